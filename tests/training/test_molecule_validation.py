"""Validation of molecules during training: it leaves the run unchanged and gives the scores of generated molecules."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import unite_fast
from unite_fast.checkpoint.manager import Checkpoints
from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
from unite_fast.errors import UserError
from unite_fast.evaluation.molecules.scores import generation_scores
from unite_fast.model.unite import UNITE
from unite_fast.recipes import load_config
from unite_fast.training import molecule_validation
from unite_fast.training.molecule_validation import SCORES, MoleculeValidation
from unite_fast.training.pictures import MoleculePictures
from unite_fast.training.train_state import TrainState
from unite_fast.training.trainer import Trainer, train

pytest.importorskip("rdkit")

EVALUATED = ("train.evaluate_every=4", "evaluation.count=22", "evaluation.batch=5", "train.steps=12")


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """RDKit takes seconds over random molecules, and test_pictures.py has pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoleculePictures, "drawings", lambda *made: {})
        yield


@pytest.fixture(scope="module")
def evaluated(tiny_molecules, tmp_path_factory) -> Path:
    """The folder of a finished run with evaluation. Read-only."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    train(load_config("qm9_tiny", (*tiny_molecules, *EVALUATED, f"train.out={folder}")))
    return folder


def rows_of(folder: Path) -> list[dict]:
    """Rows of the curve, without their times."""
    rows = [json.loads(line) for line in (folder / "evaluation" / "curve.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_evaluation_does_not_change_the_run(evaluated, tiny_molecules, tmp_path, assert_same_run):
    train(load_config("qm9_tiny", (*tiny_molecules, f"train.out={tmp_path / 'plain'}")))
    assert_same_run(evaluated, tmp_path / "plain")
    assert not (tmp_path / "plain" / "evaluation").exists()


def test_rows_are_the_scores_of_what_the_averaged_weights_generate(evaluated):
    rows = rows_of(evaluated)
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert {(row["count"], row["weights"], row["sampling.solver"]) for row in rows} == {(22, "EMA", "euler")}
    model = unite_fast.load(evaluated)
    scores = generation_scores(model.generate(model.draw_sizes(22, 0), seed=0, batch=5))
    assert {name: rows[-1][name] for name in SCORES} == {name: scores[name] for name in SCORES}
    events = EventAccumulator(str(evaluated / "tensorboard")).Reload()
    for name in ("valid_connected", "atom_stable"):
        assert [event.step for event in events.Scalars(name)] == [4, 8, 12]
        assert events.Scalars(name)[-1].value == pytest.approx(rows[-1][name])
    with Image.open(evaluated / "evaluation" / "curve.png") as picture:
        assert picture.width == 660


def test_scores_reach_the_row_and_the_line_under_their_names(evaluated, tiny_molecules, tmp_path, monkeypatch):
    """Untrained molecules score 0 everywhere, so that a swap would not show."""
    shares = dict(zip(SCORES, (0.125, 0.25, 0.5, 0.75), strict=True))
    monkeypatch.setattr(
        "unite_fast.training.molecule_validation.generation_scores", lambda molecules: shares | {"counts": {}}
    )
    config = load_config("qm9_tiny", (*tiny_molecules, *EVALUATED))
    state = TrainState(UNITE.create(config.model, 0), config)
    state.model.size_counts[18] = 1
    validation = MoleculeValidation(config, tmp_path, torch.device("cpu"), 0, 140)
    line = validation.run(state, None)
    assert "valid_connected 12.5%" in line and "atom_stable 25.0%" in line and "22 samples" in line
    assert {name: rows_of(tmp_path)[0][name] for name in SCORES} == shares
    assert validation.scalars(validation.rows[0]) == {"valid_connected": 0.125, "atom_stable": 0.25}


def test_a_resumed_run_has_the_same_curve(evaluated, tiny_molecules, tmp_path, assert_same_run):
    """As if killed at step 11: the last checkpoint is that of step 8."""
    killed = tmp_path / "killed"
    shutil.copytree(evaluated, killed, symlinks=True)
    shutil.rmtree(killed / "checkpoints" / "step_00000012")
    (killed / "checkpoints" / "latest").unlink()
    trainer = Trainer(load_config("qm9_tiny", (*tiny_molecules, *EVALUATED, f"train.out={killed}")), resume=True)
    assert [row["step"] for row in rows_of(killed)] == [4, 8], "rows after the checkpoint are dropped at once"
    trainer.run()
    trainer.close()
    assert rows_of(killed) == rows_of(evaluated)
    assert_same_run(killed, evaluated)


def digest(molecules: MoleculeSet) -> dict[str, float]:
    """Numbers that depend on every molecule and on their order, in place of the scores."""
    place = np.arange(1, len(molecules) + 1)
    return {
        "valid_connected": float((place * molecules.sizes).sum()),
        "atom_stable": float((place * np.abs(molecules.positions).sum((1, 2))).sum()),
        "valid": float((place * molecules.numbers.sum(1)).sum()),
        "mol_stable": 0.0,
    }


def run_in_ranks(folder: Path, out: Path, settings: tuple[str, ...]) -> list[dict]:
    torch.distributed.init_process_group("gloo")
    molecule_validation.generation_scores = digest  # in this process alone
    config = load_config("qm9_tiny", settings)
    state = TrainState(UNITE(config.model), config)
    checkpoints = Checkpoints(folder / "checkpoints", 0)
    checkpoint = checkpoints.find()
    checkpoints.load_into(checkpoint, state.tensors())
    state.resume_at(checkpoint.step)
    validation = MoleculeValidation(config, out, torch.device("cpu"), 0, 140)
    validation.run(state, None)
    return validation.rows


def test_ranks_share_the_work(ranks, evaluated, tiny_molecules, tmp_path):
    """22 molecules make five batches of 5, so one of three ranks has none in the last round."""
    results = ranks(3, run_in_ranks, evaluated, tmp_path, (*tiny_molecules, *EVALUATED))
    model = unite_fast.load(evaluated)
    expected = digest(model.generate(model.draw_sizes(22, 0), seed=0, batch=5))
    for rows in results:
        assert {name: rows[0][name] for name in SCORES} == pytest.approx(expected, rel=1e-6)
        assert rows[0]["atom_stable"] == results[0][0]["atom_stable"]
    assert len(rows_of(tmp_path)) == 1


def test_intervals_and_the_default_count(tiny_molecules):
    config = load_config("qm9_tiny", (*tiny_molecules, "train.evaluate_epochs=0.5"))
    validation = MoleculeValidation(config, Path("nowhere"), torch.device("cpu"), 0, 140)
    assert validation.count == 200 and not validation.warning
    # Half an epoch is 4.375 steps.
    assert [step for step in range(1, 20) if validation.due(step)] == [5, 9, 14, 18]
    assert not Path("nowhere").exists()


def test_without_rdkit_the_run_does_not_start(tiny_molecules, tmp_path, monkeypatch, mentions):
    for name in [name for name in sys.modules if name.partition(".")[0] == "rdkit"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rdkit", None)
    settings = (*tiny_molecules, f"train.out={tmp_path / 'run'}")
    with pytest.raises(UserError, match=mentions("RDKit", "unite-fast[molecules]")):
        train(load_config("qm9_tiny", (*settings, *EVALUATED)))
    assert not (tmp_path / "run").exists()
    train(load_config("qm9_tiny", (*settings, "train.steps=1")))


def test_molecules_that_are_not_finite_are_counted_and_the_run_goes_on(tiny_molecules, tmp_path, capsys, mentions):
    settings = (*tiny_molecules, *EVALUATED, f"train.out={tmp_path / 'run'}", "train.steps=4")
    trainer = Trainer(load_config("qm9_tiny", settings), resume=False)
    trainer.validation.run(trainer.state, None)
    before = [row["step"] for row in rows_of(tmp_path / "run")]
    with torch.no_grad():
        for average in trainer.state.ema.averages.values():
            average.fill_(float("nan"))
    line = trainer.validation.run(trainer.state, None)
    trainer.close()
    assert re.search(mentions("warning", "no evaluation of step 0", "22 of 22"), line)
    assert [row["step"] for row in rows_of(tmp_path / "run")] == before == [0]


@pytest.mark.parametrize(
    "setting", ["evaluation.features=pixels", "evaluation.reference=a.npz", "evaluation.inception=a.pth"]
)
def test_settings_of_the_frechet_distance_are_refused(setting, tiny_molecules, mentions):
    with pytest.raises(UserError, match=mentions(setting.partition("=")[0], "molecules")):
        load_config("qm9_tiny", (*tiny_molecules, setting))
