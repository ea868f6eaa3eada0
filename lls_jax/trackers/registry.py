"""Trackers by name."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lls_jax.errors import UserError
from lls_jax.trackers.base import Tracker
from lls_jax.trackers.mlflow import MLflow
from lls_jax.trackers.tensorboard import TensorBoard
from lls_jax.trackers.wandb import WandB


class _Kind(NamedTuple):
    """A tracker, and the package that it needs.

    Attributes:
        make: the tracker's class.
        module: of the package.
        install: its name for pip.
    """

    make: Callable[..., Tracker]
    module: str
    install: str


_KINDS = {
    "tensorboard": _Kind(TensorBoard, "tensorboardX", "tensorboardX"),
    "mlflow": _Kind(MLflow, "mlflow", "mlflow"),
    "wandb": _Kind(WandB, "wandb", "wandb"),
}
NAMES = tuple(_KINDS)


def require(names: Sequence[str]) -> None:
    """Check that what trackers need is installed.

    Args:
        names: of them.

    Raises:
        ValueError: an unknown name.
        UserError: something is not installed; the message says how to.
    """
    for name in names:
        if name not in _KINDS:
            raise ValueError(f"unknown tracker {name!r}; expected some of {', '.join(NAMES)}.")
        if importlib.util.find_spec(_KINDS[name].module) is None:
            raise UserError(
                f"tracker {name!r} needs the package {_KINDS[name].install}, which is not "
                f"installed; `pip install {_KINDS[name].install}`, or leave {name} out."
            )


def make(
    names: Sequence[str],
    settings: Mapping[str, Any] | None = None,
    warn: Callable[[str], None] | None = None,
) -> list[Tracker]:
    """Callbacks for :func:`lls_jax.fit` that send each epoch's record on.

    Args:
        names: some of ``tensorboard``, ``mlflow``, ``wandb``.
        settings: what is trained with, JSON values, to be shown with the run.
        warn: is told what could not be sent; None: Python's warnings.

    Raises:
        ValueError: an unknown name.
        UserError: something is not installed.
    """
    require(names)
    options = {} if warn is None else {"warn": warn}
    return [_KINDS[name].make(settings, **options) for name in names]
