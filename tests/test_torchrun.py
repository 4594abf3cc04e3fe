"""Training in four processes under torchrun: ranks are killed, frozen and signalled.

On two cores, five processes take longer to import PyTorch than to run these tests. So torchrun's agent, which starts,
watches and restarts the workers, is a fork of this process, and the workers are forks of the agent. With `--torchrun`
the command itself runs.
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
from unite_fast.utils.rows import read_rows

WORLD = 4
CHECKPOINT_EVERY = 5
"""Steps between checkpoints."""
ENDLESS = "train.steps=1000000"
TIMEOUT = 15.0
"""parallel.timeout of the runs, in seconds. A step takes 0.1 s, and up to 2 s on a busy machine."""
pytestmark = pytest.mark.timeout(1200)  # each waits up to four minutes, several times


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
        """Process ids of the current workers, rank 0 first."""
        return children_of(self.pid)

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

    def kill(self) -> None:
        """Kill the processes that still run."""
        if not self.ended():
            for process in (self.pid, *self.workers()):
                os.kill(process, signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def children_of(pid: int) -> list[int]:
    """Process ids in ascending order; none if there is no such process."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return sorted(map(int, children.read_text().split())) if children.exists() else []


def run_command(arguments: tuple[str, ...], restarts: int) -> None:
    flags = ("--standalone", f"--nproc-per-node={WORLD}", f"--max-restarts={restarts}", "-m", "unite_fast", "train")
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *flags, *arguments])


def run_agent(arguments: tuple[str, ...], restarts: int) -> None:
    """Does what the command does, but forks the workers."""
    forks_have_no_handlers()
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


def forks_have_no_handlers() -> None:
    """Forks of this process end by the signals for which the agent has handlers, like programs that torchrun starts.
    Blocked during the fork: Python forgets a signal that it handled before the fork is complete."""
    numbers = signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def reset() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        unblock()

    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, numbers), after_in_parent=unblock, after_in_child=reset
    )


def wait_for_siblings() -> None:
    """Wait until the agent has forked all workers. A thread of the agent looks up the host name of each worker that
    connects to its store, and a fork during the lookup inherits a held lock of the C library, which is never
    released."""
    agent = os.getppid()
    while os.getppid() == agent and len(children_of(agent)) < WORLD:
        time.sleep(0.01)


def worker(*arguments: str) -> None:
    wait_for_siblings()
    sys.argv = ["unite-fast", "train", *arguments]
    try:
        main()
    except SystemExit as ending:
        if ending.code:
            os._exit(ending.code)


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    """Waits longer than the shared fixture: with `--torchrun`, a start takes ten seconds on two idle cores."""

    def wait(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 240
        while not condition():
            assert time.monotonic() < end, "the condition did not hold within four minutes"
            time.sleep(0.1)

    return wait


@pytest.fixture
def torchrun(tiny_run, trained_folder, tmp_path, pytestconfig) -> Iterator[Callable[..., Torchrun]]:
    # The run of `trained_folder` in this process has imported everything that the forks need.
    started = []

    def start(*arguments: str, restarts: int = 0) -> Torchrun:
        settings = ("digits", *tiny_run, "train.log_every=1", f"train.checkpoint_every={CHECKPOINT_EVERY}")
        arguments = (*settings, ENDLESS, f"parallel.timeout={TIMEOUT}", *arguments)
        started.append(Torchrun(tmp_path, arguments, restarts, pytestconfig.getoption("torchrun")))
        return started[-1]

    yield start
    for running in started:
        running.kill()


@pytest.fixture
def undisturbed(torchrun, wait_until, tmp_path) -> Callable[[int], Path]:
    """Trains for a number of steps without a disturbance; returns the run folder."""

    def run(steps: int) -> Path:
        running = torchrun(f"train.steps={steps}", "train.out=undisturbed")
        wait_until(running.ended)
        assert running.status == 0, running.printed()
        assert running.errors() == []
        assert read_status(tmp_path / "undisturbed") == f"finished at step {steps}"
        return tmp_path / "undisturbed"

    return run


def last_logged_step(folder: Path) -> int:
    return max((row["step"] for row in read_rows(folder / "metrics.jsonl")), default=0)


LOST_RANK_ERROR = r"error: rank \d: step \d+: .+\b(rank \d|process)\b.+"


def test_a_killed_rank_restarts_all_ranks_from_the_last_checkpoint(
    torchrun, undisturbed, wait_until, assert_same_run, tmp_path, pytestconfig, mentions
):
    """A random rank is killed at random moments. The final run equals an undisturbed one bit for bit."""
    kills = pytestconfig.getoption("kills")
    folder, rng = tmp_path / "run", random.Random(11)
    running = torchrun("train.out=run", restarts=kills)
    workers: list[int] = []
    for kill in range(kills):
        wait_until(lambda old=workers: len(running.workers()) == WORLD and not set(running.workers()) & set(old))
        workers = running.workers()
        step_before = last_logged_step(folder)
        # Every fourth kill hits the start, the others a step, a log or a save, after a complete checkpoint.
        if kill % 4 != 3:
            wait_until(lambda step_before=step_before: last_logged_step(folder) > step_before + 2 * CHECKPOINT_EVERY)
        time.sleep(rng.uniform(0, 1.5))
        os.kill(rng.choice(workers), signal.SIGKILL)
        assert not running.ended(), running.printed()
    wait_until(lambda: not set(running.workers()) & set(workers))
    step_before = last_logged_step(folder)
    wait_until(lambda: last_logged_step(folder) > step_before)

    # Slurm's warning signal to one rank stops all, and torchrun does not restart them.
    running.signal(rng.randrange(WORLD), signal.SIGUSR1)
    wait_until(running.ended)
    assert running.status == 0, running.printed()
    step = load_checkpoint(folder).step
    assert read_status(folder) == f"stopped at step {step} by SIGUSR1"
    assert re.search(mentions(f"step {step}", 1000000, "--resume"), running.printed())
    starts = [int(first) for first in re.findall(r"steps (\d+)\.\.", running.printed())]
    assert starts == sorted(starts) and all(first % CHECKPOINT_EVERY == 0 for first in starts) and starts[-1] > 0
    # The survivors of a kill print a line each, or none if it was too early for them to notice.
    assert all(re.fullmatch(LOST_RANK_ERROR, line) for line in running.errors()), running.errors()
    assert running.errors() and "Traceback" not in running.printed()
    assert_same_run(folder, undisturbed(step))


def test_a_frozen_rank_is_named_and_sigterm_to_torchrun_saves_a_checkpoint(
    torchrun, undisturbed, wait_until, assert_same_run, tmp_path
):
    folder = tmp_path / "run"
    running = torchrun("train.out=run", restarts=1)
    wait_until(lambda: last_logged_step(folder) > CHECKPOINT_EVERY)
    workers, begun = running.workers(), time.monotonic()
    os.kill(workers[2], signal.SIGSTOP)
    wait_until(lambda: running.errors())
    assert TIMEOUT <= time.monotonic() - begun < TIMEOUT + 20
    os.kill(workers[2], signal.SIGKILL)  # torchrun would, after half a minute
    timeout_error = rf"error: rank \d: step \d+: .*\b{TIMEOUT:g} s\b.*\brank 2"
    assert re.fullmatch(timeout_error, running.errors()[0])
    assert re.search(r"unite_fast/training/trainer.py\", line \d+, in run\n", running.printed()), "no stack trace"

    step_before = last_logged_step(folder)
    wait_until(lambda: last_logged_step(folder) > step_before)
    os.kill(running.pid, signal.SIGTERM)
    wait_until(running.ended)
    assert running.status == 1, "torchrun's own status, whatever its workers return"
    step = load_checkpoint(folder).step
    assert read_status(folder) == f"stopped at step {step} by SIGTERM"
    assert step > step_before

    running = torchrun("train.out=run", f"train.steps={step + 3}", "--resume")
    wait_until(running.ended)
    assert running.status == 0, running.printed()
    assert read_status(folder) == f"finished at step {step + 3}"
    assert_same_run(folder, undisturbed(step + 3))


def test_if_torchrun_is_killed_its_ranks_save_and_end(torchrun, undisturbed, wait_until, assert_same_run, tmp_path):
    folder = tmp_path / "run"
    running = torchrun("train.out=run")
    wait_until(lambda: last_logged_step(folder) > CHECKPOINT_EVERY)
    workers = running.workers()
    os.kill(running.pid, signal.SIGKILL)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    step = load_checkpoint(folder).step
    assert re.match(
        rf"stopped at step {step} by .*torchrun of rank \d; was running under torchrun ", read_status(folder)
    )
    (line,) = running.errors()
    assert re.match(rf"error: step {step}: torchrun of rank \d\b", line)

    running = torchrun("train.out=run", f"train.steps={step + 3}", "--resume")
    wait_until(running.ended)
    assert running.status == 0, running.printed()
    assert_same_run(folder, undisturbed(step + 3))


def test_a_user_error_is_printed_once_per_machine_and_ends_torchrun(torchrun, wait_until, mentions):
    running = torchrun("train.bacth_size=8", restarts=1)
    wait_until(running.ended)
    assert running.status == 1
    # A restart would find the same mistake, so there is none.
    (error,) = running.errors()
    assert re.match(mentions("rank 0", "train.bacth_size", "batch_size"), error)


def test_a_restart_does_not_resume_an_earlier_run(torchrun, undisturbed, wait_until, mentions):
    folder = undisturbed(3)
    running = torchrun("train.out=undisturbed", restarts=1)
    wait_until(running.ended)
    assert running.status == 1
    (error,) = running.errors()
    assert re.search(mentions("rank 0", "undisturbed", "--resume"), error)
    assert last_logged_step(folder) == 3
