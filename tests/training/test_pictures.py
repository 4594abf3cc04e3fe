"""What a run draws: which data, and of which split."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from unite_fast.data_pipeline import open_source
from unite_fast.data_pipeline.molecules.set_file import read_set, write_set
from unite_fast.data_pipeline.splits import ClassesDiffer
from unite_fast.model.unite import UNITE
from unite_fast.recipes import load_config
from unite_fast.sampling import sampler
from unite_fast.sampling.molecules import draw_sizes, reconstruct
from unite_fast.training.pictures import (
    MOLECULE_COLUMNS,
    MOLECULE_ROWS,
    ImagePictures,
    MoleculePictures,
    open_pictures,
    real_images,
)


@pytest.fixture
def config(tiny_run):
    return load_config("digits", tiny_run)


@pytest.fixture
def of_molecules(tiny_molecules):
    """Pictures of a run on molecules with these settings, and a model that knows their sizes."""

    def open(*settings: str) -> tuple[MoleculePictures, UNITE]:
        config = load_config("qm9_tiny", (*tiny_molecules, *settings))
        model = UNITE.create(config.model, 0)
        model.size_counts[15:18] = torch.tensor([1.0, 2.0, 1.0])
        return open_pictures(config), model

    return open


def test_held_out_images_come_from_the_test_split_if_there_is_one(config, tmp_path):
    test, _ = open_source("digits", "", 8, "test").read(range(40))
    assert torch.equal(real_images(config)[0], test)
    # Without a test split, they are training images.
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(2):
            Image.fromarray(np.full((8, 8, 3), 60 * i + ord(label), np.uint8)).save(tmp_path / label / f"{i}.png")
    config = load_config("digits", ("data.source=folder", f"data.path={tmp_path}", "model.num_classes=2"))
    images, kind = real_images(config)
    assert [int(image.float().mean()) for image in images] == [97, 157, 98, 158]
    assert kind.startswith("training images") and "held-out split" in kind
    (tmp_path / "a").rename(tmp_path / "train")
    (tmp_path / "b").rename(tmp_path / "val")
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir()
        (tmp_path / split / "0.png").rename(tmp_path / split / "a" / "0.png")
    assert real_images(config)[1] == "held-out images"
    # A broken held-out split is said, and other classes are refused.
    (tmp_path / "val" / "a").rename(tmp_path / "val" / "b")
    with pytest.raises(ClassesDiffer):
        real_images(config)
    shutil.rmtree(tmp_path / "val" / "b")
    images, kind = real_images(config)
    assert len(images) == 1 and kind.startswith("training images") and str(tmp_path / "val") in kind


def test_the_modality_chooses_the_pictures(config, of_molecules):
    pictures = open_pictures(config)
    assert isinstance(pictures, ImagePictures) and isinstance(of_molecules()[0], MoleculePictures)
    samples, copies = pictures.make(UNITE.create(config.model, 0))
    assert samples.shape == (80, 3, 8, 8) and copies.shape == pictures.real.shape == (40, 3, 8, 8)
    assert {name: draw().size for name, draw in pictures.drawings(samples, copies).items()}.keys() == {
        "samples",
        "reconstructions",
    }


def test_held_out_molecules_of_all_sizes_are_reconstructed(of_molecules, tiny_molecules):
    pictures, model = of_molecules()
    whole = read_set(tiny_molecules[0].removeprefix("data.path="))
    held_out = whole.index[whole.split == 1].tolist()
    rows = [held_out.index(index) for index in pictures.real.index]
    assert len(rows) == MOLECULE_ROWS * MOLECULE_COLUMNS // 2 and rows == sorted(set(rows))
    assert (rows[0], rows[-1]) == (0, len(held_out) - 1), "evenly spaced: sets may be sorted by size"
    assert pictures.of_real == "held-out images"
    _, copies = pictures.make(model)
    assert (copies.positions == reconstruct(model, pictures.real, pictures.config.seed).positions).all()


def test_a_set_without_held_out_molecules_shows_training_molecules(of_molecules, tiny_molecules, tmp_path):
    whole = read_set(tiny_molecules[0].removeprefix("data.path="))
    write_set(tmp_path / "train.npz", whole.take(whole.split == 0).take(range(3)))
    pictures, _ = of_molecules(f"data.path={tmp_path / 'train.npz'}")
    assert len(pictures.real) == 3 and pictures.of_real.startswith("training molecules: ")


def test_samples_have_the_sizes_of_training_and_depend_on_the_seed(of_molecules):
    pictures, model = of_molecules("seed=5")
    samples, copies = pictures.make(model)
    assert len(samples) == MOLECULE_ROWS * MOLECULE_COLUMNS
    sizes = draw_sizes(model.size_counts, len(samples), 5)
    assert samples.sizes.tolist() == sizes.tolist() and set(samples.sizes) == {15, 16, 17}
    direct = sampler.sample_images(model, sizes, pictures.config.sampling, 5)
    assert (samples.positions == direct[..., 1:].numpy()).all()
    again = pictures.make(model)
    assert (again[0].positions == samples.positions).all() and (again[1].positions == copies.positions).all()
    other, _ = of_molecules("seed=6")
    assert not (other.make(model)[0].sizes == samples.sizes).all()


def test_pictures_of_molecules_are_drawn(of_molecules):
    pytest.importorskip("rdkit")
    pictures, _ = of_molecules()
    # True molecules: RDKit takes long over random ones.
    drawn = {name: draw() for name, draw in pictures.drawings(pictures.real, pictures.real).items()}
    assert drawn.keys() == {"samples", "reconstructions"}
    for picture in drawn.values():
        assert picture.width > 100 and len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 10
    assert drawn["reconstructions"].height == pytest.approx(2 * drawn["samples"].height, rel=0.2)
