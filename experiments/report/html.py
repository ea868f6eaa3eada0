"""HTML from values: escaped text, tables, pictures inside the page."""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --quiet: #5b6570; --line: #dfe3e8; --mark: #1f5fbf; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 70rem; color: var(--ink);
  background: #fff; font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .2rem 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--line); }
p.quiet, .quiet { color: var(--quiet); margin: .2rem 0 .8rem; }
.figures { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.figures div { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .9rem;
  flex: 1 1 9rem; }
.figures b { display: block; font-size: 1.45rem; line-height: 1.2; }
.figures span { color: var(--quiet); font-size: .88rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr));
  gap: 1rem; }
img { width: 100%; height: auto; display: block; }
.confusion { max-width: 34rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: top; font-variant-numeric: tabular-nums; }
th { color: var(--quiet); font-weight: 600; }
th:first-child, td:first-child, table.text th, table.text td { text-align: left; }
table.text td { overflow-wrap: anywhere; }
table.text td:first-child { white-space: nowrap; overflow-wrap: normal; }
pre { background: #f4f6f8; border-radius: .4rem; padding: .7rem .9rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .9rem; }
summary { cursor: pointer; color: var(--mark); margin: .6rem 0; }
"""


def text(value: Any) -> str:
    """A value as a reader sees it: numbers short, None as nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return html.escape(str(value))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    """A table; what has no number stays empty.

    Args:
        columns: headings.
        rows: as long as the headings; strings are taken as text, floats shown to four digits.
        kind: ``"text"`` for one of words.
    """
    head = "".join(f"<th>{text(column)}</th>" for column in columns)
    head = f"<thead><tr>{head}</tr></thead>\n" if any(columns) else ""
    body = "".join(
        "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>\n" for row in rows
    )
    return f'<div class="scroll"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>\n'


def pairs(values: Mapping[str, Any], head: tuple[str, str] = ("", "")) -> str:
    """A table of names and values."""
    return table(head, list(values.items()), "text")


def picture(svg: bytes, what: str) -> str:
    """A picture inside the page."""
    data = base64.b64encode(svg).decode()
    return f'<img alt="{html.escape(what)}" src="data:image/svg+xml;base64,{data}">\n'


def section(title: str, content: str) -> str:
    """A heading and what is under it; nothing for nothing."""
    return f"<h2>{html.escape(title)}</h2>\n{content}" if content else ""


def document(title: str, content: str) -> str:
    """The whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{content}</body>\n</html>\n"
    )
