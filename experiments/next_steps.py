"""What a finished run means beside backpropagation's, and what to try after it."""

import dataclasses
import pathlib
import shlex
from collections.abc import Iterator
from typing import Any

from experiments.commands import resume_command
from experiments.config import TrainConfig
from experiments.config_choices import OF_LOCAL_LOSSES, OF_RULES
from experiments.presets import BP_MEASURED, default_config
from experiments.run_config import NOT_COMPARED, may_go_on, read_config
from experiments.several_rules import has_local_losses
from lls_jax.errors import UserError
from lls_jax.runs import folder as folders

# What a rule has and bp has not: runs that differ in these alone may be set side by side.
_OF_RULES = ("rule", "groups", *OF_RULES, *OF_LOCAL_LOSSES)


def next_steps(config: TrainConfig) -> list[str]:
    """Lines for a person whose run has ended.

    Args:
        config: of the run.
    """
    folder = pathlib.Path(config.run_folder())
    others = list(_siblings(config, folder))
    bp = [other for other in others if other.config.rule == "bp"]
    lines = _meaning(config, bp)
    quoted = shlex.quote(str(folder))
    lines += [
        f"curves: {folder / 'curves.png'}; all of it as one page:",
        f"  python -m experiments.report {quoted}",
    ]
    if bp and config.rule != "bp":
        beside = shlex.quote(str(bp[0].folder))
        lines += ["both, epoch by epoch:", f"  python -m experiments.compare {quoted} {beside}"]
    return lines + _try_next(config, folder, others)


@dataclasses.dataclass(frozen=True)
class _Sibling:
    config: TrainConfig
    folder: pathlib.Path
    accuracy: float


def _siblings(config: TrainConfig, folder: pathlib.Path) -> Iterator[_Sibling]:
    """Finished runs beside this one that differ in the rule, those of its seed first."""
    ignored = {*_OF_RULES, *NOT_COMPARED, "seed", "progress"}
    compared = [f.name for f in dataclasses.fields(config) if f.name not in ignored]
    found = []
    for path in sorted(folder.parent.glob("*/config.json")):
        if path.parent == folder:
            continue
        try:
            other = read_config(path.parent)
            if any(getattr(other, name) != getattr(config, name) for name in compared):
                continue
            records = folders.read_metrics(path.parent)
        except (UserError, OSError):
            continue
        if records and records[-1]["epoch"] >= config.epochs:
            found.append(_Sibling(other, path.parent, records[-1]["test_accuracy"]))
    yield from sorted(found, key=lambda other: other.config.seed != config.seed)


def _meaning(config: TrainConfig, bp: list[_Sibling]) -> list[str]:
    """How far backpropagation gets, as a run beside this one or this version's own has it."""
    if config.rule == "bp":
        return []
    if bp:
        return [f"bp reached {bp[0].accuracy:.2f} % with the same options ({bp[0].folder})"]
    measured = BP_MEASURED.get(config.dataset)
    ignored = {*_OF_RULES, *NOT_COMPARED, "seed", "dataset"}
    default = default_config(config.dataset)
    is_default = all(
        getattr(config, field.name) == getattr(default, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ignored
    )
    if measured is None or not is_default:
        return []
    return [
        f"bp reached {measured.accuracy:.2f} % with the same options, {measured.how}; see for "
        "yourself:",
        f"  {measured.command}",
    ]


def _try_next(config: TrainConfig, folder: pathlib.Path, others: list[_Sibling]) -> list[str]:
    """The next run to make: bp, then a reach of 2, or a local rule after bp."""
    if config.coordinator is not None or config.pipeline is not None:
        return []
    done = {(one.config.rule, one.config.reach, one.config.groups) for one in others}
    changes: dict[str, Any]
    if config.rule == "bp":
        what, changes = "try next, with no gradient between blocks:", {"rule": "lls_mxm"}
    elif all(one.config.rule != "bp" for one in others) and config.dataset not in BP_MEASURED:
        what = "try next, to know how far backpropagation gets:"
        # Options of a local rule are of no use to it.
        changes = {**{name: getattr(TrainConfig, name) for name in _OF_RULES}, "rule": "bp"}
    elif config.reach == 1 and has_local_losses(config):
        what, changes = "try next, each loss teaching the block below its own too:", {"reach": 2}
    else:
        return []
    new = dataclasses.replace(config, **changes, workdir=None)
    if (new.rule, new.reach, new.groups) in done:
        return []
    # In a folder of its own, beside this one.
    beside = folder.parent / pathlib.Path(new.run_folder()).name
    if (beside / "config.json").exists() and not _may_go_on(beside, new):
        return []
    if str(beside) != new.run_folder():
        new = dataclasses.replace(new, workdir=str(beside))
    return [what, f"  {resume_command(new)}"]


def _may_go_on(folder: pathlib.Path, config: TrainConfig) -> bool:
    """Whether the run in a folder is that of a config, or may be."""
    try:
        stored = read_config(folder)
    except UserError:
        return False
    return all(may_go_on(stored, config, field.name) for field in dataclasses.fields(config))
