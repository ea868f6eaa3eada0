"""The command line: options from typed configs, and errors as one line with exit status 2."""

import argparse
import dataclasses
import functools
import logging
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from simple_parsing import ArgumentParser, SimpleHelpFormatter
from simple_parsing.wrappers.dataclass_wrapper import DataclassWrapper
from simple_parsing.wrappers.field_wrapper import DashVariant, FieldWrapper

from experiments import abort_message, determinism, option_files, output, run_config, startup
from experiments.config import TrainConfig
from experiments.config_choices import BASELINES, OF_LOCAL_LOSSES, OF_RULES, option
from experiments.presets import default_config
from lls_jax.errors import UserError
from pallas_kernels.errors import KernelUnavailableError

Config = TypeVar("Config")

_BAD_INPUT = 2
# What a shell says of a command that SIGPIPE has ended.
_NOBODY_READS = 141
# An empty shell variable behind them is no wish for the default, or for the folder one is in.
_NOT_EMPTY = ("workdir", "data_dir", "out")


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = "" if message.endswith((".", "?")) else f"; see {self.prog} --help"
        super().exit(_BAD_INPUT, f"error: {message}{hint}\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if message and not status:
            # simple_parsing's of a --no-... that is given a value.
            self.error(message)
        super().exit(status, message)


class _Field(FieldWrapper):
    """Asks for a value, which an option that may be None could be typed without."""

    def get_arg_options(self) -> dict[str, Any]:
        options = super().get_arg_options()
        if options.get("nargs") == "?":
            options |= {"nargs": None, "metavar": options["metavar"].strip("[]")}
        return options


class _HelpFormatter(SimpleHelpFormatter):
    """Adds defaults; not where there is none, or where the help says it in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if "[default:" in text or action.default in (None, argparse.SUPPRESS):
            return text
        return super()._get_help_string(action)

    def start_section(self, heading: str | None) -> None:
        # The config's type means nothing to who types the command.
        super().start_section("settings" if heading and heading.endswith("['config']") else heading)


def _at_home(argument: str) -> str:
    """With a folder under ``~``, which a shell leaves as it is behind ``=``, and in a file.

    >>> _at_home("--data-dir=~/data") == "--data-dir=" + os.path.expanduser("~/data")
    True
    """
    start = argument.find("=~") + 1 if argument.startswith("--") else 0
    return argument[:start] + os.path.expanduser(argument[start:])


def parse(
    kind: type[Config],
    prog: str,
    description: str,
    arguments: Sequence[str] | None = None,
    *,
    default: Config | None = None,
    add_more: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> Config:
    """A config from the command line.

    Args:
        kind: the config's type, a dataclass.
        prog: the experiment's name.
        description: what ``--help`` says first.
        arguments: the command line; None for ``sys.argv``.
        default: values of the options that are not given; None for the type's own.
        add_more: adds options to the parser that somebody else has read already.
    """
    parser = _Parser(
        prog=f"python -m experiments.{prog}",
        description=description,
        formatter_class=_HelpFormatter,
        add_option_string_dash_variants=DashVariant.DASH,
        allow_abbrev=False,
    )
    parser.add_arguments(  # type: ignore[call-overload]
        kind,
        dest="config",
        default=default,
        dataclass_wrapper_class=functools.partial(DataclassWrapper, field_wrapper_class=_Field),
    )
    add_more(parser)
    typed = sys.argv[1:] if arguments is None else arguments
    try:
        config = parser.parse_args([*map(_at_home, typed)]).config
    except ValueError as error:
        parser.error(str(error))
    for name, value in vars(config).items():
        if name in _NOT_EMPTY and value == "":
            parser.error(f"{option(name)} is empty; give a path, or leave it out.")
    return config


def run(command: Callable[[], int], leave: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Run a command and exit with its status; what a person can mend is one line, no traceback.

    With ``LLS_JAX_TRACEBACK=1`` in the environment the traceback is shown too.

    Args:
        command: returns the exit status.
        leave: ends the process with it.
    """
    # Orbax notes there what its options imply.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    output.print_anything()
    try:
        status = command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and output.is_gone():
            # The reader has what it wanted.
            output.drop()
            leave(_NOBODY_READS)
        message = _user_message(error)
        if message is None or os.environ.get("LLS_JAX_TRACEBACK"):
            traceback.print_exc()
            leave(1)
        print(f"error: {message}", file=sys.stderr)
        status = _BAD_INPUT
    leave(status)


def _user_message(error: Exception) -> str | None:
    """What to tell the person; None where the error is ours."""
    if isinstance(error, UserError | KernelUnavailableError):
        return str(error)
    if "No space left on device" in str(error):
        where = f" at {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return (
            f"the disk is full{where}: make room, or choose another folder, and run the same "
            "command again; what was saved before is whole."
        )
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}; check the path and its permissions."
    return None


def _add_elsewhere(parser: argparse.ArgumentParser) -> None:
    """Options that say where others come from; a run's config has what came of them."""
    group = parser.add_argument_group("options from elsewhere")
    group.add_argument(
        "--config",
        dest="options_file",
        metavar="FILE",
        help="TOML file of the options below, like batch-size = 64; the command line stands "
        "before it.",
    )
    group.add_argument(
        "--set-from",
        metavar="RUN",
        help="Begin from the options, not the weights, of the run in this folder; --config and the "
        "command line stand before them.",
    )


def _default(found: argparse.Namespace) -> TrainConfig:
    """What is given neither on the command line nor in a file."""
    run = found.set_from
    if run is None:
        return default_config(found.dataset or TrainConfig.dataset, found.preset)
    if found.preset is not None:
        raise ValueError(
            f"--preset {found.preset} does not go with --set-from {run}; leave one out."
        )
    config = run_config.begin_from(pathlib.Path(run))
    if found.rule in BASELINES and found.rule != config.rule:
        # Nobody has typed them for it.
        config = config.without((*OF_RULES, *OF_LOCAL_LOSSES))
    return config if found.dataset is None else dataclasses.replace(config, dataset=found.dataset)


def with_file(prog: str, typed: Sequence[str]) -> list[str]:
    """A training command's options, those of the file that it names as if they were typed first.

    Args:
        prog: the experiment's name.
        typed: the command line.
    """
    finder, typed = _finder(prog), [*map(_at_home, typed)]
    path = finder.parse_known_args(typed)[0].options_file
    try:
        written = {} if path is None else option_files.read(pathlib.Path(path))
    except ValueError as error:
        finder.error(str(error))
    # The last one counts.
    return [*option_files.to_arguments(written), *typed]


def _finder(prog: str) -> _Parser:
    """Of the options by which it is known what the others are by default."""
    finder = _Parser(prog=f"python -m experiments.{prog}", add_help=False, allow_abbrev=False)
    _add_elsewhere(finder)
    for name in ("--preset", "--dataset", "--rule"):
        finder.add_argument(name)
    return finder


def parse_training(
    dataset: str | None, description: str, arguments: Sequence[str] | None = None
) -> TrainConfig:
    """A training run's config from its command line, and the files that this names.

    Args:
        dataset: of :data:`experiments.presets.PRESETS`: that of the command, unless the command
            line names another; None for ``experiments.run``, which is no data set's.
        description: what ``--help`` says first.
        arguments: the command line; None for ``sys.argv``.
    """
    typed = sys.argv[1:] if arguments is None else arguments
    return parse_merged(dataset, description, with_file(dataset or "run", typed))


def parse_merged(dataset: str | None, description: str, typed: Sequence[str]) -> TrainConfig:
    """As :func:`parse_training`, of options that :func:`with_file` has put together."""
    prog = dataset or "run"
    finder = _finder(prog)
    finder.set_defaults(dataset=dataset)
    try:
        default = _default(finder.parse_known_args(typed)[0])
    except (ValueError, UserError) as error:
        finder.error(str(error))
    return parse(TrainConfig, prog, description, typed, default=default, add_more=_add_elsewhere)


def train_command(dataset: str | None, description: str) -> None:
    """The command of a data set: parse, then train.

    Args:
        dataset: of :data:`experiments.presets.PRESETS`; None for whatever the command line names.
        description: what ``--help`` says first.
    """
    if any(argument.partition("=")[0] == "--config" for argument in sys.argv):
        # It may start the process again, and a pipe is read but once.
        startup.prepare()
    config = parse_training(dataset, description)
    startup.prepare()

    leave: Callable[[int], NoReturn] = sys.exit
    if config.coordinator is not None:
        leave = abort_message.prepare(
            "error: this process of the run was ended: it did not connect to the others at "
            f"coordinator {config.coordinator}, one of them was killed, or the network between "
            "them failed; "
            "see what the others say. Start the same run again, with any number of processes, to "
            "resume it from its newest checkpoint."
        )

    def command() -> int:
        if config.deterministic:
            determinism.prepare(pathlib.Path(config.run_folder()))
        # Imported late: JAX takes longer to start than `--help` may take to answer.
        from experiments.train import train_and_advise

        return train_and_advise(config)

    run(command, leave)
