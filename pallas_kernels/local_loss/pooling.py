"""Adaptive average pooling, as PyTorch defines it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def bins_of(size: int, bins: int) -> list[tuple[int, int]]:
    """Where each bin of 1-D adaptive pooling starts, and where it ends.

    >>> bins_of(7, 2)
    [(0, 4), (3, 7)]
    """
    return [(i * size // bins, -(-(i + 1) * size // bins)) for i in range(bins)]


def bin_sizes(shape: tuple[int, ...], pool_size: int) -> np.ndarray:
    """Elements of each window of ``[batch, height, width, channels]``: float32 ``[p, p]``."""
    rows, columns = (
        [stop - start for start, stop in bins_of(size, pool_size)] for size in shape[1:3]
    )
    return np.outer(rows, columns).astype(np.float32)


def sum_bins(x: jax.Array, pool_size: int, axes: tuple[int, ...] = (1, 2)) -> jax.Array:
    """Sums over the windows of adaptive pooling, which may overlap or repeat.

    Args:
        x: ``[batch, height, width, channels]``.
        pool_size: ``p``, windows along each spatial axis.
        axes: those that are left.

    Returns:
        float32 ``[batch, p, p, channels]``.
    """
    for axis in axes:
        parts = (
            jnp.sum(jax.lax.slice_in_dim(x, *ends, axis=axis), axis, dtype=jnp.float32)
            for ends in bins_of(x.shape[axis], pool_size)
        )
        x = jnp.stack(list(parts), axis)
    return x


@functools.lru_cache(maxsize=256)
def pooling_matrix(size: int, bins: int) -> np.ndarray:
    """The averaging weights of 1-D adaptive pooling.

    Bin ``i`` averages the elements from ``floor(i * size / bins)`` up to, and without,
    ``ceil((i + 1) * size / bins)``: bins overlap where `bins` does not divide `size`,
    and repeat where it is larger.

    Args:
        size: number of inputs, at least 1.
        bins: number of outputs, at least 1.

    Returns:
        float32 ``[bins, size]``; each row sums to one.

    >>> pooling_matrix(3, 2).tolist()
    [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
    """
    matrix = np.zeros((bins, size), np.float32)
    for i, (start, stop) in enumerate(bins_of(size, bins)):
        matrix[i, start:stop] = 1.0 / (stop - start)
    matrix.setflags(write=False)
    return matrix


def _pool_axis(x: jax.Array, axis: int, bins: int) -> jax.Array:
    size = x.shape[axis]
    if size == bins:
        return x
    if size % bins == 0:
        shape = (*x.shape[:axis], bins, size // bins, *x.shape[axis + 1 :])
        return jnp.mean(x.reshape(shape), axis=axis + 1)
    if bins % size == 0:
        return jnp.repeat(x, bins // size, axis=axis)
    pooled = jnp.tensordot(
        x, jnp.asarray(pooling_matrix(size, bins), x.dtype), (axis, 1), precision="highest"
    )
    return jnp.moveaxis(pooled, -1, axis)


def adaptive_average_pool(x: jax.Array, pool_size: int) -> jax.Array:
    """Average a batch of images, sequences or feature vectors to a fixed size.

    Args:
        x: ``[batch, height, width, channels]``, ``[batch, length, channels]`` or ``[batch,
            features]``.
        pool_size: bins along height and along width, along the length, or along the features.

    Returns:
        ``[batch, pool_size, pool_size, channels]``, ``[batch, pool_size, channels]`` or ``[batch,
        pool_size]``, in the dtype of `x`.

    Raises:
        ValueError: `x` has another number of axes, or `pool_size` is below 1.

    >>> adaptive_average_pool(jnp.arange(6.0)[None], 3)
    Array([[0.5, 2.5, 4.5]], dtype=float32)
    """
    if pool_size < 1:
        raise ValueError(f"`pool_size` is {pool_size}; it must be at least 1.")
    if x.ndim == 4 and x.shape[1] % pool_size == 0 and x.shape[2] % pool_size == 0:
        # One reduction over both window axes: one pass over the activation.
        batch, height, width, channels = x.shape
        windows = x.reshape(
            batch, pool_size, height // pool_size, pool_size, width // pool_size, channels
        )
        return jnp.mean(windows, axis=(2, 4))
    if x.ndim == 4:
        # Sums alone are in float32, never a whole activation.
        sizes = bin_sizes(x.shape, pool_size)[None, :, :, None]
        return (sum_bins(x, pool_size) / sizes).astype(x.dtype)
    if x.ndim in (2, 3):
        return _pool_axis(x, 1, pool_size)
    raise ValueError(
        f"`x` has shape {x.shape}; expected [batch, height, width, channels], [batch, length, "
        "channels] or [batch, features]."
    )


def latent_dim(activation_shape: tuple[int, ...], pool_size: int) -> int:
    """Number of latents of an example.

    Args:
        activation_shape: of one example: ``(height, width, channels)``, ``(length, channels)`` or
            ``(features,)``.
        pool_size: ``p``; bins along each spatial axis, or along the features.

    Returns:
        ``channels * p * p``, ``channels * p`` or ``p``.

    >>> latent_dim((8, 8, 3), 2), latent_dim((8, 3), 2), latent_dim((8,), 2)
    (12, 6, 2)
    """
    *sides, channels = activation_shape
    return channels * pool_size ** len(sides) if sides else pool_size


def pool_latents(activation: jax.Array, pool_size: int) -> jax.Array:
    """Pool an activation and flatten it channel-major: latent ``c * p * p + i * p + j``.

    Args:
        activation: ``[batch, height, width, channels]``, ``[batch, length, channels]`` or
            ``[batch, features]``, any float dtype.
        pool_size: ``p``; bins along each spatial axis, or along the features.

    Returns:
        float32 ``[batch, latents]``, as many as :func:`latent_dim` says.
    """
    pooled = adaptive_average_pool(activation.astype(jnp.float32), pool_size)
    if pooled.ndim > 2:
        pooled = jnp.moveaxis(pooled, -1, 1)
    return pooled.reshape(pooled.shape[0], -1)
