"""The molecules that settings name."""

import numpy as np
import pytest

from unite_fast.data_pipeline.molecules.of_config import molecules_of
from unite_fast.data_pipeline.molecules.set_file import read_set, write_set
from unite_fast.data_pipeline.splits import HELD_OUT, NoSplit
from unite_fast.errors import UserError
from unite_fast.recipes import load_config


@pytest.fixture
def configured(qm9_200):
    return lambda *settings: load_config("qm9_tiny", (f"data.path={qm9_200}", *settings))


@pytest.mark.parametrize(
    ("split", "name", "count"),
    [("train", "train", 140), ("val", "val", 30), ("test", "test", 30), (HELD_OUT, "val", 30)],
)
def test_each_split_is_of_the_file(split, name, count, configured, qm9_200):
    source = molecules_of(configured("molecules.heavy=0"), split)
    whole = read_set(qm9_200)
    assert (len(source), source.split, source.held_out) == (count, name, name != "train")
    expected = whole.take(whole.split == ["train", "val", "test"].index(name))
    assert (source.molecules.numbers == expected.numbers).all() and source.molecules.inchi == expected.inchi


def test_the_settings_of_the_recipe_reach_the_source(configured):
    config = configured("molecules.heavy=8", "molecules.group=2", "model.elements=N C O H F")
    source = molecules_of(config, "train")
    assert 0 < len(source) < 140 and source.molecules.heavy.max() == 8
    assert (source.group, source.atoms, source.elements) == (2, 32, ("N", "C", "O", "H", "F"))
    assert len(source.class_names) == config.model.num_classes
    # Batches of one size follow each other.
    assert len(set(source.sizes[source.order(0, 0)[:2]].tolist())) == 1


def test_another_path_takes_the_place_of_the_recipes(configured, qm9_200, tmp_path):
    few = read_set(qm9_200)
    few = few.take(few.split == 0).take(range(11))
    write_set(tmp_path / "few.npz", few)
    config = configured("molecules.heavy=0", "data.path=missing.npz")
    assert len(molecules_of(config, "train", str(tmp_path / "few.npz"))) == 11
    with pytest.raises(NoSplit):
        molecules_of(config, "test", str(tmp_path / "few.npz"))
    with pytest.raises(UserError, match=r"missing\.npz"):
        molecules_of(config, "train")


def test_synthetic_molecules_need_no_file(configured):
    config = configured("data.source=synthetic", "data.path=", "molecules.heavy=0")
    source = molecules_of(config, "train")
    assert len(source) > 1000 and np.abs(source.molecules.positions.std() - 1.4) < 0.5
    assert not (source.molecules.positions[:30] == molecules_of(config, "test").molecules.positions[:30]).all()
    # A named file wins: bench --data.
    assert len(molecules_of(config, "train", str(configured().data.path))) < 1000


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        (("data.source=digits",), ("data.source", "digits", "molecules")),
        (("data.path=",), ("data.path", "unite-fast molecules qm9")),
        (("model.elements=H C N O",), ("F",)),
        (("molecules.heavy=1",), ("heavy",)),
    ],
)
def test_what_does_not_fit_is_named(settings, tokens, configured, mentions):
    with pytest.raises(UserError, match=mentions(*tokens)):
        molecules_of(configured("molecules.heavy=0", *settings), "train")
