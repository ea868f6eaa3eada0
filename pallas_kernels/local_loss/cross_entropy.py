"""The head of LLS and its variants: normalise, modulate, softmax cross-entropy."""

import jax
import jax.numpy as jnp

# The square of the 1e-12 below which PyTorch's `normalize` stops dividing by the norm.
_NORM_FLOOR_SQUARED = 1e-24


def cross_entropy(
    scores: jax.Array,
    square: jax.Array,
    modulation: jax.Array | None,
    label: jax.Array,
    *,
    temperature: float = 0.5,
    label_smoothing: float = 0.0,
    normalize: bool = True,
) -> jax.Array:
    """The loss of one example, a scalar.

    With ``s`` the scores of an example, of its latents divided by their norm where `normalize`::

        logits = s,  s * m  or  s M             (no modulation, a vector, a matrix)
        loss   = softmax_cross_entropy(logits / temperature, label, label_smoothing)

    Args:
        scores: float32 ``[rows]``.
        square: of the latents' norm, a float32 scalar.
        modulation: None, ``m`` ``[rows]`` or ``M`` ``[rows, classes]``.
        label: an integer scalar, a class; of one that is none the loss is NaN, since inside a
            compiled function nobody can refuse it (its gradient may be 0 there: XLA makes a
            selection of the product with the target).
        temperature: divides the logits; positive, dimensionless.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1).
        normalize: whether the latents are scaled to unit length.

    References:
        Apolinario, Roy, Roy, https://arxiv.org/abs/2405.15868, section 3.
    """
    if normalize:
        scores = scores * jax.lax.rsqrt(jnp.maximum(square, _NORM_FLOOR_SQUARED))
    if modulation is None:
        logits = scores
    elif modulation.ndim == 1:
        logits = scores * modulation
    else:
        logits = jnp.matmul(scores, modulation, precision="highest")
    classes = logits.shape[-1]
    target = (1.0 - label_smoothing) * jax.nn.one_hot(label, classes, dtype=jnp.float32)
    target = target + label_smoothing / classes
    loss = -jnp.sum(target * jax.nn.log_softmax(logits / temperature))
    is_class = (label >= 0) & (label < classes)
    return loss * jnp.where(is_class, jnp.float32(1.0), jnp.float32(jnp.nan))
