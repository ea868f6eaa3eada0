"""Where the kernels can run."""

import importlib
import importlib.metadata
from typing import Any, NamedTuple

import jax

_LEAST_CAPABILITY = (8, 0)
_GPU = ("gpu", "cuda")


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


def current_device() -> Device:
    """The device of the mesh in use, if it names one, else JAX's default device."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return Device(abstract.platform, abstract.device_kind, None)
    default: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(default, str):
        default = jax.devices(default)[0]
    device = default or jax.devices()[0]
    # Other devices have no such attribute.
    text = str(device.compute_capability) if device.platform in _GPU else ""
    major, dot, minor = text.partition(".")
    known = dot and major.isdecimal() and minor.isdecimal()
    capability = (int(major), int(minor)) if known else None
    return Device(device.platform, device.device_kind, capability)


_PALLAS = (
    "jax.experimental.pallas.triton",
    "this jax has no Triton lowering of Pallas any more; use 'triton' or 'xla'",
)
_PACKAGES = {
    "split": _PALLAS,
    "pallas": _PALLAS,
    "triton": (
        "jax_triton",
        "it needs the package jax-triton (`pip install 'lls_jax[triton]'`, Python 3.12 or newer); "
        "use 'pallas' or 'xla'",
    ),
}


def obstacle(implementation: str, device: Device) -> str | None:
    """What keeps an implementation from running, and what to use instead; None for nothing.

    Args:
        implementation: ``"xla"``, ``"split"``, ``"pallas"`` or ``"triton"``.
        device: from :func:`current_device`.
    """
    if implementation == "xla":
        return None
    if device.platform not in _GPU:
        return (
            f"it needs an NVIDIA GPU and the device is {device.platform} ({device.kind}); "
            "use 'xla' (from Python, interpret=True tests it anywhere)"
        )
    if device.capability is not None and device.capability < _LEAST_CAPABILITY:
        have, need = (".".join(map(str, pair)) for pair in (device.capability, _LEAST_CAPABILITY))
        return f"it needs compute capability {need} and {device.kind} has {have}; use 'xla'"
    return _package_obstacle(implementation)


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
