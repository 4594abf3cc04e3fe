"""The command line: options and settings of any value, in any command that ends soon."""

import contextlib
import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from unite_fast.checkpoint.model_file import export_model
from unite_fast.cli import main
from unite_fast.errors import UserError

pytestmark = pytest.mark.usefixtures("slow_inputs")

FEW = ("--count", "2", "--steps", "1", "--batch", "2", "--solver", "euler")
COMMANDS: dict[str, tuple[list[str], str]] = {
    "info": (["MODEL"], ""),
    "export": (["MODEL", "OUT.safetensors"], ""),
    "export-official": (["MODEL", "OUT.pt"], ""),
    "sample": (["MODEL", *FEW, "--out", "OUT.png"], "classes count guidance interval solver steps seed out"),
    "generate": (
        ["MODEL", *FEW, "--out", "OUT.npz"],
        "num classes guidance interval solver steps seed batch precision out device",
    ),
    "reconstruct": (["MODEL", "IMAGE", "--out", "OUT.png"], "out device"),
    "evaluate": (
        ["MODEL", "--count", "4", "--reconstructions", "2", "--steps", "1", "--guidance", "1", "--out", "OUT"],
        "features inception inception-sha256 reference data count guidance interval solver steps "
        "reconstructions seed batch precision out",
    ),
    "gallery": (
        ["MODEL", "--no-real", "--classes", "1", "--per-class", "1", "--scales", "1", "--steps", "1"],
        "out data classes per-class scales guidance interval solver seed",
    ),
    "plan": (["digits"], "gpu nodes gpus-per-node price data measured"),
    "inspect": (["digits", "--seconds", "0.01"], "image-size split workers seed out"),
    "stats": (["digits", "OUT.npz"], "features inception image-size split batch workers"),
    "shards": (
        ["PICTURES", "OUT", "--image-size", "8"],
        "format image-size quality seed per-shard split labels workers",
    ),
    "parity": (["TRACE"], "backend device"),
}
"""Command -> usual arguments, and the options that are changed."""
SETTLED = ("train.steps=1", "train.checkpoint_every=1", "train.out=OUT")
AMOUNTS = ("steps", "count", "num", "reconstructions", "per-class", "batch")
"""Options for which some thousands are a usual value, which takes long."""
VALUES = [
    "0",
    "1",
    "2",
    "-1",
    "1e30",
    "-1e30",
    "nan",
    "inf",
    "1:5:1e-9",
    "1,2,3",
    "",
    "euler",
    "cpu",
    "cuda",
    "OUT.png",
]


@pytest.fixture(scope="session")
def inputs(trained_folder: Path, tmp_path_factory) -> Path:
    """What commands read."""
    folder = tmp_path_factory.mktemp("inputs")
    export_model(trained_folder, folder / "model.safetensors")
    for number in range(4):
        (folder / "pictures" / f"c{number % 2}").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"c{number % 2}" / f"{number}.png")
    shutil.copy(Path(__file__).parents[1] / "data" / "official_tiny_a.npz", folder / "trace.npz")
    return folder


def _words(values: st.SearchStrategy) -> st.SearchStrategy[str]:
    """The values as words of a command line, without those that a user may well mean: a `pipe:` or an address there is
    used, and an output may be outside the working directory."""
    return values.map(str).filter(lambda word: not word.startswith(("pipe:", "../", "https:", "s3:")))


def _run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Raises:
        UserError: the command refused in one line, or with click's usage.
    """
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", ["unite-fast", *words])
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ending:
            status = ending.code or 0
    error = err.getvalue()
    assert "Traceback" not in error and "--traceback" not in error, (words, error)
    if status == 2 and "Usage:" not in error:
        (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
        raise UserError(line)
    assert status in (0, 2) or words[0] == "parity", (words, status, error)
    if status == 2:
        raise UserError("usage")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_options(fuzz, name, inputs, monkeypatch):
    usual, options = COMMANDS[name][0], COMMANDS[name][1].split()

    def one(draw, folder):
        shutil.copytree(inputs, folder, dirs_exist_ok=True)
        places = {
            "MODEL": "model.safetensors",
            "IMAGE": "pictures/c0/0.png",
            "PICTURES": "pictures",
            "TRACE": "trace.npz",
        }
        words = [places.get(word, word) for word in usual]
        absurd = st.one_of(st.sampled_from(VALUES), _words(fuzz.absurd()))
        any_value = st.one_of(absurd, _words(fuzz.value()))
        for _ in range(draw(st.integers(1, 2))):
            if options and draw(st.integers(0, 3)):
                option = draw(st.sampled_from(options))
                words += [f"--{option}", draw(absurd if option in AMOUNTS else any_value)]
            else:
                words[draw(st.integers(0, len(words) - 1))] = draw(absurd)
        before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        try:
            _run([name, *[word.replace("\0", "") for word in words]], monkeypatch)
        finally:
            for path, content in before.items():
                assert path.read_bytes() == content, f"{words} changed {path}"

    fuzz(f"{name}, options", one)


def test_settings_of_a_run(fuzz, tiny_run, monkeypatch):
    from unite_fast.config import Config
    from unite_fast.recipes import to_tree
    from unite_fast.training.run_folder import flatten

    # Sizes are in test_settings.py: a large model that fits into memory takes long here, as do many steps of a solver.
    large = (
        "width",
        "depth",
        "heads",
        "flow_draws",
        "tokens",
        "size",
        "classes",
        "channels",
        "threads",
        "batch",
        "sampling.steps",
    )
    keys = [key for key in flatten(to_tree(Config())) if not any(word in key for word in large)]

    def one(draw, folder):
        value = draw(st.one_of(st.sampled_from(VALUES), _words(fuzz.value())))
        words = [*tiny_run, *SETTLED, f"{draw(st.sampled_from(keys))}={value}"]
        _run(["train", "digits", *[word.replace("\0", "") for word in words]], monkeypatch)

    fuzz("train, settings", one)
