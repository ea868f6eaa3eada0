"""A convolutional auxiliary classifier a block: decoupled greedy learning."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lls_jax.convolution import convolve_3x3
from lls_jax.initializers import fan_in_uniform
from pallas_kernels.local_loss import latent_dim, pool_latents


@dataclasses.dataclass(frozen=True)
class DecoupledRule:
    """A small network of its own reads the classes from a block's activation.

    ``loss = CE(W pool(relu(f(a))) + b, y)``, with ``f`` a learned 3x3 convolution with bias (a
    dense layer for feature vectors) as wide as the activation.

    Attributes:
        num_classes: number of classes, ``K``.
        label_smoothing: of the cross-entropy, in [0, 1).
        name: the rule's name.

    References:
        Belilovsky, Eickenberg, Oyallon, "Decoupled Greedy Learning of CNNs", ICML 2020,
        https://arxiv.org/abs/1901.08164.
    """

    num_classes: int
    label_smoothing: float = 0.0
    name: str = "decoupled"

    def init_for(
        self, key: jax.Array, activation_shape: tuple[int, ...], *, pool_size: int
    ) -> dict[str, Any]:
        """``f`` and the classifier, drawn U(-1/sqrt(fan_in), 1/sqrt(fan_in)); biases are 0.

        Args:
            key: random key.
            activation_shape: ``(height, width, channels)`` or ``(features,)``.
            pool_size: of the classifier's latents.
        """
        width, spatial = activation_shape[-1], len(activation_shape) == 3
        shape = (3, 3, width, width) if spatial else (width, width)
        latents = latent_dim(activation_shape, pool_size)
        keys = jax.random.split(key)
        kernel = fan_in_uniform(math.prod(shape[:-1]))(keys[0], shape)
        return {
            "hidden": {"kernel": kernel, "bias": jnp.zeros(width)},
            "output": {
                "kernel": fan_in_uniform(latents)(keys[1], (latents, self.num_classes)),
                "bias": jnp.zeros(self.num_classes),
            },
        }

    def loss(
        self, params: dict[str, Any], activation: jax.Array, labels: jax.Array, *, pool_size: int
    ) -> jax.Array:
        """The local loss, a float32 scalar.

        Args:
            params: from :meth:`init_for`.
            activation: ``[batch, height, width, channels]`` or ``[batch, features]``.
            labels: integers ``[batch]``.
            pool_size: bins along each spatial axis, or along the features.
        """
        a = activation.astype(jnp.float32)
        hidden, output = params["hidden"], params["output"]
        h = convolve_3x3(a, hidden["kernel"]) if a.ndim == 4 else a @ hidden["kernel"]
        h = jax.nn.relu(h + hidden["bias"].reshape((1,) * (a.ndim - 1) + (-1,)))
        logits = pool_latents(h, pool_size) @ output["kernel"] + output["bias"][None, :]
        target = optax.smooth_labels(jax.nn.one_hot(labels, self.num_classes), self.label_smoothing)
        return jnp.mean(optax.softmax_cross_entropy(logits, target))
