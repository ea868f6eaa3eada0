"""Direct feedback alignment and direct random target projection: baselines that are not local."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lls_jax.layers.initializers import fan_in_uniform
from lls_jax.rules.base import Rule, check_choice, check_options


@dataclasses.dataclass(frozen=True)
class DirectFeedback(Rule):
    """A fixed random projection of the output's error, or of the target, onto every activation.

    In place of the gradient of a loss, a block's activation gets ``e B``, with ``B`` fixed and
    random, and ``e`` the error at the output ``softmax(logits) - onehot`` (DFA), its sign
    (sign-DFA) or the target ``onehot`` (DRTP).

    Attributes:
        num_classes: number of classes, ``K``.
        signal: ``"error"`` or ``"target"``.
        sign: whether only the error's sign is fed back.

    References:
        Nøkland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks",
        https://arxiv.org/abs/1609.01596. Frenkel, Lefebvre, Bol, "Learning Without Feedback",
        https://arxiv.org/abs/1909.01311 (DRTP; and sign-DFA, section 2).
    """

    num_classes: int
    signal: Literal["error", "target"]
    sign: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for an option that is out of its range."""
        check_options(self.num_classes)
        check_choice("signal", self.signal, ("error", "target"))

    @property
    def name(self) -> str:
        """``dfa`` or ``drtp``."""
        return "dfa" if self.signal == "error" else "drtp"

    @property
    def fixed(self) -> frozenset[str]:
        """``B`` stays as it was drawn."""
        return frozenset({"feedback"})

    def init(
        self, key: jax.Array, activation_shape: tuple[int, ...], pool_size: int
    ) -> dict[str, Any]:
        """``B``, ``[K, *activation_shape]``, drawn U(-1/sqrt(n), 1/sqrt(n)) for ``n`` activations.

        Args are those of :meth:`Rule.init`.
        """
        del pool_size
        draw = fan_in_uniform(math.prod(activation_shape))
        return {"feedback": draw(key, (self.num_classes, *activation_shape))}

    def output_signal(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """``e``, for the mean over the batch: ``[batch, classes]``.

        Args:
            logits: ``[batch, classes]``.
            labels: integers ``[batch]``.
        """
        target = jax.nn.one_hot(labels, self.num_classes, dtype=jnp.float32)
        signal = target
        if self.signal == "error":
            signal = jax.nn.softmax(logits.astype(jnp.float32)) - target
        return (jnp.sign(signal) if self.sign else signal) / labels.shape[0]
