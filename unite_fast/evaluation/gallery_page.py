"""Render a gallery as one self-contained HTML file, readable from a width of 320 pixels.

`molecules/gallery_page.py` renders molecules with `document`.
"""

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image
from torch import Tensor


class Drawn(Protocol):
    """A figure of a page."""

    @property
    def count(self) -> int:
        """Number of images or molecules."""
        ...

    def html(self) -> str: ...


@dataclass
class Figure:
    """One image, or an original and its copy, above a caption."""

    images: list[Tensor]
    """Each uint8 [3, S, S]."""
    alts: list[str]
    caption: str = ""

    @property
    def count(self) -> int:
        return len(self.images)

    def html(self) -> str:
        images = "".join(
            f'<button type="button"><img src="{data_uri(image)}" alt="{html.escape(alt)}" width="{image.shape[-1]}" '
            f'height="{image.shape[-2]}"></button>'
            for image, alt in zip(self.images, self.alts, strict=True)
        )
        caption = f"<figcaption>{html.escape(self.caption)}</figcaption>" if self.caption else ""
        return f'<figure><div class="images">{images}</div>{caption}</figure>'


@dataclass
class Row:
    title: str
    figures: Sequence[Drawn]


@dataclass
class Chart:
    title: str
    steps: list[int]
    values: list[float]


@dataclass
class Section:
    key: str
    """Anchor in the page."""
    title: str
    text: str
    rows: list[Row] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)


SMALL = 64
"""Images up to this side are enlarged with hard pixels: smoothing would show details the model did not draw."""

STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfa; --ink: #1d2126; --faint: #5b636d; --line: #d8dbdf;
  --accent: #0b63a5; --side: var(--wide) }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e6e8ea; --faint: #a2aab4; --line: #343a42; --accent: #7cb8f0 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .2rem; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 3rem 0 .3rem; padding-top: .8rem; border-top: 1px solid var(--line) }
h3 { font-size: .9rem; font-weight: 600; margin: 1rem 0 .3rem; overflow-wrap: anywhere }
p { margin: 0 0 .8rem; max-width: 46rem }
a { color: var(--accent) }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1rem 0 0 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 1rem 0 0 }
dt, figcaption, .date, text { color: var(--faint) }
dd { margin: 0; overflow-wrap: anywhere }
.row { display: flex; flex-wrap: wrap; gap: .6rem .5rem }
figure { margin: 0; width: min-content }
figcaption { font-size: .75rem; line-height: 1.3; margin-top: .15rem; text-align: center; overflow-wrap: anywhere }
.images { display: flex; gap: 2px }
button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: zoom-in; display: block }
img { display: block; width: var(--side); height: auto; background: var(--line) }
.pixels img { image-rendering: pixelated }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1.5rem }
.charts figure { width: 100%; max-width: 34rem }
.charts figcaption { text-align: left; font-size: .9rem; margin: 0 0 .3rem; color: var(--ink) }
svg { display: block; width: 100%; height: auto }
text { fill: var(--faint); font: 11px system-ui, sans-serif }
.grid { stroke: var(--line) }
.curve { fill: none; stroke: var(--accent); stroke-width: 1.6; stroke-linejoin: round }
dialog { border: 1px solid var(--line); background: var(--paper); color: var(--ink); padding: 1rem; max-width: 96vw }
dialog::backdrop { background: rgb(0 0 0 / .6) }
dialog img { width: min(80vw, 70vh, 40rem); margin: auto }
dialog p { margin: .6rem 0; text-align: center; max-width: 40rem }
dialog form { display: flex; gap: .5rem; justify-content: center }
dialog button { border: 1px solid var(--line); padding: .3rem .9rem; cursor: pointer }
@media (max-width: 30rem) {
  :root { --side: var(--narrow) }
  body { padding: 1rem .75rem 3rem }
  dl { grid-template-columns: 1fr; gap: 0 }
  dt { margin-top: .4rem }
  .row { gap: .5rem .4rem }
}
@media print { button { cursor: auto } figure { break-inside: avoid } }
"""

SCRIPT = """
const dialog = document.querySelector("dialog"), shown = dialog.querySelector("img"), words = dialog.querySelector("p")
const all = [...document.querySelectorAll(".images button")]
let at = 0
function show(i) {
  at = (i + all.length) % all.length
  const image = all[at].querySelector("img")
  shown.src = image.src
  shown.alt = words.textContent = image.alt
}
all.forEach((button, i) => button.addEventListener("click", () => { show(i); dialog.showModal() }))
dialog.querySelector(".before").addEventListener("click", () => show(at - 1))
dialog.querySelector(".after").addEventListener("click", () => show(at + 1))
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close() })
dialog.addEventListener("close", () => all[at].focus())
dialog.addEventListener("keydown", event => {
  if (event.key === "ArrowLeft") show(at - 1)
  if (event.key === "ArrowRight") show(at + 1)
})
"""


DIALOG = """<dialog aria-label="enlarged image"><img alt=""><p></p>
<form method="dialog"><button type="button" class="before">previous</button><button>close</button>\
<button type="button" class="after">next</button></form></dialog>
"""


def render(head: dict[str, str], sections: list[Section], date: str) -> str:
    """A page of images as an HTML document; see `document`."""
    figures = [figure for section in sections for row in section.rows for figure in row.figures]
    images = [image for figure in figures if isinstance(figure, Figure) for image in figure.images]
    size = max((image.shape[-1] for image in images), default=0)
    return document(
        head,
        sections,
        date,
        hint="Press an image to enlarge it.",
        style=f":root {{ {_sides(size)} }}{STYLE}",
        script=SCRIPT,
        body_class="pixels" if size <= SMALL else "",
        below=DIALOG,
    )


def document(
    head: dict[str, str],
    sections: list[Section],
    date: str,
    hint: str,
    style: str,
    script: str,
    body_class: str = "",
    above: str = "",
    below: str = "",
) -> str:
    """A page as an HTML document.

    Args:
        head: facts for the top of the page, by name; must contain "recipe".
        date: date of the page.
        hint: how to use the page.
        style, script: CSS and JavaScript.
        above, below: HTML before and after the sections.
    """
    title = html.escape(f"{head['recipe']}: gallery")
    facts = "\n".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in head.items())
    links = "\n".join(f'<a href="#{section.key}">{html.escape(section.title)}</a>' for section in sections)
    body = "\n".join(_section(section) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body{f' class="{body_class}"' if body_class else ""}>
<header>
<h1>{title}</h1>
<p class="date">Made on {html.escape(date)} with unite-fast. {html.escape(hint)}</p>
<nav aria-label="sections">
{links}
</nav>
<dl>
{facts}
</dl>
</header>
<main>
{above}{body}
</main>
{below}<script>{script}</script>
</body>
</html>
"""


def _sides(size: int) -> str:
    """Width of an image on wide and narrow screens: small images at a multiple of their size, so that pixels are equal;
    large images eight in a row, or two on a phone."""
    if size > SMALL:
        return "--wide: 8.6rem; --narrow: calc(50vw - 1.05rem)"
    wide, narrow = (max(size, limit // max(size, 1) * size) for limit in (80, 64))
    return f"--wide: {wide}px; --narrow: {narrow}px"


def _section(section: Section) -> str:
    rows = "\n".join(_row(row) for row in section.rows)
    charts = "\n".join(_chart(chart) for chart in section.charts)
    return f"""<section id="{section.key}">
<h2>{html.escape(section.title)}</h2>
<p>{html.escape(section.text)}</p>
{rows}{f'<div class="charts">{charts}</div>' if charts else ""}
</section>"""


def _row(row: Row) -> str:
    title = f"<h3>{html.escape(row.title)}</h3>\n" if row.title else ""
    return f'{title}<div class="row">\n' + "\n".join(figure.html() for figure in row.figures) + "\n</div>"


def data_uri(image: Tensor) -> str:
    """uint8 [3, S, S] -> a PNG as a data URI."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 8, 24
"""Size of a chart and its margins, in SVG units."""


def _chart(chart: Chart) -> str:
    """One curve on a logarithmic axis."""
    low, high = math.log10(min(chart.values)), math.log10(max(chart.values))
    # A flat curve gets a margin above and below.
    low, high = (low, high) if high - low > 1e-3 else (low - 0.1, high + 0.1)
    first, last = chart.steps[0], max(chart.steps[-1], chart.steps[0] + 1)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - math.log10(value)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in zip(chart.steps, chart.values, strict=True))
    lines = []
    for i in range(5):
        value = 10 ** (low + (high - low) * i / 4)
        lines.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        )
    for step, anchor in ((first, "start"), (last, "end")):
        lines.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{step:,}</text>')
    label = html.escape(
        f"{chart.title}: from {chart.values[0]:.4g} at step {first} to {chart.values[-1]:.4g} at step {last}"
    )
    return (
        f'<figure><figcaption>{html.escape(chart.title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{label}">{"".join(lines)}<polyline class="curve" points="{points}"/></svg></figure>'
    )
