"""Local learning in JAX: each block of a network trained from its own loss.

Importing this package touches no device and imports no submodule until it is used:
``lls_jax.rules`` and ``from lls_jax import rules, models, training, interop, evaluation, fit`` do.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_MODULES = (
    *(
        "accounting",
        "analysis",
        "arguments",
        "blocks",
        "data",
        "errors",
        "evaluation",
        "frameworks",
        "interop",
        "layers",
        "models",
    ),
    *("optimizers", "placement", "platforms", "processes", "rules", "runs", "steps", "trackers"),
    "training",
)
# Functions that stand at the top, and the modules that they are from.
_FUNCTIONS = {"fit": "lls_jax.runs.fit", "local_update": "lls_jax.steps.block"}

__all__ = [*_FUNCTIONS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return vars(importlib.import_module(_FUNCTIONS[name]))[name]
    if name in _MODULES:
        return importlib.import_module(f"lls_jax.{name}")
    raise AttributeError(f"module 'lls_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
