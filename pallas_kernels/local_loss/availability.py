"""Where the kernels can run, and which implementation a call takes."""

import importlib
import importlib.metadata
from typing import Any, NamedTuple

import jax

from pallas_kernels.errors import KernelUnavailableError
from pallas_kernels.local_loss.config import Problem, tuned

_LEAST_CAPABILITY = (8, 0)
_DTYPES = ("float32", "bfloat16", "float16")
# Rows and classes live in registers, padded to a power of two.
_MOST_CLASSES = 1024


class Device(NamedTuple):
    """The device that a function is traced for.

    Attributes:
        platform: ``"cpu"``, ``"gpu"``, ...
        kind: like ``"NVIDIA H200"``.
        capability: compute capability, like (9, 0); None where it is not known.
    """

    platform: str
    kind: str
    capability: tuple[int, int] | None


class Choice(NamedTuple):
    """An implementation, and why it is the one.

    Attributes:
        implementation: its name.
        reason: for people.
    """

    implementation: str
    reason: str


def current_device() -> Device:
    """The device of the mesh in use, if it names one, else JAX's default device."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        platform = getattr(abstract, "platform", None) or "gpu"
        return Device(platform, abstract.device_kind, None)
    default: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(default, str):
        default = jax.devices(default)[0]
    device = default or jax.devices()[0]
    text = str(getattr(device, "compute_capability", ""))
    major, dot, minor = text.partition(".")
    known = dot and major.isdecimal() and minor.isdecimal()
    capability = (int(major), int(minor)) if known else None
    return Device(device.platform, device.device_kind, capability)


_PACKAGES = {
    "pallas": (
        "jax.experimental.pallas.triton",
        "this jax has no Triton lowering of Pallas any more; use 'triton' or 'xla'",
    ),
    "triton": (
        "jax_triton",
        "it needs the package jax-triton (`pip install 'lls_jax[triton]'`, Python 3.12 or newer); "
        "use 'pallas' or 'xla'",
    ),
}


def obstacle(implementation: str, device: Device, problem: Problem) -> str | None:
    """What keeps an implementation from running, and what to use instead; None for nothing.

    Args:
        implementation: ``"xla"``, ``"pallas"`` or ``"triton"``.
        device: from :func:`current_device`.
        problem: the shapes.
    """
    if implementation == "xla":
        return None
    return _device_obstacle(implementation, device) or shape_obstacle(problem)


def _device_obstacle(implementation: str, device: Device) -> str | None:
    if implementation == "xla":
        return None
    if device.platform not in ("gpu", "cuda"):
        return (
            f"it needs an NVIDIA GPU and the device is {device.platform} ({device.kind}); "
            "use 'xla' (from Python, interpret=True tests it anywhere)"
        )
    if device.capability is not None and device.capability < _LEAST_CAPABILITY:
        have, need = (".".join(map(str, pair)) for pair in (device.capability, _LEAST_CAPABILITY))
        return f"it needs compute capability {need} and {device.kind} has {have}; use 'xla'"
    return _package_obstacle(implementation)


def shape_obstacle(problem: Problem) -> str | None:
    """What about the shapes keeps any kernel from running; None for nothing."""
    if problem.dtype not in _DTYPES:
        return f"it takes {', '.join(_DTYPES)} and the activation is {problem.dtype}; use 'xla'"
    largest = max(problem.rows, problem.classes)
    if largest > _MOST_CLASSES:
        return f"it takes up to {_MOST_CLASSES} rows and classes and there are {largest}; use 'xla'"
    return None


def _package_obstacle(implementation: str) -> str | None:
    module, advice = _PACKAGES[implementation]
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{advice} ({error})"
    # Its rule for eliminating dead code has the signature of older versions:
    # jax_triton/triton_lib.py, `_triton_kernel_call_dce_rule`.
    jax_triton = importlib.metadata.version("jax-triton") if implementation == "triton" else ""
    if jax_triton in ("0.4.0", "0.4.1") and jax.__version_info__ >= (0, 12):
        return (
            f"jax-triton {jax_triton} does not work with jax {jax.__version__}; install "
            "'jax<0.12' or a newer jax-triton, or use 'pallas' or 'xla'"
        )
    return None


def require(implementation: str) -> None:
    """Raise KernelUnavailableError if this device cannot run an implementation at any shape.

    Args:
        implementation: ``"xla"``, ``"pallas"`` or ``"triton"``.
    """
    stopped = _device_obstacle(implementation, current_device())
    if stopped is not None:
        raise KernelUnavailableError(
            f"implementation {implementation!r} cannot run here: {stopped}."
        )


def choose_implementation(device: Device, problem: Problem) -> Choice:
    """What ``implementation=None`` takes: a kernel where one was measured to be faster, else XLA.

    The measurement is the user's own, ``python -m pallas_kernels.tune``: a kernel that has not been
    timed on a device is not chosen for it.
    """
    reasons = []
    for name in ("pallas", "triton"):
        stopped = obstacle(name, device, problem)
        if stopped is not None:
            reasons.append(f"{name}: {stopped.split(';')[0]}")
        elif tuned(name, device.kind, problem) is None:
            reasons.append(
                f"{name}: not measured to be faster on {device.kind} for these shapes (run "
                "`python -m pallas_kernels.tune`)"
            )
        else:
            return Choice(name, f"measured to be faster than xla on {device.kind}")
    return Choice("xla", "; ".join(reasons))
