"""Every choice that depends on the kind of device, in one place, each with its reason.

A program may be compiled for another device than the default one; what is chosen inside a program
(:func:`by_platform`) follows the device that it is compiled for, what is chosen outside follows the
device that is asked about.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Choices(NamedTuple):
    """What suits a kind of device.

    Attributes:
        compiled_loops: whether a compiled loop over training steps runs as fast as steps that are
            launched one by one. In a loop XLA's CPU backend runs convolutions without its threads:
            30 times slower on two cores.
        ordered_collectives: whether a block waits for the sums over devices of the block below. A
            GPU computes meanwhile; devices made of one CPU have few threads, each of which may wait
            in another of several sums forever.
        threads_a_device: threads that a device needs for its sums over devices; 0 where it has its
            own. With fewer than three, each of them may wait in another of the sums that are ready
            at the same time, for devices that have no thread left.
    """

    compiled_loops: bool
    ordered_collectives: bool
    threads_a_device: int


CHOICES = {
    "cpu": Choices(compiled_loops=False, ordered_collectives=True, threads_a_device=3),
    "gpu": Choices(compiled_loops=True, ordered_collectives=False, threads_a_device=0),
    "tpu": Choices(compiled_loops=True, ordered_collectives=False, threads_a_device=0),
}


def choices(platform: str) -> Choices:
    """What suits a kind of device; one that is not known is treated as a CPU, which always works.

    >>> choices("cpu").compiled_loops
    False
    """
    return CHOICES.get(platform, CHOICES["cpu"])


def by_platform(*args: Any, cpu: Callable[..., Any], elsewhere: Callable[..., Any]) -> Any:
    """One of two forms of the same computation, by the device that the program is compiled for.

    Convolutions use it: on a CPU, XLA's own are slow in many shapes
    (:mod:`lls_jax.layers.convolution` has the measurements); elsewhere they are the fastest.

    Args:
        *args: of both.
        cpu: the form for CPUs.
        elsewhere: the form for all other devices.
    """
    return jax.lax.platform_dependent(*args, cpu=cpu, default=elsewhere)


_CPU_INFO = pathlib.Path("/proc/cpuinfo")
# Of x86, by Linux's name. What `avx512_bf16` alone would gain has not been measured.
_MULTIPLIES_BFLOAT16 = "amx_bf16"


def multiplies_bfloat16() -> bool:
    """Whether products on a CPU take bfloat16 factors: XLA uses the units that this machine has.

    Asked while a program is traced; the same program on another CPU is as right, and slower. Never
    in a run of several processes, whose programs must be one whatever their CPUs are.
    """
    return jax.process_count() == 1 and _has_bfloat16_units()


@functools.cache
def _has_bfloat16_units() -> bool:
    """Of this machine's CPU, by what Linux says of it; False where there is no Linux to ask."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return _MULTIPLIES_BFLOAT16 in flags.split()
