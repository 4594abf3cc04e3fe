"""The page as a browser parses it: data that come back, nothing that breaks out, nothing from elsewhere."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from unite_fast.evaluation.gallery_page import Chart, Row, Section
from unite_fast.evaluation.molecules import gallery_page
from unite_fast.evaluation.molecules.gallery_page import BAD, GOOD, PLAIN, Frame, MoleculeFigure, Shape, render

VOID = {"meta", "input", "br", "line", "polyline"}
EVIL = '</script><!--<script>alert(1)</script>"><b>&amp;\u2028'


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects figures, scripts and attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.scripts, self.captions = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attributes), ""))
        if tag == "figcaption":
            self.captions.append([])

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        if self.open[-2:] == ["figcaption", "span"]:
            self.captions[-1].append(data)

    def figures(self) -> list[dict]:
        """The data of each figure."""
        data = [json.loads(text) for attributes, text in self.scripts if attributes.get("type") == "application/json"]
        return data[:-1]  # the last one is the table of elements


def water(caption: str = "H₂O") -> Frame:
    shape = Shape(
        ["O", "H", "H"], np.array([[0, 0, 0.00049], [0.757, 0.586, 0], [-0.757, 0.586, 0]]), np.array([[0, 1, 1]])
    )
    return Frame([[shape]], [(caption, PLAIN), ("not valid", BAD)])


def page_of(*figures: MoleculeFigure, **head: str) -> str:
    return render({"recipe": "tiny", **head}, [Section("one", "One", "A text.", [Row("", figures)])], "today")


def test_figures_carry_their_molecules():
    first, second = water("first"), water("second")
    second.views[0].append(Shape(["N"], np.zeros((1, 3)), np.zeros((0, 3), np.int64)))
    text = page_of(MoleculeFigure([first, second], ["water"], first=1), MoleculeFigure([water()], ["still"]))
    page = Page(text)
    moving, still = page.figures()
    assert moving["first"] == 1 and [len(frame["views"][0]) for frame in moving["frames"]] == [1, 2]
    assert still["frames"][0]["views"] == [
        [{"symbols": ["O", "H", "H"], "positions": [0, 0, 0, 0.757, 0.586, 0, -0.757, 0.586, 0], "bonds": [0, 1, 1]}]
    ]
    assert page.captions == [["second", "not valid"], ["H₂O", "not valid"]], "that of the first frame shown"
    assert page.tags.count("canvas") == 2
    assert ("max", "1") in page.attributes and ("value", "1") in page.attributes
    assert text.count('type="range"') == 1, "a figure of one frame has no slider"
    assert ("class", "bad") in page.attributes and ("aria-label", "still") in page.attributes


def test_pictures_side_by_side_are_of_one_figure():
    frame = Frame([water().views[0], [*water().views[0], *water().views[0]]], [("same bonds", GOOD)])
    figure = MoleculeFigure([frame], ["original", "copy"])
    page = Page(page_of(figure))
    assert page.tags.count("canvas") == 2 and figure.count == 3
    assert [len(view) for view in page.figures()[0]["frames"][0]["views"]] == [1, 2]


def test_nothing_breaks_out_of_the_page():
    frame = water(EVIL)
    frame.views[0][0].symbols[0] = EVIL
    section = Section("one", EVIL, EVIL, [Row(EVIL, [MoleculeFigure([frame, frame], [EVIL])])])
    section.charts.append(Chart(EVIL, [1, 2], [1.0, 2.0]))
    text = render({"recipe": EVIL, EVIL: EVIL}, [section], EVIL)
    page = Page(text)
    assert page.tags.count("script") == 3 and "b" not in page.tags, "the figure's, the elements' and the viewer"
    assert text.count("<!--") == 0
    (data,) = page.figures()
    assert data["frames"][1]["caption"][0][0] == EVIL and data["frames"][0]["views"][0][0]["symbols"][0] == EVIL
    assert page.captions[0][0] == EVIL


def test_the_page_needs_nothing_from_elsewhere():
    page_text = page_of(MoleculeFigure([water()], ["water"]))
    page = Page(page_text)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|import\(|fetch|XMLHttp|localStorage|eval\(", page_text)
    assert not {name for name, _ in page.attributes} & {"src", "srcset", "data", "action", "onclick", "onload"}
    assert "default-src 'none'" in page_text
    assert "prefers-color-scheme: dark" in page_text and "prefers-reduced-motion" in page_text
    scripts = [text for attributes, text in page.scripts if not attributes]
    assert scripts == [(Path(gallery_page.__file__).with_name("viewer.js")).read_text("utf-8")]


def test_the_viewer_finds_what_the_page_has():
    page_text = page_of(MoleculeFigure([water(), water()], ["water"]))
    balls = json.loads(Page(page_text).scripts[-2][1])
    assert balls.keys() >= {"H", "C", "N", "O", "F", ""}
    assert all(0 < radius < 1 and len(colour) == 3 for radius, colour in balls.values())
    viewer = Path(gallery_page.__file__).with_name("viewer.js").read_text("utf-8")
    for name in re.findall(r"settings = \{(.*?)\}", viewer)[0].split(","):
        assert f'name="{name.split(":")[0].strip()}"' in page_text
    for variable in re.findall(r'getPropertyValue\("(.*?)"\)', viewer):
        # Two schemes; the viewer reads the colour digit by digit.
        assert len(re.findall(rf"{variable}: #[0-9a-f]{{6}}\b", page_text)) == 2
    for css_class in re.findall(r'querySelector(?:All)?\("\.(\w+)"\)', viewer):
        assert re.search(rf'class="[^"]*\b{css_class}\b', page_text), css_class


def test_numbers_that_json_lacks_are_refused():
    frame = water()
    frame.views[0][0].positions[0, 0] = np.nan
    with pytest.raises(ValueError):
        page_of(MoleculeFigure([frame], ["water"]))


@pytest.fixture(scope="module")
def run_viewer():
    """Runs JavaScript after the part of the viewer that needs no page; returns the value of an expression."""
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    viewer = Path(gallery_page.__file__).with_name("viewer.js").read_text("utf-8")
    functions = viewer.partition("\n// Vectors and rotations")[2].partition("\n// Colours")[0]

    def run(expression: str):
        code = f"//{functions}\nconsole.log(JSON.stringify({expression}))"
        return json.loads(subprocess.run(["node", "-e", code], check=True, capture_output=True, text=True).stdout)

    return run


def test_the_viewer_turns_molecules_without_mirroring_them(run_viewer):
    turns = "Array.from({length: 500}, (_, i) => [Math.sin(i), Math.cos(3 * i)])"
    start = "[1,0,0, 0,1,0, 0,0,1]"
    rotation = np.array(run_viewer(f"{turns}.reduce((r, [x, y]) => turned(r, x, y), {start})")).reshape(3, 3)
    assert rotation @ rotation.T == pytest.approx(np.eye(3), abs=1e-12) and np.linalg.det(rotation) > 0
    front = [0, 0, 1]
    right, down = (run_viewer(f"rotated(turned({start}, {x}, {y}), {front})") for x, y in ((0.1, 0), (0, 0.1)))
    assert right[0] > 0.09 and down[1] < -0.09, "the side to the reader follows the pointer"


def test_double_bonds_lie_in_the_plane_of_their_neighbours(run_viewer, few):
    ethylene = few.positions[4, :6][:, [0, 2, 1]].astype(float)
    data = {
        "symbols": ["C", "C", "H", "H", "H", "H"],
        "positions": ethylene.ravel().tolist(),
        "bonds": [0, 1, 2, 0, 2, 1, 0, 3, 1, 1, 4, 1, 1, 5, 1],
    }
    sides = [bond["side"] for bond in run_viewer(f"molecule({json.dumps(data)}).bonds")]
    assert np.abs(sides[0]) == pytest.approx([0, 0, 1], abs=1e-9)
    # Cyanide's triple bond has no plane; any side across it does.
    line = {"symbols": ["H", "C", "N"], "positions": [-1, 0, 0, 0, 0, 0, 1.2, 0, 0], "bonds": [0, 1, 1, 1, 2, 3]}
    side = run_viewer(f"molecule({json.dumps(line)}).bonds")[1]["side"]
    assert np.linalg.norm(side) == pytest.approx(1) and side[0] == pytest.approx(0)


def test_the_viewer_is_javascript():
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    viewer = Path(gallery_page.__file__).with_name("viewer.js")
    assert subprocess.run(["node", "--check", viewer], capture_output=True).returncode == 0
