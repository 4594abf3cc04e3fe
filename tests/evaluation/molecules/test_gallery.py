"""What the page shows are the outputs of the model, moved but not mirrored, in the order of the seed."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import unite_fast
from unite_fast.data_pipeline.molecules.elements import NUMBERS
from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
from unite_fast.data_pipeline.molecules.set_file import read_set
from unite_fast.errors import UserError
from unite_fast.evaluation.gallery import GallerySettings
from unite_fast.evaluation.molecules.alignment import rmsd_of_sets
from unite_fast.evaluation.molecules.evaluate import open_true_molecules
from unite_fast.evaluation.molecules.gallery import (
    BAD,
    FAIR,
    GOOD,
    HELD_OUT,
    SAMPLES,
    View,
    drawn_molecules,
    formula,
    make_molecule_gallery,
    pairs_of_one_size,
)
from unite_fast.evaluation.molecules.gallery_page import Shape, render

pytest.importorskip("rdkit", reason="RDKit is not installed")

SET = Path(__file__).parents[2] / "data" / "qm9_200.npz"
WITH_DATA = ["samples", "sizes", "reconstructions", "between-molecules", "denoising", "curves"]
WITHOUT_DATA = ["samples", "sizes", "denoising", "curves"]
TOLERANCE = 2e-4
"""Angstrom, of sampling in other batches."""


@pytest.fixture(scope="module")
def model_file(molecule_file, tmp_path_factory):
    """A model in a folder with metrics."""
    folder = tmp_path_factory.mktemp("run")
    rows = [{"step": step, "l1": 1 / step, "cross_entropy": 2 / step, "flow": 3 / step} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return shutil.copy(molecule_file, folder / "model.safetensors")


@pytest.fixture(scope="module")
def trained(model_file):
    """With more noise in its parameters: else all atoms are of one element, and near the centre."""
    model = unite_fast.load(model_file)
    generator = torch.Generator().manual_seed(1)
    encoder, decoder = model.network.encoder, model.network.decoder
    noises = [*((parameter, 0.2) for parameter in encoder.parameters()), (decoder.atom_table, 0.7)]
    for parameter, deviation in [*noises, (decoder.pred.weight, 0.3)]:
        parameter += deviation * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def page(trained, model_file):
    """Facts, and sections by key."""
    settings = GallerySettings(classes=[9, 17], per_class=3, data=str(SET), seed=5, sampling={"steps": 3})
    head, sections = make_molecule_gallery(trained, model_file, settings)
    return head, {section.key: section for section in sections}


def shapes(section, picture: int = 0, frame: int = 0) -> list[list[Shape]]:
    """The molecules in one picture of each figure."""
    return [figure.frames[frame].views[picture] for row in section.rows for figure in row.figures]


def assert_same(shape: Shape, molecules: MoleculeSet, row: int, tolerance: float = TOLERANCE) -> None:
    """Equal up to a rotation and a translation."""
    size = molecules.sizes[row]
    numbers = [NUMBERS[symbol] for symbol in shape.symbols]
    assert numbers == molecules.numbers[row, :size].tolist()
    here = MoleculeSet.of([numbers], shape.positions[None], [size])
    assert rmsd_of_sets(here, molecules.take([row]))[0] < tolerance


def test_the_page_shows_the_sample_of_its_seed(page, trained):
    head, sections = page
    assert list(sections) == WITH_DATA
    assert head["seed"] == "5" and "3 steps" in head["sampling"] and HELD_OUT not in head
    expected = trained.generate(trained.draw_sizes(SAMPLES, 5), seed=5, steps=3)
    assert len(set(expected.numbers.ravel())) > 3 and expected.positions.std() > 0.5, "else the test shows little"
    shown = shapes(sections["samples"])
    assert len(shown) == SAMPLES
    for row, (shape,) in enumerate(shown):
        assert_same(shape, expected, row)
        assert np.abs(shape.positions.max(0) + shape.positions.min(0)).max() < 1e-6, "in the middle of its picture"
    captions = [figure.frames[0].caption for figure in sections["samples"].rows[0].figures]
    assert [int(re.search(r"\d+", caption[0][0].split(",")[1])[0]) for caption in captions] == expected.sizes.tolist()
    valid = sum(caption[1][1] != BAD for caption in captions)
    assert re.search(rf"\b{len(captions) - valid} not valid", sections["samples"].text)


def test_numbers_of_atoms_share_their_noise(page, trained):
    _, sections = page
    rows = sections["sizes"].rows
    assert [len(row.figures) for row in rows] == [2, 2, 2]
    for column, size in enumerate((9, 17)):
        expected = trained.generate([size] * 3, seed=5, steps=3)
        for row in range(3):
            assert_same(rows[row].figures[column].frames[0].views[0][0], expected, row)


def test_reconstructions_lie_on_their_originals(page, trained):
    _, sections = page
    truth = open_true_molecules(trained.config, str(SET))[0].molecules
    truth = truth.take(np.random.RandomState(0).permutation(len(truth))[:8])
    copies = trained.reconstruct(truth, seed=5)
    distances = rmsd_of_sets(truth, copies)
    figures = sections["reconstructions"].rows[0].figures
    assert len(figures) == 8
    for row, figure in enumerate(figures):
        (alone,), (pale, copy) = figure.frames[0].views
        assert_same(alone, truth, row, 1e-5)
        assert (pale.positions == alone.positions).all()
        assert_same(copy, copies, row)
        shown = np.sqrt(np.square(copy.positions - pale.positions).sum(1).mean())
        assert shown == pytest.approx(distances[row], abs=1e-4)
        assert figure.frames[0].caption[1][0] == f"RMSD {distances[row]:.3f} Å"
        assert figure.frames[0].caption[2] == ("other elements", BAD), "an untrained model"
    assert f"{distances.mean():.3f} Å" in sections["reconstructions"].text


def test_a_perfect_copy_has_the_same_bonds(trained, model_file, monkeypatch):
    def copy(molecules, seed, batch):
        copies = molecules.take(range(len(molecules)))
        copies.positions = copies.positions[..., [1, 2, 0]]  # turned
        copies.positions[1, 0] += 30
        copies.numbers[2, 0] = 7 if copies.numbers[2, 0] == 6 else 6
        return copies

    monkeypatch.setattr(trained, "reconstruct", copy)
    settings = GallerySettings(classes=[5], per_class=1, data=str(SET))
    sections = {section.key: section for section in make_molecule_gallery(trained, model_file, settings)[1]}
    captions = [figure.frames[0].caption for figure in sections["reconstructions"].rows[0].figures]
    marks = [caption[2] for caption in captions]
    same = ("same bonds", GOOD)
    assert marks == [same, ("other bonds", BAD), ("other elements", BAD), *[same] * 5]
    assert captions[0][1][0] == "RMSD 0.000 Å"
    assert re.search(r"\b6\.$", sections["reconstructions"].text)


def test_interpolations_begin_and_end_at_reconstructions(page, trained):
    _, sections = page
    truth = open_true_molecules(trained.config, str(SET))[0].molecules
    truth = truth.take(np.random.RandomState(0).permutation(len(truth)))
    pairs = pairs_of_one_size(truth, 3)
    figures = sections["between-molecules"].rows[0].figures
    assert len(figures) == len(pairs) == 3
    for pair, figure in zip(pairs, figures, strict=True):
        ends = trained.reconstruct(truth.take(pair), seed=5)
        assert len(figure.frames) == 15
        assert [figure.frames[i].caption[0][0] for i in (0, 7, 14)] == [f"{s}% of the way" for s in (0, 50, 100)]
        assert_same(figure.frames[0].views[0][0], ends, 0, 2e-3)
        assert_same(figure.frames[-1].views[0][0], ends, 1, 2e-3)


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
def test_denoising_ends_at_the_sample(trained, model_file, solver):
    settings = GallerySettings(classes=[5], per_class=1, data=None, seed=2, sampling={"solver": solver, "steps": 4})
    sections = {section.key: section for section in make_molecule_gallery(trained, model_file, settings)[1]}
    expected = trained.generate(trained.draw_sizes(3, 2), seed=2, solver=solver, steps=4)
    for row, figure in enumerate(sections["denoising"].rows[0].figures):
        times = [float(frame.caption[0][0].removeprefix("t = ")) for frame in figure.frames]
        assert times[0] == 0 and times[-1] == 1 and times == sorted(set(times)) and len(times) >= 5
        assert figure.first == len(times) - 1
        assert_same(figure.frames[-1].views[0][0], expected, row)
        middle = figure.frames[1].views[0][0].positions
        assert np.abs(middle - figure.frames[-1].views[0][0].positions).max() > 1e-3


def test_the_same_seed_gives_the_same_page(trained, model_file):
    def make(seed: int, batch: int = 64) -> str:
        settings = GallerySettings(classes=[6], per_class=1, data=str(SET), seed=seed, batch=batch)
        return render(*make_molecule_gallery(trained, model_file, settings), "today")

    pages = [make(0), make(0), make(1)]
    assert pages[0] == pages[1] != pages[2]


def test_without_data_the_page_says_why(command, model_file, tmp_path):
    out = tmp_path / "page.html"
    words = ("gallery", model_file, "--out", out, "--classes", "7,8", "--per-class", 1)
    for options, reason, keys in (
        ((), f"--data &#x27;{SET}&#x27;", WITHOUT_DATA),
        (("--no-real",), "--no-real", WITHOUT_DATA),
        (("--data", SET), None, WITH_DATA),
    ):
        ended = command(*words, *options)
        assert (ended.status, ended.err) == (0, "")
        text = out.read_text("utf-8")
        assert re.findall(r'<section id="(.*?)"', text) == keys
        assert re.findall(r'href="#(.*?)"', text) == keys
        fact = re.search(rf"<dt>{HELD_OUT}</dt><dd>(.*?)</dd>", text)
        assert (reason is None) == (fact is None) == (HELD_OUT not in ended.out)
        assert fact is None or reason in fact[1]
        assert text.count("<polyline") == 3, "positions, elements and flow"
        shown = int(ended.out.splitlines()[-1].split()[0])
        assert shown == text.count('"symbols"')


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        (("--guidance", "2"), ("guidance",)),
        (("--scales", "1,2"), ("--scales",)),
        (("--interval", "0,1"), ("--interval",)),
        (("--classes", "33"), (33, 32)),
        (("--classes", "0"), (0,)),
        (("--classes", "9" * 30), ("9" * 30, 32)),
        (("--classes", "5,6", "--per-class", "501"), ("--classes", "1,002", "1,000")),
        (("--per-class", "1001"), ("1001",)),
        (("--data", "/nowhere.npz"), ("/nowhere.npz", "--data", "--no-real")),
        (("--steps", "0"), ("sampling.steps",)),
        (("--out", "page.png"), ("page.png", ".html")),
    ],
)
def test_mistakes_are_one_line(command, model_file, tmp_path, monkeypatch, options, tokens):
    monkeypatch.chdir(tmp_path)
    command("gallery", model_file, *options).error(*tokens)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_saw_no_molecules_is_a_mistake(trained, model_file, monkeypatch):
    monkeypatch.setattr(trained.network, "size_counts", torch.zeros(33))
    with pytest.raises(UserError, match="histogram"):
        make_molecule_gallery(trained, model_file, GallerySettings(data=None))


def test_marks_say_what_a_molecule_is(few):
    few.sizes[1] = 4  # methyl
    few.positions[4, 5] += 20  # leaves two ions, which are valid
    seen = list(drawn_molecules(few))
    assert [each.mark[1] for each in seen] == [GOOD, BAD, GOOD, GOOD, FAIR, GOOD]
    names = ["O", "", "C#N", "O=C=O", "", "OCF"]
    assert [each.caption[2:] for each in seen] == [[(name, "")] if name else [] for name in names]
    assert seen[0].name == "H₂O, 3 atoms" and seen[5].name == "CH₃FO, 6 atoms"
    orders = [each.shape(View.of(each.positions)).bonds[:, 2].tolist() for each in seen]
    assert orders[:4] == [[1, 1], [1, 1, 1], [3, 1], [2, 2]]


def test_formulas_are_in_hills_order():
    assert formula(np.array([1] * 12 + [6, 6, 8, 7, 17, 35])) == "C₂H₁₂BrClNO"
    assert formula(np.array([9, 1, 8])) == "FHO"


def test_a_view_neither_mirrors_nor_stretches():
    for seed in range(20):
        points = np.random.default_rng(seed).normal(size=(7, 3)) * [1, 2, 3] + 5
        view = View.of(points)
        assert np.linalg.det(view.rotation) == pytest.approx(1)
        seen = view.apply(points)
        assert (np.diff(seen.std(0)) < 0).all(), "the longest axis across, the shortest towards the reader"
        assert np.linalg.norm(seen[0] - seen[1]) == pytest.approx(np.linalg.norm(points[0] - points[1]))
    assert View.of(np.ones((1, 3))).apply(np.ones((1, 3))) == pytest.approx(np.zeros((1, 3)))


def test_pairs_are_of_one_size():
    molecules = read_set(SET)
    pairs = pairs_of_one_size(molecules, 4)
    sizes = [molecules.sizes[pair].tolist() for pair in pairs]
    assert len(sizes) == 4 and all(a == b for a, b in sizes) and len({a for a, _ in sizes}) == 4
    assert all(a < b for a, b in pairs)
    assert pairs_of_one_size(molecules.take([0]), 4) == []
