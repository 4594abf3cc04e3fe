"""Commands on a model or on files of molecules: a right result, or one line that says what is wrong.

tests/training/test_molecule_runs.py trains, generates and evaluates.
"""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import unite_fast
from unite_fast.checkpoint.model_file import save_model
from unite_fast.data_pipeline.molecules.set_file import read_set
from unite_fast.data_pipeline.molecules.write import write_molecules
from unite_fast.interop.official import export_official, import_official
from unite_fast.sampling.pipeline import TrainedUNITE


@pytest.fixture
def molecule_set(tiny_molecules) -> Path:
    return Path(tiny_molecules[0].removeprefix("data.path="))


@pytest.fixture
def without_rdkit(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "rdkit"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rdkit", None)


@pytest.mark.parametrize(
    ("words", "tokens"),
    [
        (("search-guidance", "MODEL", "--out", "new"), ("molecules", "guidance", "unite-fast evaluate")),
        (("export-official", "MODEL", "new.pt"), ("molecules", "unite-fast export")),
        (("sample", "MODEL", "--guidance", "2"), ("guidance", "molecules")),
        (("sample", "MODEL", "--classes", "33"), ("[33]", "1 to 32")),
        (("sample", "MODEL", "--classes", "0"), ("[0]", "1 to 32")),
        (("sample", "MODEL", "--out", "a.jpg"), (".png", ".xyz")),
        (("generate", "MODEL", "--out", "new.xyz", "--guidance", "2"), ("guidance", "molecules")),
        (("generate", "MODEL", "--out", "folder"), (".xyz", ".sdf", ".npz")),
        (("evaluate", "MODEL", "--data", "SET", "--guidance", "2"), ("--guidance", "molecules")),
        (("evaluate", "MODEL", "--data", "SET", "--features", "pixels"), ("--features", "molecules")),
        (("reconstruct", "MODEL", "SET", "--out", "SET"), ("SET",)),
        (("stats", "SET", "new.npz"), ("SET", "molecules", "unite-fast")),
        (("inspect", "SET"), ("SET", "molecules", "unite-fast")),
        (("shards", "make", "SET", "new"), ("SET", "molecules", "unite-fast")),
        (("train", "digits", "data.source=folder", "data.path=SET"), ("SET", "molecules")),
        (("train", "digits", "data.source=molecules", "data.path=SET"), ("model.modality=molecules", "qm9_tiny")),
        (("plan", "qm9_s", "--data", "raw"), ("--data", "molecules")),
        (("parity", "SET"), ("SET", "trace")),
        (("import-official", "SET", "new.safetensors"), ("SET", "torch.save")),
        (("bench", "qm9_tiny", "--data", "missing.npz"), ("missing.npz",)),
    ],
    ids=lambda one: " ".join(one) if "MODEL" in one or "SET" in one else None,
)
def test_what_molecules_do_not_have_is_one_line(
    words, tokens, command, molecule_file, molecule_set, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(molecule_file), "SET": str(molecule_set)}
    words = [word.replace("SET", names["SET"]) if "=" in word else names.get(word, word) for word in words]
    line = command(*words).error()
    assert all(names.get(token, token) in line for token in tokens), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.sdf", "a.xyz"])
def test_images_are_not_read_from_text_files_of_molecules(name, command, tmp_path):
    (tmp_path / name).write_text("1\n\nC 0 0 0\n")
    command("shards", "make", tmp_path / name, tmp_path / "new").error(name, "molecules")
    command("inspect", tmp_path / name, "--out", tmp_path / "new.png").error(name, "molecules")


@pytest.mark.parametrize(
    "words",
    [
        ("sample", "MODEL", "--count", "2", "--out", "new.png"),
        ("sample", "MODEL", "--count", "2", "--out", "new.sdf"),
        ("generate", "MODEL", "--count", "2", "--out", "new.sdf"),
        ("evaluate", "MODEL", "--data", "SET", "--count", "2", "--out", "new"),
        ("reconstruct", "MODEL", "SET", "--out", "new.png"),
    ],
)
def test_without_rdkit_the_extra_is_named_before_the_work(
    words, command, molecule_file, molecule_set, tmp_path, monkeypatch, without_rdkit
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("unite_fast.sampling.sampler.sample_batch", None)
    names = {"MODEL": molecule_file, "SET": molecule_set}
    command(*(names.get(word, word) for word in words)).error("RDKit", "unite-fast[molecules]")
    assert [path for path in tmp_path.iterdir() if path.suffix] == []


@pytest.mark.parametrize("suffix", [".xyz", ".npz"])
def test_files_without_bonds_need_no_rdkit(suffix, command, molecule_file, tmp_path, without_rdkit, mentions):
    out = tmp_path / f"new{suffix}"
    ended = command("sample", molecule_file, "--count", 3, "--classes", "9,4", "--seed", 2, "--out", out)
    assert (ended.status, ended.err) == (0, "") and re.search(mentions(3, "molecules", out), ended.out)
    if suffix == ".npz":
        expected = unite_fast.load(molecule_file).generate([9, 4, 9], seed=2)
        assert (read_set(out).positions == expected.positions).all()
    else:
        assert [line for line in out.read_text().splitlines() if line.isdigit()] == ["9", "4", "9"]


def test_sizes_are_drawn_if_no_classes_are_given(command, molecule_file, tmp_path):
    assert command("sample", molecule_file, "--count", 5, "--seed", 4, "--out", tmp_path / "a.npz").status == 0
    drawn = unite_fast.load(molecule_file).draw_sizes(5, 4)
    assert read_set(tmp_path / "a.npz").sizes.tolist() == drawn.tolist()


def test_reconstructions_are_saved_and_their_errors_printed(command, molecule_file, molecule_set, tmp_path):
    few = read_set(molecule_set).take([3, 50])
    write_molecules(tmp_path / "few.xyz", few)
    ended = command("reconstruct", molecule_file, tmp_path / "few.xyz", "--out", tmp_path / "copies.npz")
    assert ended.status == 0, ended.err
    copies = read_set(tmp_path / "copies.npz")
    assert copies.sizes.tolist() == few.sizes.tolist()
    model = unite_fast.load(molecule_file)
    np.testing.assert_allclose(
        copies.positions, model.reconstruct(few).positions[:, : copies.numbers.shape[1]], atol=2e-3
    )
    assert re.search(r"molecule 0: RMSD \d+\.\d+ A, elements (right|wrong)", ended.out)
    assert "molecule 1: " in ended.out and "2 molecules" in ended.out


def test_pictures_of_samples_are_drawn(command, molecule_file, tmp_path):
    pytest.importorskip("rdkit")
    out = tmp_path / "a.png"
    assert command("sample", molecule_file, "--count", 2, "--classes", "5", "--out", out).status == 0
    assert Image.open(out).width > 100


def test_info_and_export(command, molecule_file, tmp_path):
    ended = command("info", molecule_file)
    assert ended.status == 0 and "modality: molecules" in ended.out and "step" in ended.out
    assert command("export", molecule_file, tmp_path / "again.safetensors").status == 0
    one, other = (
        unite_fast.load(path).network.state_dict() for path in (molecule_file, tmp_path / "again.safetensors")
    )
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    assert one["size_counts"].sum() == 140


def test_images_with_a_plain_norm_have_its_constants_in_the_official_format(tiny_config, make_model, tmp_path):
    """The authors' code always has weight and bias."""
    tiny_config.model.latent_norm = "layer_plain"
    model = make_model(tiny_config.model)
    save_model(tmp_path / "a.safetensors", tiny_config, 1, model.state_dict())
    export_official(tmp_path / "a.safetensors", tmp_path / "a.pt")
    heads = tiny_config.model.decoder.heads
    import_official(tmp_path / "a.pt", tmp_path / "b.safetensors", decoder_heads=heads, in_context_start=1)
    again = TrainedUNITE.load(tmp_path / "b.safetensors").network
    assert (again.latent_norm.weight == 1).all() and (again.latent_norm.bias == 0).all()
    images, registers, t = torch.rand(2, 3, 8, 8), torch.randn(2, 4, 6), torch.zeros(2)
    assert torch.equal(again.tokenize(images, registers, t), model.tokenize(images, registers, t))


def test_bench_names_molecules(command, tiny_molecules, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("unite_fast.benchmarking.matmul_rate.matmul_rate.__defaults__", (torch.bfloat16, 0.01))
    settings = [setting for setting in tiny_molecules if not setting.startswith("data.")]
    ended = command("bench", "qm9_tiny", *settings, "--warmup", 1, "--steps", 2, "--csv", "")
    assert ended.status == 0, ended.err
    assert "molecules/s" in ended.out and "GFLOP per molecule" in ended.out and "synthetic molecules" in ended.out
    assert "image" not in ended.out + ended.err
    ended = command("bench", "qm9_tiny", *settings, "--warmup", 1, "--steps", 2, "--csv", "", "--data", "missing.npz")
    ended.error("missing.npz")


def test_plan_names_molecules(command):
    ended = command("plan", "qm9_s", "--gpu", "h100", "--gpus-per-node", 1)
    assert ended.status == 0, ended.err
    assert "molecules/s" in ended.out and "work per molecule: 21 GFLOP" in ended.out
    for foreign in ("image", "LPIPS", "pixels", "released"):
        assert foreign not in ended.out.partition("assumptions")[0]
