"""`unite-fast evaluate` and `unite-fast stats`, in one process and under torchrun."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unite_fast.cli import main
from unite_fast.evaluation.report import default_folder

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
