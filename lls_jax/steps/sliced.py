"""A convolution block whose gradients are taken in slices of the batch: less memory.

Plainly, a gradient of the convolution's output is an array as large as that output, and so are
the activation and what its gradient is made of. Here the output itself is the only such array (and,
where that is asked for, the gradient toward the input): all gradients toward the output are of one
slice at a time, in a near cache. What the next block takes, and the means over windows, are made of
the output in one pass each, or in slices too where the former takes more. No convolution is
computed twice.

Or the output is not kept either: time for memory, but for an image's few channels. Then the batch
goes through the convolution once for BatchNorm's statistics, which are those of the whole batch;
once for what the next block takes, and the pooled activation; and once for each way back, to the
weights, the input, or both. With one from above there are the gradients of BatchNorm's scale and
bias before, which are sums over the whole batch: for these the maxima between blocks are kept, a
quarter of the output; where there are none the batch goes through it once more.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from lls_jax.blocks import running_average
from lls_jax.layers.convolution import convolve_3x3
from lls_jax.layers.normalization import (
    Statistics,
    affine,
    along,
    apply_statistics,
    gradient_sums,
    gradients_from_sums,
    input_gradient,
)
from lls_jax.layers.ordering import token_of, wait_for, written_out
from lls_jax.layers.pooled_normalization import (
    pool_from_sums,
    spread,
    window_gradient_sums,
    window_sums,
)
from lls_jax.layers.pooling import max_pool, share_maxima, spread_maxima
from lls_jax.layers.slices import map_slices, sum_slices, walk_slices
from lls_jax.platforms import by_platform
from lls_jax.steps.slice_plan import Plan


class Residuals(NamedTuple):
    """What a block's gradients need.

    Attributes:
        x: its input.
        kernel: of the convolution.
        output: of the convolution; None where it is not kept.
        maxima: from :func:`_maxima`, where the plan keeps these of it; else None.
        statistics: BatchNorm's.
        sums: of :func:`lls_jax.layers.pooled_normalization.window_sums`; None where no means are
            wanted.
    """

    x: jax.Array
    kernel: jax.Array
    output: jax.Array | None
    maxima: jax.Array | None
    statistics: Statistics
    sums: Any


def _convolve(plan: Plan, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return convolve_3x3(x, kernel.astype(plan.dtype), plan.stride)


def _moments(y: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = y.astype(jnp.float32)
    return jnp.sum(wide, (0, 1, 2)), jnp.sum(jnp.square(wide), (0, 1, 2))


def _forward(
    plan: Plan, x: jax.Array, kernel: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[Any, Residuals]:
    """A 3x3 convolution, BatchNorm, LeakyReLU(0.01), and what is wanted of the activation.

    Args:
        plan: the slices.
        x: ``[batch, height, width, channels]``.
        kernel: float32 ``[3, 3, channels, features]``.
        scale: float32 ``[features]``.
        bias: float32 ``[features]``.

    Returns:
        ``(downsampled, pooled, mean, variance)``: what ``plan.downsample`` gives; the means over
        windows, float32 ``[batch, p, p, features]``, or None; the batch's statistics of the
        convolution's output, float32 ``[features]``. And what the gradients need.
    """
    kept = _convolve(plan, x, kernel) if plan.keeps_output else None
    if kept is None:
        total, square = plan.run(sum_slices, lambda x: _moments(_convolve(plan, x, kernel)), x)
    else:
        total, square = _moments(kept)
    count = x.shape[0] * _elements(plan, x)
    mean = total / count
    # Rounding must not make it negative.
    variance = jnp.maximum(square / count - jnp.square(mean), 0.0)
    statistics = Statistics(mean, variance, scale, bias)

    def pass_on(y: jax.Array) -> tuple[jax.Array, jax.Array]:
        maxima = _maxima(plan, y, statistics)
        return plan.downsample(apply_statistics(maxima, *statistics)), maxima

    def sum_windows(y: jax.Array) -> Any:
        return None if plan.pool_size is None else window_sums(y, statistics, plan.pool_size)

    def follow(x: jax.Array, kept: jax.Array | None) -> Any:
        # Cut out once: of bfloat16 XLA's CPU backend would cut and widen it again for each maximum
        # (0.12.0.1; in float32 it cuts once anyway).
        y = jax.lax.optimization_barrier(_convolve(plan, x, kernel) if kept is None else kept)
        downsampled, maxima = pass_on(y)
        return downsampled, (maxima if plan.keeps_maxima else None), sum_windows(y)

    if kept is not None and plan.passes_on_at_once:
        # It takes little in between, and a loop would copy a slice before it finds its maxima.
        # Written out: else XLA 0.10 finds it for each who reads it, and keeps the convolution's
        # output for the last of them.
        downsampled, maxima = written_out(lambda y: pass_on(y)[0], kept), None
        sums = sum_windows(kept)
    else:
        source = (x, None) if kept is None else (None, kept)
        downsampled, maxima, sums = plan.run(map_slices, follow, *source)
    pooled = None
    if plan.pool_size is not None:
        pooled = pool_from_sums(sums, statistics, _elements(plan, x) // plan.pool_size**2)
    residuals = Residuals(x, kernel, kept, maxima, statistics, sums)
    return (downsampled, pooled, mean, variance), residuals


def _maxima(plan: Plan, y: jax.Array, statistics: Statistics) -> jax.Array:
    """Those elements of a convolution's output from which something is passed on.

    BatchNorm and LeakyReLU keep the order of a channel's elements, or turn it round where the slope
    is negative: so a window's largest activation is found before either, and computed alone.

    Args:
        plan: says whether these are the maxima of 2x2 windows, or all.
        y: ``[batch, height, width, features]``.
        statistics: BatchNorm's.

    Returns:
        ``[batch, height / 2, width / 2, features]``, or `y`.
    """
    if not plan.max_pool:
        return y
    slope, _ = affine(*statistics)
    sign = along(jnp.where(slope < 0, jnp.float32(-1), jnp.float32(1)), y)
    # In float32, which rounds nothing here: a CPU's compiler rounds each bfloat16 in between.
    return (max_pool(y.astype(jnp.float32) * sign) * sign).astype(y.dtype)


def _elements(plan: Plan, x: jax.Array) -> int:
    """Of a channel of one example's convolution."""
    return math.prod(-(-side // plan.stride) for side in x.shape[1:3])


def _pull(
    plan: Plan, residuals: Residuals, *cotangents: jax.Array | None, params: bool, input: bool
) -> tuple[Any, Any]:
    """The gradients with respect to kernel, scale and bias, and to the input.

    Args:
        plan: the slices.
        residuals: of :func:`_forward`.
        cotangents: of what is downsampled, in its shape, and of the pooled activation, float32
            ``[batch, p, p, features]``; None for zeros.
        params: whether the former are asked for.
        input: whether the latter is.
    """
    x, kernel, kept, maxima, statistics, sums = residuals
    d_downsampled, d_window = cotangents
    if d_downsampled is None and d_window is None:
        nothing = jax.tree.map(jnp.zeros_like, (kernel, statistics.scale, statistics.bias))
        return (nothing if params else None), (jnp.zeros_like(x) if input else None)
    if d_window is not None and plan.pool_size is not None:
        d_window = d_window / (_elements(plan, x) // plan.pool_size**2)
    own = d_downsampled, d_window

    def output(x: jax.Array, kept: jax.Array | None) -> jax.Array:
        return _convolve(plan, x, kernel) if kept is None else kept

    def before_pooling(seen: jax.Array, d_downsampled: jax.Array) -> jax.Array:
        activation = apply_statistics(seen, *statistics)
        return jax.vjp(plan.downsample, activation)[1](d_downsampled)[0]

    def find_maxima(y: jax.Array) -> jax.Array:
        # Written out: else they are found again with each element that is made of them.
        return written_out(lambda y: _maxima(plan, y, statistics), y) if plan.max_pool else y

    def to_sums(x: Any, kept: Any, maxima: Any, own: Any) -> tuple[jax.Array, jax.Array]:
        seen = find_maxima(output(x, kept)) if maxima is None else maxima
        return gradient_sums(seen, statistics, before_pooling(seen, own[0]))

    totals = []
    if d_window is not None:
        totals.append(window_gradient_sums(d_window, sums))
    if d_downsampled is not None:
        source = (x, kept, None) if maxima is None else (None, None, maxima)
        totals.append(plan.run(sum_slices, to_sums, *source, own))
    gradients = gradients_from_sums(jax.tree.map(lambda *parts: sum(parts), *totals), statistics)

    def to_convolution(x: jax.Array, kept: jax.Array | None, own: Any) -> jax.Array:
        y, count = output(x, kept), residuals.x.shape[0] * _elements(plan, x)

        def through_norm(y: jax.Array, d_activation: jax.Array) -> jax.Array:
            return input_gradient(y, statistics, d_activation, gradients, count)

        d_downsampled, d_window = own
        if d_downsampled is None:
            return through_norm(y, spread(d_window, y.shape))
        # Not those that were kept: of an output that is computed again, which may be rounded in
        # another way, none might equal them.
        seen = find_maxima(y)
        share = before_pooling(seen, d_downsampled)
        if plan.max_pool:
            share = written_out(share_maxima, y, seen, share)

        def of_both(y: jax.Array, seen: jax.Array, share: jax.Array, *d: jax.Array) -> jax.Array:
            above = spread_maxima(y, seen, share) if plan.max_pool else share
            below = (spread(one, y.shape) for one in d)
            return through_norm(y, sum(below, above.astype(jnp.float32)))

        # In the shape of `y`: XLA writes it three times as slowly into one that the kernel's
        # gradient wants (jax 0.10).
        return written_out(of_both, y, seen, share, *(() if d_window is None else (d_window,)))

    def through_convolution(x: jax.Array, kept: jax.Array | None, own: Any) -> tuple[Any, Any]:
        dy = to_convolution(x, kept, own)
        d_kernel: Any = ()
        d_x: Any = ()
        if params:
            d_kernel = jax.vjp(functools.partial(_convolve, plan, x), kernel)[1](dy)[0]
        if input:
            # After the kernel's gradient: not what both take in between at once.
            dy = by_platform(d_kernel, dy, cpu=_after, elsewhere=lambda _, dy: dy)
            d_x = jax.vjp(lambda x: _convolve(plan, x, kernel), x)[1](dy)[0]
        return d_kernel, d_x

    d_kernel, d_input = plan.run(walk_slices, through_convolution, x, kept, own)
    return ((d_kernel, *gradients) if params else None), (d_input if input else None)


def _after(tree: Any, later: Any) -> Any:
    return wait_for(token_of(tree), later)


def _arrays(plan: Plan, params: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    norm = params["norm"]
    return x.astype(plan.dtype), params["conv"]["kernel"], norm["scale"], norm["bias"]


def _new_statistics(params: Any, batch_stats: Any, mean: jax.Array, variance: jax.Array) -> Any:
    new = running_average(batch_stats["norm"], mean + params["conv"]["bias"], variance)
    return {"norm": new}


def run_block(
    plan: Plan, params: Any, batch_stats: Any, x: jax.Array
) -> tuple[tuple[jax.Array, jax.Array | None], Any, Callable[..., Any]]:
    """A :class:`lls_jax.blocks.ConvBlock` in training, and its way back.

    Args:
        plan: from :func:`lls_jax.steps.slice_plan.plan_block`.
        params: the block's.
        batch_stats: the block's.
        x: its input, ``[batch, height, width, channels]``.

    Returns:
        ``((downsampled, pooled), batch_stats, pull)``: what the next block takes, but for dropout;
        the means over windows, None where the plan wants none; the new statistics.
        ``pull(d_downsampled, d_pooled, params=..., input=...)`` gives the gradients with respect to
        `params` and `x`, those that are asked for; a cotangent may be None, for zeros.
    """
    (downsampled, pooled, mean, variance), residuals = _forward(plan, *_arrays(plan, params, x))
    stats = _new_statistics(params, batch_stats, mean, variance)
    # The gradient goes back in the dtype that the input came in, whatever the block's own is.
    pull = Partial(functools.partial(_pull_block, plan, x.dtype), residuals)
    return (downsampled, pooled), stats, pull


def _pull_block(
    plan: Plan, dtype: Any, residuals: Residuals, *cotangents: Any, **wanted: bool
) -> Any:
    d_params, d_input = _pull(plan, residuals, *cotangents, **wanted)
    d_input = None if d_input is None else d_input.astype(dtype)
    if d_params is None:
        return None, d_input
    d_kernel, d_scale, d_bias = d_params
    # The batch's mean takes the convolution's bias out again.
    conv = {"kernel": d_kernel, "bias": jnp.zeros_like(d_bias)}
    return {"conv": conv, "norm": {"scale": d_scale, "bias": d_bias}}, d_input
