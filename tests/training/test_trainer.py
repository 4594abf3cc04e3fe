"""Whole runs: exact resume, refused mistakes, stops on errors, and the files they leave."""

import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from unite_fast.checkpoint.folders import step_folders, step_of
from unite_fast.checkpoint.format import as_recorded
from unite_fast.checkpoint.manager import Checkpoints
from unite_fast.checkpoint.reader import load_checkpoint
from unite_fast.distributed.signals import StopVote, TorchrunEnded
from unite_fast.errors import TemporaryError, UserError
from unite_fast.recipes import load_config, to_tree
from unite_fast.training import console, metrics, profiling, train_step
from unite_fast.training.data_record import DataRecord
from unite_fast.training.metrics import training_metrics
from unite_fast.training.run_folder import check_same_settings, read_status
from unite_fast.training.step_timer import StepClock
from unite_fast.training.trainer import Trainer, train
from unite_fast.utils.rows import read_rows


@pytest.fixture
def settings(tiny_run, tmp_path):
    """Makes the config of a tiny run in this test's folder."""

    def make(*overrides: str, folder: str = "run"):
        return load_config("digits", (*tiny_run, f"train.out={tmp_path / folder}", *overrides))

    return make


@pytest.fixture
def image_folder(tmp_path):
    """Makes a folder of 24 noise images in two classes; files of `truncated` are cut in half."""

    def make(truncated: tuple[str, ...] = ()):
        generator = np.random.default_rng(0)
        for name in (f"{kind}/{i:02d}.png" for kind in ("cats", "dogs") for i in range(12)):
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(path)
            if name in truncated:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return tmp_path / "images"

    return make


def saved_steps(folder) -> list[int]:
    return [step_of(path) for path in step_folders(folder / "checkpoints")]


@pytest.mark.parametrize(
    ("at", "overrides"),
    [
        pytest.param(10, (), id="plain"),
        pytest.param(7, ("train.micro_batch=2", "data.flip=true"), id="micro-batches-flips"),
        pytest.param(3, ("train.precision=bfloat16", "optim.muon_dtype=bfloat16"), id="bfloat16"),
        pytest.param(3, ("train.precision=float8", "optim.muon_dtype=bfloat16"), id="float8"),
        pytest.param(19, ("train.log_every=20", "train.checkpoint_every=4"), id="before-the-log"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(settings, assert_same_run, at, overrides):
    whole = train(settings(*overrides, folder="whole"))
    assert (whole.steps, whole.stopped_by) == (20, 0)
    train(settings(*overrides, f"train.steps={at}"))
    assert load_checkpoint(settings().train.out).step == at
    resumed = train(settings(*overrides), resume=True)
    assert (resumed.steps, resumed.folder) == (20, whole.folder.with_name("run"))
    assert_same_run(whole.folder, resumed.folder)
    assert read_rows(whole.folder / "metrics.jsonl")[-1]["step"] == 20


def test_resume_is_exact_with_prefetched_and_broken_images(settings, assert_same_run, image_folder):
    data = image_folder(truncated=("cats/03.png", "dogs/11.png"))
    overrides = ("data.source=folder", f"data.path={data}", "model.num_classes=2", "data.flip=true")
    whole = train(settings(*overrides, folder="whole"))
    train(settings(*overrides, "train.steps=2"))
    train(settings(*overrides, "data.workers=0", "train.steps=5"), resume=True)
    assert_same_run(whole.folder, train(settings(*overrides), resume=True).folder)
    assert {name for name, _ in load_checkpoint(whole.folder).progress["loader"]["skipped"]} == {
        "cats/03.png",
        "dogs/11.png",
    }


def test_micro_batches_match_one_large_batch(settings, monkeypatch):
    """Losses and gradient norms, up to rounding: float32 sums in another order."""
    histories, sizes, make = [], [], train_step.make_micro_batch

    def make_and_record(images, *others):
        sizes.append(len(images))
        return make(images, *others)

    monkeypatch.setattr(train_step, "make_micro_batch", make_and_record)
    for micro in (0, 4, 1):
        trainer = Trainer(settings(f"train.micro_batch={micro}", "data.flip=true", folder=f"micro{micro}"), False)
        history = []
        for _ in range(3):
            losses, norm = trainer.step(next(trainer.loader))
            history += [losses.total, losses.l1, losses.flow, norm]
        trainer.close()
        histories.append(torch.stack(history))
        size = micro or 8
        assert sizes == [size] * (3 * 8 // size)
        sizes.clear()
    for history in histories[1:]:
        # 1e-5 is 80 roundings of float32; a wrong weight of a micro-batch would show as 0.1 or more.
        assert torch.allclose(history, histories[0], rtol=1e-5, atol=0)
    assert not torch.equal(histories[0][:4], histories[0][4:8])


def test_a_finished_run_leaves_all_documented_files(trained_folder):
    names = sorted(os.listdir(trained_folder))
    pictures = ["curves.png", "reconstructions", "reconstructions.png", "samples", "samples.png"]
    assert names == sorted([".lock", "checkpoints", "config.yaml", "metrics.jsonl", "status", "tensorboard", *pictures])
    assert saved_steps(trained_folder) == [10, 20]
    assert load_config(str(trained_folder / "config.yaml")) == as_recorded(load_checkpoint(trained_folder).config)

    rows = [json.loads(line) for line in (trained_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    for row in rows:
        losses = {"step", "epoch", "total", "l1", "lpips", "flow", "grad_norm", "lr", "skipped_steps"}
        losses |= {"latent_rms", "latent_gain"}
        parts = {f"seconds_{part}" for part in ("data", "forward", "backward", "optimizer", "other")}
        # No MFU: no peak of a CPU is known.
        assert row.keys() == losses | parts | {"images_per_s", "images_per_s_per_gpu", "memory_gb"}
        assert row["images_per_s"] * sum(row[part] for part in parts) == pytest.approx(8)
        assert training_metrics(row).keys() == losses
        assert row["epoch"] == pytest.approx(row["step"] * 8 / 1437)
        assert row["total"] == pytest.approx(row["l1"] + row["flow"], rel=1e-6)
        assert min(row["l1"], row["flow"], row["grad_norm"], row["lr"], row["images_per_s"]) > 0

    events = EventAccumulator(str(trained_folder / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == rows[0].keys() - {"step"}
    for key in ("l1", "flow", "lr", "images_per_s"):
        assert [event.step for event in events.Scalars(key)] == [5, 10, 15, 20]
        assert [event.value for event in events.Scalars(key)] == pytest.approx([row[key] for row in rows])


def test_the_speed_in_a_row_covers_the_steps_since_the_last_row(settings, monkeypatch):
    parts = dict.fromkeys(("data", "forward", "backward", "optimizer", "other"), 0.4)
    monkeypatch.setattr(StepClock, "take", lambda self: (2.0, parts))
    train(settings("train.steps=7"))
    rows = read_rows(train(settings("train.steps=15"), resume=True).folder / "metrics.jsonl")
    # 8 images per step. The row of step 10 covers three steps: the run was resumed after step 7.
    steps = {row["step"]: row["images_per_s"] * 2.0 / 8 for row in rows}
    assert steps == {5: 5, 10: 3, 15: 5}
    assert [row["seconds_data"] for row in rows] == pytest.approx([0.4 / 5, 0.4 / 3, 0.4 / 5])


@pytest.mark.parametrize(
    "name",
    [
        "samples.png",
        "reconstructions.png",
        "curves.png",
        "samples/step_00000020.png",
        "reconstructions/step_00000020.png",
    ],
)
def test_pictures_of_a_run_are_not_blank(trained_folder, name):
    with Image.open(trained_folder / name) as picture:
        picture.load()
        assert min(picture.size) > 200
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_picture_every_draws_pictures_during_the_run(settings):
    folder = train(settings("train.picture_every=8")).folder
    for kind in ("samples", "reconstructions"):
        assert sorted(os.listdir(folder / kind)) == [f"step_{step:08d}.png" for step in (8, 16, 20)]


def test_drawing_pictures_does_not_change_the_run(settings, assert_same_run):
    assert_same_run(
        train(settings("train.picture_every=7", folder="with")).folder, train(settings(folder="without")).folder
    )


def test_old_checkpoints_are_deleted_except_multiples_of_keep_every(settings):
    folder = train(settings("train.checkpoint_every=3", "train.keep_every=6")).folder
    assert saved_steps(folder) == [6, 12, 18, 20]
    assert sorted(os.listdir(folder / "checkpoints"))[:1] == ["latest"]
    assert len(os.listdir(folder / "checkpoints")) == 5


def test_a_run_is_not_overwritten(settings, mentions):
    folder = train(settings("train.steps=2")).folder
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=mentions(folder, "--resume", "train.out=FOLDER")):
        train(settings())
    # Without config.yaml it still counts as a run: pruning would delete new checkpoints beside the old ones.
    (folder / "config.yaml").unlink()
    del times[folder / "config.yaml"]
    with pytest.raises(UserError, match=mentions(folder, "--resume")):
        train(settings())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == times


def test_resuming_without_a_checkpoint_starts_at_step_zero(settings, assert_same_run):
    """So one command line serves the first start and all restarts of a job."""
    fresh = train(settings("train.steps=4", folder="fresh"))
    killed = fresh.folder.with_name("run")
    killed.mkdir()
    (killed / "config.yaml").write_text("of a run that was killed early")
    (killed / "metrics.jsonl").write_text(json.dumps({"step": 3, "l1": 1.0}) + "\n")
    assert_same_run(fresh.folder, train(settings("train.steps=4"), resume=True).folder)


def test_resuming_a_finished_run_changes_nothing(settings, assert_same_run):
    whole = train(settings("train.steps=4", folder="whole"))
    train(settings("train.steps=4"))
    again = train(settings("train.steps=4"), resume=True)
    assert (again.steps, again.images_per_s) == (4, 0)
    assert_same_run(whole.folder, again.folder)


@pytest.mark.parametrize(
    ("override", "tokens"),
    [
        ("model.encoder.width=32", ("model.encoder.width", 32, 16)),
        ("seed=5", ("seed", 5, 0)),
        ("schedule.lr=1.0", ("schedule.lr", "1.0", "0.0025")),
        ("train.batch_size=4", ("train.batch_size", 4, 8)),
        ("train.micro_batch=2", ("train.micro_batch", 2, 0)),
        ("train.precision=bfloat16", ("train.precision", "bfloat16", "float32")),
        ("optim.adamw_betas=0.8,0.9", ("optim.adamw_betas", "[0.8, 0.9]", "[0.9, 0.999]")),
    ],
)
def test_resume_refuses_changed_settings_that_affect_a_step(settings, override, tokens, mentions):
    with pytest.raises(UserError, match=mentions(*tokens)) as refusal:
        check_same_settings(settings(), settings(override))
    assert "\n" not in str(refusal.value)


def test_resume_is_refused_with_another_image_decoder(settings, rewrite, mentions):
    folder = train(settings("train.steps=2")).folder
    rewrite(folder, lambda saved: saved.progress.update(decoder="dali"))
    with pytest.raises(UserError, match=mentions("dali", "pillow", "data.loader=dali")):
        train(settings("train.steps=4"), resume=True)


def test_resume_accepts_changed_settings_that_do_not_affect_a_step(settings):
    now = settings(
        "name=other", "data.workers=7", "train.steps=9", "train.device=auto", "train.log_every=1", "train.keep_every=3",
        "train.checkpoint_every=2", "train.picture_every=2", folder="elsewhere",
    )  # fmt: skip
    check_same_settings(settings(), now)


def test_a_resumed_run_saves_its_new_settings(settings):
    train(settings("train.steps=2"))
    folder = train(settings("train.steps=3"), resume=True).folder
    assert yaml.safe_load((folder / "config.yaml").read_text()) == to_tree(settings("train.steps=3"))


@pytest.mark.parametrize(
    ("override", "tokens"),
    [
        ("data.workers=-1", ("data.workers", "negative")),
        ("model.num_classes=9", ("model.num_classes", 10, 9)),
        ("data.path=somewhere", ("data.path", "somewhere")),
        ("data.source=folder", ("data.source", "folder", "data.path")),
        ("perceptual.weight=1.0", ("perceptual.vgg_path",)),
    ],
)
def test_a_mistake_at_the_start_leaves_no_run_folder(settings, override, tokens, monkeypatch, mentions):
    for variable in [name for name in os.environ if name.startswith("UNITE_FAST")]:
        monkeypatch.delenv(variable)
    with pytest.raises(UserError, match=mentions(*tokens)):
        train(settings(override))
    assert not os.path.exists(settings().train.out)


def test_missing_cuda_is_an_error(settings, monkeypatch, mentions):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=mentions("device", "cuda")):
        train(settings("train.device=cuda"))


def test_a_nonfinite_loss_stops_the_run_and_names_step_and_checkpoint(settings, rewrite, mentions):
    folder = train(settings("train.steps=6", "train.checkpoint_every=3")).folder
    # A huge learning rate from here on: step 7 ruins the weights, and step 8 has a loss that is not finite.
    good = step_folders(folder / "checkpoints")[-1]
    rewrite(folder, lambda saved: setattr(saved.config.schedule, "lr", 1e30))
    with pytest.raises(UserError, match=mentions("step 8", good)):
        train(settings("schedule.lr=1e30", "train.log_every=2", "train.checkpoint_every=100"), resume=True)
    assert saved_steps(folder) == [3, 6]
    assert load_checkpoint(folder).step == 6
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [5]


def test_a_nonfinite_loss_before_the_first_checkpoint_names_the_step(settings, mentions):
    config = settings("schedule.lr=1e30", "schedule.warmup_steps=1")
    with pytest.raises(UserError, match=mentions("step 3", "finite")):
        train(config)
    assert saved_steps(Path(config.train.out)) == []


def test_nonfinite_weights_are_not_saved(settings, mentions):
    trainer = Trainer(settings(), False)
    trainer.step(next(trainer.loader))
    with torch.no_grad():
        next(trainer.state.model.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(UserError, match=mentions("weights", "step 1", "finite")):
        trainer.save()
    trainer.close()
    assert saved_steps(trainer.folder) == []


def act_at(monkeypatch, step: int, act) -> None:
    """Runs `act` before a step of the next run."""
    original = Trainer.step

    def run(self, batch):
        if self.state.step + 1 == step:
            act()
        return original(self, batch)

    monkeypatch.setattr(Trainer, "step", run)


# TensorBoard's thread finds no file; see `cli._report_thread`.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_whose_folder_is_moved_goes_on_where_it_is(settings, assert_same_run, monkeypatch, capsys, tmp_path):
    whole = train(settings("train.picture_every=10", folder="whole"))
    capsys.readouterr()
    act_at(monkeypatch, 8, lambda: os.rename(tmp_path / "run", tmp_path / "moved"))
    outcome = train(settings("train.picture_every=10"))
    assert outcome.folder == tmp_path / "moved" and not (tmp_path / "run").exists()
    assert_same_run(whole.folder, outcome.folder)
    assert capsys.readouterr().out.count("was moved") == 1
    assert sorted(os.listdir(outcome.folder)) == sorted(os.listdir(whole.folder))


# TensorBoard's thread finds no file; see `cli._report_thread`.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_whose_folder_is_deleted_saves_in_a_new_one(settings, monkeypatch, capsys, tmp_path):
    act_at(monkeypatch, 8, lambda: shutil.rmtree(tmp_path / "run"))
    folder = train(settings()).folder
    assert folder == tmp_path / "run" and saved_steps(folder) == [10, 20]
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [10, 15, 20]
    assert load_config(str(folder / "config.yaml")) == settings()
    assert capsys.readouterr().out.count("was deleted") == 1


@pytest.fixture
def moved_by_a_save(monkeypatch, tmp_path) -> Path:
    """The first save moves the run folder to this one, and fails."""
    original = Checkpoints._finish

    def move(self, partial, path, manifest):
        if path.parent == tmp_path / "run" / "checkpoints":
            os.rename(tmp_path / "run", tmp_path / "moved")
        original(self, partial, path, manifest)

    monkeypatch.setattr(Checkpoints, "_finish", move)
    return tmp_path / "moved"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_move_that_is_noticed_before_the_failed_save_ends_nothing(settings, moved_by_a_save, wait_until, monkeypatch):
    """The row of step 15 notices it; the save of step 10 failed, and that of step 20 waits for it."""
    act_at(monkeypatch, 12, lambda: wait_until(moved_by_a_save.exists))
    outcome = train(settings())
    assert outcome.folder == moved_by_a_save
    assert saved_steps(outcome.folder) == [20]


def test_a_run_whose_folder_is_moved_during_the_last_save_saves_again(settings, moved_by_a_save, tmp_path):
    assert saved_steps(train(settings("train.steps=2")).folder) == [2]
    assert load_checkpoint(tmp_path / "moved").step == 2


def test_a_failure_of_every_side_output_saves_the_run(settings, assert_same_run, monkeypatch, capsys):
    """Metrics, events, pictures, curves and the trace of the profiler."""
    whole = train(settings(folder="whole"))
    capsys.readouterr()
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "disk full"))
    for module, name in ((metrics, "open_to_append"), (metrics, "make_folder"), (console, "save_png"),
                         (console, "save_curves"), (profiling, "make_folder")):  # fmt: skip
        monkeypatch.setattr(module, name, full)
    outcome = train(settings("train.picture_every=10", "profile.steps=3:5"))
    assert outcome.steps == 20 and saved_steps(outcome.folder) == [10, 20]
    assert torch.equal(
        load_checkpoint(outcome.folder).tensors["model.latent_norm.weight"],
        load_checkpoint(whole.folder).tensors["model.latent_norm.weight"],
    )
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    names = ("metrics.jsonl", "TensorBoard", "curves.png", "samples", "reconstructions", "profile")
    assert sorted(line.split(":")[1].strip() for line in warnings) == sorted(names)


def test_a_run_in_a_folder_of_links_writes_through_none(settings, trained_folder, tmp_path, capsys):
    """The folder came from elsewhere."""
    run, victim = tmp_path / "run", tmp_path / "victim"
    shutil.copytree(trained_folder, run, symlinks=True)
    victim.mkdir()
    for name in ("config.yaml", "status", "metrics.jsonl", "samples.png", "curves.png", "reconstructions.png"):
        (run / name).unlink()
        (victim / name).write_text("mine")
        (run / name).symlink_to(victim / name)
    for name in ("samples", "reconstructions", "tensorboard", "evaluation"):
        shutil.rmtree(run / name, ignore_errors=True)
        (run / name).symlink_to(victim)
    before = sorted(os.listdir(victim))
    train(settings("train.steps=24", "train.picture_every=2"), resume=True)
    assert sorted(os.listdir(victim)) == before
    assert {path.read_text() for path in victim.iterdir()} == {"mine"}
    assert load_checkpoint(run).step == 24
    assert not any((run / name).is_symlink() for name in ("config.yaml", "status", "metrics.jsonl", "samples.png"))


def test_checkpoints_are_not_written_through_a_link(settings, tmp_path, mentions):
    (tmp_path / "run").mkdir()
    (tmp_path / "victim").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match=mentions(tmp_path / "run" / "checkpoints", "link")):
        train(settings("train.steps=2"))
    assert os.listdir(tmp_path / "victim") == []


def test_a_copy_that_followed_links_resumes_and_saves(settings, trained_folder, assert_same_run, tmp_path):
    """`cp -rL` and `scp -r` make a real folder of `latest`."""
    whole = train(settings("train.steps=30", folder="whole"))
    for name, ignored in (("all", ()), ("alone", ("step_*",))):
        run = tmp_path / name
        shutil.copytree(trained_folder, run, ignore=shutil.ignore_patterns(*ignored) if ignored else None)
        if ignored:
            shutil.copytree(
                trained_folder / "checkpoints" / "latest", run / "checkpoints" / "latest", dirs_exist_ok=True
            )
        assert not (run / "checkpoints" / "latest").is_symlink()
        outcome = train(settings("train.steps=30", folder=name), resume=True)
        assert_same_run(whole.folder, outcome.folder)
        assert os.readlink(run / "checkpoints" / "latest") == "step_00000030"


def test_a_file_system_without_links_saves_and_resumes(settings, assert_same_run, monkeypatch, checkpoint_warnings):
    whole = train(settings(folder="whole"))
    monkeypatch.setattr(Path, "symlink_to", mock.Mock(side_effect=OSError(errno.EPERM, "no links here")))
    folder = train(settings("train.steps=10")).folder
    assert sorted(os.listdir(folder / "checkpoints")) == ["step_00000010"]
    assert_same_run(whole.folder, train(settings(), resume=True).folder)
    assert all("no links here" in line for line in checkpoint_warnings()) and len(checkpoint_warnings()) >= 1


def test_resuming_nothing_says_so_loudly(settings, capsys, mentions):
    train(settings("train.steps=1"), resume=True)
    assert re.search(mentions("WARNING", "nothing to resume", settings().train.out), capsys.readouterr().out)
    train(settings("train.steps=2"), resume=True)
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", ".", "/x", "a\nb"])
def test_the_name_of_a_run_is_no_path(settings, name, mentions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = settings()
    config.name, config.train.out = name, ""
    with pytest.raises(UserError, match=mentions("name", repr(name), "train.out=FOLDER")):
        train(config)
    assert os.listdir(tmp_path) == []


def test_home_is_expanded_in_the_run_folder(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = settings("train.steps=1")
    config.train.out = "~/x"
    assert train(config).folder == tmp_path / "home" / "x"


@pytest.mark.parametrize(
    ("change", "tokens"),
    [
        (lambda saved: saved.tensors.pop("model.latent_norm.weight"), ("model.latent_norm.weight",)),
        (lambda saved: saved.tensors.pop("optim.latent_norm.weight.exp_avg"), ("optim.latent_norm.weight.exp_avg",)),
        (
            lambda saved: saved.tensors.update({"ema.latent_norm.weight": torch.zeros(5)}),
            ("ema.latent_norm.weight", "[5]", "[4]"),
        ),
        (lambda saved: saved.tensors.update({"ema.foreign": torch.zeros(5)}), ("ema.foreign",)),
        (lambda saved: saved.progress.pop("averages"), ("'averages'",)),
    ],
)
def test_a_checkpoint_with_missing_or_wrong_tensors_is_not_resumed(settings, rewrite, change, tokens, mentions):
    folder = train(settings("train.steps=2")).folder
    rewrite(folder, change)
    with pytest.raises(UserError, match=mentions(folder / "checkpoints" / "step_00000002", *tokens)) as refusal:
        train(settings("train.steps=4"), resume=True)
    assert "\n" not in str(refusal.value)


def test_resume_skips_a_damaged_checkpoint(settings, assert_same_run, checkpoint_warnings, mentions):
    whole = train(settings(folder="whole"))
    folder = train(settings()).folder
    shard = folder / "checkpoints" / "step_00000020" / "shard_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    assert_same_run(whole.folder, train(settings(), resume=True).folder)
    damaged, used = shard.parent, shard.parents[1] / "step_00000010"
    (warning,) = checkpoint_warnings()
    assert re.match(mentions(damaged, shard.name, used), warning)


def test_a_failed_save_stops_the_run(settings, monkeypatch, mentions):
    def fail(*_):
        raise OSError(28, "No space left on device")

    folder = train(settings("train.steps=4")).folder
    monkeypatch.setattr("unite_fast.checkpoint.format.save_file", fail)
    with pytest.raises(UserError, match=mentions(folder / "checkpoints" / "step_00000006", os.strerror(errno.ENOSPC))):
        train(settings("train.checkpoint_every=6"), resume=True)
    assert saved_steps(folder) == [4]
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")][-1] <= 12, "it stops at the next save"


def test_truncated_images_are_skipped_and_listed(settings, image_folder, capfd, caplog, mentions):
    data = image_folder(truncated=("cats/03.png", "dogs/11.png"))
    train(settings("data.source=folder", f"data.path={data}", "model.num_classes=2"))
    out = capfd.readouterr().out
    assert re.search(mentions("skipped", 2), out)
    for name in ("cats/03.png", "dogs/11.png"):
        assert re.search(mentions(f"{name}:"), out)
        assert sum(f"{name}: " in message for message in caplog.messages) == 1


def test_a_folder_without_a_readable_image_is_an_error(settings, image_folder, mentions):
    data = image_folder(truncated=tuple(f"{kind}/{i:02d}.png" for kind in ("cats", "dogs") for i in range(12)))
    with pytest.raises(UserError, match=mentions(24, "cats/00.png")):
        train(settings("data.source=folder", f"data.path={data}", "model.num_classes=2"))


def test_the_summary_prints_all_paths_verbatim(settings, capfd):
    """Long lines are neither cut nor wrapped, and names are not parsed as markup or emoji."""
    folder = train(settings("train.steps=5", "name='[/b]'", folder=f"{'long' * 40}/[/red]:car:x")).folder
    out = capfd.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["run", "folder"] and line.endswith(f" {folder}") for line in out)
    for label, file in {
        "checkpoint": "checkpoints/latest",
        "samples": "samples.png",
        "reconstructions": "reconstructions.png",
        "curves": "curves.png",
        "metrics": "metrics.jsonl",
    }.items():
        assert any(line.split()[0] == label and line.endswith(f" {folder / file}") for line in out if line)
        assert (folder / file).exists()
    assert out[0].startswith("training [/b]: ")


def test_a_run_says_what_is_left_out_and_refuses_other_held_out_classes(settings, tmp_path, capfd, mentions):
    for name in ("train/cats/0.png", "train/dogs/1.png", "val/cats/2.png"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    (tmp_path / "data" / "train" / "cats" / "notes.txt").write_text("x")
    data = ("data.source=folder", f"data.path={tmp_path / 'data'}", "model.num_classes=2", "data.workers=0")
    run = (*data, "train.steps=1", "train.batch_size=2")
    train(settings(*run))
    printed = capfd.readouterr().out
    assert re.search(r"^left out: 1 .*cats/notes\.txt", printed, re.M) and "training images" not in printed
    (tmp_path / "data" / "val" / "cats").rename(tmp_path / "data" / "val" / "1")
    with pytest.raises(UserError, match=mentions(tmp_path / "data" / "val" / "1", "numbers")):
        train(settings(*run, folder="other"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_another_process_made_meanwhile_is_not_overwritten(settings, monkeypatch, mentions, resume):
    """Two starts at once, one of which reads its data for longer than the other one trains."""
    original = DataRecord.of

    def slowly(*arguments):
        monkeypatch.setattr(DataRecord, "of", original)
        train(settings("train.steps=4"))
        return original(*arguments)

    monkeypatch.setattr(DataRecord, "of", slowly)
    with pytest.raises(UserError, match=mentions(settings().train.out, "--resume")):
        train(settings("train.steps=2"), resume=resume)
    assert saved_steps(Path(settings().train.out)) == [4]
    assert read_status(Path(settings().train.out)) == "finished at step 4"


def test_the_log_of_a_run_whose_checkpoints_are_gone_is_kept(settings, capsys):
    folder = train(settings()).folder
    log = (folder / "metrics.jsonl").read_text()
    (folder / "checkpoints").rename(folder / "old_checkpoints")
    train(settings("train.steps=1"), resume=True)
    assert (folder / "metrics.1.jsonl").read_text() == log
    assert "metrics.1.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("stopped_by", [0, signal.SIGTERM])
def test_a_run_stops_for_a_killed_torchrun_only_before_its_last_step(settings, monkeypatch, stopped_by):
    """The vote may end with the last step: then nothing is left to resume."""

    def next_result(vote: StopVote) -> int:
        vote.orphan = 1
        return stopped_by

    monkeypatch.setattr(StopVote, "next_result", next_result)
    if not stopped_by:
        assert train(settings("train.steps=2")).orphan is None
        assert read_status(Path(settings().train.out)) == "finished at step 2"
        return
    with pytest.raises(TorchrunEnded) as ended:
        train(settings("train.steps=2"))
    assert ended.value.status == TemporaryError.status
    assert read_status(Path(settings().train.out)).startswith("stopped at step 0 by the end of torchrun of rank 1;")
    assert load_checkpoint(Path(settings().train.out)).step == 0
