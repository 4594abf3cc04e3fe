"""`unite-fast evaluate` and `unite-fast stats`, alone and as torchrun starts them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unite_fast.cli import main
from unite_fast.evaluation.report import default_folder

QUICK = ("--count", 20, "--steps", 1)


def test_evaluate_says_and_keeps_what_it_found(command, trained_folder, tmp_path):
    ended = command("evaluate", trained_folder, *QUICK, "--guidance", "1,3", "--out", tmp_path / "out")
    assert (ended.status, ended.err) == (0, "")
    starts = ("reconstruction of 360 held-out images: ", "classifier (SVM on real pixels): 99.4% right on held-out")
    starts += tuple(f"20 generated images, {kind}: Frechet distance of PCA" for kind in ("unguided", "guidance 3"))
    # 20 images for 41 components, and 360.
    starts += ("note: 20 generated images are too few", "note: no LPIPS", "note: no SSIM")
    starts += ("note: 360 held-out images for 41 features", f"all of it in {tmp_path}")
    said = ended.out.splitlines()
    assert len(said) == len(starts)
    for line, start in zip(said, starts, strict=True):
        assert line.startswith(start)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("evaluation.json", "evaluation.md", "samples_guidance_1.png", "samples_guidance_3.png"),
        "reconstructions.png",
    }
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    # Another evaluation there leaves no picture of this one.
    assert command("evaluate", trained_folder, *QUICK, "--guidance", "2", "--out", tmp_path / "out").status == 0
    assert [path.name for path in (tmp_path / "out").glob("samples*")] == ["samples_guidance_2.png"]
    assert f"{result['reconstruction']['psnr']:.2f} dB PSNR" in said[0]
    assert f"{result['generated'][1]['class_agreement']:.1%} classified as asked for" in said[3]


def test_results_lie_in_the_runs_folder():
    assert default_folder(Path("runs/x/checkpoints/step_00000020")) == Path("runs/x/evaluation")
    assert default_folder(Path("here/model.safetensors")) == Path("here/evaluation")


def test_a_runs_own_folder_is_the_default(command, trained_folder, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for path in (trained_folder / "checkpoints").iterdir():
        (run / "checkpoints" / path.name).symlink_to(path)
    assert command("evaluate", run, *QUICK, "--reconstructions", 0).status == 0
    assert (run / "evaluation" / "evaluation.json").exists()


def test_stats_of_digits_and_of_a_folder_with_a_broken_picture(command, trained_folder, tmp_path):
    out = tmp_path / "digits.npz"
    ended = command("stats", "digits", out, "--split", "test")
    assert (ended.status, ended.err) == (0, "")
    with np.load(out, allow_pickle=False) as file:
        d = len(file["mu"])
        assert file["sigma"].shape == (d, d) and file["samples"].shape == (360, d)
    assert ended.out == f"360 images, {d} pixels features: {out}\n"
    ended = command("evaluate", trained_folder, *QUICK, "--reference", out, "--out", tmp_path / "out")
    assert ended.status == 0
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["reference"]["split"] == "test"

    for i in range(5):
        (tmp_path / "data" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9, 3), 40 * i, np.uint8)).save(tmp_path / "data" / "a" / f"{i}.png")
    (tmp_path / "data" / "a" / "3.png").write_bytes(b"no picture")
    ended = command("stats", tmp_path / "data", tmp_path / "data.npz", "--image-size", 8)
    assert ended.out.splitlines()[1] == (
        "1 images could not be read and are left out, the first: a/3.png: not an image of a known format"
    )
    with np.load(tmp_path / "data.npz", allow_pickle=False) as file:
        about = json.loads(bytes(file["meta_json"]))["about"]
    assert about["unreadable_first"] == ["a/3.png: not an image of a known format"]


def run_main(arguments: list[str]) -> None:
    sys.argv = ["unite-fast", *arguments]
    with pytest.raises(SystemExit) as ending:
        main()
    assert not ending.value.code and not torch.distributed.is_initialized()


def test_torchrun_shares_the_work(command, ranks, trained_folder, tmp_path):
    found = []
    for world in (1, 2):
        reference, out = tmp_path / f"{world}.npz", tmp_path / f"out{world}"
        made = ["stats", "digits", str(reference)]
        judged = ["evaluate", str(trained_folder), *map(str, QUICK), "--batch", "8", "--out", str(out)]
        for arguments in (made, [*judged, "--reference", str(reference)]):
            if world == 1:
                assert command(*arguments).status == 0
            else:
                ranks(world, run_main, arguments)
        result = json.loads((out / "evaluation.json").read_text())
        assert result["processes"] == world
        found.append((result["generated"][0]["frechet_distance"], result["reconstruction"]["frechet_distance"]))
        with Image.open(out / "samples_guidance_1.png") as picture:
            found[-1] += (np.asarray(picture).tobytes(),)
    assert found[1][2] == found[0][2]
    assert found[1][:2] == pytest.approx(found[0][:2], rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "RUN", "--guidance", "2,x"), "--guidance is a list of numbers such as 1,3; got '2,x'"),
        (("evaluate", "RUN", "--guidance", ","), "--guidance is a list of numbers such as 1,3; got ','"),
        (("evaluate", "RUN", "--count", "0"), "the count is 0 images; a covariance needs at least 2"),
        (("evaluate", "RUN", "--features", "clip"), "features is 'clip'"),
        (("evaluate", "RUN", "--reference", "absent.npz"), "there is no file of statistics absent.npz"),
        (("evaluate", "RUN", "--features", "inception"), "the FID needs statistics of real images"),
        (("evaluate", "RUN", "--out", "FILE"), "is in the way: it is no folder"),
        (("evaluate", "RUN", "--solver", "magic", "--out", "new"), "sampling.solver"),
        (("stats", "digits", "x.txt"), "x.txt ends in .txt; what is written here is: .npz"),
        (("stats", "digits", "x.npz", "--features", "inception"), "--inception is not set"),
        (("stats", "absent", "x.npz"), "no folder absent: name one that has a subfolder per class"),
        (("evaluate", "RUN", "--data", "absent"), "no folder absent: name one that has a subfolder per class"),
    ],
)
def test_mistakes_are_one_line(command, trained_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    names = {"RUN": trained_folder, "FILE": tmp_path / "file"}
    assert message in command(*(names.get(part, part) for part in arguments)).error()
