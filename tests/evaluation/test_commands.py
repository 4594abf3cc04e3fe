"""`unite-fast evaluate` and `unite-fast stats`, in one process and under torchrun."""

import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import unite_fast
from unite_fast.checkpoint.model_file import export_model
from unite_fast.cli import main
from unite_fast.data_pipeline import image_folder
from unite_fast.data_pipeline.shards import remote
from unite_fast.errors import UserError
from unite_fast.evaluation.evaluate import evaluate
from unite_fast.evaluation.report import default_folder
from unite_fast.evaluation.settings import EvaluationSettings

QUICK = ("--count", 20, "--steps", 1)


def test_evaluate_prints_and_saves_its_result(command, trained_folder, tmp_path, mentions):
    ended = command("evaluate", trained_folder, *QUICK, "--guidance", "1,3", "--out", tmp_path / "out")
    assert (ended.status, ended.err) == (0, "")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("evaluation.json", "evaluation.md", "samples_guidance_1.png", "samples_guidance_3.png"),
        "reconstructions.png",
    }
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    # Another evaluation in that folder removes the grids of this one.
    assert command("evaluate", trained_folder, *QUICK, "--guidance", "2", "--out", tmp_path / "out").status == 0
    assert [path.name for path in (tmp_path / "out").glob("samples*")] == ["samples_guidance_2.png"]
    # The output has the figures and notes of the file, and names the folder.
    rebuilt, (unguided, guided) = result["reconstruction"], result["generated"]
    assert (rebuilt["images"], unguided["guidance"], guided["guidance"]) == (360, 1, 3)
    assert rebuilt["real_class_agreement"] > 0.9, "the classifier knows real digits"
    for tokens in (
        (360, f"{rebuilt['psnr']:.2f} dB", f"{rebuilt['l1']:.4f}", f"{rebuilt['frechet_distance']:.4f}"),
        (f"{rebuilt['real_class_agreement']:.1%}", f"{rebuilt['class_agreement']:.1%}"),
        (20, "unguided", f"{unguided['frechet_distance']:.4f}", f"{unguided['class_agreement']:.1%}"),
        (20, "guidance 3", f"{guided['frechet_distance']:.4f}", f"{guided['class_agreement']:.1%}"),
        *((note,) for note in result["notes"]),
        (tmp_path / "out",),
    ):
        assert re.search(mentions(*tokens), ended.out), tokens
    # 20 images are too few for 41 components, and 360 are not many.
    notes = "\n".join(result["notes"])
    for tokens in ((20, 41), ("LPIPS",), ("SSIM",), (360, 41)):
        assert re.search(mentions(*tokens), notes), tokens


COMMANDS = (
    ("evaluate", "--count", 20, "--steps", 1, "--out", "out"),
    ("search-guidance", "--count", 2, "--final-count", 2, "--scales", "1,2", "--out", "out"),
    ("gallery", "--steps", 1, "--out", "page.html"),
)


@pytest.fixture
def received(trained_folder, rewrite, tmp_path):
    """Makes a run folder, a checkpoint and a model file whose settings name these data."""

    def make(name="digits", **data) -> list[Path]:
        run = tmp_path / "received"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(trained_folder, run, symlinks=True)

        def change(saved):
            saved.config = replace(
                saved.config,
                name=name,
                data=replace(saved.config.data, **data),
                perceptual=replace(saved.config.perceptual, vgg_path=str(tmp_path / "pipe"), lpips_path="/dev/zero"),
                evaluation=replace(saved.config.evaluation, reference=str(tmp_path / "pipe"), inception="/dev/zero"),
                train=replace(saved.config.train, out=str(tmp_path / "elsewhere"), wandb="theirs"),
            )

        rewrite(run, change)
        export_model(run, run / "model.safetensors")
        return [run, run / "checkpoints" / "latest", run / "model.safetensors"]

    return make


@pytest.mark.parametrize(
    "place",
    ["pipe:touch mark; cat {}", "https://127.0.0.1:1/set", "http://127.0.0.1:1/set", "folder", "~", "new\nline\x1b[2J"],
)
def test_a_received_model_opens_nothing_that_its_settings_name(command, received, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    opened = []
    for module in (image_folder.FolderSource, remote.RemoteShardSource):
        monkeypatch.setattr(module, "__init__", lambda self, *arguments: opened.append(arguments))
    for model in received(source="folder" if place == "folder" else "shards", path=place):
        for name, *options in COMMANDS:
            ended = command(name, model, *options)
            assert ended.status == 2 and ended.err.count("\n") == 1, ended.err
            assert "--data" in ended.err and repr(place) in ended.err
    assert opened == [] and not (tmp_path / "mark").exists() and not (tmp_path / "elsewhere").exists()
    with pytest.raises(UserError, match="--data"):
        evaluate(unite_fast.load(model), EvaluationSettings(count=20, sampling={"steps": 1}))


def test_built_in_data_and_data_that_the_user_names_are_opened(command, received, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    _, _, model = received("<script>x</script>\n\x1b[2J", source="digits", path="")
    assert command("evaluate", model, *QUICK, "--out", "out").status == 0
    first, *others = (tmp_path / "out" / "evaluation.md").read_text().splitlines()
    assert first.startswith("# Evaluation of &lt;script") and first.isprintable() and "<" not in "".join(others)
    assert command("info", model).out.replace("\n", "").isprintable()
    assert command("info", model).out.count(str(tmp_path / "pipe")) == 2, "what the file says is shown"
    _, _, model = received(source="shards", path="pipe:touch mark; cat {}")
    assert command("evaluate", model, *QUICK, "--data", "digits", "--out", "again").status == 0
    assert not (tmp_path / "mark").exists() and not (tmp_path / "elsewhere").exists()


def test_results_go_to_the_run_folder():
    assert default_folder(Path("runs/x/checkpoints/step_00000020")) == Path("runs/x/evaluation")
    assert default_folder(Path("here/model.safetensors")) == Path("here/evaluation")


def test_the_run_folder_is_the_default(command, trained_folder, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for path in (trained_folder / "checkpoints").iterdir():
        (run / "checkpoints" / path.name).symlink_to(path)
    assert command("evaluate", run, *QUICK, "--reconstructions", 0).status == 0
    assert (run / "evaluation" / "evaluation.json").exists()


def test_stats_of_digits_and_of_a_folder_with_a_broken_image(command, trained_folder, tmp_path, mentions):
    out = tmp_path / "digits.npz"
    ended = command("stats", "digits", out, "--split", "test")
    assert (ended.status, ended.err) == (0, "")
    with np.load(out, allow_pickle=False) as file:
        d = len(file["mu"])
        assert file["sigma"].shape == (d, d) and file["samples"].shape == (360, d)
    assert re.search(mentions(360, d, "pixels", out), ended.out)
    ended = command("evaluate", trained_folder, *QUICK, "--reference", out, "--out", tmp_path / "out")
    assert ended.status == 0
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["reference"]["split"] == "test"

    for i in range(5):
        (tmp_path / "data" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9, 3), 40 * i, np.uint8)).save(tmp_path / "data" / "a" / f"{i}.png")
    (tmp_path / "data" / "a" / "3.png").write_bytes(b"no picture")
    ended = command("stats", tmp_path / "data", tmp_path / "data.npz", "--image-size", 8)
    assert re.search(mentions(1, "a/3.png"), ended.out.splitlines()[1])
    with np.load(tmp_path / "data.npz", allow_pickle=False) as file:
        provenance = json.loads(bytes(file["meta_json"]))["about"]
    (unreadable,) = provenance["unreadable_first"]
    assert unreadable.startswith("a/3.png: ")


def run_main(arguments: list[str]) -> None:
    sys.argv = ["unite-fast", *arguments]
    with pytest.raises(SystemExit) as ending:
        main()
    assert not ending.value.code and not torch.distributed.is_initialized()


def test_torchrun_gives_the_same_result(command, ranks, trained_folder, tmp_path):
    results = []
    for world in (1, 2):
        reference, out = tmp_path / f"{world}.npz", tmp_path / f"out{world}"
        stats = ["stats", "digits", str(reference)]
        evaluation = ["evaluate", str(trained_folder), *map(str, QUICK), "--batch", "8", "--out", str(out)]
        for arguments in (stats, [*evaluation, "--reference", str(reference)]):
            if world == 1:
                assert command(*arguments).status == 0
            else:
                ranks(world, run_main, arguments)
        result = json.loads((out / "evaluation.json").read_text())
        assert result["processes"] == world
        results.append((result["generated"][0]["frechet_distance"], result["reconstruction"]["frechet_distance"]))
        with Image.open(out / "samples_guidance_1.png") as picture:
            results[-1] += (np.asarray(picture).tobytes(),)
    assert results[1][2] == results[0][2]
    assert results[1][:2] == pytest.approx(results[0][:2], rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        (("evaluate", "RUN", "--guidance", "2,x"), ("--guidance", "'2,x'")),
        (("evaluate", "RUN", "--guidance", ","), ("--guidance", "','")),
        (("evaluate", "RUN", "--count", "0"), ("--count", 0, 2)),
        (("evaluate", "RUN", "--batch", "0"), ("--batch", 0)),
        (("evaluate", "RUN", "--features", "clip"), ("--features", "'clip'", "inception", "pixels")),
        (("evaluate", "RUN", "--reference", "absent.npz"), ("absent.npz", "unite-fast stats")),
        (("evaluate", "RUN", "--features", "inception"), ("--reference", "--features inception")),
        (("evaluate", "RUN", "--out", "FILE"), ("file", "--out")),
        (("evaluate", "RUN", "--solver", "magic", "--out", "new"), ("sampling.solver", "'magic'")),
        (("stats", "digits", "x.txt"), ("x.txt", ".npz")),
        (("stats", "digits", "x.npz", "--features", "inception"), ("--inception", "UNITE_FAST_INCEPTION")),
        (("stats", "absent", "x.npz"), ("absent", "data.path=FOLDER")),
        (("evaluate", "RUN", "--data", "absent"), ("absent", "data.path=FOLDER")),
    ],
)
def test_mistakes_are_one_line(command, trained_folder, tmp_path, monkeypatch, arguments, tokens):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    names = {"RUN": trained_folder, "FILE": tmp_path / "file"}
    command(*(names.get(part, part) for part in arguments)).error(*tokens)


def test_images_that_are_not_finite_are_not_scored(command, trained_folder, tmp_path):
    for name in ("evaluate", "sample", "generate"):
        out = {"evaluate": "x", "sample": "x.png", "generate": "x.npz"}[name]
        options = ("--guidance", "1e30", "--count", 20, "--out", tmp_path / out)
        command(name, trained_folder, *options).error("20 of 20", "guidance 1e+30")
        assert not (tmp_path / out).exists()
    command("gallery", trained_folder, "--guidance", "1e30", "--out", tmp_path / "x.html").error("guidance 1e+30")


def test_a_folder_is_written_by_one_evaluation(command, trained_folder, tmp_path, process, wait_until):
    running = process("evaluate", trained_folder, "--count", 100_000, "--out", "out")
    wait_until(lambda: (tmp_path / ".out.lock").exists() and (tmp_path / ".out.lock").stat().st_size)
    command("evaluate", trained_folder, *QUICK, "--out", tmp_path / "out").error(tmp_path / "out", "being written")
    command("search-guidance", trained_folder, "--out", tmp_path / "out").error(tmp_path / "out", "being written")
    running.signal(signal.SIGKILL)
    running.wait()
    assert command("evaluate", trained_folder, *QUICK, "--out", tmp_path / "out").status == 0
    assert not (tmp_path / ".out.lock").exists()


def test_a_report_replaces_no_foreign_file_and_follows_no_link(command, trained_folder, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "evaluation.md").write_text("# My notes")
    (tmp_path / "notes" / "guidance.md").write_text("# My notes")
    for name in ("evaluate", "search-guidance"):
        command(name, trained_folder, "--out", tmp_path / "notes").error("in the way")
        inside = trained_folder / "checkpoints" / "step_00000020"
        command(name, trained_folder, "--out", inside).error(inside)
    run = tmp_path / "run"
    shutil.copytree(trained_folder, run, symlinks=True)
    for name in ("evaluation", "guidance"):
        (run / name).symlink_to(tmp_path / "notes")
    command("evaluate", run, *QUICK).error(run / "evaluation", "link")
    command("search-guidance", run).error(run / "guidance", "link")
    assert {path.read_text() for path in (tmp_path / "notes").iterdir()} == {"# My notes"}


def test_statistics_replace_statistics_only(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("samples.npz", arr_0=0)
    command("stats", "digits", "samples.npz").error("samples.npz", "in the way")
    Path("text.npz").write_text("mine")
    command("stats", "digits", "text.npz").error("text.npz", "in the way")
    for _ in range(2):
        assert command("stats", "digits", "new.npz").status == 0
    Path("digits").mkdir()
    command("stats", "./digits", "digits/new.npz").error("digits/new.npz", "reads")
    assert sorted(os.listdir()) == ["digits", "new.npz", "samples.npz", "text.npz"]
