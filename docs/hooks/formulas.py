r"""Formulas become MathML when the pages are built: browsers set it themselves, without a script.

Arithmatex marks them, as ``\(...\)`` and ``\[...\]``; latex2mathml turns their LaTeX into MathML.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_MARKED = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.S
)


def on_page_content(content: str, **_: Any) -> str:
    """The page with its formulas as MathML."""

    def formula(found: re.Match[str]) -> str:
        block = found["tag"] == "div"
        latex = html.unescape(found["latex"]).strip()
        mathml = convert(latex, display="block" if block else "inline")
        return f'<div class="formula">{mathml}</div>' if block else mathml

    return _MARKED.sub(formula, content)
