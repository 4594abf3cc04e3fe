"""What lets a run outlive its processes: signals that ask it to stop, processes that die or hang, restarts.

Whoever starts the run again learns how it ended from two things. The exit status: 0 (done; under torchrun also:
stopped by a signal, all saved), 128 + signal (the same without torchrun), 2 (a mistake that a restart will not mend),
`TEMPORARY` and `HUNG` (try again). And the run folder's file `status`, since torchrun makes 1 of every failure:
`finished at step N`, `stopped at step N by SIGTERM`, or still `running`.
"""

import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.distributed import distributed_c10d

from unite_fast.errors import UserError
from unite_fast.utils.files import writing_aside

TEMPORARY = 75
"""Exit status of a process that lost contact with another: sysexits.h's "try again later"."""
HUNG = 124
"""Exit status of a process that made no progress: that of timeout(1)."""
PATIENCE = 10
"""How many times the ordinary limit a start, a compilation, a checkpoint, drawing or an evaluation may take."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Ask a run to save and end; Slurm sends the last one before a job's time is over."""
ROLL_CALL = 3.0
"""Seconds that processes have to answer after a contact broke. torchrun kills after 30."""


class LostContact(UserError):
    """Another process of the run is gone, or does not answer; no mistake, and a restart goes on."""

    status = TEMPORARY


class Peers:
    """The processes of a run, and three ways to them besides those of training: collective operations on the CPU; a
    line to the next rank, which breaks when that dies; torchrun's store, which works when the others do not."""

    def __init__(self, rank: int = 0, world: int = 1):
        """All processes call this together, after `init_process_group`."""
        self.rank, self.world = rank, world
        self.group = self.line = self.store = None
        if world > 1:
            # Who waits too long is for the watchdog to say.
            self.group, self.line = (distributed.new_group(backend="gloo", timeout=timedelta(days=1000)) for _ in "12")
            # A connection of its own: the main thread may hang in a request on the other.
            self.store = distributed_c10d._get_default_store().clone()

    def largest(self, number: int) -> "Vote":
        """Begin to find the largest of the numbers that the processes give; none waits for it here."""
        return Vote(number, self.group)

    def wait_for_next(self) -> None:
        """Until the next rank hangs up.

        Raises:
            RuntimeError: it died.
        """
        distributed.recv(torch.zeros(1), (self.rank + 1) % self.world, self.line)

    def hang_up(self) -> None:
        distributed.send(torch.zeros(1), (self.rank - 1) % self.world, self.line)

    def call_roll(self) -> None:
        """Let all processes know that contact broke."""
        with suppress(RuntimeError):  # the store is gone as well
            self.store.set("roll call", "")

    def called(self) -> bool:
        """Whether there is a roll call, and if so answer it."""
        with suppress(RuntimeError):
            if self.store.check(["roll call"]):
                self.store.set(f"alive/{self.rank}", "")
                return True
        return False

    def silent(self) -> list[int]:
        """Ranks that do not answer a roll call within a few seconds: gone, or frozen."""
        missing: list[int] = []
        # In a thread of its own, because a store whose machine is gone answers nothing at all.
        counting = threading.Thread(target=self._count, args=(missing,), daemon=True)
        counting.start()
        counting.join(2 * ROLL_CALL)
        return missing

    def _count(self, missing: list[int]) -> None:
        keys = {f"alive/{rank}": rank for rank in range(self.world)}
        self.call_roll()
        end = time.monotonic() + ROLL_CALL
        with suppress(RuntimeError):
            while time.monotonic() < end and not self.store.check(list(keys)):
                time.sleep(0.05)
            missing += [rank for key, rank in keys.items() if not self.store.check([key])]


class Vote:
    """The largest of a number of each process, found while they do other things. On the CPU: no device waits."""

    def __init__(self, number: int, group: distributed.ProcessGroup | None):
        self.number = torch.tensor([number])
        self.work = None
        if group is not None:
            self.work = distributed.all_reduce(self.number, distributed.ReduceOp.MAX, group, async_op=True)

    def result(self) -> int:
        if self.work is not None:
            self.work.wait()
        return int(self.number)


class Stop:
    """Whether the processes of a run should end after this step: a signal came to one of them, and all know it."""

    def __init__(self, peers: Peers):
        self.peers = peers
        self.received: list[int] = []
        """Signals that came to this process."""
        self.vote: Vote | None = None

    def agreed(self) -> int:
        """The signal to stop for, 0 if there is none. All processes ask once a step and get the same answer; it takes
        one step, so that nobody waits for it."""
        wanted = self.finish()
        if not wanted:
            self.vote = self.peers.largest(self.received[0] if self.received else 0)
            if self.peers.world == 1:
                wanted = self.finish()
        return wanted

    def finish(self) -> int:
        """The answer to what was asked last, so that no process leaves while others still wait for its."""
        vote, self.vote = self.vote, None
        return vote.result() if vote else 0


@contextmanager
def stop_on_signals(peers: Peers) -> Iterator[Stop]:
    """Inside, SIGTERM, SIGINT and SIGUSR1 are remembered, so that the loop can end between two steps.

    A second one of the same kind acts as it would without us. Not under torchrun: its processes get what is sent to all
    of a job a second time from torchrun, which kills them by itself after a while (TORCH_ELASTIC_SHUTDOWN_TIMEOUT).
    """
    stop = Stop(peers)

    def remember(number, _frame):
        stop.received.append(number)
        if not under_torchrun():
            signal.signal(number, before[number])

    before = {number: signal.signal(number, remember) for number in SIGNALS}
    try:
        yield stop
        stop.finish()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Watchdog:
    """Threads that end this process when it cannot go on: it makes no progress (a collective operation that another
    process does not join, a disk or a data loader that hangs), or another process died and this one does not notice
    (it waits for its device). Used as a context manager; outside, it only takes notes.

    It depends on no backend's timeouts, and says what the process was doing. It also asks a process to stop whose
    torchrun was killed: nobody would.
    """

    def __init__(self, peers: Peers, timeout: float, step: int = 0):
        """
        Args:
            timeout: seconds between two beats after which the process ends.
        """
        self.peers, self.timeout = peers, timeout
        self.beat(step, "starting", patient=True)
        self.ended = threading.Event()
        self.parent = os.getppid() if under_torchrun() else None

    def beat(self, step: int, doing: str, patient: bool = False) -> None:
        """A sign of life.

        Args:
            doing: what comes next, to be said if it never ends: "reading images".
            patient: it may take `PATIENCE` times as long.
        """
        self.step, self.doing = step, doing
        self.limit = self.timeout * (PATIENCE if patient else 1)
        self.last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.main = threading.get_ident()
        jobs = [self._watch_progress]
        if self.peers.world > 1:
            jobs += [self._watch_next, self._listen]
        self.threads = [threading.Thread(target=job, daemon=True) for job in jobs]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, kind, *_):
        self.ended.set()
        if kind is None:
            if self.peers.world > 1:
                self.peers.hang_up()
            for thread in self.threads:
                thread.join()

    def _watch_progress(self) -> None:
        while not self.ended.wait(min(1.0, self.timeout / 10)):
            if time.monotonic() - self.last > self.limit:
                stack = "".join(traceback.format_stack(sys._current_frames()[self.main]))
                silent = self.peers.silent() if self.peers.world > 1 else []
                answer = f"; no answer from {named(silent)}" if silent else ""
                self._end(f"no progress for {self.limit:g} s while {self.doing}{answer}\n{stack}", HUNG)
            if self.parent and os.getppid() != self.parent:
                self.parent = None
                os.kill(os.getpid(), signal.SIGTERM)

    def _watch_next(self) -> None:
        try:
            self.peers.wait_for_next()
        except RuntimeError:
            if not self.ended.is_set():
                self.peers.call_roll()

    def _listen(self) -> None:
        while not self.peers.called():
            if self.ended.wait(ROLL_CALL / 6):
                return
        silent = self.peers.silent()
        # The main thread may find out by itself (see `contact`), or the one that watches progress may.
        if not self.ended.wait(ROLL_CALL):
            self._end(f"lost contact with {named(silent)} while {self.doing}", TEMPORARY)

    def _end(self, what: str, status: int) -> None:
        if not self.ended.is_set():
            rank = f"rank {self.peers.rank}: " if self.peers.world > 1 else ""
            # In one piece, or it would mix with what other processes write.
            sys.stderr.write(f"error: {rank}step {self.step}: {what.rstrip()}\n")
            sys.stderr.flush()
            os._exit(status)


@contextmanager
def contact(watchdog: Watchdog) -> Iterator[None]:
    """What PyTorch raises inside when another process is gone becomes one line that names step and process.

    Raises:
        LostContact
    """
    try:
        yield
    except RuntimeError as error:
        if watchdog.peers.world == 1 or not broken(error):
            raise
        who = named(watchdog.peers.silent())
        raise LostContact(f"step {watchdog.step}: lost contact with {who} while {watchdog.doing}") from error


def broken(error: RuntimeError) -> bool:
    """Whether a collective operation failed for want of the other processes. Gloo raises bare RuntimeErrors, which name
    its source files."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def named(ranks: list[int]) -> str:
    if not ranks:
        return "another process"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def exit_status(stopped_by: int) -> int:
    """Of a process that ended as it should, perhaps because of a signal. torchrun would take anything but 0 for a
    failure, and start the processes again."""
    return 128 + stopped_by if stopped_by and not under_torchrun() else 0


def fresh_store(timeout: float) -> tuple[distributed.Store, int, int]:
    """The store through which the processes of one start find each other, with rank and number of processes, from the
    environment variables that torchrun sets.

    torchrun 2.13 keeps one store over its restarts, and the addresses of processes that died stand in it still
    (https://github.com/pytorch/pytorch/issues/135712): a restarted group would wait for them for ever. So the keys of
    each start have a prefix of their own.

    Args:
        timeout: seconds that a process waits for the others.

    Raises:
        LostContact: they did not come.
    """
    world = int(os.environ["WORLD_SIZE"])
    try:
        store, rank, world = next(distributed.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        return distributed.PrefixStore(_name_of_start(store, rank, world, timeout), store), rank, world
    except (distributed.DistError, TimeoutError) as error:
        raise LostContact(f"not all {world} processes came to the start within {timeout:g} s") from error


def _name_of_start(store: distributed.Store, rank: int, world: int, timeout: float) -> str:
    """A name on which the processes agree, although the store may hold what others wrote in a start before. torchrun's
    count of restarts does not serve: each machine has its own.

    Each writes a new number. Rank 0 proposes the numbers that it finds; each confirms a proposal with its own number in
    it; what all have confirmed holds. A proposal with a number of a process that is gone never gets as far.
    """
    mine = secrets.token_hex(8)
    store.set(f"start/{rank}", mine)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if rank == 0:
            store.set("start/proposal", ",".join(store.get(f"start/{other}").decode() for other in range(world)))
        proposal = store.get("start/proposal").decode()
        if mine in proposal:
            store.set(f"start/confirmed/{rank}", proposal)
            if rank == 0 and all(_is(store, f"start/confirmed/{other}", proposal) for other in range(world)):
                store.set("start/held", proposal)
            if _is(store, "start/held", proposal):
                return f"start {proposal.partition(',')[0]}"
        time.sleep(0.05)
    raise TimeoutError


def _is(store: distributed.Store, key: str, value: str) -> bool:
    return store.check([key]) and store.get(key).decode() == value


def launch_name() -> str:
    """Tells this start by torchrun, its restarts included, from others."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    # What torchrun calls it where nobody chose a name.
    return f"{socket.gethostname()}-{os.getppid()}" if name == "none" else name


def restarted(folder: Path, peers: Peers) -> bool:
    """Whether torchrun started these processes again, to go on with what they began. Not so if they never came as far
    as that, say because the folder holds another run."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    # Each machine's torchrun counts for itself, and not all of them see the folder's last change at once.
    return bool(peers.largest(again).result() and peers.largest(read_status(folder) == running()).result())


def running() -> str:
    """A run's status until it has ended."""
    return f"running under torchrun {launch_name()}" if under_torchrun() else "running"


def ended(step: int, stopped_by: int) -> str:
    """A run's status from then on."""
    return f"stopped at step {step} by {signal.Signals(stopped_by).name}" if stopped_by else f"finished at step {step}"


def read_status(folder: Path) -> str:
    path = folder / "status"
    return path.read_text().strip() if path.exists() else ""


def write_status(folder: Path, status: str) -> None:
    with writing_aside(folder / "status") as partial:
        partial.write_text(status + "\n")
