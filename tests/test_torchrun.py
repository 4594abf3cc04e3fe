"""Runs of four processes under torchrun, whose processes are killed, frozen and asked to stop.

Importing PyTorch takes five processes on two cores longer than all that they do here. So torchrun's agent, which
starts, watches and restarts processes, is a fork of this process, and they are forks of it. With `--torchrun` it is the
command.
"""

import os
import random
import re
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from unite_fast.checkpoint.reader import load_checkpoint
from unite_fast.cli import main
from unite_fast.training.run_folder import read_status
from unite_fast.utils.files import read_rows

WORLD = 4
EVERY = 5
"""Steps between checkpoints."""
FOR_EVER = "train.steps=1000000"
HANGING = 6.0
"""parallel.timeout of the runs, seconds; a step takes 0.1 s, and on a busy machine 2 s were seen."""


class Torchrun:
    """torchrun with `unite-fast train` in four processes."""

    def __init__(self, folder: Path, arguments: tuple[str, ...], restarts: int, command: bool):
        self.output = folder / f"output_{uuid.uuid4().hex}.txt"
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.chdir(folder)
            output = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.environ["OMP_NUM_THREADS"] = "1"
            run_command(arguments, restarts) if command else run_agent(arguments, restarts)

    def workers(self) -> list[int]:
        """Process ids of those there are now, rank 0 first."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return sorted(map(int, children.read_text().split())) if children.exists() else []

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.workers()[rank], number)

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def printed(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def errors(self) -> list[str]:
        return [line for line in self.printed().splitlines() if line.startswith("error: ")]

    def end(self) -> None:
        """Whatever is left of it."""
        if not self.ended():
            for process in (self.pid, *self.workers()):
                os.kill(process, signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def run_command(arguments: tuple[str, ...], restarts: int) -> None:
    flags = ("--standalone", f"--nproc-per-node={WORLD}", f"--max-restarts={restarts}", "-m", "unite_fast", "train")
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *flags, *arguments])


def run_agent(arguments: tuple[str, ...], restarts: int) -> None:
    """What the command does, but for the start of the processes."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=WORLD,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        start_method="fork",
    )
    try:
        elastic_launch(config, worker)(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def worker(*arguments: str) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # the agent has handlers
        signal.signal(number, signal.SIG_DFL)
    sys.argv = ["unite-fast", "train", *arguments]
    try:
        main()
    except SystemExit as ending:
        if ending.code:
            os._exit(ending.code)


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    """Patient: by the command, a start takes ten seconds of both of two cores, and ours may be busy."""

    def wait(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 240
        while not condition():
            assert time.monotonic() < end, "what was waited for did not happen within four minutes"
            time.sleep(0.1)

    return wait


@pytest.fixture
def torchrun(tiny_run, trained_folder, tmp_path, pytestconfig) -> Iterator[Callable[..., Torchrun]]:
    # A run in this process, `trained_folder`, has imported what the processes forked from it would each import.
    started = []

    def start(*arguments: str, restarts: int = 0) -> Torchrun:
        settings = ("digits", *tiny_run, "train.log_every=1", f"train.checkpoint_every={EVERY}")
        arguments = (*settings, FOR_EVER, f"parallel.timeout={HANGING}", *arguments)
        started.append(Torchrun(tmp_path, arguments, restarts, pytestconfig.getoption("torchrun")))
        return started[-1]

    yield start
    for running in started:
        running.end()


@pytest.fixture
def undisturbed(torchrun, wait_until, tmp_path) -> Callable[[int], Path]:
    """The folder of a run of so many steps that nobody disturbed."""

    def run(steps: int) -> Path:
        running = torchrun(f"train.steps={steps}", "train.out=undisturbed")
        wait_until(running.ended)
        assert running.status == 0, running.printed()
        assert running.errors() == []
        assert read_status(tmp_path / "undisturbed") == f"finished at step {steps}"
        return tmp_path / "undisturbed"

    return run


def logged(folder: Path) -> int:
    return max((row["step"] for row in read_rows(folder / "metrics.jsonl")), default=0)


LOST = r"error: rank \d: step \d+: .+\b(rank \d|process)\b.+"


def test_kill_9_of_any_rank_at_any_moment(
    torchrun, undisturbed, wait_until, assert_same_run, tmp_path, pytestconfig, mentions
):
    """torchrun starts all four again, each time from the last checkpoint, and in the end the run is bit for bit the one
    that nobody killed."""
    kills = pytestconfig.getoption("kills")
    folder, chance = tmp_path / "run", random.Random(11)
    running = torchrun("train.out=run", restarts=kills)
    workers: list[int] = []
    for kill in range(kills):
        wait_until(lambda old=workers: len(running.workers()) == WORLD and not set(running.workers()) & set(old))
        workers = running.workers()
        at = logged(folder)
        # Every fourth one dies while it starts, the others somewhere in a step, a log or a save, when one is complete.
        if kill % 4 != 3:
            wait_until(lambda at=at: logged(folder) > at + 2 * EVERY)
        time.sleep(chance.uniform(0, 1.5))
        os.kill(chance.choice(workers), signal.SIGKILL)
        assert not running.ended(), running.printed()
    wait_until(lambda: not set(running.workers()) & set(workers))
    at = logged(folder)
    wait_until(lambda: logged(folder) > at)

    # The end: Slurm's warning to one of them, which all heed; torchrun does not start them again.
    running.signal(chance.randrange(WORLD), signal.SIGUSR1)
    wait_until(running.ended)
    assert running.status == 0, running.printed()
    step = load_checkpoint(folder).step
    assert read_status(folder) == f"stopped at step {step} by SIGUSR1"
    assert re.search(mentions(f"step {step}", 1000000, "--resume"), running.printed())
    starts = [int(first) for first in re.findall(r"steps (\d+)\.\.", running.printed())]
    assert starts == sorted(starts) and all(first % EVERY == 0 for first in starts) and starts[-1] > 0
    # The survivors of each kill said so in a line, or were too early to have noticed.
    assert all(re.fullmatch(LOST, line) for line in running.errors()), running.errors()
    assert running.errors() and "Traceback" not in running.printed()
    assert_same_run(folder, undisturbed(step))


def test_a_frozen_rank_is_named_and_a_signal_to_torchrun_is_heeded(
    torchrun, undisturbed, wait_until, assert_same_run, tmp_path
):
    folder = tmp_path / "run"
    running = torchrun("train.out=run", restarts=1)
    wait_until(lambda: logged(folder) > EVERY)
    workers, begun = running.workers(), time.monotonic()
    os.kill(workers[2], signal.SIGSTOP)
    wait_until(lambda: running.errors())
    assert HANGING <= time.monotonic() - begun < HANGING + 20
    os.kill(workers[2], signal.SIGKILL)  # torchrun would, after half a minute
    hung = rf"error: rank \d: step \d+: .*\b{HANGING:g} s\b.*\brank 2"
    assert re.fullmatch(hung, running.errors()[0])
    assert re.search(r"unite_fast/training/trainer.py\", line \d+, in run\n", running.printed()), "where it hangs"

    at = logged(folder)
    wait_until(lambda: logged(folder) > at)
    os.kill(running.pid, signal.SIGTERM)
    wait_until(running.ended)
    assert running.status == 1, "torchrun's own, whatever its processes say"
    step = load_checkpoint(folder).step
    assert read_status(folder) == f"stopped at step {step} by SIGTERM"
    assert step > at

    running = torchrun("train.out=run", f"train.steps={step + 3}", "--resume")
    wait_until(running.ended)
    assert running.status == 0, running.printed()
    assert read_status(folder) == f"finished at step {step + 3}"
    assert_same_run(folder, undisturbed(step + 3))


def test_a_mistake_is_printed_once_per_machine(torchrun, wait_until, mentions):
    running = torchrun("train.bacth_size=8", restarts=1)
    wait_until(running.ended)
    assert running.status == 1
    errors = running.errors()
    assert len(errors) == 2  # one for each start
    assert all(re.match(mentions("rank 0", "train.bacth_size", "batch_size"), line) for line in errors)


def test_a_restart_does_not_take_up_a_run_that_was_there_before(torchrun, undisturbed, wait_until, mentions):
    folder = undisturbed(3)
    running = torchrun("train.out=undisturbed", restarts=1)
    wait_until(running.ended)
    assert running.status == 1
    assert len(running.errors()) == 2 * WORLD
    assert all(re.search(mentions("undisturbed", "--resume"), line) for line in running.errors())
    assert logged(folder) == 3
