"""The public function of the local loss: checks its arguments and picks an implementation."""

import types
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.local_loss import reference

IMPLEMENTATIONS: Mapping[str, Callable[..., jax.Array]] = types.MappingProxyType(
    {"xla": reference.local_loss}
)


def _latent_dim(activation: jax.Array, pool_size: int) -> int:
    return pool_size if activation.ndim == 2 else activation.shape[-1] * pool_size**2


def _check(
    activation: jax.Array,
    projection: jax.Array,
    modulation: jax.Array | None,
    labels: jax.Array,
    pool_size: int,
    temperature: float,
    label_smoothing: float,
) -> None:
    if activation.ndim not in (2, 4):
        raise ValueError(
            f"`activation` has shape {activation.shape}; expected [batch, height, width, channels] "
            "or [batch, features]."
        )
    if not jnp.issubdtype(activation.dtype, jnp.floating):
        raise ValueError(f"`activation` has dtype {activation.dtype}; expected a float dtype.")
    if pool_size < 1:
        raise ValueError(f"`pool_size` is {pool_size}; it must be at least 1.")
    if not temperature > 0:
        raise ValueError(f"`temperature` is {temperature}; it must be positive.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"`label_smoothing` is {label_smoothing}; it must lie in [0, 1).")
    latents = _latent_dim(activation, pool_size)
    if projection.ndim != 2 or projection.shape[1] != latents:
        raise ValueError(
            f"`projection` has shape {projection.shape}; expected [rows, {latents}] for an "
            f"activation of shape {activation.shape} pooled to {pool_size}."
        )
    if labels.shape != activation.shape[:1]:
        raise ValueError(
            f"`labels` has shape {labels.shape}; expected {activation.shape[:1]}, one an example."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"`labels` has dtype {labels.dtype}; expected an integer dtype.")
    rows = projection.shape[0]
    if modulation is not None and (modulation.ndim not in (1, 2) or modulation.shape[0] != rows):
        raise ValueError(
            f"`modulation` has shape {modulation.shape}; expected [{rows}] or [{rows}, classes], "
            f"for a projection of {rows} rows, or None."
        )


def local_loss(
    activation: jax.Array,
    projection: jax.Array,
    modulation: jax.Array | None,
    labels: jax.Array,
    *,
    pool_size: int,
    temperature: float = 0.5,
    label_smoothing: float = 0.0,
    normalize: bool = True,
    implementation: str | None = None,
) -> jax.Array:
    """A block's local loss: pool, normalise, project, modulate, softmax cross-entropy.

    With ``a`` the activation pooled to ``p x p`` and flattened channel-major::

        z      = a / max(||a||, 1e-12)          (z = a where not `normalize`)
        s      = z W^T
        logits = s,  s * m  or  s M             (no modulation, a vector, a matrix)
        loss   = cross_entropy(logits / temperature, labels, label_smoothing)

    Everything after the activation is computed in float32. Differentiable once, in reverse, with
    respect to `activation`, `projection` and `modulation`.

    Args:
        activation: ``[batch, height, width, channels]`` or ``[batch, features]``, any float dtype.
        projection: ``W``, ``[rows, latents]``; ``latents`` is ``channels * p * p``, or ``p``.
        modulation: None, ``m`` ``[rows]`` or ``M`` ``[rows, classes]``.
        labels: integers ``[batch]``; an index of a class each.
        pool_size: ``p``; bins along each spatial axis, or along the features.
        temperature: divides the logits; positive, dimensionless.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1).
        normalize: whether each example's latents are scaled to unit length.
        implementation: ``"xla"``, or None for the best one here.

    Returns:
        float32 ``[batch]``: the loss of each example.

    Raises:
        ValueError: an argument's shape, dtype or value is wrong, or no such implementation exists.

    References:
        Apolinario, Roy, Roy, "LLS: Local Learning Rule for Deep Neural Networks Inspired by Neural
        Activity Synchronization", WACV 2025, https://arxiv.org/abs/2405.15868, section 3.

    >>> local_loss(jnp.ones((1, 4)), jnp.eye(2), None, jnp.array([0]), pool_size=2)
    Array([0.6931472], dtype=float32)
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"`implementation` is {implementation!r}; expected one of "
            f"{', '.join(map(repr, IMPLEMENTATIONS))}, or None to choose."
        )
    _check(activation, projection, modulation, labels, pool_size, temperature, label_smoothing)
    return IMPLEMENTATIONS[implementation or "xla"](
        activation,
        projection,
        modulation,
        labels,
        pool_size=pool_size,
        temperature=temperature,
        label_smoothing=label_smoothing,
        normalize=normalize,
    )
