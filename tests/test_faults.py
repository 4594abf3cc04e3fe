"""User errors and system faults through the command line: status 2, one line that names the cause, no traceback."""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from unite_fast.checkpoint.folders import step_folders
from unite_fast.checkpoint.model_file import load_model, save_model
from unite_fast.checkpoint.reader import load_checkpoint
from unite_fast.training.trainer import Trainer

# The operating system's messages.
DISK_FULL, READ_ONLY_DISK = os.strerror(errno.ENOSPC), os.strerror(errno.EROFS)
TRACE = Path(__file__).parent / "data" / "official_tiny_a.npz"


@pytest.fixture
def expect_error(command, tmp_path, monkeypatch):
    """Runs a command in an empty folder, expects a one-line error with all `tokens`, and returns the line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, tokens: tuple = ()) -> str:
        return command(*arguments).error(*tokens)

    return run


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
    return path


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def test_an_unknown_setting_is_refused(expect_error):
    expect_error("train", "train.bacth_size=8", tokens=("train.bacth_size", "batch_size"))
    expect_error("train", "zzz=8", tokens=("zzz", "name", "seed"))


@pytest.mark.parametrize(
    ("setting", "tokens"),
    [
        ("train.steps=many", ("train.steps", "'many'")),
        ("train.steps=1.5", ("train.steps", 1.5)),
        ("data.flip=5", ("data.flip", 5)),
        ("schedule.lr=[1]", ("schedule.lr", "[1]")),
        ("schedule.lr=.nan", ("schedule.lr", "nan")),
        ("schedule.lr=1e999", ("schedule.lr", "inf")),
        ("schedule.lr=1e38", ("schedule.lr", "1e+38", "1e+30")),
        ("optim.eps=-1e300", ("optim.eps", "-1e+300")),
        ("model=B", ("model", "'B'")),
        ("optim.adamw_betas=2,3", ("optim.adamw_betas", "[0, 1)")),
        ("name=", ("name", "empty")),
    ],
)
def test_a_setting_of_wrong_type_or_value_is_refused(expect_error, setting, tokens):
    expect_error("train", setting, tokens=tokens)


FOLDER_DATA = ("data.source=folder", "model.num_classes=2")


def test_a_missing_data_folder_is_refused_and_leaves_no_run(expect_error):
    expect_error("train", *FOLDER_DATA, "data.path=nowhere", tokens=("nowhere", "data.path=FOLDER"))
    expect_error("train", "data.source=idx", "data.path=nowhere", tokens=("nowhere", "train-images-idx3-ubyte"))
    assert os.listdir() == []


def test_an_empty_data_folder_is_refused(expect_error, tmp_path):
    (tmp_path / "data").mkdir()
    expect_error("train", *FOLDER_DATA, "data.path=data", tokens=("data", "class"))
    (tmp_path / "data" / "cats").mkdir()
    expect_error("train", *FOLDER_DATA, "data.path=data", tokens=("data/cats", ".png"))


def test_a_truncated_image_is_skipped_in_training_and_refused_in_reconstruct(
    expect_error, command, tiny_run, trained_folder, picture, tmp_path
):
    for kind in ("cats", "dogs"):
        for i in range(6):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, tmp_path / "data" / kind / f"{i}.png")
    truncate(tmp_path / "data" / "dogs" / "4.png")
    # Training skips the image, counts it and names it ...
    ended = command("train", *tiny_run, *FOLDER_DATA, "data.path=data", "train.steps=4", "train.out=run")
    assert ended.status == 0
    assert re.search(r"skipped +1 .*\n +dogs/4\.png: ", ended.out)
    # ... but an image that the user names must be readable.
    expect_error("reconstruct", trained_folder, picture, "data/dogs/4.png", tokens=("data/dogs/4.png",))
    assert not (tmp_path / "reconstructions.png").exists()
    expect_error("reconstruct", trained_folder, "none.png", tokens=("none.png", os.strerror(errno.ENOENT)))


@pytest.mark.parametrize("name", ["sample", "info", "evaluate", "export", "export-official", "train", "reconstruct"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    command, trained_folder, picture, tiny_run, tmp_path, monkeypatch, checkpoint_warnings, name, mentions
):
    """A run falls back with a warning. A damaged checkpoint given by its path is an error that suggests the other."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_folder, "run", symlinks=True)
    truncated_shard = truncate(Path("run/checkpoints/step_00000020/shard_00001.safetensors"))
    arguments = {
        "train": (*tiny_run, "train.out=run", "--resume"),
        "evaluate": ("--count", 10, "--steps", 1),
        "reconstruct": (picture,),
        "export": ("out.safetensors",),
        "export-official": ("out.pt",),
    }.get(name, ())
    size = truncated_shard.stat().st_size
    damage = ("run/checkpoints/step_00000020", truncated_shard.name, size, "run/checkpoints/step_00000010")
    ended = command(name, *(() if name == "train" else ("run",)), *arguments)
    assert ended.status == 0, ended.err
    (warning,) = checkpoint_warnings()
    assert re.match(mentions(*damage), warning)
    if name != "train":
        command(name, truncated_shard.parent, *arguments).error(*damage)


def test_a_checkpoint_of_another_shape_is_refused(expect_error, command, tiny_run, trained_folder, tmp_path):
    changed = (*tiny_run, "model.encoder.width=32", f"train.out={trained_folder}", "--resume")
    expect_error("train", *changed, tokens=("model.encoder.width", 32, 16))
    saved = load_model(trained_folder)
    misfit = saved.averages | {"latent_norm.weight": torch.zeros(7)}
    save_model(tmp_path / "misfit.safetensors", saved.config, 1, misfit)
    expect_error("sample", "misfit.safetensors", tokens=("misfit.safetensors", "latent_norm.weight", "[7]", "[4]"))
    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    expect_error("info", "foreign.safetensors", tokens=("foreign.safetensors", "unite-fast export"))


def test_a_trace_in_a_wrong_format_is_refused(expect_error, picture, tmp_path):
    expect_error("parity", "none.npz", tokens=("none.npz",))
    expect_error("parity", picture, tokens=(picture, "trace"))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    expect_error("parity", "other.npz", tokens=("other.npz", "meta_json"))
    np.savez(tmp_path / "pickle.npz", x=np.array([{}], dtype=object))
    expect_error("parity", "pickle.npz", tokens=("pickle.npz", "trace"))
    shutil.copy(TRACE, tmp_path / "torn.npz")
    expect_error("parity", truncate(tmp_path / "torn.npz"), tokens=(tmp_path / "torn.npz", "trace"))


@pytest.mark.parametrize("classes", ["10", "3,-1", "99999999999999999999"])
def test_a_class_out_of_range_is_refused(expect_error, trained_folder, classes):
    wrong = classes.rpartition(",")[2]
    expect_error("sample", trained_folder, f"--classes={classes}", tokens=("class", wrong, "0..9"))


def test_training_on_a_full_disk_stops_and_the_run_resumes(
    tiny_run, trained_folder, assert_same_run, command, tmp_path, mentions
):
    """The disk fills up during the third checkpoint."""
    size = (trained_folder / "checkpoints" / "step_00000020" / "shard_00001.safetensors").stat().st_size
    script = """
        mount -t tmpfs -o size="$1" tmpfs "$2" || exit 99
        "$3" -m unite_fast train "${@:4}" train.out="$2"/run
        status=$?
        cp -r "$2"/run saved
        exit $status
    """
    (tmp_path / "disk").mkdir()
    settings = (*tiny_run, "train.steps=40")
    disk = (str(int(2.7 * size)), "disk", sys.executable)
    try:
        ended = subprocess.run(
            ["unshare", "-Urm", "bash", "-c", script, "bash", *disk, *settings],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("needs unshare to mount a small disk")
    if ended.returncode in (1, 99) and "disk/run" not in ended.stderr:
        pytest.skip(f"cannot mount a small disk: {ended.stderr.strip()}")
    assert ended.returncode == 75, ended.stderr
    assert re.fullmatch(rf"error: {mentions('disk/run/checkpoints/step_00000030', DISK_FULL)}.*\n", ended.stderr)
    # The earlier checkpoints are intact, and with more space the run resumes as if undisturbed.
    saved = tmp_path / "saved"
    assert sorted(os.listdir(saved / "checkpoints")) == ["latest", "step_00000010", "step_00000020"]
    assert load_checkpoint(saved).step == 20
    assert command("train", *settings, f"train.out={saved}", "--resume").status == 0
    assert command("train", *settings, f"train.out={tmp_path / 'undisturbed'}").status == 0
    assert_same_run(saved, tmp_path / "undisturbed")


def test_samples_for_a_full_disk_are_an_error(expect_error, trained_folder, picture, full_disk):
    for name in ("full.png", "full.npz"):
        expect_error("sample", trained_folder, "--count", 2, "--out", name, tokens=(name, DISK_FULL))
    expect_error("reconstruct", trained_folder, picture, "--out", "full.png", tokens=("full.png", DISK_FULL))


def test_a_user_error_in_a_new_process_prints_one_line_and_exits_with_2(tmp_path, mentions):
    ended = subprocess.run(
        [sys.executable, "-m", "unite_fast", "train", "train.stepz=3"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(rf"error: {mentions('train.stepz', 'steps')}.*\n", ended.stderr)


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        (("--interval", "abc"), ("--interval", "LOW,HIGH", "'abc'")),
        (("--interval", "0.5"), ("--interval", "LOW,HIGH", "'0.5'")),
        (("--interval", "0.9,0.1"), ("sampling.interval", "LOW,HIGH")),
        (("--interval", "nan,nan"), ("--interval", "LOW,HIGH")),
        (("--solver", "foo"), ("sampling.solver", "'foo'", "euler", "heun", "multistep", "dopri5")),
        (("--steps", 0), ("sampling.steps", "positive")),
        (("--guidance", "nan"), ("sampling.guidance", "finite")),
        (("--guidance", "inf"), ("sampling.guidance", "finite")),
        (("--classes", "x"), ("--classes", "'x'")),
        (("--batch", 0), ("batch", 0)),
        (("--seed", -1), ("seed", -1, "[0, 2**64)")),
        (("--seed", 2**64), ("seed", 2**64, "[0, 2**64)")),
        (("--device", "tpu"), ("device", "'tpu'", "auto", "cpu", "cuda")),
        (("--out", "a.jpg"), ("a.jpg", ".png", ".npz")),
    ],
)
def test_invalid_options_of_sample_are_refused(expect_error, trained_folder, options, tokens):
    expect_error("sample", trained_folder, "--count", 2, *options, tokens=tokens)
    assert os.listdir() == []


def test_an_output_path_that_sample_cannot_write_is_refused(expect_error, trained_folder, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    expect_error("sample", trained_folder, "--out", "file", tokens=("file", "--out"))
    expect_error("sample", trained_folder, "--out", "folder.png", tokens=("folder.png", "--out"))
    expect_error("sample", trained_folder, "--count", 1, "--out", "file/a.png", tokens=("file/a.png",))


def test_cuda_without_a_gpu_is_refused(expect_error, trained_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for call in (("sample", trained_folder, "--device", "cuda"), ("train", "train.device=cuda")):
        expect_error(*call, tokens=("device", "cuda"))


def test_a_missing_checkpoint_is_refused(expect_error, tmp_path):
    expect_error("info", "nowhere", tokens=("nowhere",))
    (tmp_path / "run").mkdir()
    expect_error("sample", "run", tokens=("run", "latest"))


def test_weights_with_nan_are_refused(expect_error, trained_folder, tmp_path):
    saved = load_model(trained_folder)
    saved.averages["latent_norm.weight"].fill_(float("nan"))
    save_model(tmp_path / "nan.safetensors", saved.config, 1, saved.averages)
    expect_error("sample", "nan.safetensors", tokens=("nan.safetensors", "latent_norm.weight", "finite"))


def test_out_of_memory_is_one_line(expect_error, tiny_run, monkeypatch):
    message = expect_error("train", *tiny_run, f"model.encoder.width={2**16}", "train.out=run")
    assert re.search(r"\bout of memory\b.*parallel\.strategy=fsdp", message)
    cpu_message = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4503599627370496 bytes."
    monkeypatch.setattr(Trainer, "run", mock.Mock(side_effect=RuntimeError(cpu_message)))
    message = expect_error("train", *tiny_run, "train.out=other")
    assert re.search(r"\b\d{9,} bytes\b.*train\.micro_batch", message)
    # PyTorch's message on a GPU.
    cuda_message = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"
    monkeypatch.setattr(Trainer, "run", mock.Mock(side_effect=torch.OutOfMemoryError(cuda_message)))
    expect_error("train", *tiny_run, "train.out=run", tokens=(cuda_message, "train.micro_batch", "--batch"))


def test_training_into_an_existing_run_is_refused(expect_error, tiny_run, trained_folder):
    expect_error(
        "train", *tiny_run, f"train.out={trained_folder}", tokens=(trained_folder, "--resume", "train.out=FOLDER")
    )


def test_the_error_of_a_diverged_run_names_the_last_good_checkpoint(expect_error, tiny_run):
    diverging = ("schedule.warmup_steps=4", "schedule.lr=1e30", "train.checkpoint_every=1", "train.out=run")
    message = expect_error("train", *tiny_run, *diverging)
    step, checkpoint = re.search(r"\bstep (\d+)\b.* (run/checkpoints/step_\d+)", message).groups()
    assert Path(checkpoint) == step_folders(Path("run/checkpoints"))[-1]
    assert load_checkpoint(checkpoint).step == int(step) - 1


def test_a_run_folder_below_a_file_is_refused(expect_error, tiny_run, tmp_path):
    (tmp_path / "file").touch()
    expect_error("train", *tiny_run, "train.out=file/run", tokens=("file/run", os.strerror(errno.ENOTDIR)))


def test_a_run_folder_on_a_read_only_disk_is_refused(tiny_run, tmp_path, mentions):
    script = 'mount -t tmpfs -o ro tmpfs disk || exit 99; exec "$1" -m unite_fast train "${@:2}" train.out=disk/run'
    (tmp_path / "disk").mkdir()
    call = ["unshare", "-Urm", "bash", "-c", script, "bash", sys.executable, *tiny_run]
    try:
        ended = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs unshare to mount a read-only disk")
    if ended.returncode in (1, 99) and "disk/run" not in ended.stderr:
        pytest.skip(f"cannot mount a read-only disk: {ended.stderr.strip()}")
    assert ended.returncode == 2
    assert re.fullmatch(rf"error: {mentions('disk/run', READ_ONLY_DISK)}.*\n", ended.stderr)


def test_a_save_to_a_read_only_folder_fails_and_keeps_the_last_checkpoint(tiny_run, trained_folder, tmp_path, mentions):
    shutil.copytree(trained_folder, tmp_path / "run", symlinks=True)
    script = """
        mount --bind run/checkpoints run/checkpoints && mount -o remount,bind,ro run/checkpoints || exit 99
        exec "$1" -m unite_fast train "${@:2}" train.out=run train.steps=22 --resume
    """
    call = ["unshare", "-Urm", "bash", "-c", script, "bash", sys.executable, *tiny_run]
    try:
        ended = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs unshare to make a folder read-only for root too")
    if ended.returncode in (1, 99) and "run/checkpoints/step" not in ended.stderr:
        pytest.skip(f"cannot make a folder read-only: {ended.stderr.strip()}")
    assert ended.returncode == 75
    assert re.fullmatch(rf"error: {mentions('run/checkpoints/step_00000022', READ_ONLY_DISK)}.*\n", ended.stderr)
    assert load_checkpoint(tmp_path / "run").step == 20


def test_a_newline_in_a_path_does_not_break_the_line_of_the_error(expect_error):
    expect_error("info", "two\nlines", tokens=("two lines",))
