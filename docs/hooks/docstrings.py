"""Docstrings as Markdown, before pages show them: doctests, literal blocks and roles are code."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")
_LITERAL = re.compile(r"::\n\n(?=    )")
_DOCTEST = re.compile(
    r"^(?P<indent> *)>>> (?:.*\n?)(?:(?P=indent)\S.*\n?|(?P=indent) +\S.*\n?)*", re.M
)


def markdown(text: str) -> str:
    """A docstring as Markdown."""

    def fenced(found: re.Match[str]) -> str:
        indent = found["indent"]
        return f"{indent}```python\n{found[0].rstrip()}\n{indent}```\n"

    return _DOCTEST.sub(fenced, _LITERAL.sub(":\n\n", _ROLE.sub(r"`\1`", text)))


class Markdown(griffe.Extension):
    """Rewrites every docstring that is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Before anything is made of it."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
