"""Local classifiers, learned or fixed and random: a linear map of the latents to the classes."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lls_jax.rules.base import Rule, check_choice, check_count
from lls_jax.rules.cross_entropy import CrossEntropyRule, draw_modulation
from pallas_kernels.local_loss import adaptive_average_pool, latent_dim

_FEEDBACK_STDDEV = 0.1
_NAMES = {"none": "lls_random", "vector": "lls_m_random", "matrix": "lls_mxm_random"}


@dataclasses.dataclass(frozen=True)
class RandomLLS(CrossEntropyRule):
    """LLS with a random basis in place of the periodic one.

    A matrix ``Q`` ``[K, hidden]`` is reduced along `hidden` to the number of latents by adaptive
    average pooling; with ``a`` the pooled activation, not normalised, the logits are ``a Q^T``.
    ``lls_random`` keeps ``Q`` as it was drawn; ``lls_m_random`` has ``m[:, None] * Q`` and
    ``lls_mxm_random`` ``M Q``, with ``m``, ``M`` learned.

    Attributes:
        num_classes: number of classes, ``K``.
        temperature: divides the logits; positive, dimensionless.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1).
        implementation, interpret: see :class:`HeadRule`.
        modulation: ``"none"``, ``"vector"`` (``m`` ``[K]``) or ``"matrix"`` (``M`` ``[K, K]``).
        hidden_dim: columns of ``Q``; one number for all blocks, one for each, or None for as many
            as there are latents. :mod:`lls_jax.rules.published` has those of the published runs.

    References:
        Apolinario, Roy, Roy, https://arxiv.org/abs/2405.15868, sections 3.2 and 4.3.
    """

    modulation: Literal["none", "vector", "matrix"] = "none"
    hidden_dim: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for an option that is out of its range."""
        super().__post_init__()
        check_choice("modulation", self.modulation, _NAMES)
        widths = self.hidden_dim if isinstance(self.hidden_dim, tuple) else (self.hidden_dim,)
        if any(width is not None and width < 1 for width in widths):
            raise ValueError(f"`hidden_dim` is {self.hidden_dim}; it must be at least 1.")

    @property
    def name(self) -> str:
        """``lls_random``, ``lls_m_random`` or ``lls_mxm_random``."""
        return _NAMES[self.modulation]

    @property
    def fixed(self) -> frozenset[str]:
        """``Q`` stays as it was drawn."""
        return frozenset({"feedback"})

    @property
    def normalizes(self) -> bool:
        """The latents keep their length."""
        return False

    def at_block(self, index: int, num_blocks: int | None = None) -> Rule:
        """The rule with the width of one block; see :meth:`Rule.at_block`."""
        if not isinstance(self.hidden_dim, tuple):
            return self
        check_count("widths of the feedback, one a block,", len(self.hidden_dim), num_blocks)
        return dataclasses.replace(self, hidden_dim=self.hidden_dim[index])

    def init(
        self, key: jax.Array, activation_shape: tuple[int, ...], pool_size: int
    ) -> dict[str, Any]:
        """``{"feedback": Q}``, N(0, 0.1^2), and ``"modulation"``, N(0, 0.01^2), where there is one.

        Args are those of :meth:`Rule.init`.

        Raises:
            ValueError: there is one width a block, and this is not the rule of one block.
        """
        if isinstance(self.hidden_dim, tuple):
            raise ValueError(
                f"`hidden_dim` is {self.hidden_dim}, one a block; take the rule of one block "
                "first, by `rule.at_block(index)`."
            )
        feedback_key, modulation_key = jax.random.split(key)
        width = self.hidden_dim or latent_dim(activation_shape, pool_size)
        params = {
            "feedback": _FEEDBACK_STDDEV
            * jax.random.normal(feedback_key, (self.num_classes, width), jnp.float32)
        }
        shapes = {"vector": (self.num_classes,), "matrix": (self.num_classes, self.num_classes)}
        if self.modulation != "none":
            params["modulation"] = draw_modulation(modulation_key, shapes[self.modulation])
        return params

    def projection(self, params: dict[str, Any], latent_dim: int) -> jax.Array:
        """``Q`` reduced to the latents, ``[classes, latents]``."""
        feedback = params["feedback"]
        if self.fixed:
            feedback = jax.lax.stop_gradient(feedback)
        return adaptive_average_pool(feedback, latent_dim)

    def modulation_of(self, params: dict[str, Any]) -> jax.Array | None:
        """``m``, or ``M`` turned about: ``a (M Q)^T = (a Q^T) M^T``, a smaller product."""
        modulation = params.get("modulation")
        return modulation if modulation is None or modulation.ndim == 1 else modulation.T


@dataclasses.dataclass(frozen=True)
class LocalClassifier(RandomLLS):
    """A learned linear classifier a block: :class:`RandomLLS` whose ``Q`` is learned.

    References:
        Mostafa, Ramesh, Cauwenberghs, "Deep supervised learning using local errors",
        https://arxiv.org/abs/1711.06756.
    """

    @property
    def name(self) -> str:
        """``local_classifier``."""
        return "local_classifier"

    @property
    def fixed(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()
