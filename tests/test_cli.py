"""The command line: help, images, and what it imports."""

import errno
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import unite_fast
from unite_fast import cli
from unite_fast.checkpoint import model_file
from unite_fast.distributed import store
from unite_fast.errors import UserError
from unite_fast.recipes import load_config, to_tree

COMMANDS = (
    *("train", "sample", "generate", "reconstruct", "evaluate", "stats", "info", "shards", "inspect"),
    *("gallery", "search-guidance", "export", "plan", "molecules", "check-cluster"),
    *("import-official", "export-official", "parity"),
)


@pytest.fixture
def sample(command, trained_folder, tmp_path, mentions):
    """Runs `sample` with the trained model; returns images and labels."""

    def draw(*options: object) -> tuple[np.ndarray, list[int]]:
        out = tmp_path / "drawn.npz"
        ended = command("sample", trained_folder, "--out", out, *options)
        assert ended.status == 0, ended.err
        with np.load(out) as file:
            assert re.fullmatch(rf"{mentions(len(file['arr_0']), out)}.*\n", ended.out)
            return file["arr_0"], file["arr_1"].tolist()

    return draw


def run_python(*arguments: str, folder: object = ".") -> subprocess.CompletedProcess:
    """A new Python process."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=folder)


def test_it_runs_as_a_module_and_lists_its_commands(tmp_path):
    ended = run_python("-m", "unite_fast", "--help", folder=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    for name in COMMANDS:
        assert re.search(rf"\b{name}\b", ended.stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(command, name):
    ended = command(name, "--help")
    assert (ended.status, ended.err) == (0, "")
    assert re.search(rf"Usage: .*\b{name} ", ended.out)
    assert re.search(rf"Examples?:\s+unite-fast {name}", ended.out)


def test_without_a_command_help_is_shown(command):
    assert "Usage: " in command().out


@pytest.mark.parametrize(
    "wrong", [("nonsense",), ("sample",), ("sample", "x", "--nope"), ("sample", "x", "--count", "0")]
)
def test_wrong_arguments_have_status_2_and_no_traceback(command, wrong):
    ended = command(*wrong)
    assert ended.status == 2
    assert "Traceback" not in ended.err and "Error" in ended.err


@pytest.mark.parametrize(("rank", "waits"), [(0, []), (1, [cli.FIRST_RANK_SECONDS])])
def test_the_first_rank_of_a_machine_prints_first(command, monkeypatch, mentions, rank, waits):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    ended = command("train", "train.bacth_size=8")
    assert ended.status == 2 and re.search(mentions(f"rank {rank}", "train.bacth_size"), ended.err)
    assert slept == waits


@pytest.mark.parametrize(
    ("raised_by", "rank", "printed"),
    [
        (3, 3, "error: rank 3: x"),  # the rank itself
        (3, 0, "error: rank 3: x"),  # the first one of each machine
        (3, 4, "error: rank 3: x"),
        (3, 1, ""),
        (None, 4, "error: x"),  # the message says which
        (None, 5, ""),
    ],
)
def test_the_error_of_one_rank_is_printed_once_per_machine(monkeypatch, capsys, raised_by, rank, printed):
    """Eight ranks on two machines."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(store, "announce_early_mistake", lambda message: None)
    for name, value in {"RANK": rank, "WORLD_SIZE": 8, "LOCAL_RANK": rank % 4, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    error = UserError("x")
    error.raised_by = raised_by
    with pytest.raises(SystemExit) as ended:
        cli._exit("x", 2, error)
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip() == printed


def test_importing_the_command_line_imports_no_torch():
    """torch takes seconds to import, and help does not need it."""
    code = "import sys, unite_fast, unite_fast.cli; print([m for m in sys.modules if m.partition('.')[0] in {names}])"
    names = {"torch", "torchvision", "scipy", "sklearn", "matplotlib", "tensorboard"}
    ended = run_python("-c", code.format(names=names))
    assert (ended.stdout, ended.stderr) == ("[]\n", "")


def test_importing_the_data_pipeline_imports_no_library_of_a_single_source():
    code = "import sys, unite_fast.data_pipeline; print([name for name in {names} if name in sys.modules])"
    ended = run_python("-c", code.format(names=("sklearn", "scipy", "torchvision", "nvidia.dali")))
    assert (ended.stdout, ended.stderr) == ("[]\n", "")


def test_every_module_imports_and_trains_without_torchvision(tiny_run, tmp_path):
    code = """
import importlib, pkgutil, sys
class NoTorchvision:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            raise ImportError("no torchvision")
sys.meta_path.insert(0, NoTorchvision())
import unite_fast
for module in pkgutil.walk_packages(unite_fast.__path__, "unite_fast."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from unite_fast.cli import main
sys.argv = ["unite-fast", "train", *sys.argv[1:]]
main()
"""
    ended = run_python("-c", code, *tiny_run, "train.steps=1", "train.out=run", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "samples.png").exists()


def test_train_takes_a_recipe_and_settings(command, tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = to_tree(load_config("digits", (*tiny_run, "name=mine")))
    (tmp_path / "a=b.yaml").write_text(yaml.safe_dump(tree))
    ended = command("train", "a=b.yaml", "train.steps=2")
    assert ended.status == 0, ended.err
    assert ended.err == ""
    assert re.match(r"training mine: 0\.0", ended.out)
    saved = yaml.safe_load((tmp_path / "runs" / "mine" / "config.yaml").read_text())
    assert (saved["train"]["steps"], saved["train"]["batch_size"]) == (2, 8)


def test_a_folder_named_like_a_recipe_does_not_hide_it(command, tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert command("train", "digits", *tiny_run, "train.steps=1").status == 0
    assert (tmp_path / "runs" / "digits" / "samples.png").exists()


def test_samples_depend_on_the_seed_and_not_on_the_batch(sample):
    whole, labels = sample("--count", 12)
    assert whole.shape == (12, 8, 8, 3) and whole.dtype == np.uint8
    assert labels == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    for batch in (1, 5, 100):
        assert np.array_equal(sample("--count", 12, "--batch", batch)[0], whole)
    assert np.array_equal(sample("--count", 12, "--seed", 0)[0], whole)
    assert not np.array_equal(sample("--count", 12, "--seed", 1)[0], whole)
    assert np.array_equal(sample("--count", 5)[0], whole[:5])


def test_every_sampling_option_changes_the_images(sample):
    plain, _ = sample("--count", 6)
    assert sample("--count", 3, "--classes", "7,2")[1] == [7, 2, 7]
    for options in (
        ("--solver", "heun"),
        ("--solver", "multistep"),
        ("--solver", "dopri5"),
        ("--steps", 5),
        ("--guidance", 8),
        ("--guidance", 8, "--interval", "0,0.7"),
    ):
        assert not np.array_equal(sample("--count", 6, *options)[0], plain), options
    assert np.array_equal(sample("--count", 6, "--guidance", 8, "--interval", "0.4,0.4")[0], plain)
    # The recipe's own settings, given as options.
    same = sample("--count", 6, "--solver", "euler", "--steps", 2, "--guidance", 1, "--interval", "0,1")
    assert np.array_equal(same[0], plain)


def test_samples_as_a_grid_and_as_a_folder(command, sample, trained_folder, tmp_path):
    images, labels = sample("--count", 3)
    assert command("sample", trained_folder, "--count", 3, "--out", tmp_path / "grid.png").status == 0
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == ((10 * 9 + 1) * 6, (9 + 1) * 6)
        assert len(np.unique(np.asarray(picture))) > 20
    assert command("sample", trained_folder, "--count", 3, "--out", tmp_path / "folder").status == 0
    names = sorted(os.listdir(tmp_path / "folder"))
    assert names == [f"{i:06d}_class{label}.png" for i, label in enumerate(labels)]
    for name, image in zip(names, images, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "folder" / name)), image)


def test_reconstruct_prints_the_psnr_of_each_image(command, trained_folder, tmp_path, mentions):
    generator = np.random.default_rng(0)
    paths = [tmp_path / f"{name}.png" for name in ("a", "b", "c")]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (11, 14, 3), dtype=np.uint8)).save(path)
    out = tmp_path / "new" / "pairs.png"
    ended = command("reconstruct", trained_folder, *paths, "--out", out)
    assert (ended.status, ended.err) == (0, "")
    lines = ended.out.splitlines()
    for path, line in zip(paths, lines, strict=False):
        assert 0 < float(re.fullmatch(rf"{re.escape(str(path))}: ([\d.]+) dB", line)[1]) < 60
    assert len(lines) == 4 and re.match(mentions(3, out), lines[3])
    with Image.open(out) as picture:
        assert picture.size == ((3 * 9 + 1) * 6, (2 * 9 + 1) * 6)
        assert len(np.unique(np.asarray(picture))) > 20


def test_a_file_name_that_is_not_unicode_can_be_printed(process, trained_folder, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    Image.new("RGB", (9, 9)).save(path)
    running = process("reconstruct", trained_folder, path)
    assert running.wait() == 0, running.printed()
    assert "\\udcff.png: " in running.printed()


def test_info_describes_a_checkpoint(command, trained_folder):
    ended = command("info", trained_folder)
    assert ended.status == 0
    first, second, *settings = ended.out.splitlines()
    assert re.fullmatch(r"step_00000020: digits, 20 optimizer steps, [\d.]+ MiB", first)
    assert re.fullmatch(r"parameters: [\d,]+ \(encoder [\d,]+, decoder [\d,]+\)", second)
    assert yaml.safe_load("\n".join(settings)) == yaml.safe_load((trained_folder / "config.yaml").read_text())


def test_export_official_and_import_official_keep_the_weights(command, trained_folder, tmp_path):
    official, ours = tmp_path / "official.pt", tmp_path / "ours.safetensors"
    assert command("export-official", trained_folder, official).status == 0
    assert command("import-official", official, ours, "--decoder-heads", 1, "--in-context-start", 1).status == 0
    one, other = unite_fast.load(trained_folder), unite_fast.load(ours)
    settings = dict(solver="euler", steps=2, guidance=2.0, interval=(0.0, 1.0))
    assert torch.equal(one.generate([1, 2, 3], **settings), other.generate([1, 2, 3], **settings))


class Broken(Exception):
    pass


def deep() -> None:
    deep()


def fail_with(error: BaseException):
    def run(*arguments, **options) -> None:
        if isinstance(error, RecursionError):
            deep()
        raise error

    return run


@pytest.mark.parametrize(
    "error",
    [Broken("two\nlines \x1b[31m"), RecursionError(), ImportError("no module x"), AssertionError(), KeyError("a")],
)
def test_any_exception_is_one_line_that_names_the_file_of_its_traceback(command, monkeypatch, tmp_path, error):
    monkeypatch.setattr(tempfile, "mkstemp", partial(tempfile.mkstemp, dir=tmp_path))
    monkeypatch.setattr(model_file, "describe", fail_with(error))
    ended = command("info", "run")
    assert ended.status == 1 and len(ended.err.splitlines()) == 1 and ended.err[:-1].isprintable()
    (file,) = tmp_path.iterdir()
    assert f"error: {type(error).__name__}" in ended.err and str(file) in ended.err
    text = file.read_text()
    assert "Traceback" in text and type(error).__name__ in text and "'info', 'run'" in text
    assert file.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("arguments", [("--traceback", "info", "run"), ("info", "run", "--traceback")])
def test_the_traceback_is_printed_if_asked_for(command, monkeypatch, tmp_path, arguments):
    monkeypatch.setattr(tempfile, "mkstemp", partial(tempfile.mkstemp, dir=tmp_path))
    monkeypatch.setattr(model_file, "describe", fail_with(Broken("why")))
    ended = command(*arguments)
    assert ended.status == 1 and list(tmp_path.iterdir()) == []
    assert ended.err.startswith("Traceback") and ended.err.splitlines()[-1].startswith("error: Broken: why")
    monkeypatch.setattr(model_file, "describe", fail_with(UserError("your mistake")))
    ended = command(*arguments)
    assert ended.status == 2 and ended.err.splitlines()[-1] == "error: your mistake"


def test_a_traceback_that_cannot_be_written_is_said(command, monkeypatch, tmp_path, mentions):
    monkeypatch.setattr(model_file, "describe", fail_with(Broken("why")))
    with monkeypatch.context() as patch:  # pytest itself needs temporary files later
        patch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
        ended = command("info", "run")
    assert ended.status == 1 and len(ended.err.splitlines()) == 1
    assert re.search(mentions("Broken: why", os.strerror(errno.ENOENT), "--traceback"), ended.err)


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (KeyboardInterrupt(), 1, "interrupted"),
        (EOFError("at its end"), 1, "at its end"),
        (MemoryError(), 2, "out of memory"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe", "socket"), 2, "socket: Broken pipe"),
        (PermissionError(errno.EACCES, "denied", "file\n"), 2, "file : denied"),
    ],
)
def test_errors_of_the_system_are_one_line(command, monkeypatch, tmp_path, error, status, text):
    monkeypatch.setattr(tempfile, "mkstemp", partial(tempfile.mkstemp, dir=tmp_path))
    monkeypatch.setattr(model_file, "describe", fail_with(error))
    ended = command("info", "run")
    assert ended.status == status and len(ended.err.splitlines()) == 1 and text in ended.err


def test_a_thread_that_fails_is_one_line(command, monkeypatch):
    def describe(checkpoint: Path) -> str:
        thread = threading.Thread(target=fail_with(Broken("two\nlines")))
        thread.start()
        thread.join()
        return "described"

    monkeypatch.setattr(model_file, "describe", describe)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    ended = command("info", "run")
    assert (ended.status, ended.out) == (0, "described\n")
    assert len(ended.err.splitlines()) == 1 and "Broken: two lines" in ended.err


def test_a_broken_environment_is_named(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "x")
    command("info", "run").error("WORLD_SIZE", "'x'")
    command("train").error("WORLD_SIZE", "'x'")


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - set(cli.SHARED)))
def test_a_command_for_one_process_runs_once_under_torchrun(command, monkeypatch, tmp_path, name):
    """So is every new command, unless `SHARED` names it."""
    monkeypatch.chdir(tmp_path)
    for variable, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(variable, str(value))
    ended = command(name, "a", "b")
    assert (ended.status, ended.out, ended.err) == (0, "", "")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    ended = command(name, "nowhere", "nothing")
    note, *rest = ended.err.splitlines()
    assert re.search(rf"\b{name}\b.*\b2\b", note) and "rank 0:" not in "".join(rest)
    assert "WORLD_SIZE" not in os.environ


@pytest.mark.parametrize("word", ["~/x", "--out=~/x", "train.out=~/x", "data.path=~/a~b/~"])
def test_home_is_expanded_where_a_shell_leaves_it(monkeypatch, word):
    monkeypatch.setenv("HOME", "/home/me")
    before, _, after = word.partition("~")
    assert cli._read_words([word]) == ([f"{before}/home/me{after}"], False)
    for other in ("a~/x", "name=a~", "x=a/~/b"):
        assert cli._read_words([other])[0] == [other]


def test_images_are_not_written_over_what_is_read(command, trained_folder, tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    before = path.read_bytes()
    command("reconstruct", trained_folder, path, "--out", path).error(path, "reads")
    (tmp_path / "y.png").symlink_to("x.png")
    command("reconstruct", trained_folder, path, "--out", tmp_path / "y.png").error("y.png", "reads")
    assert path.read_bytes() == before
    for out in (trained_folder, trained_folder / "checkpoints", trained_folder / "checkpoints" / "x.png"):
        command("sample", trained_folder, "--count", 1, "--out", out).error(out, "reads")
    # A picture may be replaced, another kind of file not.
    (tmp_path / "z.png").write_text("mine")
    command("sample", trained_folder, "--out", tmp_path / "z.png").error("z.png", "in the way")
    assert command("sample", trained_folder, "--count", 1, "--out", path).status == 0
