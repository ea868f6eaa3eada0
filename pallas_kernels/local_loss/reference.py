"""The local loss in plain XLA operations: what every other implementation must equal."""

import jax
import jax.numpy as jnp

from pallas_kernels.local_loss.pooling import pool_latents

# The square of the 1e-12 below which PyTorch's `normalize` stops dividing by the norm.
NORM_FLOOR_SQUARED = 1e-24


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float) -> jax.Array:
    """Softmax cross-entropy with label smoothing, ``[batch, classes] -> [batch]``, in float32."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    picked = jnp.take_along_axis(log_probabilities, labels[:, None].astype(jnp.int32), axis=1)[:, 0]
    if not label_smoothing:
        return -picked
    uniform = jnp.mean(log_probabilities, axis=1)
    return -((1.0 - label_smoothing) * picked + label_smoothing * uniform)


def local_logits(
    activation: jax.Array,
    projection: jax.Array,
    modulation: jax.Array | None,
    *,
    pool_size: int,
    normalize: bool,
) -> jax.Array:
    """Pool, normalise, project, modulate: the logits of a block, float32 ``[batch, classes]``."""
    latents = pool_latents(activation, pool_size)
    scores = jnp.matmul(latents, projection.astype(jnp.float32).T, precision="highest")
    if normalize:
        # Scaling the few scores instead of the many latents. `maximum` on the square keeps the
        # gradient of an all-zero row finite.
        square = jnp.sum(jnp.square(latents), axis=1, keepdims=True)
        scores = scores * jax.lax.rsqrt(jnp.maximum(square, NORM_FLOOR_SQUARED))
    if modulation is None:
        return scores
    if modulation.ndim == 1:
        return scores * modulation[None, :]
    return jnp.matmul(scores, modulation, precision="highest")


def local_loss(
    activation: jax.Array,
    projection: jax.Array,
    modulation: jax.Array | None,
    labels: jax.Array,
    *,
    pool_size: int,
    temperature: float,
    label_smoothing: float,
    normalize: bool,
) -> jax.Array:
    """The local loss of each example; :func:`pallas_kernels.local_loss.local_loss` says more."""
    logits = local_logits(
        activation, projection, modulation, pool_size=pool_size, normalize=normalize
    )
    return cross_entropy(logits / temperature, labels, label_smoothing)
