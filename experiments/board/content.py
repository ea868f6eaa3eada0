"""What a board holds, in its folder and beyond one command."""

import dataclasses
import itertools
import json
import pathlib
import shlex
from typing import Any, NamedTuple

from experiments import several_rules
from experiments.board.config import ACCUMULATED, CHECKPOINTED, BoardConfig
from experiments.board.rows import Row, row_of, rows_of, train_config
from experiments.command_line import parse_merged, with_file
from experiments.commands import changed_options
from experiments.config import TrainConfig
from experiments.config_choices import BASELINES, OF_CUTS, OF_RULES, option
from experiments.option_files import to_arguments
from experiments.presets import default_config
from experiments.reach_options import TypedReach
from experiments.run_config import NOT_COMPARED, from_dict
from lls_jax.errors import UserError

_RULES = ("lls", "lls_mxm", "local_classifier", "bp", CHECKPOINTED, ACCUMULATED)
_FORMAT = 1
# Options of the training command that are the board's own.
_OWN = ("rule", "reach", "seed", "epochs", "workdir", "progress")
# That no run of a board can have: budgets would be unequal, and one process on one device trains.
_NEVER = (
    *("patience", "pipeline", "stages", "data_parallel"),
    *("coordinator", "num_processes", "process_id", "deterministic"),
)
# Options that change no training, but columns of the board.
_SHOWN = ("remat", "slice", "test_views")

Key = tuple[str, str, TypedReach]


class Board(NamedTuple):
    """A board.

    Attributes:
        dataset: what is trained on.
        recipe: what all runs have in common.
        seeds: that every row is trained with.
        rows: in the order in which they were added.
        measured: speed, memory and counted costs by model, rule and reach.
    """

    dataset: str
    recipe: TrainConfig
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    measured: dict[Key, dict[str, Any]]


def key_of(row: Row) -> Key:
    """What a row's speed and costs belong to, whatever its budget."""
    return row.model, row.rule, row.reach


def recipe_of(dataset: str, options: str) -> TrainConfig:
    """What all runs of a board have in common.

    Raises:
        UserError: an unknown data set, a quotation with no end, or an option that is the board's
            own.
    """
    try:
        default_config(dataset)
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        arguments = shlex.split(options)
    except ValueError as error:
        raise UserError(f"--options {options!r} has {error}; mend its quotes.") from error
    # A file may be a pipe, which is read but once.
    merged = with_file(dataset, arguments)
    given = {argument.split("=")[0] for argument in merged}
    for names, why in (
        (_OWN, "is the board's to say; give it to the board, or leave it out"),
        (_NEVER, "no run of a board can have; leave it out"),
    ):
        for name in names:
            if found := given & {option(name), option(f"no_{name}")}:
                raise UserError(
                    f"--options has {found.pop()}, which {why}, also in a file that --config names."
                )
    recipe = parse_merged(dataset, "", merged)
    default = default_config(dataset)
    if recipe.dataset != dataset:
        raise UserError(
            f"--options has --dataset {recipe.dataset}, and the board is of {dataset}; leave it "
            f"out, or give --dataset {recipe.dataset} to a board of its own."
        )
    for name in _NEVER:
        if (value := getattr(recipe, name)) != getattr(default, name):
            raise UserError(
                f"--options has {option(name)} {value} from a run, which no run of a board can "
                "have; give that run's other options themselves."
            )
    # A run has one of each, and a board several; what a person wrote is refused above.
    return dataclasses.replace(recipe, **{name: getattr(default, name) for name in _OWN})


def read(folder: pathlib.Path) -> Board | None:
    """The board that a folder holds; None for none.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / "board.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if content["format"] != _FORMAT:
            raise ValueError(f"it has format {content['format']}, and this version knows {_FORMAT}")
        rows = tuple(map(row_of, content["rows"]))
        measured = {(m["model"], m["rule"], m["reach"]): m for m in content["measured"]}
        dataset = content["dataset"]
        # Boards of before it was there have what was typed.
        recipe = (
            from_dict(content["recipe"])
            if "recipe" in content
            else recipe_of(dataset, content["options"])
        )
        return Board(dataset, recipe, tuple(content["seeds"]), rows, measured)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a board of this version: {error!r}.") from error


def to_json(board: Board, summary: list[dict[str, Any]]) -> dict[str, Any]:
    """What board.json holds: the board, and its table."""
    return {
        "format": _FORMAT,
        "dataset": board.dataset,
        "recipe": dataclasses.asdict(board.recipe),
        "seeds": list(board.seeds),
        "rows": summary,
        "measured": list(board.measured.values()),
    }


def extend(config: BoardConfig, stored: Board | None) -> Board:
    """A board with what a command adds to it; what is not given is as the board has it.

    Raises:
        UserError: a new board without a budget, or another recipe than the board's.
    """
    budgets: dict[str, float] = {}
    if config.epochs is not None:
        budgets["epochs"] = config.epochs
    if config.seconds is not None:
        budgets["seconds"] = config.seconds
    if stored is None:
        if not budgets:
            raise UserError(
                f"{config.workdir} holds no board yet; say its budget: --epochs N or --seconds S."
            )
        dataset = config.dataset or "cifar10"
        recipe = recipe_of(dataset, config.options or "")
        models = config.models or [recipe.model]
        rules, reaches = config.rules or list(_RULES), config.reach or [1, 2]
        rows = rows_of(recipe, models, rules, reaches, budgets)
        several_rules.check_used(recipe, [train_config(recipe, row) for row in rows])
        return Board(dataset, recipe, tuple(config.seeds or (0, 1, 2)), _unique(rows), {})
    _check_same(config, stored)
    rows = list(stored.rows)
    # A number for each loss is of networks with as many losses.
    known = {(row.model, row.reach) for row in rows}
    if config.rules or config.models or config.reach or budgets:
        for budget in [budgets] if budgets else [{r.budget: r.amount} for r in stored.rows]:
            new = rows_of(
                stored.recipe,
                config.models or [row.model for row in stored.rows],
                config.rules or [row.rule for row in stored.rows],
                config.reach or _reaches(stored),
                budget,
            )
            rows += [
                row
                for row in new
                if config.reach or isinstance(row.reach, int) or (row.model, row.reach) in known
            ]
    seeds = dict.fromkeys((*stored.seeds, *config.seeds))
    return stored._replace(rows=_unique(rows), seeds=tuple(seeds))


def _unique(rows: list[Row]) -> tuple[Row, ...]:
    return tuple(dict.fromkeys(rows))


def _reaches(board: Board) -> list[TypedReach]:
    """Of those that could have any."""
    return [row.reach for row in board.rows if _could_reach(board.recipe, row)] or [1]


def _could_reach(recipe: TrainConfig, row: Row) -> bool:
    try:
        return train_config(recipe, dataclasses.replace(row, reach=2)).reach == 2
    except UserError:
        # A user's own rule that is gone, like what else its row needed once.
        return True


def _check_same(config: BoardConfig, stored: Board) -> None:
    if config.dataset not in (None, stored.dataset):
        raise UserError(
            f"{config.workdir} holds a board of {stored.dataset}, not of {config.dataset}; give "
            "another --workdir."
        )
    if config.options is None:
        return
    ours, theirs = recipe_of(stored.dataset, config.options), stored.recipe
    shown = _SHOWN if ours.data_dir is None else (*_SHOWN, "data_dir")
    differing = [
        f"{option(name)} {getattr(theirs, name)} there, {getattr(ours, name)} here"
        for name in (field.name for field in dataclasses.fields(ours))
        if (name not in NOT_COMPARED or name in shown)
        and name not in _OWN
        and getattr(ours, name) != getattr(theirs, name)
    ]
    if differing:
        raise UserError(
            f"{config.workdir} holds a board with other --options ({'; '.join(differing)}); leave "
            "them out, or give another --workdir."
        )


def _alike(board: Board) -> dict[tuple[Any, ...], tuple[list[str], list[str]]]:
    """By budget and reaches, models and rules of which all pairs are rows of the board."""
    reaches: dict[tuple[Any, ...], list[TypedReach]] = {}
    for row in board.rows:
        has_reach = row.trained_rule not in BASELINES
        cell = row.budget, row.amount, has_reach, row.rule, row.model
        reaches.setdefault(cell, []).append(row.reach)
    models: dict[tuple[Any, ...], list[str]] = {}
    for (*budget, has_reach, rule, model), own in reaches.items():
        models.setdefault((*budget, tuple(own) if has_reach else None, rule), []).append(model)
    grouped: dict[tuple[Any, ...], tuple[list[str], list[str]]] = {}
    # Rules without a reach last: they go with others, whatever the reaches of those are.
    for (*budget, own, rule), own_models in sorted(models.items(), key=lambda one: not one[0][2]):
        key = (*budget, own, tuple(own_models))
        if own is None:
            key = next((k for k in grouped if k[:2] == key[:2] and k[3] == key[3]), key)
        grouped.setdefault(key, (own_models, []))[1].append(rule)
    return grouped


def _count_used(
    recipe: TrainConfig, key: tuple[Any, ...], alike: tuple[list[str], list[str]]
) -> int:
    """How many of the options that not all rules take are of use to rows that are alike."""
    (budget, amount, _, _), (models, rules) = key, alike
    try:
        runs = [
            train_config(recipe, Row(model, rule, 1, budget, amount))
            for model, rule in itertools.product(models, rules)
        ]
    except UserError:
        # A user's own rule that is gone.
        return 0
    plain, names = TrainConfig(), (*OF_RULES, *OF_CUTS)
    asked = {name: v for name in names if (v := getattr(recipe, name)) != getattr(plain, name)}
    return sum(any(getattr(one, name) == v for one in runs) for name, v in asked.items())


def commands(board: Board, workdir: str) -> list[str]:
    """Commands that make the same board: one for all rules that have the same rows otherwise."""
    # Not as typed: what they named may have changed.
    recipe = {k: v for k, v in changed_options(board.recipe).items() if k not in _OWN}
    options = shlex.join(to_arguments(recipe))
    # A board begins with options that some of its rows have a use for.
    groups = sorted(_alike(board).items(), key=lambda group: -_count_used(board.recipe, *group))
    lines = []
    for (budget, amount, reaches, _), (models, rules) in groups:
        arguments = ["python", "-m", "experiments.board", "--workdir", workdir]
        arguments += ["--dataset", board.dataset, "--models", *models, "--rules", *rules]
        if reaches:
            arguments += ["--reach", *map(str, reaches)]
        arguments += ["--seeds", *map(str, board.seeds), f"--{budget}", f"{amount:g}"]
        if options:
            arguments += [f"--options={options}"]
        lines.append(shlex.join(arguments))
    return lines
