"""`unite-fast bench` times the real trainer, and leaves only a row of a table."""

import csv
import json
import os
import re
import sys
import tempfile
import time

import pytest
import torch
from PIL import Image

from unite_fast.benchmarking import figures, matmul_rate, measure
from unite_fast.cli import main
from unite_fast.planning import flops, predict
from unite_fast.planning.gpus import find_gpu
from unite_fast.planning.predict import RELEASED_IMAGES_PER_S
from unite_fast.recipes import TUNABLE, load_config
from unite_fast.training.trainer import Trainer


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """The current folder, and one for temporary files, which must be empty at the end."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(matmul_rate.matmul_rate, "__defaults__", (torch.bfloat16, 0.01))
    for variable in ("UNITE_FAST_VGG16", "UNITE_FAST_LPIPS"):
        monkeypatch.delenv(variable, raising=False)
    yield
    assert list(scratch.glob("unite_fast*")) == []


@pytest.fixture
def bench(command, tiny_run):
    """Runs it on the tiny recipe; returns the JSON that it prints."""

    def run(*arguments: object) -> dict:
        ended = command("bench", "digits", *tiny_run, "--json", "--warmup", 2, "--steps", 5, *arguments)
        assert ended.status == 0, ended.err
        return json.loads(ended.out)

    return run


def rows(path="runs/bench.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_has_every_figure(bench, monkeypatch):
    steps = []
    take = Trainer.step

    def counted(trainer, batch):
        steps.append((batch.data.shape, trainer.config.data.source, trainer.config.train.out))
        return take(trainer, batch)

    monkeypatch.setattr(Trainer, "step", counted)
    row = bench("train.micro_batch=4")
    assert len(steps) == 7 and {step[:2] for step in steps} == {((8, 3, 8, 8), "synthetic")}
    assert steps[0][2].startswith(tempfile.tempdir)
    assert (row["batch_size"], row["micro_batch"], row["steps"], row["gpus"]) == (8, 4, 5, 1)
    assert row["images_per_s"] == pytest.approx(8e3 / row["step_ms"])
    assert row["images_per_s_slow"] <= row["images_per_s"] <= row["images_per_s_fast"]
    parts = sum(row[f"{part}_ms"] for part in figures.PARTS)
    assert parts == pytest.approx(8e3 / row["images_per_s_mean"], rel=1e-6), "the parts add up to the step"
    assert row["forward_ms"] > 0 and row["backward_ms"] > 0 and row["optimizer_ms"] > 0
    each = flops.image_flops(load_config("digits", tuple(row["settings"].split()))) / 1e9
    assert row["gflop_per_image"] == pytest.approx(each)
    share = each * row["images_per_s"] / (row["product_tflops"] * 1e3)
    assert row["mfu_of_product"] == pytest.approx(share)
    assert row["datasheet_tflops"] is row["mfu_of_datasheet"] is row["predicted_images_per_s_fast"] is None
    assert "not in the table" in row["why_no_prediction"]
    assert row["released_images_per_s_per_gpu"] is None and row["bad_step"] is None
    assert row["memory_gb"] > 0.05 and row["first_step_s"] > 0 and row["data_wait_share"] < 0.5
    assert row["torch"] == torch.__version__ and row["lpips"] == "off" and row["strategy"] == "none"
    assert row["card"] and row["commit"] and row["date"].endswith("Z")
    # The table has the same figures, and this folder nothing else.
    assert [written["images_per_s"] for written in rows()] == [str(row["images_per_s"])]
    assert os.listdir() == ["runs"] and set(os.listdir("runs")) == {"bench.csv", ".bench.csv.lock"}


def test_the_first_step_is_not_timed_with_the_others(bench, monkeypatch):
    take, seconds = Trainer.step, [2.0]

    def slow_at_first(trainer, batch):
        time.sleep(seconds.pop() if seconds else 0)
        return take(trainer, batch)

    monkeypatch.setattr(Trainer, "step", slow_at_first)
    row = bench()
    assert row["first_step_s"] > 2
    assert 5 * 8 / row["images_per_s_mean"] < 2, "without the first step"
    assert sum(row[f"{part}_ms"] for part in figures.PARTS) < 2e3 / 5


def test_a_recipe_that_evaluates_needs_no_inception_weights(bench, monkeypatch):
    monkeypatch.delenv("UNITE_FAST_INCEPTION", raising=False)
    row = bench("train.evaluate_every=1", "evaluation.features=inception", "train.picture_every=1", "--csv", "")
    assert row["steps"] == 5 and os.listdir() == []


def test_text_a_second_row_and_a_plot(command, tiny_run):
    for arguments in (("--steps", 3), ("--steps", 3, "--profile", "--plot", "plot.png")):
        ended = command("bench", "digits", *tiny_run, "--warmup", 1, *arguments)
        assert ended.status == 0, ended.err
    assert "images/s" in ended.out and "aten::" in ended.out and "MFU" in ended.out
    assert "first step" in ended.err, "progress is printed in a pipe too"
    assert len(rows()) == 2
    with Image.open("plot.png") as picture:
        assert picture.size[0] > 100
    os.remove("plot.png")
    assert "2 measurements" in command("bench", "--plot", "plot.png").out
    assert os.path.exists("plot.png")


def test_profile_lists_the_slowest_kernels(bench):
    top = bench("--profile", "--csv", "")["top_kernels"]
    assert {"aten::mm", "aten::addmm"} & {one["name"] for one in top}
    assert [one["ms"] for one in top] == sorted((one["ms"] for one in top), reverse=True)
    assert all(one["ms"] > 0 and one["calls"] > 0 and 0 < one["share"] < 1 for one in top)
    assert os.listdir() == []


def test_seconds_limit_the_steps(bench):
    assert bench("--steps", 1000, "--seconds", 0.001)["steps"] == 1
    assert bench("--steps", 4, "--seconds", 1000)["steps"] == 4


def test_data_can_be_digits(bench):
    assert bench("--data", "digits")["data"] == "digits"


def test_data_can_be_an_image_folder(bench, tmp_path):
    for name in ("a/0.png", "a/1.png", "b/2.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (int(name[2]) * 90, 5, 5)).save(tmp_path / "data" / name)
    row = bench("--data", tmp_path / "data", "model.num_classes=2", "data.workers=1")
    assert row["data"] == str(tmp_path / "data") and row["data_ms"] > 0


def test_lpips_without_weights_is_random_and_the_row_says_so(bench):
    row = bench("model.image_size=16", "perceptual.weight=1", "train.batch_size=2", "--steps", 3)
    assert row["lpips"] == "random weights" and row["bad_step"] is None


def test_train_has_no_random_weights(command, tiny_run):
    command("train", *tiny_run, "perceptual.weight=1").error("perceptual.vgg_path", "UNITE_FAST_VGG16")


def test_named_weights_that_are_missing_are_an_error(command, tiny_run):
    ended = command("bench", "digits", *tiny_run, "perceptual.weight=1", "perceptual.vgg_path=nowhere.pth")
    ended.error("perceptual.vgg_path", "nowhere.pth")


def test_tuned_settings_override_the_recipe_and_not_the_command(bench, command, tiny_run, tmp_path):
    tuned = tmp_path / "tuned.yaml"
    tuned.write_text("# card\nkernels: reference\ntrain: {micro_batch: 2, threads: 1}\n")
    row = bench("--tuned", tuned)
    assert (row["kernels"], row["micro_batch"]) == ("reference", 2)
    assert bench("--tuned", tuned, "train.micro_batch=4")["micro_batch"] == 4
    tuned.write_text("kernels: reference\noptim: {muon_dtype: float32}\n")
    for name in ("bench", "train"):
        command(name, "digits", *tiny_run, "--tuned", tuned).error(tuned, "optim.muon_dtype", *TUNABLE)
    command("train", "--tuned", "none.yaml").error("none.yaml", "unite-fast tune")


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        ((), ("unite-fast bench RECIPE", "imagenet256_b")),
        (("train.steps=3",), ("unite-fast bench RECIPE", "train.steps=3")),
        (("nowhere",), ("nowhere", "digits")),
        (("digits", "train.bacth_size=3"), ("train.bacth_size", "batch_size")),
        (("digits", "data.path=x"), ("data.path=x", "--data PATH")),
        (("digits", "--data", "nowhere"), ("nowhere",)),
        (("digits", "--plot", "plot.pdf"), ("--plot", "plot.pdf", ".png")),
        (("--plot", "plot.png"), ("runs/bench.csv", "--csv")),
        (("digits", "attention=sdpa_flash"), ("attention", "sdpa_flash")),
    ],
)
def test_a_mistake_is_one_error_line(command, arguments, tokens):
    command("bench", *arguments).error(*tokens)


def test_figures_are_printed_if_the_table_cannot_be_written(command, tiny_run, mentions):
    ended = command("bench", "digits", *tiny_run, "--steps", 1, "--csv", "/proc/bench.csv", "--json")
    assert ended.status == 2 and json.loads(ended.out)["images_per_s"] > 0
    assert re.match(mentions("/proc/bench.csv"), ended.err.splitlines()[-1])


def test_an_error_in_a_step_leaves_no_files(command, tiny_run, monkeypatch, mentions):
    def broken(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Trainer, "step", broken)
    ended = command("bench", "digits", *tiny_run)
    assert ended.status == 2
    assert re.match(mentions("error: out of memory", "2 GiB", "train.micro_batch"), ended.err.splitlines()[-1])
    assert not os.path.exists("runs")


def test_a_step_that_is_not_finite_is_reported(bench, command, tiny_run, monkeypatch):
    take = Trainer.step

    def nan_norm(trainer, batch):
        losses, norm = take(trainer, batch)
        return losses, norm * float("nan") if trainer.state.step == 3 else norm

    monkeypatch.setattr(Trainer, "step", nan_norm)
    assert bench()["bad_step"] == 3
    assert "NOT FINITE" in command("bench", "digits", *tiny_run, "--steps", 3).out


def test_a_known_gpu_has_a_prediction(tiny_run, monkeypatch):
    config = load_config("imagenet256_b", ("train.batch_size=64",))
    measured = measure.Measurement(
        ranks=measure.Ranks(world=1),
        device=torch.device("cuda"),
        first_step=1.0,
        whole=0.6,
        step_seconds=[0.3, 0.3],
        parts=dict.fromkeys(figures.PARTS, 0.06),
        matmul_rate=700e12,
        memory=30e9,
        reserved=33e9,
        bad_step=None,
        strategy="none",
        random_lpips=True,
        top=None,
    )
    machine = {
        "date": "",
        "commit": "c",
        "card": "NVIDIA H100 80GB HBM3",
        "torch": "2",
        "cuda": "13.0",
        "triton": "3.6",
    }
    monkeypatch.setattr(figures, "describe", lambda device: machine)
    row = figures.row(config, measured, measure.Window(), "synthetic", ())
    plan = predict.make_plan(config, predict.Cluster(find_gpu("h100"), 1, 1))
    assert row["datasheet_tflops"] == 989
    assert row["mfu_of_datasheet"] == pytest.approx(64 / 0.3 * flops.image_flops(config) / 989e12)
    assert row["predicted_images_per_s_slow"] == plan.slow.images_per_s < plan.fast.images_per_s
    assert row["predicted_images_per_s_fast"] == plan.fast.images_per_s
    assert row["released_images_per_s_per_gpu"] == RELEASED_IMAGES_PER_S
    text = "\n".join(figures.lines(row))
    assert "989 TFLOP/s" in text and "2.08 x" in text and "random weights" in text
    other = load_config("imagenet256_b", ("objective.flow_draws=2", "train.precision=float32"))
    row = figures.row(other, measured, measure.Window(), "synthetic", ())
    assert row["released_images_per_s_per_gpu"] is None and "bfloat16" in row["why_no_prediction"]


def test_marks_on_a_gpu_do_not_synchronise(monkeypatch):
    class Event:
        """A CUDA event, 250 ms after the one before."""

        now = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.now += 250.0
            self.at = Event.now

        def elapsed_time(self, other):
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    marks = measure.Marks(torch.device("cuda"))
    for _ in range(4):
        marks.add()
    assert marks.seconds() == [0.25, 0.25, 0.25]


def run_rank(folder: str, arguments: tuple[str, ...]) -> int:
    """The command on one rank; its stdout goes to a file."""
    os.chdir(folder)
    output = os.open(f"rank{os.environ['RANK']}.txt", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(output, 1)
    sys.stdout = os.fdopen(1, "w")
    sys.argv = ["unite-fast", "bench", *arguments]
    try:
        main()
    except SystemExit as ending:
        return ending.code or 0
    finally:
        sys.stdout.flush()
    return 0


def test_two_processes(ranks, tiny_run, tmp_path):
    here = str(tmp_path / "here")
    arguments = ("digits", *tiny_run, "--json", "--warmup", "2", "--steps", "4", "--seconds", "60", "--profile")
    assert ranks(2, run_rank, here, arguments) == [0, 0]
    assert (tmp_path / "here" / "rank1.txt").read_text() == ""
    row = json.loads((tmp_path / "here" / "rank0.txt").read_text())
    assert (row["gpus"], row["nodes"], row["strategy"]) == (2, 1, "ddp")
    assert (row["batch_size"], row["micro_batch"], row["steps"]) == (8, 4, 4)
    assert row["images_per_s_per_gpu"] == pytest.approx(row["images_per_s"] / 2)
    assert len(rows()) == 1 and row["top_kernels"]
