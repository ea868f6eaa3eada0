"""Options from elsewhere than the command line: a file of them, or another run."""

import dataclasses
import difflib
import pathlib
import tomllib
import types
import typing
from collections.abc import Mapping
from typing import Any

from experiments.config import TrainConfig
from experiments.config_choices import option

_IN_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _kinds(annotation: Any) -> tuple[type, ...]:
    """The types that a field's value may have, where there is one: ``int`` of ``int | None``."""
    if isinstance(annotation, types.UnionType):
        return tuple(one for one in typing.get_args(annotation) if one is not type(None))
    return (annotation,)


KINDS = {field.name: _kinds(field.type) for field in dataclasses.fields(TrainConfig)}


def read(path: pathlib.Path) -> dict[str, Any]:
    """The options in a TOML file, ``batch-size = 64`` or ``batch_size = 64``, by field.

    Args:
        path: of the file.

    Raises:
        ValueError: it cannot be read, or has what is no option, or a value of the wrong type.
    """
    try:
        written = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"--config {path} cannot be read ({reason}).") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--config {path} is no TOML: {error}.") from error
    values: dict[str, Any] = {}
    for key, value in written.items():
        name = key.replace("-", "_")
        if name not in KINDS:
            close = difflib.get_close_matches(name, KINDS, n=1, cutoff=0.0)
            raise ValueError(
                f"--config {path} has {key!r}, which is no option of a training command; the "
                f"nearest is {close[0].replace('_', '-')!r}."
            )
        if name in values:
            raise ValueError(f"--config {path} has {option(name)} twice; leave one out.")
        kinds = KINDS[name]
        # TOML's 1 is a number too; its true is none, though Python's is.
        fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
        if not fits or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(_IN_WORDS[kind] for kind in kinds)
            raise ValueError(f"--config {path} has {key} = {value!r}; expected {expected}.")
        values[name] = value
    return values


def to_arguments(values: Mapping[str, Any]) -> list[str]:
    """Options as they are typed.

    Args:
        values: by field, none of them None.

    >>> to_arguments({"batch_size": 64, "progress": False, "deterministic": True})
    ['--batch-size', '64', '--no-progress', '--deterministic']
    """
    arguments = []
    for name, value in values.items():
        if isinstance(value, bool):
            arguments.append(option(name if value else f"no_{name}"))
        else:
            arguments += [option(name), str(value)]
    return arguments
