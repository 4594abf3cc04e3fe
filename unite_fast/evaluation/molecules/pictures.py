"""Pictures of molecules: chemists' drawings of the valid ones, balls for the others."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
from unite_fast.evaluation.molecules.alignment import check_same_sizes
from unite_fast.evaluation.molecules.perception import atoms_of, graph, perceive, rdkit
from unite_fast.evaluation.molecules.scores import same_elements

BOND = 0.13
"""Length of a bond, as a share of the side of a picture; large molecules are drawn smaller."""
MARGIN = 0.07
"""Free border of a picture, as a share of its side."""
_BOND_LENGTH = 1.45
"""Angstrom that `BOND` stands for in balls."""
_SMOOTH = 4
"""Balls are drawn at so many times their size, and reduced."""
_RED = (205, 32, 32)
_GREY = (150, 150, 150)
_PALE = (222, 222, 222)
BALLS = {1: (0.26, (245, 245, 245)), 6: (0.40, (85, 85, 85)), 7: (0.39, (48, 80, 248)), 8: (0.38, (230, 40, 30))} | {
    9: (0.36, (80, 190, 70))
}
"""Radius, Angstrom, and colour by atomic number."""
OTHER_BALL = (0.42, (170, 90, 190))


def molecule_grid(molecules: MoleculeSet, columns: int, size: int = 240) -> Image.Image:
    """One picture of all molecules, row by row, on white.

    A valid one (`perceive`) is drawn in two dimensions, without hydrogens where the drawing is clear without them. An
    invalid one is drawn as its atoms, seen along its shortest axis, with a red cross in the corner.

    Args:
        size: side of each picture, pixels.

    Raises:
        UserError: RDKit is not installed.
    """
    pictures = [_picture(*atoms, size) for atoms in atoms_of(molecules)]
    for picture in pictures:
        _frame(picture, _PALE)
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    return _page([[row] for row in rows], columns, size)


def molecule_pairs(truth: MoleculeSet, copies: MoleculeSet, columns: int, size: int = 240) -> Image.Image:
    """As `molecule_grid`, each row of true molecules above the row of their copies. A copy with other elements or other
    bonds by distance (`graph`) has a red frame.

    Raises:
        UserError: sets of different sizes; RDKit is not installed.
    """
    check_same_sizes(truth, copies)
    above, below = [], []
    for original, copy, same in zip(atoms_of(truth), atoms_of(copies), same_elements(truth, copies), strict=True):
        above.append(_picture(*original, size))
        below.append(_picture(*copy, size))
        differs = not same or graph(*original) != graph(*copy)
        _frame(above[-1], _PALE)
        _frame(below[-1], _RED if differs else _PALE)
    starts = range(0, len(above), columns)
    return _page([[part[start : start + columns] for part in (above, below)] for start in starts], columns, size)


def _page(blocks: list[list[list[Image.Image]]], columns: int, size: int) -> Image.Image:
    """Blocks of rows of pictures, with more space between the blocks if they have more than one row."""
    gap = size // 20
    tall = max(map(len, blocks), default=0)
    between = 3 * gap if tall > 1 else gap
    width = columns * (size + gap) + gap
    height = 2 * gap + sum(len(block) * (size + gap) - gap for block in blocks) + between * (len(blocks) - 1)
    page = Image.new("RGB", (width, max(height, 1)), "white")
    top = gap
    for block in blocks:
        for row in block:
            for column, picture in enumerate(row):
                page.paste(picture, (gap + column * (size + gap), top))
            top += size + gap
        top += between - gap
    return page


def _picture(numbers: np.ndarray, positions: np.ndarray, size: int) -> Image.Image:
    molecule = perceive(numbers, positions).molecule
    if molecule is not None:
        return _drawing(molecule, size)
    picture = _balls(numbers, positions, size)
    _cross(picture)
    return picture


def _drawing(molecule: Any, size: int) -> Image.Image:
    """RDKit's drawing of its molecule in two dimensions."""
    chem, draw = rdkit("Chem"), rdkit("Chem.Draw.rdMolDraw2D")
    with rdkit("rdBase").BlockLogs():
        flat = chem.RemoveHs(molecule, sanitize=False)
        rdkit("Chem.rdDepictor").Compute2DCoords(flat)
        drawer = draw.MolDraw2DCairo(size, size)
        options = drawer.drawOptions()
        options.padding = MARGIN
        options.fixedBondLength = BOND * size
        options.bondLineWidth = max(1, round(size / 130))
        options.minFontSize = options.maxFontSize = max(6, round(size / 16))
        drawer.DrawMolecule(flat)
        drawer.FinishDrawing()
    return Image.open(io.BytesIO(drawer.GetDrawingText())).convert("RGB")


@dataclass(frozen=True)
class _View:
    """Atoms on the plane of the picture."""

    at: np.ndarray
    """Pixels, [n, 2]."""
    depth: np.ndarray
    """[n], grows towards the viewer."""
    scale: float
    """Pixels per Angstrom."""


def _view(positions: np.ndarray, side: float) -> _View:
    """Seen along the shortest principal axis, the longest one across; never as a mirror image."""
    centred = positions - positions.mean(0)
    axes = np.linalg.svd(centred, full_matrices=True)[2]
    axes[2] *= np.linalg.det(axes)
    across, up, depth = (centred @ axes.T).T
    flat = np.stack([across, -up], 1)  # rows of a picture count downwards
    low, high = flat.min(0), flat.max(0)
    largest = float((high - low).max()) + 2 * OTHER_BALL[0]
    scale = min(BOND * side / _BOND_LENGTH, (1 - 2 * MARGIN) * side / largest)
    return _View(side / 2 + scale * (flat - (low + high) / 2), depth, scale)


def _balls(numbers: np.ndarray, positions: np.ndarray, size: int) -> Image.Image:
    """Atoms as balls, those in front over those behind, and grey lines for bonds by distance. Atoms whose position is
    not finite are left out."""
    side = _SMOOTH * size
    picture = Image.new("RGB", (side, side), "white")
    finite = np.isfinite(positions).all(1)
    numbers, positions = numbers[finite], positions[finite]
    if len(numbers):
        view, canvas = _view(positions, side), ImageDraw.Draw(picture)
        for i, j in graph(numbers, positions) or ():
            canvas.line([tuple(view.at[i]), tuple(view.at[j])], fill=_GREY, width=max(1, round(0.14 * view.scale)))
        for atom in np.argsort(view.depth):
            radius, colour = BALLS.get(int(numbers[atom]), OTHER_BALL)
            (x, y), r = view.at[atom], radius * view.scale
            canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour, outline=(60, 60, 60), width=_SMOOTH)
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def _cross(picture: Image.Image) -> None:
    """A red cross in the upper right corner."""
    low, high = round(0.035 * picture.width), round(0.105 * picture.width)
    width, right = max(2, picture.width // 70), picture.width - 1
    canvas = ImageDraw.Draw(picture)
    canvas.line([(right - high, low), (right - low, high)], fill=_RED, width=width)
    canvas.line([(right - high, high), (right - low, low)], fill=_RED, width=width)


def _frame(picture: Image.Image, colour: tuple[int, int, int]) -> None:
    side = picture.width - 1
    width = max(2, picture.width // 100) if colour == _RED else 1
    ImageDraw.Draw(picture).rounded_rectangle((0, 0, side, side), radius=side // 20, outline=colour, width=width)
