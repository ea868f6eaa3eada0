"""Similarity matching and local cross-entropy together: "predsim"."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lls_jax.layers.convolution import convolve_3x3
from lls_jax.layers.initializers import fan_in_uniform
from lls_jax.rules.base import LocalRule, check_options
from lls_jax.rules.checks import required_pool_size
from lls_jax.rules.cross_entropy import loss_of_classes, smoothed_losses
from pallas_kernels.local_loss import latent_dim, pool_latents


def similarity(x: jax.Array) -> jax.Array:
    """Cosine similarities of a batch's centred rows: ``[batch, features] -> [batch, batch]``."""
    centred = x - jnp.mean(x, axis=1, keepdims=True)
    square = jnp.sum(jnp.square(centred), axis=1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
    return jnp.matmul(normed, normed.T, precision="highest")


def _deviation(x: jax.Array) -> jax.Array:
    """Standard deviation over an image: ``[batch, height, width, channels]`` to channels."""
    # The floor keeps the gradient of a constant channel finite.
    return jnp.sqrt(jnp.maximum(jnp.var(x, axis=(1, 2)), 1e-12))


@dataclasses.dataclass(frozen=True)
class PredSim(LocalRule):
    """Similar images shall have similar activations, and the classes shall be readable from them.

    ``loss = (1 - weight) CE(W pool(a) + b, y) + weight mean((S(f(a)) - S(onehot(y)))^2)``,
    with ``S`` the matrix of cosine similarities within the batch and ``f`` a learned 3x3
    convolution followed by the deviation over the image (a learned linear map for feature vectors).

    Attributes:
        num_classes: number of classes, ``K``.
        similarity_weight: share of the similarity loss, in [0, 1].
        label_smoothing: of the cross-entropy, in [0, 1).

    References:
        Nøkland, Eidnes, "Training Neural Networks with Local Error Signals", ICML 2019,
        https://arxiv.org/abs/1901.06656.
    """

    num_classes: int
    similarity_weight: float = 0.99
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for an option that is out of its range."""
        check_options(self.num_classes, label_smoothing=self.label_smoothing)
        if not 0 <= self.similarity_weight <= 1:
            raise ValueError(
                f"`similarity_weight` is {self.similarity_weight}; it must lie in [0, 1]."
            )

    def init(
        self, key: jax.Array, activation_shape: tuple[int, ...], pool_size: int
    ) -> dict[str, Any]:
        """``f``'s kernel, and the classifier; all drawn U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

        Args are those of :meth:`Rule.init`.
        """
        width, spatial = activation_shape[-1], len(activation_shape) == 3
        shape = (3, 3, width, width) if spatial else (width, width)
        latents = latent_dim(activation_shape, pool_size)
        keys = jax.random.split(key)
        return {
            "similarity": fan_in_uniform(math.prod(shape[:-1]))(keys[0], shape),
            "kernel": fan_in_uniform(latents)(keys[1], (latents, self.num_classes)),
            "bias": jnp.zeros(self.num_classes, jnp.float32),
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
        target = jax.nn.one_hot(labels, self.num_classes, dtype=jnp.float32)
        if a.ndim == 4:
            features = _deviation(convolve_3x3(a, params["similarity"]))
        else:
            features = a @ params["similarity"]
        if a.ndim == 3:
            # Tokens, by their deviation along the sequence.
            features = jnp.sqrt(jnp.maximum(jnp.var(features, axis=1), 1e-12))
        difference = similarity(features) - similarity(target)
        logits = pool_latents(a, pool_size) @ params["kernel"] + params["bias"][None, :]
        prediction = jnp.mean(smoothed_losses(logits, labels, self.label_smoothing))
        weight = self.similarity_weight
        loss = (1.0 - weight) * prediction + weight * jnp.mean(jnp.square(difference))
        return loss_of_classes(loss, labels, self.num_classes)
