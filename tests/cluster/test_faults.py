"""Faults of a cluster: a worker, torchrun, the head or the network of a host fails while the job joins, computes a
step, saves, evaluates or generates. Each test checks that the survivors name the host, that the job goes on by the
documented commands, and that the final weights equal an undisturbed run's.

The hosts are namespaces of this machine (hosts.py); each runs the real torchrun. They need root, iproute2 and
util-linux; without them all is skipped.

    pytest tests/cluster                                      hosts and one difference, half a minute
    pytest tests/cluster --cluster --cluster-table=FILE       all, an hour on two cores; prints a table of seconds
    pytest tests/cluster --cluster -k "link and checkpoint"   one of them

What is measured, from the fault on: until a survivor names the host, until all old ranks on reachable hosts have ended,
and until the next new row of the metrics, with the commands of a user who reacts at once.
"""

import contextlib
import re
import signal
import sys
import time
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.timeout(1800)
STEPS = 60
"""Of the jobs; see conftest.py."""
PHASES = ("joining", "step", "checkpoint", "evaluation")
NAMED_WITHIN = 30.0
"""Seconds in which a dead host must be named, on an idle machine."""
HUNG = 60.0
"""Seconds that torchrun has to end when its job is over or cannot go on."""
PATIENCE = 3
"""Factor on it for a busy one."""


class Fault:
    """A fault of host 2, in a job of hosts 1 and 2, and what a user does about it."""

    host, others = 2, (1,)

    def __init__(self, job, row: dict):
        self.job, self.row = job, row

    def happen(self) -> None:
        raise NotImplementedError

    def repair(self) -> None:
        """Bring the job back as the documents say, once the old ranks have ended."""

    def end_torchrun(self, host: int) -> None:
        """Wait until torchrun ended on a host, and end it if it does not."""
        job, begun = self.job, time.monotonic()
        while job.hosts.processes(host) and time.monotonic() - begun < HUNG:
            time.sleep(0.1)
        if job.hosts.processes(host):
            self.row["torchrun"] = f"on node{host} still there after {HUNG:g} s"
            job.kill(job.hosts.agents(host))
            job.wait(lambda: not job.hosts.processes(host), f"the end of all processes on host {host}")
        else:
            self.row["torchrun"] = f"on node{host} ended after {time.monotonic() - begun:.0f} s"


class WorkerDies(Fault):
    """torchrun starts all ranks again."""

    def happen(self) -> None:
        self.job.kill(self.job.hosts.ranks(self.host).values())


class AgentDies(Fault):
    """torchrun is killed, for example for memory. Its ranks save and stop, and with them all others. A rank that had
    not yet noticed its torchrun goes on without it."""

    def happen(self) -> None:
        self.job.kill(self.job.hosts.agents(self.host))

    def repair(self) -> None:
        self.row["note"] = self.job.status()
        self.end_torchrun(1)
        if not self.job.finished():
            self.job.start(1, 2)


class LinkIsCut(Fault):
    """For good. Another host takes the place."""

    def happen(self) -> None:
        self.job.hosts.link(self.host, up=False)

    def repair(self) -> None:
        self.job.start(self.job.hosts.add())


class PowerFails(LinkIsCut):
    def happen(self) -> None:
        self.job.hosts.power_off(self.host)


class HeadLosesPower(Fault):
    """Another host takes its name, and all torchruns are started again."""

    host, others = 1, (2,)

    def happen(self) -> None:
        self.job.hosts.power_off(1)

    def repair(self) -> None:
        self.end_torchrun(2)
        self.job.start(self.job.hosts.add("node1"), 2)


FAULTS = {"worker": WorkerDies, "agent": AgentDies, "link": LinkIsCut, "power": PowerFails, "head": HeadLosesPower}
CASES = [(fault, phase) for fault in FAULTS for phase in PHASES if fault != "power" or phase == "step"]


def reach_phase(job, phase: str) -> list[int]:
    """Wait until the job is in this phase. Returns the processes that were stopped to keep it there."""
    job.wait(lambda: len(job.ranks()) == 2, "the ranks")
    if phase == "step":
        job.wait(lambda: job.step() >= 13, "step 13")
    if phase == "evaluation":
        job.wait(lambda: job.step() == 20, "step 20", pause=0.002)
    if phase == "checkpoint":
        main = job.ranks()[0]
        for _ in range(STEPS // 10):
            job.wait(job.saving, "a checkpoint that is being saved", pause=0.0005)
            job.kill([main], signal.SIGSTOP)
            if job.saving():
                return [main]
            job.kill([main], signal.SIGCONT)
        raise AssertionError("no save lasted long enough")
    return []


def disturb(job, fault: Fault, stopped: list[int], row: dict, progress: Callable[[], int]) -> None:
    """Let the fault happen, wait for what follows, and repair it. Fills in the row's seconds.

    Args:
        progress: a number that grows once the job works again.
    """
    hosts, old, name = job.hosts, job.ranks(), job.hosts[fault.host].name
    survivors = [pid for number in fault.others for pid in hosts.ranks(number).values()]
    victims = [pid for pid in old.values() if pid not in survivors]
    lost = next(rank for rank, pid in old.items() if pid in victims)
    before, begun = len(job.printed(*fault.others)), time.monotonic()

    def since() -> float:
        return round(time.monotonic() - begun, 1)

    def named() -> str:
        lines = job.printed(*fault.others)[before:].splitlines()
        # Before they have joined, ranks do not know each other's hosts.
        who = rf"\b({name}|rank {lost})\b"
        return next((line for line in lines if re.search(rf"error: (rank \d+.*?: )?.*{who}", line)), "")

    fault.happen()
    job.kill(stopped, signal.SIGCONT)
    # torchrun may restart a joining job before its ranks know.
    job.wait(lambda: named() or not job.alive(survivors), f"{name} named, or the end of the others")
    row["named"] = since() if named() else "-"
    job.wait(lambda: not job.alive(survivors), "the end of the old ranks")
    row["ended"] = since()
    if job.alive(victims):
        job.wait(lambda: not job.alive(victims), "the end of the old ranks on the faulty host")
        row["ended there"] = since()
    fault.repair()
    row["repaired"] = since()
    if not job.finished():
        job.wait(lambda: set(job.ranks().values()) - set(old.values()), "new ranks")
        before = progress()
        job.wait(lambda: progress() > before, "progress")
        row["trains again"] = since()
    row["line"] = named()


@pytest.mark.long
def test_a_host_without_power_is_named(make_hosts, make_job, table):
    """On hosts with Debian's names. The other host's torchrun then waits for a replacement."""
    job = make_job(make_hosts(2, debian_names=True))
    job.start(1, 2)
    job.wait(lambda: job.step() >= 3, "step 3")
    row, survivor, begun = {"fault": "power", "phase": "step"}, job.ranks()[0], time.monotonic()
    table.append(row)
    job.hosts.power_off(2)
    job.wait(lambda: not job.alive([survivor]), "the end of the other host's rank")
    row["ended"], row["line"] = round(time.monotonic() - begun, 1), job.errors(1)[0]
    assert re.match(r"error: rank 0 on node1: step \d+: .*\brank 1 on node2\b", row["line"])
    assert len(job.errors(1)) == 1 and not job.ended(1)
    assert row["ended"] < PATIENCE * NAMED_WITHIN


@pytest.mark.long
@pytest.mark.parametrize(("kind", "phase"), CASES, ids=[f"{fault}-{phase}" for fault, phase in CASES])
def test_a_fault_is_named_and_the_run_ends_as_if_undisturbed(
    make_hosts, make_job, undisturbed, assert_same_run, table, kind, phase
):
    job = make_job(make_hosts(2, debian_names=kind == "power"))
    job.start(1, 2)
    stopped = reach_phase(job, phase)
    row = {"fault": kind, "phase": phase, "at step": job.step()}
    table.append(row)
    fault = FAULTS[kind](job, row)
    disturb(job, fault, stopped, row, job.rows_written)
    job.wait(job.finished, "the end of the training")
    assert_same_run(job.folder, undisturbed(2))
    row["same run"] = "yes"
    finish(job, kind, phase, row)


def finish(job, kind: str, phase: str, row: dict) -> None:
    """Wait for the torchruns that were started last, and check the seconds."""
    last = job.commands[-2:] if kind in ("head", "agent") else [job.commands[0], job.commands[-1]]
    job.wait(lambda: all(command.ended() for command in last), "the end of torchrun")
    row["statuses"] = [command.status for command in last]
    if (kind, phase) != ("agent", "joining"):
        assert row["statuses"] == [0, 0], job.printed()
    # torchrun ends a process that generates within a second of another one's death, before that is named.
    if phase != "joining" and kind != "agent" and (kind, phase) != ("worker", "generation"):
        assert row["named"] != "-", job.printed()
        assert row["named"] < PATIENCE * NAMED_WITHIN


@pytest.mark.long
@pytest.mark.parametrize("kind", ["worker", "agent", "link", "head"])
def test_a_fault_while_generating_loses_no_sample(make_hosts, make_job, undisturbed, ranks, table, tmp_path, kind):
    run, out, alone = undisturbed(2), tmp_path / "shared" / "out.npz", tmp_path / "alone.npz"
    arguments = ["generate", str(run), "--count", "6400", "--batch", "32", "--steps", "20", "--device", "cpu", "--out"]
    job = make_job(make_hosts(2))
    job.arguments = [*arguments, str(out)]
    parts = out.with_name("out.npz.parts")

    def written() -> int:
        return 10**6 if out.exists() else len(list(parts.glob("batch_*")))

    job.start(1, 2)
    job.wait(lambda: written() > 10, "ten batches")
    row = {"fault": kind, "phase": "generation", "at step": written()}
    table.append(row)
    fault = FAULTS[kind](job, row)
    disturb(job, fault, [], row, written)
    job.wait(out.exists, "the output")
    finish(job, kind, "generation", row)
    ranks(1, _generate_here, [*arguments, str(alone)])
    assert out.read_bytes() == alone.read_bytes()
    row["same run"] = "yes"


def _generate_here(arguments: list[str]) -> None:
    from unite_fast.cli import main

    sys.argv = ["unite-fast", *arguments]
    with contextlib.suppress(SystemExit):
        main()
