"""Evaluation during training: it leaves the run unchanged and gives the scores of `evaluate`."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import unite_fast
from unite_fast.checkpoint.manager import Checkpoints
from unite_fast.errors import UserError
from unite_fast.evaluation.evaluate import evaluate
from unite_fast.evaluation.gallery import curves
from unite_fast.evaluation.settings import EvaluationSettings
from unite_fast.model.unite import UNITE
from unite_fast.recipes import load_config
from unite_fast.training.train_state import TrainState
from unite_fast.training.trainer import Trainer, train
from unite_fast.training.validation import Validation

EVALUATED = ("train.evaluate_every=4", "evaluation.count=70", "sampling.guidance=3")


@pytest.fixture(scope="module")
def evaluated(tiny_run, tmp_path_factory) -> Path:
    """The folder of a finished run with evaluation. Read-only."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    train(load_config("digits", (*tiny_run, *EVALUATED, f"train.out={folder}")))
    return folder


def rows_of(folder: Path) -> list[dict]:
    """Rows of the evaluation curve, without their times."""
    rows = [json.loads(line) for line in (folder / "evaluation" / "curve.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_evaluation_does_not_change_the_run(evaluated, tiny_run, tmp_path, assert_same_run):
    train(load_config("digits", (*tiny_run, "sampling.guidance=3", f"train.out={tmp_path / 'plain'}")))
    assert_same_run(evaluated, tmp_path / "plain")
    assert not (tmp_path / "plain" / "evaluation").exists()


def test_rows_state_their_settings_and_match_evaluate(evaluated):
    rows = rows_of(evaluated)
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20]
    assert {row["count"] for row in rows} == {70}
    assert {row["title"] for row in rows} == {"Frechet distance of PCA-reduced pixels"}
    assert {(row["sampling.guidance"], row["sampling.solver"], row["weights"]) for row in rows} == {(3, "euler", "EMA")}
    settings = EvaluationSettings(count=70, guidance=(3.0,), batch=64, reconstructions=0)
    measured = evaluate(unite_fast.load(evaluated), settings)["generated"][0]["frechet_distance"]
    assert rows[-1]["distance"] == pytest.approx(measured, rel=1e-9)
    events = EventAccumulator(str(evaluated / "tensorboard")).Reload().Scalars("frechet_distance")
    assert [event.step for event in events] == [4, 8, 12, 16, 20]
    assert events[-1].value == pytest.approx(measured, rel=1e-6)
    with Image.open(evaluated / "evaluation" / "curve.png") as picture:
        assert picture.width == 660


def test_the_gallery_shows_the_curve(evaluated):
    for checkpoint in (evaluated, evaluated / "checkpoints" / "latest"):
        (section,) = curves(checkpoint)
        chart = {chart.title: chart for chart in section.charts}["Frechet distance of PCA-reduced pixels"]
        assert chart.steps == [4, 8, 12, 16, 20]
        assert chart.values == [row["distance"] for row in rows_of(evaluated)]


def test_a_resumed_run_has_the_same_curve(evaluated, tiny_run, tmp_path, assert_same_run):
    """As if killed at step 13: the last checkpoint is that of step 10, and the row of step 12 is newer."""
    killed = tmp_path / "killed"
    shutil.copytree(evaluated, killed, symlinks=True)
    checkpoints = killed / "checkpoints"
    shutil.rmtree(checkpoints / "step_00000020")
    (checkpoints / "latest").unlink()
    curve = killed / "evaluation" / "curve.jsonl"
    curve.write_text("".join(curve.read_text().splitlines(keepends=True)[:3]) + '{"step": 16, "dist')
    settings = (*tiny_run, *EVALUATED, f"train.out={killed}")
    trainer = Trainer(load_config("digits", settings), resume=True)
    assert [row["step"] for row in rows_of(killed)] == [4, 8], "rows after the checkpoint are dropped at once"
    trainer.run()
    trainer.close()
    assert rows_of(killed) == rows_of(evaluated)
    assert_same_run(killed, evaluated)


def test_evaluation_settings_may_change_on_resume(evaluated, tiny_run, tmp_path):
    more = tmp_path / "more"
    shutil.copytree(evaluated, more, symlinks=True)
    changed = ("train.evaluate_every=1", "evaluation.count=9", "sampling.guidance=3", "train.steps=21")
    train(load_config("digits", (*tiny_run, *changed, f"train.out={more}")), resume=True)
    assert [(row["step"], row["count"]) for row in rows_of(more)][-2:] == [(20, 70), (21, 9)]


def test_evaluate_every_is_due_at_multiples_of_steps(tiny_run):
    config = load_config("digits", (*tiny_run, "train.evaluate_every=10"))
    evaluation = Validation(config, Path("nowhere"), torch.device("cpu"), 0, 1437)
    assert evaluation.count == 1000 and not evaluation.warning
    assert [step for step in range(1, 31) if evaluation.due(step)] == [10, 20, 30]
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(("epochs", "steps"), [(1, [90, 180, 270]), (0.5, [45, 90, 135, 180, 225, 270]), (2.5, [225])])
def test_evaluate_epochs_is_due_at_the_first_step_after_an_epoch(epochs, steps, tiny_run):
    """1,437 images in batches of 16: an epoch is 89.8 steps."""
    config = load_config("digits", (*tiny_run, "train.batch_size=16", f"train.evaluate_epochs={epochs}"))
    evaluation = Validation(config, Path("nowhere"), torch.device("cpu"), 0, 1437)
    assert [step for step in range(1, 301) if evaluation.due(step)] == steps


@pytest.mark.parametrize(
    ("setting", "tokens"),
    [
        ("evaluation.features=inception", ("--reference", "--features inception")),
        ("evaluation.reference=missing.npz", ("missing.npz", "unite-fast stats")),
        ("evaluation.features=clip", ("evaluation.features", "'clip'")),
        ("evaluation.count=1", ("evaluation.count", 2)),
        ("evaluation.batch=0", ("evaluation.batch", "positive")),
        ("train.evaluate_every=-1", ("train.evaluate_every", "negative")),
        ("train.evaluate_epochs=-1", ("train.evaluate_epochs", "negative")),
        ("train.evaluate_epochs=1", ("train.evaluate_epochs", "train.evaluate_every")),
    ],
)
def test_mistakes_are_refused_before_the_run_starts(tiny_run, tmp_path, setting, tokens, mentions):
    with pytest.raises(UserError, match=mentions(*tokens)):
        train(load_config("digits", (*tiny_run, *EVALUATED, f"train.out={tmp_path / 'run'}", setting)))
    assert not (tmp_path / "run").exists()


def run_in_ranks(folder: Path, out: Path, settings: tuple[str, ...]) -> tuple[str, list[dict]]:
    torch.distributed.init_process_group("gloo")
    config = load_config("digits", settings)
    state = TrainState(UNITE(config.model), config)
    checkpoints = Checkpoints(folder / "checkpoints", 0)
    checkpoint = checkpoints.find()
    checkpoints.load_into(checkpoint, state.tensors())
    state.resume_at(checkpoint.step)
    evaluation = Validation(config, out, torch.device("cpu"), 0, 1437)
    return evaluation.run(state, None), evaluation.rows


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_work(ranks, evaluated, tiny_run, tmp_path, world):
    """70 samples make five batches of 16, so one of two or three ranks has none in the last round."""
    settings = (*tiny_run, *EVALUATED, "evaluation.batch=16")
    results = ranks(world, run_in_ranks, evaluated, tmp_path, settings)
    for _, rows in results:
        assert rows[0]["distance"] == pytest.approx(rows_of(evaluated)[-1]["distance"], rel=1e-9)
        assert rows[0]["distance"] == results[0][1][0]["distance"]
    assert len(rows_of(tmp_path)) == 1


def test_several_ranks_need_a_solver_with_fixed_steps(ranks, evaluated, tiny_run, tmp_path, mentions):
    with pytest.raises(AssertionError, match=mentions("UserError", "sampling.solver=multistep")):
        ranks(2, run_in_ranks, evaluated, tmp_path, (*tiny_run, *EVALUATED, "sampling.solver=dopri5"))


def test_samples_that_are_not_finite_are_counted_and_the_run_goes_on(tiny_run, tmp_path, capsys, mentions):
    settings = (*tiny_run, *EVALUATED, "sampling.guidance=1e30", "train.steps=5", "train.picture_every=3")
    folder = train(load_config("digits", (*settings, f"train.out={tmp_path / 'run'}"))).folder
    printed = capsys.readouterr().out
    assert re.search(mentions("warning", "no evaluation of step 4", "70 of 70"), printed)
    assert re.search(mentions("warning", "no pictures of step 3", "guidance 1e+30"), printed)
    assert not (folder / "evaluation").exists() and not (folder / "samples.png").exists()
    assert Checkpoints(folder / "checkpoints", 0).find().step == 5


def test_a_curve_that_cannot_be_read_is_a_warning(tiny_run, tmp_path, capsys):
    (tmp_path / "run" / "evaluation").mkdir(parents=True)
    os.mkfifo(tmp_path / "run" / "evaluation" / "curve.jsonl")
    train(load_config("digits", (*tiny_run, *EVALUATED, f"train.out={tmp_path / 'run'}", "train.steps=4")))
    assert capsys.readouterr().out.count("warning: evaluation: ") == 1
