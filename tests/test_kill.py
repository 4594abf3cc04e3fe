"""Processes that are killed or signalled at any moment: few steps are lost, and nothing saved is damaged.

`python -m pytest tests/test_kill.py --kills 20` kills each command 20 times.
"""

import contextlib
import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unite_fast.checkpoint.folders import step_folders, step_of
from unite_fast.checkpoint.reader import load_checkpoint
from unite_fast.utils.rows import read_rows

CHECKPOINT_EVERY = 2
"""Steps between checkpoints. So few that many kills hit a save."""
ENDLESS = "train.steps=1000000"


def first_step(output: str) -> int | None:
    """The step from which a run started or resumed, as it printed; None if it was killed before."""
    steps = re.findall(r"steps (\d+)\.\.", output)
    return int(steps[-1]) if steps else None


def logged_steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_rows(folder / "metrics.jsonl")]


def latest_checkpoint(folder: Path) -> int:
    link = folder / "checkpoints" / "latest"
    return step_of(link.resolve()) if link.exists() else 0


@pytest.mark.timeout(1800)  # for --kills 20 on a busy machine
def test_a_killed_run_resumes_from_the_last_checkpoint(
    tiny_run, process, wait_until, assert_same_run, tmp_path, pytestconfig
):
    """Kills at random moments. The final run equals an undisturbed one bit for bit."""
    settings = (*tiny_run, "train.log_every=1", f"train.checkpoint_every={CHECKPOINT_EVERY}")
    folder = tmp_path / "run"
    rng = random.Random(9)
    saved_step = 0
    kills = max(10, pytestconfig.getoption("kills"))
    for attempt in range(kills):
        running = process("train", *settings, ENDLESS, "train.out=run", "--resume")
        # Two kills hit the start, the others a step, a log or a save.
        if attempt not in (3, 7):
            wait_until(lambda saved_step=saved_step: latest_checkpoint(folder) > saved_step)
        time.sleep(rng.uniform(0, 0.25))
        running.signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL

        # It had resumed from the last checkpoint ...
        assert first_step(running.printed()) in (saved_step, None)
        reached = max(logged_steps(folder), default=0)
        # ... and left an intact one. A checkpoint is written during the steps after it, and is complete before the next
        # one starts.
        checkpoint_step = load_checkpoint(folder).step
        assert checkpoint_step >= max(saved_step, ((reached - 1) // CHECKPOINT_EVERY - 1) * CHECKPOINT_EVERY)
        assert checkpoint_step % CHECKPOINT_EVERY == 0
        for file in step_folders(folder / "checkpoints"):
            assert load_checkpoint(file).step == step_of(file)
        running.output.unlink()
        saved_step = checkpoint_step
    assert saved_step >= (kills - 2) * CHECKPOINT_EVERY

    steps = f"train.steps={saved_step + 3}"
    assert process("train", *settings, steps, "train.out=run", "--resume").wait() == 0
    assert process("train", *settings, steps, "train.out=undisturbed").wait() == 0
    assert_same_run(folder, tmp_path / "undisturbed")
    assert logged_steps(folder) == list(range(1, saved_step + 4))
    assert not list(folder.rglob("*.partial")), "partial files of killed saves are removed"


def test_sigterm_and_sigint_save_a_checkpoint_and_the_run_resumes(
    tiny_run, process, wait_until, assert_same_run, tmp_path, mentions
):
    settings = (*tiny_run, "train.log_every=3", "train.checkpoint_every=100000")
    folder, saved_step = tmp_path / "run", 0
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        running = process("train", *settings, ENDLESS, "train.out=run", *["--resume"] * bool(saved_step))
        wait_until(lambda saved_step=saved_step: max(logged_steps(folder), default=0) > saved_step)
        running.signal(number)
        assert running.wait() == status
        assert first_step(running.printed()) == saved_step
        saved_step = load_checkpoint(folder).step
        assert saved_step >= max(logged_steps(folder))
        assert re.search(mentions(f"step {saved_step}", 1000000, "--resume"), running.printed())
        assert "Traceback" not in running.printed()
        running.output.unlink()

    steps = f"train.steps={saved_step + 4}"
    assert process("train", *settings, steps, "train.out=run", "--resume").wait() == 0
    assert process("train", *settings, steps, "train.out=undisturbed").wait() == 0
    assert_same_run(folder, tmp_path / "undisturbed")


def test_a_second_process_is_refused_in_the_same_folder(tiny_run, process, wait_until, command, tmp_path):
    folder = tmp_path / "run"
    running = process("train", *tiny_run, ENDLESS, "train.log_every=1", f"train.out={folder}")
    wait_until(lambda: logged_steps(folder))
    message = command("train", *tiny_run, ENDLESS, f"train.out={folder}", "--resume").error()
    holder = re.fullmatch(rf"{folder} .*\bprocess (\d+)\b.*", message)
    assert int(holder[1]) == running.pid
    step = max(logged_steps(folder))
    wait_until(lambda: max(logged_steps(folder)) > step)  # the first process still trains


def test_a_second_signal_stops_the_run_at_once(tiny_run, process, wait_until, tmp_path):
    """The first one stops the run after the current step, which may take minutes."""
    running = process("train", *tiny_run, ENDLESS, "train.log_every=1", "train.batch_size=1400", "train.out=run")
    wait_until(lambda: logged_steps(tmp_path / "run"))
    # The second signal must arrive in the same step as the first, so the batch is large and the step slow.
    running.signal(signal.SIGTERM)
    time.sleep(0.02)
    running.signal(signal.SIGTERM)
    assert running.wait() == -signal.SIGTERM


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """200 pictures in two classes."""
    folder = tmp_path / "pictures"
    for number in range(200):
        (folder / f"c{number % 2}").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 44, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"c{number % 2}" / f"{number}.png")
    return folder


COMMANDS = {
    "shards": ("shards", "pictures", "OUT", "--image-size", "32", "--per-shard", "11", "--workers", "1"),
    "generate": ("generate", "run", "--num", "600", "--steps", "4", "--batch", "20", "--out", "OUT/samples.npz"),
    "export": ("export", "run", "OUT/model.safetensors"),
    "evaluate": ("evaluate", "run", "--count", "200", "--reconstructions", "100", "--guidance", "1", "--out", "OUT"),
}


def _content(folder: Path) -> dict[str, object]:
    """The files of a result, without times and without what a later run of the command removes or replaces."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                files[name] = {key: arrays[key].tobytes() for key in arrays.files}
        elif path.suffix == ".json":
            files[name] = _timeless(json.loads(path.read_text()))
        elif path.is_file() and path.suffix != ".md" and not name.endswith(".lock"):
            files[name] = path.read_bytes()
    return files


def _timeless(tree):
    """JSON without durations and paths."""
    if isinstance(tree, dict):
        return {
            key: _timeless(value) for key, value in tree.items() if key not in ("seconds", "path", "opening", "all")
        }
    return [_timeless(value) for value in tree] if isinstance(tree, list) else tree


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_killed_command_runs_again_to_the_same_result(
    name, pictures, trained_folder, process, tmp_path, pytestconfig
):
    """The files at their final names are whole after each kill: those of before, or those of after."""
    shutil.copytree(trained_folder, tmp_path / "run", symlinks=True)

    def words(out: str) -> list[str]:
        return [word.replace("OUT", out) for word in COMMANDS[name]]

    for out in ("whole", "killed"):
        (tmp_path / out).mkdir()
    start = time.perf_counter()
    assert process(*words("whole")).wait() == 0
    seconds = time.perf_counter() - start
    whole, rng, killed = _content(tmp_path / "whole"), random.Random(name), 0
    kills = pytestconfig.getoption("kills")
    while kills > 0 or (not killed and kills > -10):
        kills -= 1
        running = process(*words("killed"))
        time.sleep(rng.uniform(0, seconds))
        with contextlib.suppress(ProcessLookupError):  # it ended before
            running.signal(signal.SIGKILL)
        if running.wait() == -signal.SIGKILL:
            killed += 1
        else:
            seconds /= 2  # the machine was busier before
        for path, content in _content(tmp_path / "killed").items():
            assert path not in whole or content == whole[path], f"{path} is damaged"
        if _content(tmp_path / "killed") == whole:  # it had done its work before the kill: begin again
            shutil.rmtree(tmp_path / "killed")
            (tmp_path / "killed").mkdir()
    last = process(*words("killed"))
    assert last.wait() == 0, last.printed()
    assert _content(tmp_path / "killed") == whole
    assert killed
    leftovers = [path for path in (tmp_path / "killed").rglob("*") if "partial" in path.name]
    assert not leftovers, leftovers
