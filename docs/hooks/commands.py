"""Writes commands.md's list from the commands themselves, when the pages are built.

Each module that can be run is asked for its ``--help``; the parser that would answer is read
instead. So an option stands here if and only if the command has it.
"""

import argparse
import contextlib
import io
import pathlib
import runpy
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

ROOT = pathlib.Path(__file__).parents[2]
PLACE = "<!-- commands -->"


def commands() -> Iterator[str]:
    """Modules that can be run."""
    for package in ("experiments", "pallas_kernels"):
        folder = ROOT / package
        names = {
            path.parent.name if path.stem == "__main__" else path.stem
            for path in (*folder.glob("*.py"), *folder.glob("*/__main__.py"))
            if "if __name__ ==" in path.read_text()
        }
        yield from (f"{package}.{name}" for name in sorted(names))


def parser_of(module: str) -> argparse.ArgumentParser:
    """What parses a command's options."""
    found: list[argparse.ArgumentParser] = []
    with (
        mock.patch.object(sys, "argv", [module, "--help"]),
        mock.patch.object(
            argparse.ArgumentParser, "print_help", lambda self, *_: found.append(self)
        ),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(SystemExit),
        # Of a module that was imported before.
        warnings.catch_warnings(action="ignore", category=RuntimeWarning),
    ):
        # As the main module, in whose source the options' help is looked for.
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    if not found:
        raise RuntimeError(f"python -m {module} --help shows no help")
    return found[0]


def _default(action: argparse.Action) -> str:
    value = action.default
    told = "[default:" in (action.help or "")
    if told or isinstance(value, bool) or value in (None, argparse.SUPPRESS, [], ""):
        return ""
    shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f" Default: `{shown}`."


def _text(words: str | None) -> str:
    text = " ".join((words or "").replace("(default: %(default)s)", "").replace("%%", "%").split())
    return text.replace("<", "&lt;").replace("*", "\\*")


def _option(action: argparse.Action) -> str:
    names = action.option_strings or [action.dest.rpartition(".")[2].upper()]
    takes = action.option_strings and action.nargs != 0 and not isinstance(action.default, bool)
    kind = (action.metavar if isinstance(action.metavar, str) else "").strip("[]")
    placeholder = {"int": " N", "float": " X"}.get(kind, " VALUE")
    value = placeholder + (" ..." if action.nargs in ("*", "+") else "") if takes else ""
    title = ", ".join(f"`{name}{value}`" for name in names)
    return f"{title}\n:   {_text(action.help)}{_default(action)}\n"


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {a.dest: a for a in parser._actions if a.dest != "help"}


def listing() -> str:
    """Every command with its options, as Markdown."""
    parsers = {module: parser_of(module) for module in commands()}
    options = {module: _actions(parser) for module, parser in parsers.items()}
    # Commands of one config: told once, then what differs.
    first: dict[tuple[str, ...], str] = {}
    parts = []
    for module, actions in options.items():
        parser, kind = parsers[module], tuple(sorted(actions))
        parts += [f"## {module}\n"]
        parts += [f"{_text(parser.description)}\n"]
        if kind in first:
            same = options[first[kind]]
            other = [
                f"`{action.option_strings[0]} {action.default}`"
                for dest, action in actions.items()
                if action.option_strings and action.default != same[dest].default
            ]
            anchor = first[kind].replace(".", "")
            parts.append(
                f"The options of [{first[kind]}](#{anchor})"
                + (f", with other defaults: {', '.join(other)}.\n" if other else ".\n")
            )
            continue
        first[kind] = module
        parts += [_option(action) for action in actions.values()]
    return "\n".join(parts)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with the list in its place."""
    return markdown.replace(PLACE, listing()) if PLACE in markdown else markdown
