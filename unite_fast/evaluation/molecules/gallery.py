"""Content of a gallery of molecules: generated ones, reconstructions, interpolations, denoising and curves.
`gallery_page.py` renders it.

m molecules, n atoms of one, N latent tokens, C latent channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from unite_fast.config import SamplingConfig
from unite_fast.data_pipeline.molecules.elements import SYMBOLS
from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
from unite_fast.errors import UserError, require
from unite_fast.evaluation.gallery import MOST_SHOWN, GallerySettings, curves, evenly_spaced, model_facts
from unite_fast.evaluation.gallery_page import Row, Section
from unite_fast.evaluation.molecules.alignment import rmsd_of_sets, superposed
from unite_fast.evaluation.molecules.evaluate import open_true_molecules
from unite_fast.evaluation.molecules.gallery_page import BAD, FAIR, GOOD, PLAIN, Frame, MoleculeFigure, Shape
from unite_fast.evaluation.molecules.perception import Perceived, atoms_of, bond_table, graph, perceive, rdkit
from unite_fast.evaluation.molecules.scores import same_elements
from unite_fast.evaluation.trajectory import denoising_trajectory
from unite_fast.randomness import Philox, Stream
from unite_fast.sampling import sampler
from unite_fast.sampling.molecules import TrainedMolecules, decode
from unite_fast.utils.progress import track

CURVES = (
    ("l1", "L1 of the positions, Angstrom"),
    ("cross_entropy", "cross-entropy of the elements, nats"),
    ("flow", "flow loss"),
)
HELD_OUT = "held-out molecules"
"""The fact that says why there are none."""
SAMPLES, SIZES, PER_SIZE, PAIRS, PATHS = 24, 8, 2, 8, 3
"""Generated molecules; numbers of atoms, and molecules of each; reconstructions; interpolations and denoised
molecules."""
POINTS, MOST_STEPS = 15, 30
"""Molecules on an interpolation, both ends included, and at most in a denoising."""
_SMALL = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def make_molecule_gallery(
    model: TrainedMolecules, checkpoint: Path, settings: GallerySettings
) -> tuple[dict[str, str], list[Section]]:
    """Facts for the head of the page, by name, and its sections.

    Args:
        checkpoint: path of the model; a metrics.jsonl in its run folder becomes curves.
        settings: `classes` are numbers of atoms, and `per_class` molecules of each; `scales` are not used. Without
            `data` the model's own are shown if it may name them (`evaluation.batches.check_named`), or else none.

    Raises:
        UserError: number of atoms or setting out of range, a guidance scale, data missing, or RDKit is not installed.
    """
    rdkit("Chem")
    sampling = model.sampling_config(**settings.sampling)
    per_size = settings.per_class or PER_SIZE
    sizes = settings.classes or usual_sizes(model, SIZES)
    model.check_sizes(sizes)
    require(
        len(sizes) * per_size <= MOST_SHOWN,
        f"--classes and --per-class ask for {len(sizes) * per_size:,} molecules; a page has at most {MOST_SHOWN:,}",
    )
    facts = model_facts(model, sampling, settings.seed, checkpoint)
    real, missing = read_real_molecules(model, settings.data)
    if missing:
        facts[HELD_OUT] = f"not shown: {missing}"
    builder = MoleculeSections(model, sampling, sizes, per_size, real, settings)
    with_real = [builder.reconstructions, builder.between_molecules] if real else []
    build = [builder.samples, builder.numbers_of_atoms, *with_real, builder.denoising]
    return facts, [section() for section in track(build, len(build), "drawing")] + curves(checkpoint, CURVES)


@dataclass
class RealMolecules:
    """True molecules to reconstruct and interpolate."""

    molecules: MoleculeSet
    kind: str
    """Name for the page, in the plural: "held-out molecules"."""


def read_real_molecules(model: TrainedMolecules, data: str | None) -> tuple[RealMolecules | None, str]:
    """Held-out molecules, or of data without them training molecules, in the order of an evaluation; or else None and
    the reason. A `data` that is given must be there.

    Raises:
        UserError: the data cannot be read, or do not fit the model.
    """
    if data is None:
        return None, "--no-real"
    try:
        source, kind = open_true_molecules(model.config, data)
    except UserError as error:
        if not data:
            return None, str(error)
        raise UserError(f"{error}; name the data with --data FILE, or give --no-real") from error
    order = np.random.RandomState(0).permutation(len(source.molecules))
    return RealMolecules(source.molecules.take(order), kind.replace("images", "molecules")), ""


def usual_sizes(model: TrainedMolecules, count: int) -> list[int]:
    """At most `count` numbers of atoms, evenly spaced between the first and the last percentile of the training
    molecules.

    Raises:
        UserError: a model that saw no molecules.
    """
    model.draw_sizes(1)  # which knows whether it did
    molecules = model.network.size_counts.double().cpu().cumsum(0).numpy()
    least, most = np.searchsorted(molecules, [0.01 * molecules[-1], 0.99 * molecules[-1]]).tolist()
    return [least + step for step in evenly_spaced(most - least + 1, count)]


@dataclass
class MoleculeSections:
    """Builds the sections of the page. Noise depends only on (seed, number of the molecule), so the same model and
    settings give the same page."""

    model: TrainedMolecules
    sampling: SamplingConfig
    sizes: list[int]
    """Numbers of atoms to show, in order."""
    per_size: int
    real: RealMolecules | None
    settings: GallerySettings

    def samples(self) -> Section:
        molecules = self._generate(self.model.draw_sizes(SAMPLES, self.settings.seed).tolist())
        seen = list(drawn_molecules(molecules))
        valid = sum(each.perceived.valid for each in seen)
        connected = sum(each.perceived.connected for each in seen)
        text = (
            f"The first {len(seen)} molecules of seed {self.settings.seed}, none left out. Their numbers of atoms are "
            f"drawn as in training. {connected} are valid and in one piece, {valid - connected} valid but in several, "
            f"{len(seen) - valid} not valid. Valid is what RDKit's DetermineBonds finds bonds for at charge 0; in the "
            "others, bonds are drawn by distance and all as single."
        )
        return Section("samples", "Generated molecules", text, [Row("", [each.figure() for each in seen])])

    def numbers_of_atoms(self) -> Section:
        columns = [list(drawn_molecules(self._generate([size] * self.per_size))) for size in self.sizes]
        rows = [Row("", [each.figure() for each in row]) for row in zip(*columns, strict=True)]
        text = (
            "All molecules of a row share their noise, atom by atom; only the number of atoms changes, which is the "
            "model's class."
        )
        return Section("sizes", "Numbers of atoms", text, rows)

    def reconstructions(self) -> Section:
        truth = self._real.molecules.take(range(min(PAIRS, len(self._real.molecules))))
        copies = self.model.reconstruct(truth, self.settings.seed, self.settings.batch)
        distances, elements = rmsd_of_sets(truth, copies), same_elements(truth, copies)
        figures, unchanged = [], 0
        pairs = zip(drawn_molecules(truth), drawn_molecules(copies), distances, elements, strict=True)
        for original, copy, distance, same in pairs:
            same_bonds = bool(same) and graph(*original.atoms) == graph(*copy.atoms)
            unchanged += same_bonds
            mark = ("same bonds", GOOD) if same_bonds else ("other bonds" if same else "other elements", BAD)
            view = View.of(original.positions)
            before = original.shape(view)
            after = copy.shape(view, superposed(copy.positions, original.positions))
            caption = [(original.name, PLAIN), (f"RMSD {distance:.3f} Å", PLAIN), mark]
            alts = [f"original {original.name}", f"reconstruction of {original.name}, over the pale original"]
            figures.append(MoleculeFigure([Frame([[before], [before, after]], caption)], alts))
        text = (
            f"{self._real.kind.capitalize()}, each to the left of its reconstruction, which lies on the pale original "
            f"as it fits best (turned, never mirrored). Mean RMSD over all atoms of these {len(figures)}: "
            f"{np.mean(distances):.3f} Å; all elements and all bonds by distance are the same in {unchanged}."
        )
        return Section("reconstructions", "Reconstructions", text, [Row("", figures)])

    def between_molecules(self) -> Section:
        figures = []
        for pair in pairs_of_one_size(self._real.molecules, PATHS):
            path = self.model.interpolate(self._real.molecules.take(pair), POINTS, self.settings.seed)
            shares = [f"{step / (POINTS - 1):.0%} of the way" for step in range(POINTS)]
            figures.append(moving_figure(path, shares, "interpolation between two molecules", first=0))
        text = (
            f"The latents of two {self._real.kind} of the same number of atoms, interpolated and decoded. Latents move "
            "on the sphere, atom by atom. Atoms are paired in the order of the file, so what lies between need not be "
            "a molecule."
            if figures
            else f"No two of the {self._real.kind} have the same number of atoms."
        )
        return Section("between-molecules", "Between two molecules", text, [Row("", figures)] if figures else [])

    def denoising(self) -> Section:
        network = self.model.network
        sizes = self.model.draw_sizes(PATHS, self.settings.seed)
        positions = torch.arange(PATHS, device=network.device)
        shape = sampler.latent_shape(network, sizes)
        noise = Philox(self.settings.seed, 0, positions).normal(Stream.SAMPLE_NOISE, shape)
        trajectory = denoising_trajectory(network, sizes, noise, self.sampling)
        times = sorted(trajectory)
        times = [times[i] for i in evenly_spaced(len(times), MOST_STEPS)]
        frames = [decode(network, trajectory[t], sizes, self.settings.batch) for t in times]
        figures = []
        for i in range(PATHS):
            path = MoleculeSet.join([molecules.take([i]) for molecules in frames])
            captions = [f"t = {t:.2f}" for t in times]
            figures.append(moving_figure(path, captions, f"denoising of molecule {i + 1}", first=len(times) - 1))
        text = (
            f"The first {PATHS} generated molecules: the network's predictions of the clean latents on the way from "
            "noise (t = 0) to the result (t = 1), decoded. Early predictions are a mean over all possible results."
        )
        return Section("denoising", "Denoising, step by step", text, [Row("", figures)])

    def _generate(self, sizes: list[int]) -> MoleculeSet:
        return self.model.generate(sizes, self.settings.seed, self.settings.batch, **self.settings.sampling)

    @property
    def _real(self) -> RealMolecules:
        assert self.real is not None  # else the sections with real molecules are not built
        return self.real


@dataclass
class DrawnMolecule:
    """A molecule with what was found about it."""

    atoms: tuple[np.ndarray, np.ndarray]
    """Atomic numbers [n] and positions float64 [n, 3]."""
    perceived: Perceived

    @property
    def positions(self) -> np.ndarray:
        return self.atoms[1]

    @property
    def name(self) -> str:
        """Formula and number of atoms."""
        count = len(self.atoms[0])
        return f"{formula(self.atoms[0])}, {count} {'atom' if count == 1 else 'atoms'}"

    @property
    def mark(self) -> tuple[str, str]:
        if not self.perceived.valid:
            return "not valid", BAD
        return ("valid, in one piece", GOOD) if self.perceived.connected else ("valid, in pieces", FAIR)

    @property
    def caption(self) -> list[tuple[str, str]]:
        smiles = [(self.perceived.smiles, PLAIN)] if self.perceived.connected else []
        return [(self.name, PLAIN), self.mark, *smiles]

    def shape(self, view: "View", positions: np.ndarray | None = None) -> Shape:
        """What a picture draws; at other positions if they are given."""
        symbols = [SYMBOLS[number] for number in self.atoms[0]]
        at = view.apply(self.positions if positions is None else positions)
        return Shape(symbols, at, bond_table(*self.atoms, self.perceived))

    def figure(self) -> MoleculeFigure:
        frame = Frame([[self.shape(View.of(self.positions))]], self.caption)
        return MoleculeFigure([frame], [f"generated {self.name}, {self.mark[0]}"])


def drawn_molecules(molecules: MoleculeSet) -> Iterator[DrawnMolecule]:
    return (DrawnMolecule(atoms, perceive(*atoms)) for atoms in atoms_of(molecules))


def moving_figure(path: MoleculeSet, captions: list[str], alt: str, first: int) -> MoleculeFigure:
    """Molecules of one size, one a position of the slider, all seen from one side."""
    drawn = list(drawn_molecules(path))
    view = View.of(np.concatenate([each.positions for each in drawn]))
    frames = [
        Frame([[each.shape(view)]], [(caption, PLAIN), *each.caption])
        for each, caption in zip(drawn, captions, strict=True)
    ]
    return MoleculeFigure(frames, [alt], first)


@dataclass
class View:
    """Where a molecule is seen from."""

    rotation: np.ndarray
    """[3, 3], proper: a picture must not mirror a molecule."""
    centre: np.ndarray
    """After the rotation, [3]."""

    @classmethod
    def of(cls, positions: np.ndarray) -> "View":
        """Along the shortest principal axis of positions [n, 3], the longest one across."""
        rotation = np.linalg.svd(positions - positions.mean(0), full_matrices=True)[2].T
        rotation[:, 2] *= np.sign(np.linalg.det(rotation))
        turned = positions @ rotation
        return cls(rotation, (turned.min(0) + turned.max(0)) / 2)

    def apply(self, positions: np.ndarray) -> np.ndarray:
        """Positions [n, 3] for `Shape`."""
        return positions @ self.rotation - self.centre


def pairs_of_one_size(molecules: MoleculeSet, count: int) -> list[list[int]]:
    """Rows of at most `count` pairs of molecules with as many atoms, each pair of another size."""
    rows: dict[int, list[int]] = {}
    for row, size in enumerate(molecules.sizes.tolist()):
        rows.setdefault(size, []).append(row)
    return [same[:2] for same in rows.values() if len(same) > 1][:count]


def formula(numbers: np.ndarray) -> str:
    """C, H and then the alphabet (Hill, J. Am. Chem. Soc. 22, 478, 1900); the alphabet alone if there is no carbon."""
    symbols, counts = np.unique([SYMBOLS[number] for number in numbers], return_counts=True)
    count_of = dict(zip(symbols.tolist(), counts.tolist(), strict=True))
    first = [symbol for symbol in ("C", "H") if "C" in count_of and symbol in count_of]
    order = [*first, *sorted(count_of.keys() - set(first))]
    words = (f"{symbol}{count_of[symbol]}" if count_of[symbol] > 1 else symbol for symbol in order)
    return "".join(words).translate(_SMALL)
