"""Real processes that are stopped at any moment: what is lost, and that nothing is damaged."""

import random
import re
import signal
import time
from pathlib import Path

import pytest

from unite_fast.checkpoint.format import step_folders, step_of
from unite_fast.checkpoint.reader import load_checkpoint
from unite_fast.utils.files import read_rows

EVERY = 2
"""Steps between checkpoints. So few that many of the moments below fall into a save."""
FOR_EVER = "train.steps=1000000"


@pytest.fixture
def started_from():
    """The step a process went on from, by its own words, once it has said them; None before."""

    def find(printed: str) -> int | None:
        found = re.findall(r"steps (\d+)\.\.", printed)
        return int(found[-1]) if found else None

    return find


def rows_in(folder: Path) -> list[int]:
    return [row["step"] for row in read_rows(folder / "metrics.jsonl")]


def latest(folder: Path) -> int:
    link = folder / "checkpoints" / "latest"
    return step_of(link.resolve()) if link.exists() else 0


def test_kill_9_at_any_moment_ten_times_in_a_row(
    tiny_run, process, wait_until, started_from, assert_same_run, tmp_path
):
    """Each time at most the steps since the last checkpoint are lost, and in the end the run is bit for bit the one
    that nobody killed."""
    settings = (*tiny_run, "train.log_every=1", f"train.checkpoint_every={EVERY}")
    folder = tmp_path / "run"
    chance = random.Random(9)
    at = 0
    for attempt in range(10):
        running = process("train", *settings, FOR_EVER, "train.out=run", "--resume")
        # Two of them die while they start, the others somewhere in a step, a log or a save.
        if attempt not in (3, 7):
            wait_until(lambda at=at: latest(folder) > at)
        time.sleep(chance.uniform(0, 0.25))
        running.signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL

        # It went on from the last checkpoint, none of whose steps were lost ...
        assert started_from(running.printed()) in (at, None)
        reached = max(rows_in(folder), default=0)
        # ... and left one that can be read. A checkpoint is written beside the steps that follow it, and the next one
        # begins when it is safe.
        found = load_checkpoint(folder).step
        assert found >= max(at, ((reached - 1) // EVERY - 1) * EVERY)
        assert found % EVERY == 0
        for file in step_folders(folder / "checkpoints"):
            assert load_checkpoint(file).step == step_of(file)
        running.output.unlink()
        at = found
    assert at >= 8 * EVERY

    end = f"train.steps={at + 3}"
    assert process("train", *settings, end, "train.out=run", "--resume").wait() == 0
    assert process("train", *settings, end, "train.out=undisturbed").wait() == 0
    assert_same_run(folder, tmp_path / "undisturbed")
    assert rows_in(folder) == list(range(1, at + 4))
    assert not list(folder.rglob("*.partial")), "what killed saves left behind is cleared away"


def test_sigterm_and_sigint_save_and_the_run_resumes(
    tiny_run, process, wait_until, started_from, assert_same_run, tmp_path, mentions
):
    settings = (*tiny_run, "train.log_every=3", "train.checkpoint_every=100000")
    folder, at = tmp_path / "run", 0
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        running = process("train", *settings, FOR_EVER, "train.out=run", *["--resume"] * bool(at))
        wait_until(lambda at=at: max(rows_in(folder), default=0) > at)
        running.signal(number)
        assert running.wait() == status
        assert started_from(running.printed()) == at
        at = load_checkpoint(folder).step
        assert at >= max(rows_in(folder))
        assert re.search(mentions(f"step {at}", 1000000, "--resume"), running.printed())
        assert "Traceback" not in running.printed()
        running.output.unlink()

    end = f"train.steps={at + 4}"
    assert process("train", *settings, end, "train.out=run", "--resume").wait() == 0
    assert process("train", *settings, end, "train.out=undisturbed").wait() == 0
    assert_same_run(folder, tmp_path / "undisturbed")


def test_two_processes_do_not_train_in_one_folder(tiny_run, process, wait_until, command, tmp_path):
    folder = tmp_path / "run"
    running = process("train", *tiny_run, FOR_EVER, "train.log_every=1", f"train.out={folder}")
    wait_until(lambda: rows_in(folder))
    message = command("train", *tiny_run, FOR_EVER, f"train.out={folder}", "--resume").error()
    holder = re.fullmatch(rf"{folder} .*\bprocess (\d+)\b.*", message)
    assert int(holder[1]) == running.pid
    at = max(rows_in(folder))
    wait_until(lambda: max(rows_in(folder)) > at)  # it was not disturbed


def test_a_second_signal_ends_a_run_at_once(tiny_run, process, wait_until, tmp_path):
    """Where the first is not heeded, because a step takes minutes."""
    running = process("train", *tiny_run, FOR_EVER, "train.log_every=1", "train.batch_size=1400", "train.out=run")
    wait_until(lambda: rows_in(tmp_path / "run"))
    # The second has to come within the step in which the first came; a step of this batch takes a good while.
    running.signal(signal.SIGTERM)
    time.sleep(0.02)
    running.signal(signal.SIGTERM)
    assert running.wait() == -signal.SIGTERM
