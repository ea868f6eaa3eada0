"""Draws where gradients stop: ``python docs/drawings/gradients.py`` writes the two pictures.

Plain SVG, in colours that read on a light and on a dark page.
"""

import pathlib

IMAGES = pathlib.Path(__file__).parents[1] / "images"
BOX, GAP, LEFT = 100, 22, 16
COLOURS = ("#1f77b4", "#d9730d", "#2a9d4a", "#a83ec0", "#c8342b")
BLOCKS = ("block 1", "block 2", "block 3", "block 4", "classifier")
STYLE = """<style>
  text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
         font-size: 17px; fill: #1b1f24; }
  .title { font-weight: 600; font-size: 19px; }
  .small { font-size: 15px; fill: #57606a; }
  .middle { text-anchor: middle; }
  .box { fill: #eef2f7; stroke: #57606a; stroke-width: 1.5; }
  .fixed { fill: #fff4d6; stroke: #9a6b00; stroke-width: 1.5; }
  .learned { fill: #e2f3e5; stroke: #2a7d3f; stroke-width: 1.5; }
  .flow { stroke: #57606a; stroke-width: 2; fill: none; }
</style>"""


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    """A whole file, on white paper so that a dark page does not swallow it."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            f"<title>{title}</title>",
            STYLE,
            f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def text(x: float, y: float, words: str, kind: str = "middle", colour: str = "") -> str:
    """Words at a place."""
    fill = f' style="fill: {colour}"' if colour else ""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}"{fill}>{words}</text>'


def box(x: float, y: float, width: float, height: float, words: str, kind: str = "box") -> list:
    """A box with words in its middle, a line for each."""
    lines = words.split("\n")
    first = y + height / 2 + 6 - 10 * (len(lines) - 1)
    return [
        f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>',
        *(text(x + width / 2, first + 20 * i, line) for i, line in enumerate(lines)),
    ]


def arrow(x1: float, y1: float, x2: float, y2: float, colour: str = "#57606a") -> list[str]:
    """A straight arrow, along one axis."""
    dx, dy = (x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1)
    tip = [(x2, y2)] + [(x2 - 9 * dx + 5 * s * dy, y2 - 9 * dy + 5 * s * dx) for s in (1, -1)]
    points = " ".join(f"{x:g},{y:g}" for x, y in tip)
    line = f'x1="{x1:g}" y1="{y1:g}" x2="{x2 - 6 * dx:g}" y2="{y2 - 6 * dy:g}"'
    return [
        f'<line {line} style="stroke: {colour}" class="flow"/>',
        f'<polygon points="{points}" fill="{colour}"/>',
    ]


def row(top: int, title: str, below: str, spans: list[tuple[int, int]]) -> list[str]:
    """A network, its losses, and how far down each of them teaches.

    Args:
        top: of the row.
        title: above it.
        below: what there is to say.
        spans: ``(block of a loss, lowest block that it teaches)``.
    """
    parts = [text(LEFT, top, title, "title"), text(LEFT, top + 22, below, "small")]
    y = top + 74
    left = [LEFT + i * (BOX + GAP) for i in range(len(BLOCKS))]
    for i, name in enumerate(BLOCKS):
        parts += box(left[i], y, BOX, 40, name)
        if i:
            parts += arrow(left[i] - GAP, y + 20, left[i], y + 20)
    for lane, (source, lowest) in enumerate(spans):
        colour = COLOURS[source]
        name = "L" if len(spans) == 1 else f"L{source + 1}"
        height = y + 60 + 20 * (lane % max(s - e + 1 for s, e in spans) if len(spans) > 1 else 0)
        right = left[source] + BOX - 8
        parts.append(
            f'<circle cx="{left[source] + BOX / 2:g}" cy="{y - 17}" r="16" fill="{colour}"/>'
        )
        parts.append(text(left[source] + BOX / 2, y - 11, name, "middle", "#ffffff"))
        parts += arrow(right, height, left[lowest] + 6, height, colour)
        # Where it stops.
        x = left[lowest] + 3
        parts.append(
            f'<line x1="{x}" y1="{height - 9}" x2="{x}" y2="{height + 9}" '
            f'style="stroke: {colour}; stroke-width: 4"/>'
        )
    return parts


def gradients() -> str:
    """Backpropagation, local learning, and a reach of two."""
    last = len(BLOCKS) - 1
    rows = [
        *row(
            34, "Backpropagation", "One loss; its gradient goes through every block.", [(last, 0)]
        ),
        *row(
            *(228, "Local learning (reach 1)"),
            "A loss a block; its gradient stops at the block's input.",
            [(i, i) for i in range(last + 1)],
        ),
        *row(
            *(422, "Reach 2"),
            "A loss teaches its own block and the one below.",
            [(i, max(i - 1, 0)) for i in range(last + 1)],
        ),
    ]
    width = 2 * LEFT + len(BLOCKS) * BOX + (len(BLOCKS) - 1) * GAP
    return picture(width, 624, "Where gradients stop: backpropagation, reach 1, reach 2", rows)


def block() -> str:
    """What is inside a block and its loss."""
    blue, parts = COLOURS[0], []
    parts += [text(16, 30, "One block, and the loss that it learns from", "title")]
    y = 56
    parts += box(16, y, 78, 56, "input\nx")
    parts += box(148, y, 150, 56, "convolution,\nBatchNorm, act.", "learned")
    parts += box(352, y, 120, 56, "activation\na")
    parts += arrow(94, y + 28, 148, y + 28) + arrow(298, y + 28, 352, y + 28)
    parts += [
        *arrow(472, y + 28, 536, y + 28),
        text(572, y + 24, "next"),
        text(572, y + 44, "block"),
    ]
    # The wall before the block, and the one after it.
    for x in (121, 504):
        parts.append(
            f'<line x1="{x}" y1="{y - 4}" x2="{x}" y2="{y + 60}" '
            'style="stroke: #c8342b; stroke-width: 4"/>'
        )
    parts.append(text(121, y + 82, "no gradient", "small middle", "#c8342b"))
    parts.append(text(530, y + 82, "no gradient", "small middle", "#c8342b"))
    second = y + 120
    parts += arrow(412, y + 56, 412, second)
    parts += box(352, second, 120, 56, "pooled,\nnormalised z")
    parts += box(192, second, 124, 56, "W\nfixed waves", "fixed")
    parts += box(76, second, 84, 56, "M\nlearned", "learned")
    parts += arrow(352, second + 28, 316, second + 28) + arrow(192, second + 28, 160, second + 28)
    third = second + 96
    parts += arrow(118, second + 56, 118, third)
    parts += box(16, third, 290, 44, "cross-entropy with the label")
    parts += [text(330, third + 17, "its gradient goes back to the", "small", blue)]
    parts += [text(330, third + 36, "block's weights and to M, no further", "small", blue)]
    return picture(620, third + 62, "A block, its fixed projection and its local loss", parts)


PICTURES = {"gradients.svg": gradients, "block.svg": block}

if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (IMAGES / name).write_text(draw())
