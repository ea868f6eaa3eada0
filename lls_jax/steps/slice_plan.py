"""Whether a block is computed in slices of the batch, and into how many: see :mod:`.sliced`."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lls_jax.blocks import ConvBlock, DenseBlock
from lls_jax.layers.convolution import FEW_CHANNELS
from lls_jax.layers.pooled_normalization import can_pool
from lls_jax.layers.slices import choose_count
from lls_jax.models import BlockSpec, Group
from lls_jax.platforms import by_platform
from lls_jax.rules import LocalRule

# Where nothing is asked for, on a CPU. Slices this large are in its near caches, and large enough
# for all of its threads; more of them are too small for the matrix library's best. Milliseconds of
# a step of lls_mxm and megabytes of temporaries, two cores of an AMD EPYC, jax 0.12.0.1:
#
#                           whole       4 MiB       2 MiB
#   small_conv, batch 128   53, 45                  45, 27
#   vgg8, batch 32          409, 144    428, 116    452, 110
SLICE_BYTES = 2 * 2**20
MOST_SLICES = 8
# Where gradients come from above too, a convolution of an image's few channels is computed again,
# in slices twice as large: that takes as long as to write its output to memory and to read it slice
# by slice. (Elsewhere nothing is cut, and XLA computes the same convolution once in a program; a
# pipeline's two programs compute it once each.) Milliseconds of such a block's step (128 images of
# 32x32 pixels, 32 features), two cores of an Intel Xeon, jax 0.12.0.1 / 0.10.2, medians of 25
# turns, two runs, and megabytes:
#
#               kept, 2 MiB    kept, 4 MiB    again, 2 MiB   again, 4 MiB
#   time        27.1 / 27.7                   29.9 / 28.0    27.8 / 26.4
#               29.1 / 28.0    29.0 / 28.0                   29.4 / 27.4
#   memory      24             28             9              13
#
# Without gradients from above it is read once less: SmallConv's step loses 2 %, and saves nothing.
# Since sums over windows of what is kept are one pass, keeping is faster: SmallConv's step with
# reach 2 has 0.91 / 0.98 times bp's speed in place of 0.87 / 0.92 (in turns, medians of nine). But
# it takes 45 MB in place of 33, and little memory is why somebody takes local losses. `slice_above`
# of a number keeps the output.
CHEAP_SLICE_BYTES = 4 * 2**20


class Cuts(NamedTuple):
    """How large a convolution's output may be before the batch is cut.

    Attributes:
        remat_above: as of :func:`lls_jax.training.make_train_step`, in bytes.
        slice_above: likewise.
    """

    remat_above: int | None = None
    slice_above: int | None = None


class Plan(NamedTuple):
    """What is computed in slices, besides its arrays.

    Attributes:
        slices: into how many the batch is cut.
        only_on_cpu: whether it is cut on CPUs alone.
        keeps_output: whether the convolution's output is kept.
        keeps_maxima: whether its 2x2 maxima are, of an output that is not.
        passes_on_at_once: whether what the next block takes, and the means over windows, are made
            of a kept output at once, and not a slice at a time.
        stride: of the convolution.
        dtype: of the activations.
        pool_size: windows along each spatial axis whose means are wanted; None for none.
        max_pool: whether the activation's 2x2 maxima are what is passed on.
        downsample: from these, or from the activation, to what the next block takes, an image at a
            time.
    """

    slices: int
    only_on_cpu: bool
    keeps_output: bool
    keeps_maxima: bool
    passes_on_at_once: bool
    stride: int
    dtype: Any
    pool_size: int | None
    max_pool: bool
    downsample: Callable[[jax.Array], jax.Array]

    def run(self, loop: Callable[..., Any], function: Callable[..., Any], *arrays: Any) -> Any:
        """``function(*arrays)`` by a loop over slices, where these are called for.

        Args:
            loop: :func:`lls_jax.layers.slices.sum_slices`, :func:`~.map_slices`, or
                :func:`~.walk_slices`.
            function: what they take.
            *arrays: trees of arrays ``[batch, ...]``.
        """
        cut = functools.partial(loop, function, count=self.slices)
        if not self.only_on_cpu:
            return cut(arrays)
        return by_platform(arrays, cpu=cut, elsewhere=lambda arrays: function(*arrays))


def check_cuts(cuts: Cuts) -> None:
    """Raise ValueError, naming the argument, for what no output can be above."""
    for name, above in cuts._asdict().items():
        if above is not None and above < 1:
            raise ValueError(f"`{name}` is {above}; it must be a number of bytes from 1, or None.")
    if None not in cuts:
        raise ValueError(
            f"`slice_above` is {cuts.slice_above} and `remat_above` is {cuts.remat_above}; the "
            "latter does not keep the outputs that the former is about: leave one of them out."
        )


def count_slices(shape: tuple[int, ...], dtype: Any, above: int) -> int:
    """How many slices, so that none of an array has more than `above` bytes, or one example.

    >>> count_slices((128, 32, 32, 256), jnp.float32, 2**25)
    4
    """
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    return choose_count(shape[0], math.ceil(size / above))


def may_cut(spec: BlockSpec, rule: LocalRule | None) -> bool:
    """Whether a block has one convolution and its rule sees the latents only: else it is whole.

    Of a group of blocks, whether one of them may be.

    Args:
        spec: the block, and what follows it.
        rule: its own; None where it has no loss of its own.
    """
    if isinstance(spec.module, Group):
        *inner, last = spec.module.specs
        pairs = [*((own, None) for own in inner), (last, rule)]
        return walks_members(spec.module) and any(may_cut(*pair) for pair in pairs)
    # Not a module that is derived from it, whose function may be another.
    return type(spec.module) is ConvBlock and (rule is None or rule.sees == "latents")


def walks_members(group: Group) -> bool:
    """Whether a group is computed member by member: else it is one module, and whole.

    It is if all are known to draw nothing at random, and none is there twice, which shares its
    parameters with itself.
    """
    members = group.blocks
    known = all(type(block) in (ConvBlock, DenseBlock) for block in members)
    return known and len({id(block) for block in members}) == len(members)


def plan_block(
    spec: BlockSpec,
    rule: LocalRule | None,
    x: jax.Array,
    cuts: Cuts,
    *,
    from_above: bool = False,
) -> Plan | None:
    """How a block is cut, or None where it is not.

    It is where :func:`may_cut` and its convolution's output on this batch has more bytes than is
    said.

    Args:
        spec: the block, and what follows it.
        rule: the block's own; None where it has no loss of its own.
        x: its input; only shape and dtype count.
        cuts: bytes above which the convolution's output is not kept, None keeps every one; and
            above which, of an output that is kept, its gradients are taken in slices, None for
            :data:`SLICE_BYTES` on CPUs, in about :data:`MOST_SLICES` at most, and for never
            elsewhere.
        from_above: whether gradients of blocks above come back through it. Then, where neither
            number is given, an output that is cheap to compute again is not kept: that of an image
            of at most :data:`~lls_jax.layers.convolution.FEW_CHANNELS`.
    """
    module, (remat_above, slice_above) = spec.module, cuts
    if isinstance(module, Group) or not may_cut(spec, rule):
        return None
    batch, *sides, channels = x.shape
    height, width = (-(-side // module.stride) for side in sides)
    shape = (batch, height, width, module.features)
    again = 1 if remat_above is None else count_slices(shape, module.dtype, remat_above)
    cheap = (
        (remat_above is None and slice_above is None)
        and (from_above and channels <= FEW_CHANNELS)
        and count_slices(shape, module.dtype, CHEAP_SLICE_BYTES) > 1
    )
    if again > 1:
        slices = again
    elif slice_above is not None:
        slices = count_slices(shape, module.dtype, slice_above)
    else:
        size = CHEAP_SLICE_BYTES if cheap else SLICE_BYTES
        slices = min(count_slices(shape, module.dtype, size), MOST_SLICES)
        slices = choose_count(batch, slices)
    pool_size = None if rule is None else spec.pool_size
    if slices == 1 or (pool_size is not None and not can_pool(shape, pool_size)):
        return None
    keeps_output = again == 1 and not cheap
    return Plan(
        slices,
        only_on_cpu=again == 1 and slice_above is None,
        keeps_output=keeps_output,
        keeps_maxima=from_above and spec.max_pool and not keeps_output,
        # A function of somebody's own may take much in between.
        passes_on_at_once=keeps_output and spec.then is None,
        stride=module.stride,
        dtype=module.dtype,
        pool_size=pool_size,
        max_pool=spec.max_pool,
        downsample=spec.after_max_pool,
    )
