"""A convolutional auxiliary classifier a block: decoupled greedy learning."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lls_jax.layers.convolution import convolve_3x3
from lls_jax.layers.initializers import fan_in_uniform
from lls_jax.rules.base import LocalRule, check_options
from lls_jax.rules.checks import required_pool_size
from lls_jax.rules.cross_entropy import smoothed_cross_entropy
from pallas_kernels.local_loss import latent_dim, pool_latents


@dataclasses.dataclass(frozen=True)
class Decoupled(LocalRule):
    """A small network of its own reads the classes from a block's activation.

    ``loss = CE(W pool(relu(f(a))) + b, y)``, with ``f`` a learned 3x3 convolution with bias (a
    dense layer for feature vectors) as wide as the activation.

    Attributes:
        num_classes: number of classes, ``K``.
        label_smoothing: of the cross-entropy, in [0, 1).

    References:
        Belilovsky, Eickenberg, Oyallon, "Decoupled Greedy Learning of CNNs", ICML 2020,
        https://arxiv.org/abs/1901.08164.
    """

    num_classes: int
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for an option that is out of its range."""
        check_options(self.num_classes, label_smoothing=self.label_smoothing)

    def init(
        self, key: jax.Array, activation_shape: tuple[int, ...], pool_size: int
    ) -> dict[str, Any]:
        """``f`` and the classifier, drawn U(-1/sqrt(fan_in), 1/sqrt(fan_in)); biases are 0.

        Args are those of :meth:`Rule.init`.
        """
        width, spatial = activation_shape[-1], len(activation_shape) == 3
        shape = (3, 3, width, width) if spatial else (width, width)
        latents = latent_dim(activation_shape, pool_size)
        keys = jax.random.split(key)
        kernel = fan_in_uniform(math.prod(shape[:-1]))(keys[0], shape)
        return {
            "hidden": {"kernel": kernel, "bias": jnp.zeros(width, jnp.float32)},
            "output": {
                "kernel": fan_in_uniform(latents)(keys[1], (latents, self.num_classes)),
                "bias": jnp.zeros(self.num_classes, jnp.float32),
            },
        }

    def loss(
        self,
        params: dict[str, Any],
        seen: jax.Array,
        labels: jax.Array,
        *,
        pool_size: int | None,
    ) -> jax.Array:
        """The local loss, a float32 scalar; see :meth:`LocalRule.loss`."""
        pool_size = required_pool_size(self.name, pool_size)
        a = seen.astype(jnp.float32)
        hidden, output = params["hidden"], params["output"]
        h = convolve_3x3(a, hidden["kernel"]) if a.ndim == 4 else a @ hidden["kernel"]
        h = jax.nn.relu(h + hidden["bias"].reshape((1,) * (a.ndim - 1) + (-1,)))
        logits = pool_latents(h, pool_size) @ output["kernel"] + output["bias"][None, :]
        return smoothed_cross_entropy(logits, labels, self.label_smoothing)
