"""What no run could use: values out of range, unknown names, options that do not go together.

All that can be said of the options by themselves; what takes a data set or a network is said when
they are made.
"""

import math
import types
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import reach_options
from experiments.config_choices import (
    AVERAGING,
    KERNELS,
    LOOPS,
    MEASURES,
    ON_DEVICE,
    OPTIMIZERS,
    PRECISIONS,
    SCHEDULES,
    TRACKERS,
    VIEWS,
    option,
)

_LEAST: dict[int, tuple[str, ...]] = {
    0: (
        *("warmup_epochs", "checkpoint_every", "remat", "slice", "process_id"),
        "weight_decay",
    ),
    1: (
        *("epochs", "batch_size", "eval_batch_size", "train_examples", "eval_examples"),
        *("validation_examples", "measure_every", "patience", "auxiliary_depth", "pipeline"),
        *("data_parallel", "num_processes", "profile"),
    ),
}
# Larger ones repeat smaller ones: jax.random.key takes 32 bits.
SEEDS = 2**32
_POSITIVE = ("learning_rate", "width", "other_learning_rate")
_FINITE = ("weight_decay", "temperature")
_CHOICES: dict[str, Sequence[str]] = {
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "kernels": KERNELS,
    "data_on_device": ON_DEVICE,
    "loop": LOOPS,
    "test_views": VIEWS,
}
# Of which several may be given, joined by commas.
_SEVERAL = {"measure": MEASURES, "log": TRACKERS}


def check_values(values: Mapping[str, Any]) -> None:
    """Raise ValueError, naming option and value, for what no run could use.

    Args:
        values: of all options, by field.
    """
    _check_ranges(values)
    _check_names(values)
    given = types.SimpleNamespace(**values)
    _check_training(given)
    _check_processes(values)
    _check_execution(given)


def check_seeds(name: str, seeds: Sequence[int]) -> None:
    """Raise ValueError unless there are seeds, each of which draws numbers of its own.

    Args:
        name: of the option.
        seeds: its values.
    """
    if not seeds:
        raise ValueError(f"{name} is empty; expected one or more.")
    if wrong := [seed for seed in seeds if not 0 <= seed < SEEDS]:
        raise ValueError(f"{name} is {wrong[0]}; it must be at least 0, and less than {SEEDS}.")


def check_checkpoint(wanted: str) -> None:
    """Raise ValueError unless this names a checkpoint of a run."""
    if wanted not in ("best", "last") and not wanted.isdecimal():
        raise ValueError(f"--checkpoint is {wanted!r}; expected best, last or a step.")


def _check_ranges(values: Mapping[str, Any]) -> None:
    for smallest, names in _LEAST.items():
        for name in names:
            value = values[name]
            if value is not None and value < smallest:
                raise ValueError(f"{option(name)} is {value}; it must be at least {smallest}.")
    check_seeds("--seed", [values["seed"]])
    reach_options.check([values["reach"]])
    for name in _POSITIVE:
        value = values[name]
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{option(name)} is {value}; it must be positive.")
    for name in _FINITE:
        value = values[name]
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{option(name)} is {value}; it must be a finite number.")
    if values["clip_norm"] is not None and not values["clip_norm"] > 0:
        raise ValueError(f"--clip-norm is {values['clip_norm']}; it must be positive.")
    if not 0 <= values["momentum"] < 1:
        raise ValueError(f"--momentum is {values['momentum']}; it must lie in [0, 1).")


def _check_names(values: Mapping[str, Any]) -> None:
    optimizer = values["optimizer"]
    if optimizer not in OPTIMIZERS and ":" not in optimizer:
        raise ValueError(
            f"unknown optimizer {optimizer!r}; expected one of {', '.join(OPTIMIZERS)}, or your "
            "own as package.module:function."
        )
    for name, known in _CHOICES.items():
        if values[name] not in known:
            raise ValueError(
                f"unknown {name} {values[name]!r}; expected one of {', '.join(known)}."
            )
    for name, known in _SEVERAL.items():
        given = values[name].split(",") if values[name] is not None else []
        if unknown := [one for one in given if one not in known]:
            raise ValueError(
                f"{option(name)} has {unknown[0]!r}; expected some of {', '.join(known)}, joined "
                "by commas."
            )
        if len(set(given)) < len(given):
            raise ValueError(f"{option(name)} is {values[name]!r}; give each of them once.")


def _check_training(given: Any) -> None:
    if given.other_learning_rate is not None and given.optimizer != "muon":
        raise ValueError(
            f"--other-learning-rate {given.other_learning_rate} is of no use to --optimizer "
            f"{given.optimizer}; leave it out."
        )
    if not given.momentum and given.optimizer in AVERAGING:
        raise ValueError(
            f"--momentum is {given.momentum}, by which --optimizer {given.optimizer} divides; it "
            "must be positive."
        )
    if given.warmup_epochs and given.schedule == "plateau":
        raise ValueError(
            f"--warmup-epochs {given.warmup_epochs} does not go with --schedule plateau; use "
            "another schedule."
        )
    if given.schedule == "plateau" and given.optimizer in AVERAGING:
        raise ValueError(
            f"--schedule plateau does not go with --optimizer {given.optimizer}, which averages "
            "the weights instead; use --schedule constant, or another optimizer."
        )
    if given.measure_every > 1 and not given.measure:
        raise ValueError(
            f"--measure-every {given.measure_every} is given without --measure; say what to "
            "measure."
        )


def _check_processes(values: Mapping[str, Any]) -> None:
    coordinator = values["coordinator"]
    if coordinator is None:
        for name in ("num_processes", "process_id"):
            if (value := values[name]) is not None:
                raise ValueError(
                    f"{option(name)} {value} is given without --coordinator; give HOST:PORT of "
                    "process 0."
                )
    elif coordinator != "auto" and None in (values["num_processes"], values["process_id"]):
        raise ValueError(
            f"--coordinator {coordinator} needs --num-processes and --process-id; give both, or "
            "--coordinator auto on a cluster."
        )


def _check_execution(given: Any) -> None:
    sharing = "--coordinator" if given.coordinator else "--data-parallel"
    shares_batches = bool(given.data_parallel or given.coordinator)
    if shares_batches and given.remat:
        raise ValueError(
            f"--remat {given.remat} does not go with {sharing}, whose batches are cut already; use "
            "one of them."
        )
    if given.slice and (given.remat or shares_batches):
        beside = f"--remat {given.remat}" if given.remat else sharing
        raise ValueError(f"--slice {given.slice} does not go with {beside}; leave one of them out.")
    if given.pipeline and shares_batches:
        raise ValueError(f"--pipeline and {sharing} do not go together; choose one.")
    if given.deterministic and given.coordinator:
        raise ValueError(
            "--deterministic does not go with --coordinator, each of whose processes chooses its "
            "algorithms; leave one of them out."
        )
    if given.stages is not None and given.pipeline is None:
        raise ValueError("--stages is given without --pipeline; give the number of devices.")
