"""From a kernel that makes losses and unit gradients to a differentiable function."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.local_loss.pooling import adaptive_average_pool
from pallas_kernels.local_loss.reference import NORM_FLOOR_SQUARED


class LossOptions(NamedTuple):
    """What a kernel is compiled with, besides shapes.

    Attributes:
        pool_size: bins along each spatial axis, or along the features.
        temperature: divides the logits.
        label_smoothing: share of the target spread evenly over the classes.
        normalize: whether each example's latents are scaled to unit length.
    """

    pool_size: int
    temperature: float
    label_smoothing: float
    normalize: bool


class KernelOutputs(NamedTuple):
    """What a kernel makes, all float32: losses, and gradients for a cotangent of 1.

    Attributes:
        loss: ``[batch]``.
        d_latents: ``[batch, bins, latents a bin]``.
        scores: after normalisation, ``[batch, rows]``.
        d_logits: ``[batch, classes]``.
        d_scores: ``[batch, rows]``.
        latents: before normalisation, ``[batch, bins, latents a bin]``; None unless asked for.
    """

    loss: jax.Array
    d_latents: jax.Array
    scores: jax.Array
    d_logits: jax.Array
    d_scores: jax.Array
    latents: jax.Array | None


Launch = Callable[..., KernelOutputs]


def output_shapes(batch: int, projection: tuple[int, ...], classes: int) -> list[Any]:
    """The arrays that a kernel writes, in the order of :class:`KernelOutputs`, without the latents.

    Args:
        batch: examples.
        projection: shape of the projection by bin, ``[bins, rows, latents a bin]``.
        classes: number of logits.
    """
    bins, rows, latents_a_bin = projection
    shapes = [(), (bins, latents_a_bin), (rows,), (classes,), (rows,)]
    return [jax.ShapeDtypeStruct((batch, *shape), jnp.float32) for shape in shapes]


def by_bin(projection: jax.Array, spatial: bool, pool_size: int) -> jax.Array:
    """A projection ``[rows, latents]``, channel-major, as ``[bins, rows, latents a bin]``."""
    rows = projection.shape[0]
    if not spatial:
        return projection[None]
    return jnp.moveaxis(projection.reshape(rows, -1, pool_size**2), 2, 0)


def spread(d_latents: jax.Array, activation: jax.ShapeDtypeStruct, pool_size: int) -> jax.Array:
    """The gradient of pooling: ``[batch, bins, latents a bin]`` to the activation's shape."""
    batch = d_latents.shape[0]
    if len(activation.shape) == 4:
        pooled = d_latents.reshape(batch, pool_size, pool_size, -1)
    else:
        pooled = d_latents[:, 0]
    pool = functools.partial(adaptive_average_pool, pool_size=pool_size)
    wide = jax.ShapeDtypeStruct(activation.shape, jnp.float32)
    (gradient,) = jax.linear_transpose(pool, wide)(pooled)
    return gradient.astype(activation.dtype)


@functools.lru_cache(maxsize=64)
def differentiable(launch: Launch, statics: LossOptions) -> Callable[..., jax.Array]:
    """The per-example loss with its gradient, from a kernel.

    Args:
        launch: ``launch(statics, activation, projection by bin, modulation, labels,
            save_latents=...)``, hashable.
        statics: what the kernel is compiled with.

    Returns:
        ``loss(activation, projection, modulation, labels) -> [batch]``, differentiable once, in
        reverse, with respect to the first three.
    """

    def run(
        activation: jax.Array,
        projection: jax.Array,
        modulation: jax.Array | None,
        labels: jax.Array,
        save_latents: bool,
    ) -> KernelOutputs:
        bins = by_bin(projection, activation.ndim == 4, statics.pool_size)
        labels = labels.astype(jnp.int32)
        return launch(statics, activation, bins, modulation, labels, save_latents=save_latents)

    @jax.custom_vjp
    def loss(
        activation: jax.Array,
        projection: jax.Array,
        modulation: jax.Array | None,
        labels: jax.Array,
    ) -> jax.Array:
        return run(activation, projection, modulation, labels, False).loss

    def forward(activation: Any, projection: Any, modulation: Any, labels: Any) -> Any:
        # A fixed projection is not perturbed, and then the latents need not be kept.
        values: list[Any] = [
            None if x is None else x.value for x in (activation, projection, modulation)
        ]
        fused = run(values[0], values[1], values[2], labels.value, projection.perturbed)
        return fused.loss, (fused, [None if x is None else _empty_like(x) for x in values])

    def backward(residuals: Any, cotangent: Any) -> Any:
        fused, (activation, projection, modulation) = residuals
        if isinstance(cotangent, SymbolicZero):
            cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)
        d_logits = cotangent[:, None] * fused.d_logits
        d_activation = spread(
            cotangent[:, None, None] * fused.d_latents,
            jax.ShapeDtypeStruct(activation.shape[1:], activation.dtype),
            statics.pool_size,
        )
        d_modulation = None
        if modulation is not None:
            # Sums over the batch are left to XLA, whose order does not change between runs.
            if modulation.ndim == 2:
                d_modulation = jnp.sum(fused.scores * d_logits, axis=0)
            else:
                d_modulation = jnp.matmul(fused.scores.T, d_logits, precision="highest")
            d_modulation = d_modulation.astype(modulation.dtype)
        d_projection = None
        if fused.latents is not None:
            latents = fused.latents
            if activation.ndim == 5:
                latents = jnp.moveaxis(latents, 1, 2)
            latents = latents.reshape(latents.shape[0], -1)
            if statics.normalize:
                square = jnp.sum(jnp.square(latents), axis=1, keepdims=True)
                latents = latents * jax.lax.rsqrt(jnp.maximum(square, NORM_FLOOR_SQUARED))
            d_scores = cotangent[:, None] * fused.d_scores
            d_projection = jnp.matmul(d_scores.T, latents, precision="highest")
            d_projection = d_projection.astype(projection.dtype)
        return d_activation, d_projection, d_modulation, None

    loss.defvjp(forward, backward, symbolic_zeros=True)
    return loss


def _empty_like(x: jax.Array) -> jax.Array:
    """No data, but `x`'s dtype and, after an axis of length 0, its shape."""
    return jnp.zeros((0, *x.shape), x.dtype)
