"""Files of many images: processes that are killed and resumed write the same bytes."""

import errno
import json
import os
import random
import re
import signal
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import unite_fast
from unite_fast.config import SamplingConfig
from unite_fast.distributed.launch import ranks_of_torchrun
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import UserError
from unite_fast.sampling import distributed_sampler, sample_parts
from unite_fast.sampling.distributed_sampler import Generation
from unite_fast.sampling.pipeline import weights_sha256
from unite_fast.sampling.sample_writer import write_npz, write_samples
from unite_fast.utils import files


@pytest.fixture(scope="module")
def model(trained_folder):
    return unite_fast.load(trained_folder)


@pytest.fixture
def generation() -> Generation:
    sampling = SamplingConfig(solver="multistep", steps=3, guidance=2.0, interval=(0.2, 0.9))
    return Generation(torch.arange(23) % 10, sampling, seed=5, batch=4)


def test_an_npz_in_the_usual_format(command, trained_folder, model, tmp_path, mentions):
    out = tmp_path / "new" / "samples.npz"
    ended = command("generate", trained_folder, "--num", 23, "--batch", 4, "--seed", 5, "--steps", 3, "--out", out)
    manifest = out.with_name("samples.json")
    assert (ended.status, ended.err) == (0, "")
    assert re.fullmatch(rf"{mentions(23, out, manifest)}.*\n", ended.out)
    with np.load(out) as file:
        assert file.files == ["arr_0", "arr_1"]
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (23, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [i % 10 for i in range(23)] and labels.dtype == np.int64
    expected = model.generate(labels, seed=5, batch=4, steps=3)
    assert np.array_equal(images, expected.permute(0, 2, 3, 1).numpy())
    assert sorted(os.listdir(out.parent)) == ["samples.json", "samples.npz"]
    facts = json.loads(manifest.read_text())
    assert (facts["weights"], facts["images"], facts["seed"]) == (weights_sha256(model), 23, 5)
    assert (facts["sampling.steps"], facts["torch"]) == (3, torch.__version__)


def test_a_folder_of_pngs(command, trained_folder, model, tmp_path):
    out = tmp_path / "pictures"
    out.mkdir()
    ended = command("generate", trained_folder, "--num", 5, "--classes", "7,2", "--out", out)
    assert ended.status == 0, ended.err
    names = sorted(os.listdir(out))
    assert names == [
        *(f"{i:06d}_class{label}.png" for i, label in enumerate([7, 2, 7, 2, 7])),
        "generation.json",
    ]
    expected = model.generate([7, 2, 7, 2, 7]).permute(0, 2, 3, 1).numpy()
    for name, image in zip(names, expected, strict=False):
        assert np.array_equal(np.asarray(Image.open(out / name)), image)
    assert json.loads((out / "generation.json").read_text())["images"] == 5
    assert os.listdir(tmp_path) == ["pictures"]


def write_on_a_rank(folder: Path, out: Path, generation: Generation) -> None:
    with ranks_of_torchrun(torch.device("cpu")) as ranks:
        write_samples(unite_fast.load(folder), generation, out, ranks)


def test_several_processes_write_the_same_file(trained_folder, model, generation, ranks, tmp_path):
    write_samples(model, generation, tmp_path / "1.npz")
    for world in (2, 4):
        out = tmp_path / f"{world}.npz"
        ranks(world, write_on_a_rank, trained_folder, out, generation)
        assert out.read_bytes() == (tmp_path / "1.npz").read_bytes()
        assert (tmp_path / f"{world}.json").read_bytes() == (tmp_path / "1.json").read_bytes()
    assert len(os.listdir(tmp_path)) == 6


def test_every_process_reports_a_mistake_and_none_waits(trained_folder, generation, ranks, tmp_path):
    out = tmp_path / "a.npz"
    out.touch()
    with pytest.raises(AssertionError, match=rf"(?s)rank 0.*{out} .*--out.*rank 1.*{out} .*--out"):
        ranks(2, write_on_a_rank, trained_folder, out, generation, timeout=60)


class LostRanks(Ranks):
    def wait(self) -> None:
        raise RuntimeError("gloo: connection closed by peer")


def test_a_process_that_is_lost_at_the_end_is_no_mistake(model, generation, tmp_path):
    """`join_training` names it, with a status after which torchrun restarts; a `UserError` would end torchrun."""
    with pytest.raises(RuntimeError, match="gloo"):
        write_samples(model, generation, tmp_path / "a.npz", LostRanks())


def test_torchrun_does_not_take_our_options(command):
    """It takes any prefix of its own options as an abbreviation; it did so with --num."""
    from torch.distributed.run import parse_args

    options = set(re.findall(r"--[a-z-]+", command("generate", "--help").out)) - {"--num", "--help", "--nproc-per-node"}
    assert {"--count", "--out", "--seed", "--batch", "--steps", "--compile", "--eager"} <= options
    arguments = ["generate", "run", *sorted(options)]
    assert parse_args(["-m", "unite_fast", *arguments]).training_script_args == arguments


@pytest.mark.parametrize("name", ["samples.npz", "pictures"])
def test_kill_9_at_any_moment_five_times(trained_folder, process, wait_until, name, tmp_path):
    """Finished batches survive every kill, and the result is that of an undisturbed generation."""
    arguments = ("generate", trained_folder, "--num", 90, "--batch", 3, "--solver", "heun", "--steps", 20)
    folder, rng, finished = tmp_path / f"{name}.parts", random.Random(3), set()
    for attempt in range(5):
        running = process(*arguments, "--out", name)
        # Two are killed while they start, the others within a batch or while one is written.
        if attempt not in (1, 3):
            wait_until(lambda before=finished: whole(folder) > before)
        time.sleep(rng.uniform(0, 0.05))
        running.signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL, running.printed()
        assert whole(folder) >= finished
        finished = whole(folder)
    assert 3 <= len(finished) < 90, "the kills came in time"

    assert process(*arguments, "--out", name).wait() == 0
    assert process(*arguments, "--out", f"undisturbed_{name}").wait() == 0
    assert contents(tmp_path / name) == contents(tmp_path / f"undisturbed_{name}")
    manifests = {"samples.npz": ["samples.json", "undisturbed_samples.json"]}.get(name, [])
    assert sorted(os.listdir(tmp_path)) == sorted([name, f"undisturbed_{name}", "output.txt", *manifests])
    assert len({(tmp_path / other).read_bytes() for other in manifests}) <= 1


@pytest.mark.parametrize("name", ["samples.npz", "pictures"])
def test_two_processes_do_not_write_the_same_files(trained_folder, process, wait_until, command, name, tmp_path):
    arguments = ("generate", trained_folder, "--num", 60, "--batch", 3, "--solver", "heun", "--steps", 20)
    out, folder = tmp_path / name, tmp_path / f"{name}.parts"
    running = process(*arguments, "--out", out)
    wait_until(lambda: whole(folder))
    # Stopped, so that it still runs when the other one starts, however busy the machine is.
    running.signal(signal.SIGSTOP)
    command(*arguments, "--out", out).error(folder, f"process {running.pid}", "--out")
    running.signal(signal.SIGCONT)
    assert running.wait() == 0, running.printed()
    assert not folder.exists()
    assert ".lock" not in contents(out)
    command(*arguments, "--out", out).error(out, "--out")


def whole(folder: Path) -> set[str]:
    names = os.listdir(folder) if folder.exists() else []
    return {name for name in names if not name.endswith((".partial", ".json", ".lock"))}


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else {"": path.read_bytes()}


def test_a_resumed_generation_samples_only_missing_batches(model, generation, tmp_path, monkeypatch):
    out, sampled = tmp_path / "a.npz", []
    sample = distributed_sampler.sample_batch

    def interrupted(*arguments):
        sampled.append(int(arguments[3][0]))
        if len(sampled) == 4:
            raise KeyboardInterrupt
        return sample(*arguments)

    monkeypatch.setattr(distributed_sampler, "sample_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_samples(model, generation, out)
    # A truncated file, as after a power cut, does not count as finished.
    os.truncate(tmp_path / "a.npz.parts" / "batch_00000001.uint8", 10)
    write_samples(model, generation, out)
    assert sampled == [0, 4, 8, 12, 4, 12, 16, 20]


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        (("--num", 0), ("number", 0)),
        (("--num", -3), ("number", -3)),
        (("--classes", "3,10"), ("class", 10, "0..9")),
        (("--seed", -1), ("seed", -1)),
        (("--batch", 0), ("batch", 0)),
        (("--precision", "float8"), ("precision", "'float8'", "float32", "bfloat16")),
        (("--solver", "rk4"), ("sampling.solver", "'rk4'")),
        (("--out", "a.png"), ("a.png", ".npz", "folder")),
        *((("--out", nameless), (nameless, "name")) for nameless in (".", "..", "/")),
    ],
)
def test_invalid_options_are_refused_before_anything_is_written(
    command, trained_folder, options, tokens, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command("generate", trained_folder, "--num", 5, "--out", "a.npz", *options).error(*tokens)
    assert os.listdir(tmp_path) == []


@pytest.fixture
def stopped(model, generation, tmp_path, monkeypatch):
    """Path of an .npz of 23 images that is not there yet: its generation stopped after two batches of four."""
    sample, left = distributed_sampler.sample_batch, [None, None]

    def interrupted(*arguments):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return sample(*arguments)

    monkeypatch.setattr(distributed_sampler, "sample_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_samples(model, generation, tmp_path / "a.npz")
    monkeypatch.undo()
    return tmp_path / "a.npz"


@pytest.mark.parametrize(
    ("change", "tokens"),
    [
        (lambda generation: replace(generation, seed=6), ("seed", 5, 6)),
        (lambda generation: replace(generation, batch=8), ("batch", 4, 8)),
        (lambda generation: replace(generation, precision="bfloat16"), ("precision", "float32", "bfloat16")),
        (lambda generation: replace(generation, labels=generation.labels[:22]), ("images", 23, 22)),
        (lambda generation: replace(generation, labels=generation.labels.flip(0)), ("labels",)),
        (
            lambda generation: replace(generation, sampling=replace(generation.sampling, guidance=1.5)),
            ("sampling.guidance", 2.0, 1.5),
        ),
        (
            lambda generation: replace(generation, sampling=replace(generation.sampling, interval=(0.0, 0.9))),
            ("sampling.interval", "[0.2, 0.9]", "[0.0, 0.9]"),
        ),
    ],
)
def test_parts_of_other_settings_are_refused_and_stay(model, generation, stopped, change, tokens, mentions):
    with pytest.raises(UserError, match=mentions(stopped.with_name("a.npz.parts"), "--out", *tokens)):
        write_samples(model, change(generation), stopped)
    assert len(whole(stopped.with_name("a.npz.parts"))) == 2


def test_parts_of_other_weights_are_refused(trained_folder, generation, stopped, mentions):
    other = unite_fast.load(trained_folder / "checkpoints" / "step_00000010")
    with pytest.raises(UserError, match=mentions(stopped.with_name("a.npz.parts"), "weights")):
        write_samples(other, generation, stopped)


def test_a_full_disk_is_one_line_and_loses_nothing(model, generation, stopped, mentions, monkeypatch):
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    parts = stopped.with_name("a.npz.parts")
    # While a batch is written, and while the batches are merged.
    for module in (files, sample_parts):
        with monkeypatch.context() as patch:
            patch.setattr(module, "flush", full)
            with pytest.raises(UserError, match=mentions("a.npz", os.strerror(errno.ENOSPC))):
                write_samples(model, generation, stopped)
        assert not stopped.exists()
    assert len(whole(parts)) == 6
    write_samples(model, generation, stopped)
    write_samples(model, generation, stopped.with_name("undisturbed.npz"))
    assert stopped.read_bytes() == stopped.with_name("undisturbed.npz").read_bytes()


@pytest.fixture
def killed(model, generation, stopped, monkeypatch):
    """Resumes the stopped generation, and kills it just before or just after the result is renamed."""
    rename = os.replace

    def kill(renamed: bool) -> Path:
        def dying(source, target):
            if Path(target) != stopped:
                return rename(source, target)
            if renamed:
                rename(source, target)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("unite_fast.sampling.sample_writer.os.replace", dying)
            write_samples(model, generation, stopped)
        return stopped.with_name("a.npz.parts")

    return kill


@pytest.mark.parametrize("remaining", [7, 3, 1])
def test_resume_after_a_kill_while_the_parts_were_deleted(model, generation, stopped, killed, remaining, mentions):
    parts = killed(renamed=True)
    content = stopped.read_bytes()
    left = sorted(parts.iterdir())
    assert [path.name for path in left] == [
        ".lock",
        *(f"batch_{n:08d}.uint8" for n in range(6)),
        "generation.json",
    ]
    for path in left[:-remaining]:
        path.unlink()
    with pytest.raises(UserError, match=mentions("seed", 5, 6)):
        write_samples(model, replace(generation, seed=6), stopped)
    write_samples(model, generation, stopped)
    assert stopped.read_bytes() == content
    assert json.loads(stopped.with_suffix(".json").read_text())["seed"] == 5
    assert not parts.exists()


def test_resume_after_a_kill_before_the_rename(model, generation, stopped, killed, mentions):
    parts = killed(renamed=False)
    # The manifest is written before the .npz.
    assert json.loads(stopped.with_suffix(".json").read_text())["seed"] == 5
    stopped.write_text("mine")
    with pytest.raises(UserError, match=mentions(stopped, "--out")):
        write_samples(model, generation, stopped)
    assert stopped.read_text() == "mine" and len(whole(parts)) == 6
    stopped.unlink()
    write_samples(model, generation, stopped)
    assert stopped.stat().st_size > 23 * 8 * 8 * 3 and not parts.exists()


def test_the_manifest_replaces_no_other_file(model, generation, stopped, monkeypatch, mentions):
    manifest, parts = stopped.with_suffix(".json"), stopped.with_name("a.npz.parts")
    refused = pytest.raises(UserError, match=mentions(manifest, "a.npz", "--out"))
    for other in ('{"mine": 1}', "[1]", "text"):
        manifest.write_text(other)
        with refused:
            write_samples(model, generation, stopped)
        assert manifest.read_text() == other and len(whole(parts)) == 2
    manifest.unlink()
    sample = distributed_sampler.sample_batch

    def disturbed(*arguments):
        manifest.write_text("mine")
        return sample(*arguments)

    with monkeypatch.context() as patch, refused:
        patch.setattr(distributed_sampler, "sample_batch", disturbed)
        write_samples(model, generation, stopped)
    assert manifest.read_text() == "mine" and len(whole(parts)) == 6 and not stopped.exists()
    manifest.unlink()
    assert write_samples(model, generation, stopped) == manifest
    # The manifest of a deleted .npz is replaced.
    stopped.unlink()
    write_samples(model, replace(generation, seed=6), stopped)
    assert json.loads(manifest.read_text())["seed"] == 6


def test_a_foreign_file_is_not_taken_for_the_result(model, generation, stopped, monkeypatch, mentions):
    parts = stopped.with_name("a.npz.parts")
    stopped.write_text("mine")
    with pytest.raises(UserError, match=mentions(stopped, "--out")):
        write_samples(model, generation, stopped)
    assert len(whole(parts)) == 2
    # Nor is one that appears during the generation.
    stopped.unlink()
    sample = distributed_sampler.sample_batch

    def disturbed(*arguments):
        stopped.write_text("mine")
        return sample(*arguments)

    monkeypatch.setattr(distributed_sampler, "sample_batch", disturbed)
    with pytest.raises(UserError, match=mentions(stopped, "--out")):
        write_samples(model, generation, stopped)
    assert stopped.read_text() == "mine" and len(whole(parts)) == 6
    # An empty folder of parts does not say what the file is.
    for path in parts.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=mentions(stopped, "--out")):
        write_samples(model, generation, stopped)


@pytest.mark.parametrize("number", [1, 3])
def test_parts_of_another_format_version_are_refused_and_stay(model, generation, stopped, number, mentions):
    path = stopped.with_name("a.npz.parts") / "generation.json"
    assert json.loads(path.read_text())["format"] == "unite_fast generation 2"
    path.write_text(path.read_text().replace("generation 2", f"generation {number}"))
    with pytest.raises(UserError, match=mentions(path.parent, f"generation {number}", "generation 2", "--out")):
        write_samples(model, generation, stopped)
    assert len(whole(path.parent)) == 2


@pytest.mark.parametrize("key", ["device", "torch"])
def test_parts_of_another_machine_are_refused(model, generation, stopped, key, mentions):
    path = stopped.with_name("a.npz.parts") / "generation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: "other"}))
    with pytest.raises(UserError, match=mentions(key, "other")):
        write_samples(model, generation, stopped)


def test_files_at_the_output_path_stay_unchanged(model, generation, tmp_path, mentions):
    (tmp_path / "a.npz").write_text("mine")
    with pytest.raises(UserError, match=mentions(tmp_path / "a.npz", "--out")):
        write_samples(model, generation, tmp_path / "a.npz")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(UserError, match=mentions(tmp_path / "folder.npz", "--out")):
        write_samples(model, generation, tmp_path / "folder.npz")
    (tmp_path / "b.parts").mkdir()
    (tmp_path / "b.parts" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=mentions(tmp_path / "b.parts", "generation.json", "--out")):
        write_samples(model, generation, tmp_path / "b")
    assert os.listdir(tmp_path / "b.parts") == ["thesis.tex"]
    (tmp_path / "c.parts").mkdir()
    manifest = tmp_path / "c.parts" / "generation.json"
    for wrong in ("{", "[]"):
        manifest.write_text(wrong)
        with pytest.raises(UserError, match=mentions(manifest, manifest.parent)):
            write_samples(model, generation, tmp_path / "c")
    assert (tmp_path / "a.npz").read_text() == (tmp_path / "b.parts" / "thesis.tex").read_text() == "mine"


def test_an_npz_in_pieces_is_what_numpy_saves(tmp_path):
    images = np.arange(5 * 2 * 2 * 3, dtype=np.uint8).reshape(5, 2, 2, 3)
    labels = np.array([3, 1, 4, 1, 5])
    pieces = (image.tobytes() for image in images)
    write_npz(
        tmp_path / "ours.npz", {"arr_0": (images.shape, np.uint8, pieces), "arr_1": (labels.shape, np.int64, [labels])}
    )
    np.savez(tmp_path / "theirs.npz", images, labels)
    with zipfile.ZipFile(tmp_path / "ours.npz") as ours, zipfile.ZipFile(tmp_path / "theirs.npz") as theirs:
        assert ours.testzip() is None
        assert ours.namelist() == theirs.namelist()
        assert all(ours.read(name) == theirs.read(name) for name in theirs.namelist())
        assert {info.date_time for info in ours.infolist()} == {(1980, 1, 1, 0, 0, 0)}, (
            "the time would change the bytes"
        )
