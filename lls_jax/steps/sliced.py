"""A convolution block's update in slices of the batch: time for memory.

The plain update keeps the convolution's output until its gradient is taken, and several arrays of
that size while it is. Here there is none: the batch goes through the convolution in slices, three
times. First for BatchNorm's statistics, which are those of the whole batch; then for what the next
block takes, and the pooled activation; then, with the gradient of the local loss with respect to
that, for the gradient of the weights.

A loop would be the natural form, but XLA's CPU backend runs convolutions in loops without its
threads: so the slices are written one after another, and each waits for the one before.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lls_jax.blocks import ConvBlock, running_average
from lls_jax.layers.convolution import convolve_3x3
from lls_jax.layers.normalization import (
    PooledGradients,
    Statistics,
    apply_statistics,
    can_pool,
    gradients_from_sums,
    input_gradient,
    pool_from_sums,
    window_sums,
)
from lls_jax.layers.ordering import batch_slices, slice_after, token_of
from lls_jax.models import BlockSpec
from lls_jax.rules import LocalRule
from lls_jax.steps.block import BlockOutput

Downsample = Callable[[jax.Array], jax.Array]


class Plan(NamedTuple):
    """What is computed in slices, besides its arrays.

    Attributes:
        slices: into how many the batch is cut.
        stride: of the convolution.
        dtype: of the activations.
        pool_size: windows along each spatial axis.
        downsample: from the activation to what the next block takes, an image at a time.
    """

    slices: int
    stride: int
    dtype: Any
    pool_size: int
    downsample: Downsample


def count_slices(shape: tuple[int, ...], dtype: Any, remat_above: int) -> int:
    """How many slices, so that none of an array has more than `remat_above` bytes, or one example.

    >>> count_slices((128, 32, 32, 256), jnp.float32, 2**25)
    4
    """
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    return min(shape[0], math.ceil(size / remat_above))


def put_slices(wholes: Any, parts: Any, start: int, batch: int) -> Any:
    """Arrays ``[batch, ...]`` with `parts` from `start` on; zeros are made where there are none."""
    if wholes is None:
        wholes = tuple(jnp.zeros((batch, *part.shape[1:]), part.dtype) for part in parts)
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
    return tuple(put(whole, part) for whole, part in zip(wholes, parts))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve_normalize_pool(
    plan: Plan, x: jax.Array, kernel: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """A 3x3 convolution, BatchNorm, LeakyReLU(0.01), and what is wanted of the activation.

    Differentiable once, in reverse, with respect to kernel, scale and bias, and from `pooled`
    alone; nothing flows back through the other results or to `x`.

    Args:
        plan: the slices.
        x: ``[batch, height, width, channels]``.
        kernel: float32 ``[3, 3, channels, features]``.
        scale: float32 ``[features]``.
        bias: float32 ``[features]``.

    Returns:
        ``(downsampled, pooled, mean, variance)``: what ``plan.downsample`` gives; the means over
        windows, float32 ``[batch, p, p, features]``; the batch's statistics of the convolution's
        output, float32 ``[features]``.
    """
    return run_slices(plan, x, kernel, scale, bias)[0]


def run_slices(
    plan: Plan, x: jax.Array, kernel: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple:
    """The results of :func:`convolve_normalize_pool`, and what its gradient needs: input, kernel,
    :class:`Statistics`, sums over windows, and the elements of a window."""
    batch, narrow = x.shape[0], kernel.astype(plan.dtype)
    total = jnp.zeros(kernel.shape[-1])
    square, token = total, jnp.float32(0.0)
    count = 0
    for start, size in batch_slices(batch, plan.slices):
        y = convolve_3x3(slice_after(token, x, start, size), narrow, plan.stride, compact=True)
        count += y.size // y.shape[-1]
        wide = y.astype(jnp.float32)
        total = total + jnp.sum(wide, (0, 1, 2))
        square = square + jnp.sum(jnp.square(wide), (0, 1, 2))
        token = token_of((total, square))
    mean = total / count
    variance = jnp.maximum(square / count - jnp.square(mean), 0.0)
    statistics = Statistics(mean, variance, scale, bias)
    results: Any = None
    for start, size in batch_slices(batch, plan.slices):
        y = convolve_3x3(slice_after(token, x, start, size), narrow, plan.stride, compact=True)
        own = window_sums(y, statistics, plan.pool_size)
        part = plan.downsample(apply_statistics(y, *statistics))
        results = put_slices(results, (part, *own), start, batch)
        token = token_of(tuple(map(jnp.sum, own)))
    downsampled, *sums = results
    window = count // batch // plan.pool_size**2
    pooled = pool_from_sums(sums, statistics, window)
    return (downsampled, pooled, mean, variance), (x, kernel, statistics, sums, window)


def _backward(plan: Plan, residuals: tuple, cotangents: tuple) -> tuple:
    x, kernel, statistics, sums, window = residuals
    batch, narrow = x.shape[0], kernel.astype(plan.dtype)
    gradients = gradients_from_sums(cotangents[1], sums, statistics, window)
    count = batch * window * plan.pool_size**2
    d_kernel = jnp.zeros_like(kernel)
    token = token_of(gradients)
    for start, size in batch_slices(batch, plan.slices):
        part = slice_after(token, x, start, size)
        y, pullback = jax.vjp(
            lambda k, part=part: convolve_3x3(part, k, plan.stride, compact=True), narrow
        )
        own = PooledGradients(
            jax.lax.dynamic_slice_in_dim(gradients.window, start, size),
            gradients.scale,
            gradients.bias,
        )
        (d_part,) = pullback(input_gradient(y, statistics, own, count))
        d_kernel = d_kernel + d_part.astype(jnp.float32)
        token = token_of(d_kernel)
    return jnp.zeros_like(x), d_kernel, gradients.scale, gradients.bias


convolve_normalize_pool.defvjp(run_slices, _backward)


def plan_block(
    spec: BlockSpec, rule: LocalRule, x: jax.Array, remat_above: int | None
) -> Plan | None:
    """How a block is cut, or None where it is not.

    It is where it has one convolution, whose output on this batch has more than `remat_above`
    bytes, and its rule sees the latents only.

    Args:
        spec: the block, and what follows it.
        rule: the block's own.
        x: its input; only shape and dtype count.
        remat_above: bytes; None for any number.
    """
    module = spec.module
    # Not one that is derived from it, whose function may be another.
    if remat_above is None or type(module) is not ConvBlock:
        return None
    batch, *sides, _ = x.shape
    height, width = (-(-side // module.stride) for side in sides)
    shape = (batch, height, width, module.features)
    fits = rule.sees == "latents" and can_pool(shape, spec.pool_size)
    slices = count_slices(shape, module.dtype, remat_above)
    if not fits or slices == 1:
        return None
    return Plan(slices, module.stride, module.dtype, spec.pool_size, spec.downsample)


def apply_block(plan: Plan, params: Any, batch_stats: Any, x: jax.Array) -> BlockOutput:
    """A :class:`lls_jax.blocks.ConvBlock` in training, in slices.

    Args:
        plan: from :func:`plan_block`.
        params: the block's.
        batch_stats: the block's.
        x: its input, ``[batch, height, width, channels]``.

    Returns:
        What the next block takes, but for dropout; the pooled activation, through which alone a
        gradient flows; the new statistics.
    """
    conv, norm = params["conv"], params["norm"]
    downsampled, pooled, mean, variance = convolve_normalize_pool(
        plan, x.astype(plan.dtype), conv["kernel"], norm["scale"], norm["bias"]
    )
    downsampled, mean, variance = jax.lax.stop_gradient((downsampled, mean, variance))
    new = running_average(batch_stats["norm"], mean + conv["bias"], variance)
    return BlockOutput(None, {"block": {"norm": new}}, downsampled, pooled)
