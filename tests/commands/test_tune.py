"""`unite-fast tune` with real candidates, each in its own process."""

import os
import re
import sys
import tempfile
import time

import pytest
import yaml

from unite_fast.benchmarking import candidate
from unite_fast.benchmarking.candidate import FAILED, OUT_OF_MEMORY, OUT_OF_TIME
from unite_fast.cli import main
from unite_fast.distributed.process_group import ALONE
from unite_fast.recipes import load_config, read_tuned, to_tree


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.chdir(tmp_path)
    yield
    assert list((tmp_path / "scratch").glob("unite_fast*")) == []


def test_the_fastest_settings_are_written_and_train(command, tiny_run, tmp_path):
    path, fixed = tmp_path / "recipe.yaml", ("train.compile=false", "train.threads=1")
    path.write_text(yaml.safe_dump(to_tree(load_config("digits", (*tiny_run, "kernels=reference")))))
    ended = command("tune", path, *fixed, "--budget", 120, "--out", "new/tuned.yaml")
    assert ended.status == 0, ended.err
    fastest = [line for line in ended.out.splitlines() if line.endswith("<- fastest")]
    assert len(fastest) == 1 and "kernels=auto" in ended.out
    # On a busy machine either may be the fastest.
    expected = {"kernels": "auto"} if fastest[0].startswith("kernels=auto") else {}
    assert re.search("recipe.*images/s", ended.err.splitlines()[0])
    assert read_tuned("new/tuned.yaml") == expected
    ended = command("train", path, *fixed, "train.steps=1", "train.out=run", "--tuned", "new/tuned.yaml")
    assert ended.status == 0, ended.err
    assert load_config("run/config.yaml").kernels == expected.get("kernels", "reference")


def test_candidates_that_fail_have_a_status(tiny_run, monkeypatch):
    words = ("digits", *tiny_run)
    # The table of in-context tokens exceeds any memory.
    trial = candidate.run(words, {"model.encoder.width": 2**16}, 120.0, ALONE)
    assert (trial.status, trial.row) == (OUT_OF_MEMORY, None)
    trial = candidate.run(words, {"attention": "sdpa_flash"}, 120.0, ALONE)
    assert trial.status == FAILED and trial.why.startswith("attention")
    start = time.monotonic()
    assert candidate.run(words, {"train.steps": 5}, 0.5, ALONE).status == OUT_OF_TIME
    assert time.monotonic() - start < 0.5 + candidate.GRACE + 5


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        (("nowhere",), ("nowhere", "digits")),
        (("digits", "data.path=x"), ("data.path=x",)),
        (("digits", "--out", "."), ("--out", "tuned.yaml")),
        (("digits", "train.device=cuda"), ("cuda", "device")),
    ],
)
def test_a_mistake_is_one_error_line(command, arguments, tokens):
    command("tune", *arguments).error(*tokens)


def run_rank(folder: str, arguments: tuple[str, ...]) -> str:
    """The stdout of the command on one rank."""
    os.chdir(folder)
    output = os.open(f"rank{os.environ['RANK']}.txt", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(output, 1)
    sys.stdout = os.fdopen(1, "w")
    sys.argv = ["unite-fast", "tune", *arguments]
    try:
        main()
    except SystemExit as ending:
        assert not ending.code
    sys.stdout.flush()
    with open(f"rank{os.environ['RANK']}.txt") as file:
        return file.read()


def test_two_processes(ranks, tiny_run, tmp_path):
    fixed = ("train.compile=false", "kernels=auto", "train.threads=1", "parallel.strategy=fsdp")
    arguments = ("digits", *tiny_run, *fixed, "--budget", "200")
    first, second = ranks(2, run_rank, str(tmp_path), arguments, timeout=250)
    assert "parallel.reshard_after_forward=False" in first and "<- fastest" in first and second == ""
    assert "failed" not in first
    assert set(read_tuned("tuned.yaml")) <= {"parallel.reshard_after_forward"}


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ('{\n "a": 1\n}\n', {"a": 1}),
        ('NCCL 2.29\n{\n "a": {\n  "b": 2\n }\n}\nhost: INFO {\n', {"a": {"b": 2}}),
        ("", None),
        ("NCCL version 2.29\n", None),
        ("{\ntorn", None),
    ],
)
def test_the_row_is_found_among_other_output(out, expected):
    assert candidate.printed_row(out) == expected
