"""Render a gallery of molecules as one self-contained HTML file. viewer.js draws them in three dimensions."""

import html
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unite_fast.data_pipeline.molecules.elements import SYMBOLS
from unite_fast.evaluation.gallery_page import STYLE, Section, document
from unite_fast.evaluation.molecules.pictures import BALLS, OTHER_BALL

GOOD, FAIR, BAD, PLAIN = "good", "fair", "bad", ""
"""Kinds of lines of a caption, by colour."""
PRECISION = 3
"""Decimals of positions in the page, Angstrom."""


@dataclass
class Shape:
    """A molecule as it is drawn."""

    symbols: list[str]
    """Of each atom, [n]."""
    positions: np.ndarray
    """[n, 3], Angstrom: x to the right, y up, z towards the reader. The view turns around 0."""
    bonds: np.ndarray
    """Two atoms and the order, int64 [k, 3]."""


@dataclass
class Frame:
    """What a figure shows at one position of its slider."""

    views: list[list[Shape]]
    """For each of its pictures the molecules in it. Where there are several, those before the last are pale."""
    caption: list[tuple[str, str]]
    """Lines: the text and its kind."""


@dataclass
class MoleculeFigure:
    """One picture or several side by side, which turn together; with a slider if there are several frames."""

    frames: list[Frame]
    alts: list[str]
    """For each picture, what is in it."""
    first: int = 0
    """Frame that is shown at first."""

    @property
    def count(self) -> int:
        """Number of molecules."""
        return sum(len(view) for frame in self.frames for view in frame.views)

    def html(self) -> str:
        caption = "".join(f'<span class="{kind}">{html.escape(text)}</span>' for text, kind in self._shown.caption)
        pictures = "".join(
            f'<canvas tabindex="0" role="img" aria-label="{html.escape(alt)}"></canvas>' for alt in self.alts
        )
        slider, last = "", len(self.frames) - 1
        if last:
            slider = (
                '<div class="slide"><button type="button" class="play">play</button><input type="range" min="0" '
                f'max="{last}" value="{self.first}" aria-label="{html.escape(self.alts[0])}"></div>'
            )
        data = json_text({"first": self.first, "frames": [_frame_data(frame) for frame in self.frames]})
        return (
            f'<figure class="molecule{" moving" if last else ""}"><div class="images">{pictures}</div>{slider}'
            f'<figcaption>{caption}</figcaption><script type="application/json">{data}</script></figure>'
        )

    @property
    def _shown(self) -> Frame:
        return self.frames[self.first]


MOLECULE_STYLE = """
:root { --wide: 8.6rem; --narrow: calc(50vw - 1.05rem); --good: #1d7440; --fair: #8a5a00; --bad: #b3261e;
  --card: #ffffff }
@media (prefers-color-scheme: dark) {
  :root { --good: #7bc893; --fair: #dcb25f; --bad: #f0958d; --card: #1b1f24 }
}
.molecule canvas { display: block; width: var(--side); height: var(--side); background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; cursor: grab; touch-action: pan-y }
.molecule canvas:active { cursor: grabbing }
.molecule canvas:focus { touch-action: none }
.molecule.moving { width: min(100%, 20rem) }
.molecule.moving canvas { width: 100%; height: auto; aspect-ratio: 1 }
.molecule figcaption span { display: block; min-height: 1.3em }
.molecule .good { color: var(--good) }
.molecule .fair { color: var(--fair) }
.molecule .bad { color: var(--bad) }
.molecule.moving figcaption { min-height: 5.2em }
.row:has(.molecule) { gap: 1rem .5rem; margin-bottom: 1rem }
.slide { display: flex; gap: .6rem; align-items: center; margin: .4rem 0 }
.slide input { flex: 1; min-width: 0; accent-color: var(--accent) }
.play, .tools button { border: 1px solid var(--line); border-radius: 4px; padding: .1rem .7rem; cursor: pointer }
.tools { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; align-items: center;
  background: var(--paper); border-bottom: 1px solid var(--line); padding: .5rem 0; margin-top: 1.5rem }
.tools label { display: flex; gap: .4rem; align-items: center }
.tools input { accent-color: var(--accent) }
section { scroll-margin-top: 3rem }
@media (hover: none) { .tools .hover { display: none } }
@media print { .tools, .slide { display: none } }
"""

HINT = (
    "Drag a molecule to turn it. After a click on it the wheel zooms, arrow keys turn it, and H and L switch hydrogens "
    "and labels; a double click resets it."
)

TOOLS = """<noscript><p>The molecules are drawn by JavaScript, which is off.</p></noscript>
<div class="tools" role="group" aria-label="all molecules">
<label><input type="checkbox" name="hydrogens" checked>hydrogens</label>
<label><input type="checkbox" name="labels">labels</label>
<label class="hover"><input type="checkbox" name="turning" checked>turn the row under the pointer</label>
<button type="button" class="back">reset all views</button>
</div>
"""


def render(head: dict[str, str], sections: list[Section], date: str) -> str:
    """A page of molecules as an HTML document; see `gallery_page.document`."""
    balls = {SYMBOLS[number]: ball for number, ball in BALLS.items()} | {"": OTHER_BALL}
    return document(
        head,
        sections,
        date,
        hint=HINT,
        style=STYLE + MOLECULE_STYLE,
        script=Path(__file__).with_name("viewer.js").read_text("utf-8"),
        above=TOOLS,
        below=f'<script type="application/json" id="balls">{json_text(balls)}</script>\n',
    )


def json_text(value: object) -> str:
    """JSON for an element `script`: nothing in it can end the element or begin a comment."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _frame_data(frame: Frame) -> dict:
    return {"views": [[_shape_data(shape) for shape in view] for view in frame.views], "caption": frame.caption}


def _shape_data(shape: Shape) -> dict:
    return {
        "symbols": shape.symbols,
        "positions": np.round(np.asarray(shape.positions, np.float64), PRECISION).ravel().tolist(),
        "bonds": shape.bonds.ravel().tolist(),
    }
