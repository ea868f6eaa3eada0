"""Keeps an option of a command on one line: a browser would break ``--reach`` after its dashes."""

import re
from typing import Any

_INLINE = re.compile(r"<code>([^<]*--[^<]*)</code>")
_OPTION = re.compile(r"(?<![\w-])--[\w-]+")


def on_page_content(content: str, **_: Any) -> str:
    """The page with each option of its inline code in a span that does not break."""

    def whole(found: re.Match[str]) -> str:
        unbroken = _OPTION.sub(r'<span class="option">\g<0></span>', found[1])
        return f"<code>{unbroken}</code>"

    return _INLINE.sub(whole, content)
