"""A convolution block in slices of the batch, for gradients that come from above and go below.

Either as in :mod:`lls_jax.steps.sliced`, where the convolution's output is never kept: with a
gradient from above the batch goes through the convolution twice more for each gradient, once for
the gradients of BatchNorm's statistics, scale and bias, which are sums over the whole batch, and
once for those of the weights or the input; from the pooled activation alone, once more. Or the
convolution's output is kept, and only what follows it, and its gradients, are in slices: no
convolution is computed twice, and of all arrays of that size it is the only one.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from lls_jax.blocks import running_average
from lls_jax.layers.convolution import convolve_3x3
from lls_jax.layers.normalization import (
    PooledGradients,
    Statistics,
    apply_statistics,
    gradients_from_sums,
    input_gradient,
    pool_from_sums,
    window_sums,
)
from lls_jax.layers.ordering import batch_slices, slice_after, token_of
from lls_jax.models import BlockSpec
from lls_jax.rules import LocalRule
from lls_jax.steps.sliced import Plan, plan_block, put_slices, run_slices

# Each slice's gradients are operations of their own: more take long to compile, and save little.
_MOST_SLICES = 8


def plan_kept_block(
    spec: BlockSpec, rule: LocalRule, x: jax.Array, above: int | None
) -> Plan | None:
    """How a block is cut whose convolution's output is kept, or None where it is not.

    Args are those of :func:`lls_jax.steps.sliced.plan_block`.
    """
    plan = plan_block(spec, rule, x, above)
    return None if plan is None else plan._replace(slices=min(plan.slices, _MOST_SLICES))


def run_block(
    plan: Plan, params: Any, batch_stats: Any, x: jax.Array, *, keep_output: bool
) -> tuple[tuple[jax.Array, jax.Array], Any, Callable[..., Any]]:
    """A :class:`lls_jax.blocks.ConvBlock` in training, in slices.

    Args:
        plan: from :func:`lls_jax.steps.sliced.plan_block` or :func:`plan_kept_block`.
        params: the block's.
        batch_stats: the block's.
        x: its input, ``[batch, height, width, channels]``.
        keep_output: whether the convolution's output is kept.

    Returns:
        ``((downsampled, pooled), batch_stats, pull)``. ``pull(d_downsampled, d_pooled, params=...,
        input=...)`` gives the gradients with respect to `params` and `x`, those that are asked for;
        a cotangent may be None, for zeros.
    """
    conv, norm = params["conv"], params["norm"]
    run = _run_kept if keep_output else _run_again
    outputs, residuals = run(
        plan, x.astype(plan.dtype), conv["kernel"], norm["scale"], norm["bias"]
    )
    downsampled, pooled, mean, variance = outputs
    new = running_average(batch_stats["norm"], mean + conv["bias"], variance)
    *arrays, window = residuals
    return (
        (downsampled, pooled),
        {"norm": new},
        Partial(functools.partial(_pull, plan, window), *arrays),
    )


def _run_again(plan: Plan, *arrays: jax.Array) -> tuple:
    outputs, (x, kernel, *others) = run_slices(plan, *arrays)
    return outputs, (x, kernel, None, *others)


def _run_kept(
    plan: Plan, x: jax.Array, kernel: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple:
    """As :func:`lls_jax.steps.sliced.run_slices`, with the convolution's output kept too."""
    batch = x.shape[0]
    y = convolve_3x3(x, kernel.astype(plan.dtype), plan.stride)
    count = y.size // y.shape[-1]
    wide = y.astype(jnp.float32)
    mean = jnp.mean(wide, (0, 1, 2))
    variance = jnp.maximum(jnp.mean(jnp.square(wide), (0, 1, 2)) - jnp.square(mean), 0.0)
    statistics = Statistics(mean, variance, scale, bias)
    results: Any = None
    token = token_of(statistics)
    for start, size in batch_slices(batch, plan.slices):
        part = slice_after(token, y, start, size)
        own = window_sums(part, statistics, plan.pool_size)
        passed = plan.downsample(apply_statistics(part, *statistics))
        results = put_slices(results, (passed, *own), start, batch)
        token = token_of((passed, own))
    downsampled, *sums = results
    window = count // batch // plan.pool_size**2
    pooled = pool_from_sums(sums, statistics, window)
    return (downsampled, pooled, mean, variance), (x, kernel, y, statistics, sums, window)


def _window_means(activation: jax.Array, pool_size: int) -> jax.Array:
    batch, height, width, channels = activation.shape
    rows, columns = height // pool_size, width // pool_size
    shape = (batch, pool_size, rows, pool_size, columns, channels)
    return jnp.mean(activation.astype(jnp.float32).reshape(shape), (2, 4))


def _pull(
    plan: Plan,
    window: int,
    x: jax.Array,
    kernel: jax.Array,
    kept: jax.Array | None,
    statistics: Statistics,
    sums: Any,
    *cotangents: Any,
    **wanted: bool,
) -> tuple[Any, Any]:
    batch, count = x.shape[0], x.shape[0] * window * plan.pool_size**2
    narrow = kernel.astype(plan.dtype)
    slices = batch_slices(batch, plan.slices)
    d_downsampled, d_pooled = cotangents

    def convolve(part: jax.Array, narrow: jax.Array) -> jax.Array:
        return convolve_3x3(part, narrow, plan.stride, compact=kept is None)

    def own_cotangents(start: int, size: int) -> Any:
        return tuple(
            None if one is None else jax.lax.dynamic_slice_in_dim(one, start, size)
            for one in cotangents
        )

    def after_convolution(y: jax.Array, statistics: Statistics) -> Any:
        activation = apply_statistics(y, *statistics)
        downsampled = None if d_downsampled is None else plan.downsample(activation)
        pooled = None if d_pooled is None else _window_means(activation, plan.pool_size)
        return downsampled, pooled

    # What comes from above is made in slices too, of which this waits for the last.
    token = token_of((cotangents, tuple(one if one is None else one[-1:] for one in cotangents)))
    if d_downsampled is None:
        pooled = gradients_from_sums(cotangents[1], sums, statistics, window)
        d_statistics = Statistics(jnp.zeros(()), jnp.zeros(()), pooled.scale, pooled.bias)
    else:
        d_statistics = jax.tree.map(jnp.zeros_like, statistics)
        for start, size in slices:
            if kept is None:
                y = convolve(slice_after(token, x, start, size), narrow)
            else:
                y = slice_after(token, kept, start, size)
            _, pullback = jax.vjp(functools.partial(after_convolution, y), statistics)
            (own,) = pullback(own_cotangents(start, size))
            d_statistics = jax.tree.map(jnp.add, d_statistics, own)
            token = token_of(d_statistics)

    def d_convolution(y: jax.Array, start: int, size: int) -> jax.Array:
        own = own_cotangents(start, size)
        if d_downsampled is None:
            gradients = PooledGradients(own[1] / window, d_statistics.scale, d_statistics.bias)
            return input_gradient(y, statistics, gradients, count)
        _, pullback = jax.vjp(lambda y: after_convolution(y, statistics), y)
        (direct,) = pullback(own)
        # Through the batch's mean, and through its variance.
        mean, d_mean, d_variance = (
            values[None, None, None]
            for values in (statistics.mean, d_statistics.mean, d_statistics.variance)
        )
        through = (d_mean + 2 * (y.astype(jnp.float32) - mean) * d_variance) / count
        return (direct.astype(jnp.float32) + through).astype(y.dtype)

    d_kernel, d_input = jnp.zeros_like(kernel), jnp.zeros_like(x)
    token = token + token_of(d_statistics)
    for start, size in slices:
        part = slice_after(token, x, start, size)
        if wanted["input"]:
            y, pullback = jax.vjp(convolve, part, narrow)
        else:
            y, pullback = jax.vjp(functools.partial(convolve, part), narrow)
        if kept is not None:
            y = slice_after(token, kept, start, size)
        gradients = pullback(d_convolution(y, start, size))
        if wanted["params"]:
            d_kernel = d_kernel + gradients[-1].astype(jnp.float32)
        if wanted["input"]:
            d_input = jax.lax.dynamic_update_slice_in_dim(d_input, gradients[0], start, axis=0)
        token = token_of((d_kernel if wanted["params"] else None, gradients[0]))
    norm = {"scale": d_statistics.scale, "bias": d_statistics.bias}
    conv = {"kernel": d_kernel, "bias": jnp.zeros_like(statistics.mean)}
    d_params = {"conv": conv, "norm": norm} if wanted["params"] else None
    return d_params, (d_input if wanted["input"] else None)
