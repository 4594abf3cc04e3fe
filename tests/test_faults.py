"""Bad input and bad luck, through the command line: status 2 and one line that names what is wrong, no traceback."""

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

from unite_fast.checkpoint.format import step_folders
from unite_fast.checkpoint.model_file import load_model, save_model
from unite_fast.checkpoint.reader import load_checkpoint
from unite_fast.training.trainer import Trainer

TRACE = Path(__file__).parent / "data" / "official_tiny_a.npz"


@pytest.fixture
def refused(command, tmp_path, monkeypatch):
    """Runs a command in an empty folder, and gives the one line that it says."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        return command(*arguments).error()

    return run


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
    return path


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


# The ten kinds that issue 2 asks for.


def test_1_an_unknown_key(refused):
    assert refused("train", "train.bacth_size=8") == "unknown setting train.bacth_size; did you mean batch_size?"
    assert refused("train", "zzz=8").startswith("unknown setting zzz; known here: name, seed")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.steps=many", "train.steps must be a whole number, got 'many'"),
        ("train.steps=1.5", "train.steps must be a whole number, got 1.5"),
        ("data.flip=5", "data.flip must be true or false, got 5"),
        ("schedule.lr=[1]", "schedule.lr must be a number, got [1]"),
        ("schedule.lr=.nan", "schedule.lr must be finite, got nan"),
        ("schedule.lr=1e999", "schedule.lr must be finite, got inf"),
        ("model=B", "model must be a mapping of settings, got 'B'"),
        ("optim.adamw_betas=2,3", "optim.adamw_betas must be in [0, 1)"),
        ("name=", "name must not be empty: the run's folder is called after it"),
    ],
)
def test_2_a_wrong_type_or_value(refused, setting, message):
    assert refused("train", setting) == message


FOLDER_DATA = ("data.source=folder", "model.num_classes=2")


def test_3_a_missing_data_folder(refused):
    message = refused("train", *FOLDER_DATA, "data.path=nowhere")
    assert message == "no folder nowhere: name one that has a subfolder per class (for training, data.path=FOLDER)"
    message = refused("train", "data.source=idx", "data.path=nowhere")
    assert re.match(r"no train-images-idx3-ubyte .* in nowhere", message)
    assert os.listdir() == [], "nothing that counts as a run is left behind"


def test_4_an_empty_folder(refused, tmp_path):
    (tmp_path / "data").mkdir()
    assert refused("train", *FOLDER_DATA, "data.path=data").startswith("no class folders in data: ")
    (tmp_path / "data" / "cats").mkdir()
    assert re.match(r"no images \(.*\) in class folder data/cats: ", refused("train", *FOLDER_DATA, "data.path=data"))


def test_5_a_truncated_image(refused, command, tiny_run, trained_folder, picture, tmp_path):
    for kind in ("cats", "dogs"):
        for i in range(6):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, tmp_path / "data" / kind / f"{i}.png")
    truncate(tmp_path / "data" / "dogs" / "4.png")
    # In training it is skipped, counted and named ...
    ended = command("train", *tiny_run, *FOLDER_DATA, "data.path=data", "train.steps=4", "train.out=run")
    assert ended.status == 0
    assert "skipped          1 unreadable file:\n                  dogs/4.png: " in ended.out
    # ... but whoever names a picture wants that one.
    message = refused("reconstruct", trained_folder, picture, "data/dogs/4.png")
    assert message.startswith("cannot read data/dogs/4.png: ")
    assert not (tmp_path / "reconstructions.png").exists()
    assert refused("reconstruct", trained_folder, "none.png") == "cannot read none.png: No such file or directory"


@pytest.mark.parametrize("name", ["sample", "info", "evaluate", "export", "export-official", "train", "reconstruct"])
def test_6_a_corrupt_checkpoint(
    command, trained_folder, picture, tiny_run, tmp_path, monkeypatch, checkpoint_warnings, name
):
    """Of a run, the one before it is used, said out loud; whoever names it is told of the other."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_folder, "run", symlinks=True)
    torn = truncate(Path("run/checkpoints/step_00000020/shard_00001.safetensors"))
    arguments = {
        "train": (*tiny_run, "train.out=run", "--resume"),
        "evaluate": ("--count", 10, "--steps", 1),
        "reconstruct": (picture,),
        "export": ("out.safetensors",),
        "export-official": ("out.pt",),
    }.get(name, ())
    size = torn.stat().st_size
    damage = f"run/checkpoints/step_00000020 is damaged: {torn.name} has {size} bytes, not "
    ended = command(name, *(() if name == "train" else ("run",)), *arguments)
    assert ended.status == 0, ended.err
    (said,) = checkpoint_warnings()
    assert said.startswith(damage) and said.endswith("; using run/checkpoints/step_00000010 instead")
    if name != "train":
        message = command(name, torn.parent, *arguments).error()
        assert message.startswith(damage) and message.endswith("; another one is run/checkpoints/step_00000010")


def test_7_a_checkpoint_of_another_shape(refused, command, tiny_run, trained_folder, tmp_path):
    message = refused("train", *tiny_run, "model.encoder.width=32", f"train.out={trained_folder}", "--resume")
    assert message.startswith("cannot resume: model.encoder.width is 32 now and was 16 in the run; ")
    saved = load_model(trained_folder)
    misfit = saved.averages | {"latent_norm.weight": torch.zeros(7)}
    save_model(tmp_path / "misfit.safetensors", saved.config, 1, misfit)
    message = refused("sample", "misfit.safetensors")
    assert message == ("the weights in misfit.safetensors do not fit its settings: latent_norm.weight is [7], not [4]")
    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    message = refused("info", "foreign.safetensors")
    assert message == "foreign.safetensors is a safetensors file but no model that unite-fast export wrote"


def test_8_a_trace_of_a_wrong_format(refused, picture, tmp_path):
    assert refused("parity", "none.npz") == "there is no trace none.npz"
    assert refused("parity", picture).startswith(f"{picture} is not a trace: ")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    assert refused("parity", "other.npz").startswith("other.npz is not a trace of the known format: it lacks ")
    np.savez(tmp_path / "pickle.npz", x=np.array([{}], dtype=object))
    assert refused("parity", "pickle.npz").startswith("pickle.npz is not a trace: ")
    shutil.copy(TRACE, tmp_path / "torn.npz")
    assert refused("parity", truncate(tmp_path / "torn.npz")).startswith(f"{tmp_path}/torn.npz is not a trace: ")


@pytest.mark.parametrize("classes", ["10", "3,-1", "99999999999999999999"])
def test_9_a_class_out_of_range(refused, trained_folder, classes):
    wrong = classes.rpartition(",")[2]
    message = refused("sample", trained_folder, f"--classes={classes}")
    assert message == f"class {wrong} is out of range: this model has classes 0..9"


def test_10_no_space_left(tiny_run, trained_folder, assert_same_run, command, tmp_path):
    """A disk of real size that fills up in the third checkpoint; two are kept."""
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
        pytest.skip("needs unshare, to mount a small disk of its own")
    if ended.returncode in (1, 99) and "disk/run" not in ended.stderr:
        pytest.skip(f"may not mount a small disk of its own: {ended.stderr.strip()}")
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr == (
        "error: could not save disk/run/checkpoints/step_00000030: No space left on device; "
        "checkpoints saved before are untouched\n"
    )
    # What was there is whole, and with more space the run goes on as if nothing had been.
    saved = tmp_path / "saved"
    assert sorted(os.listdir(saved / "checkpoints")) == ["latest", "step_00000010", "step_00000020"]
    assert load_checkpoint(saved).step == 20
    assert command("train", *settings, f"train.out={saved}", "--resume").status == 0
    assert command("train", *settings, f"train.out={tmp_path / 'undisturbed'}").status == 0
    assert_same_run(saved, tmp_path / "undisturbed")


def test_no_space_left_for_samples(refused, trained_folder, picture, tmp_path):
    for name in ("full.png", "full.npz"):
        (tmp_path / name).symlink_to("/dev/full")
        message = refused("sample", trained_folder, "--count", 2, "--out", name)
        assert message == f"cannot write {name}: No space left on device"
    message = refused("reconstruct", trained_folder, picture, "--out", "full.png")
    assert message == "cannot write full.png: No space left on device"


# And more of them.


def test_a_real_process_prints_one_line_and_ends_with_2(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "unite_fast", "train", "train.stepz=3"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: unknown setting train.stepz; did you mean steps?\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--interval", "abc"), "--interval is LOW,HIGH, for example 0.1,1; got 'abc'"),
        (("--interval", "0.5"), "--interval is LOW,HIGH, for example 0.1,1; got '0.5'"),
        (("--interval", "0.9,0.1"), "sampling.interval must be LOW,HIGH with 0 <= LOW <= HIGH <= 1"),
        (("--interval", "nan,nan"), "sampling.interval must be LOW,HIGH with 0 <= LOW <= HIGH <= 1"),
        (("--solver", "foo"), "sampling.solver is 'foo'; it must be one of euler, heun, multistep, dopri5"),
        (("--steps", 0), "sampling.steps must be positive"),
        (("--guidance", "nan"), "sampling.guidance must be finite"),
        (("--guidance", "inf"), "sampling.guidance must be finite"),
        (("--classes", "x"), "--classes is a list of numbers such as 1,3; got 'x'"),
        (("--batch", 0), "the batch is 0 images; it must be positive"),
        (("--seed", -1), "the seed is -1; it must be in [0, 2**64)"),
        (("--seed", 2**64), "the seed is 18446744073709551616; it must be in [0, 2**64)"),
        (("--device", "tpu"), "the device is 'tpu'; it must be one of auto, cpu, cuda"),
        (
            ("--out", "a.jpg"),
            "a.jpg ends in .jpg; what is written here is: .png, .npz, a folder (a name without an ending)",
        ),
    ],
)
def test_options_of_sample_that_make_no_sense(refused, trained_folder, options, message):
    assert refused("sample", trained_folder, "--count", 2, *options) == message
    assert os.listdir() == []


def test_something_in_the_way_of_samples(refused, trained_folder, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    assert refused("sample", trained_folder, "--out", "file") == "file is in the way; choose another --out"
    assert refused("sample", trained_folder, "--out", "folder.png") == "folder.png is in the way; choose another --out"
    assert refused("sample", trained_folder, "--count", 1, "--out", "file/a.png").startswith(
        "cannot write file/a.png: "
    )


def test_cuda_asked_for_and_absent(refused, trained_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for call in (("sample", trained_folder, "--device", "cuda"), ("train", "train.device=cuda")):
        assert refused(*call) == "the device is cuda, but torch sees no CUDA device here"


def test_a_checkpoint_that_is_not_there(refused, tmp_path):
    assert refused("info", "nowhere") == "there is no checkpoint nowhere"
    (tmp_path / "run").mkdir()
    assert refused("sample", "run") == "run holds no checkpoint (no latest)"


def test_weights_of_nan_draw_nothing(refused, trained_folder, tmp_path):
    saved = load_model(trained_folder)
    saved.averages["latent_norm.weight"].fill_(float("nan"))
    save_model(tmp_path / "nan.safetensors", saved.config, 1, saved.averages)
    assert refused("sample", "nan.safetensors").startswith("the weights in nan.safetensors are not finite: ")


def test_more_memory_than_there_is(refused, tiny_run, monkeypatch):
    width = 2**24
    message = refused("train", *tiny_run, f"model.encoder.width={width}", "train.out=run")
    assert re.fullmatch(
        r"out of memory: can't allocate memory: you tried to allocate \d+ bytes\. .*; "
        r"a smaller batch \(train\.micro_batch, --batch\) or model takes less",
        message,
    )
    # A GPU's, in the words of PyTorch.
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"
    monkeypatch.setattr(Trainer, "run", mock.Mock(side_effect=torch.OutOfMemoryError(said)))
    assert refused("train", *tiny_run, "train.out=run").startswith(f"out of memory: {said}; a smaller batch ")


def test_a_run_that_is_there_and_one_that_diverges(refused, tiny_run, trained_folder):
    message = refused("train", *tiny_run, f"train.out={trained_folder}")
    assert message.startswith(f"{trained_folder} holds a run already; continue it with --resume")
    diverging = ("schedule.warmup_steps=4", "schedule.lr=1e30", "train.checkpoint_every=1", "train.out=run")
    message = refused("train", *tiny_run, *diverging)
    good = re.fullmatch(r"the loss or gradient of step (\d+) is not finite; the last good checkpoint is (.*)", message)
    assert Path(good[2]) == step_folders(Path("run/checkpoints"))[-1]
    assert load_checkpoint(good[2]).step == int(good[1]) - 1


def test_a_run_folder_that_cannot_be_made(refused, tiny_run, tmp_path):
    (tmp_path / "file").touch()
    message = refused("train", *tiny_run, "train.out=file/run")
    assert message == "cannot write file/run: Not a directory"


def test_a_run_folder_on_a_read_only_disk(tiny_run, tmp_path):
    script = 'mount -t tmpfs -o ro tmpfs disk || exit 99; exec "$1" -m unite_fast train "${@:2}" train.out=disk/run'
    (tmp_path / "disk").mkdir()
    call = ["unshare", "-Urm", "bash", "-c", script, "bash", sys.executable, *tiny_run]
    try:
        ended = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs unshare, to mount a disk of its own")
    if ended.returncode in (1, 99) and "disk/run" not in ended.stderr:
        pytest.skip(f"may not mount a disk of its own: {ended.stderr.strip()}")
    assert ended.returncode == 2
    assert ended.stderr == "error: cannot write disk/run: Read-only file system\n"


def test_checkpoints_on_a_disk_that_became_read_only(tiny_run, trained_folder, tmp_path):
    shutil.copytree(trained_folder, tmp_path / "run", symlinks=True)
    script = """
        mount --bind run/checkpoints run/checkpoints && mount -o remount,bind,ro run/checkpoints || exit 99
        exec "$1" -m unite_fast train "${@:2}" train.out=run train.steps=22 --resume
    """
    call = ["unshare", "-Urm", "bash", "-c", script, "bash", sys.executable, *tiny_run]
    try:
        ended = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs unshare, to make a folder read-only for root too")
    if ended.returncode in (1, 99) and "could not save" not in ended.stderr:
        pytest.skip(f"may not make a folder read-only: {ended.stderr.strip()}")
    assert ended.returncode == 2
    assert ended.stderr == (
        "error: could not save run/checkpoints/step_00000022: Read-only file system; "
        "checkpoints saved before are untouched\n"
    )
    assert load_checkpoint(tmp_path / "run").step == 20


def test_a_name_of_two_lines_makes_an_error_of_one(refused):
    assert refused("info", "two\nlines") == "there is no checkpoint two lines"
