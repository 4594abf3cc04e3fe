"""Faults of a cluster: a worker, torchrun, the head or the network of a host fails while the job joins, computes a step,
saves, evaluates or generates. Each test checks that the survivors name the host, that the job goes on by the documented
commands, and that the final weights equal an undisturbed run's.

The hosts are namespaces of this machine (hosts.py); each runs the real torchrun. They need root, iproute2 and
util-linux; without them all is skipped.

    pytest tests/cluster                                      one fault and one difference, a minute and a half
    pytest tests/cluster --cluster --cluster-table=FILE       all, an hour on two cores; prints a table of seconds
    pytest tests/cluster --cluster -k "link and checkpoint"   one of them

What is measured, from the fault on: until a survivor names the host, until all old ranks on reachable hosts have ended,
and until the next new row of the metrics, with the commands of a user who reacts at once.
"""

import re
import signal
import time
from dataclasses import dataclass, field

import pytest

pytestmark = pytest.mark.timeout(1800)
PHASES = ("joining", "step", "checkpoint", "evaluation")
NAMED_WITHIN = 30.0
"""Seconds in which a dead host must be named, on an idle machine."""
PATIENCE = 3
"""Factor on it for a busy one."""


@dataclass
class Fault:
    """A fault of a host, and what a user does about it.

    Args:
        host: on which it happens; with a run on hosts 1 and 2.
    """

    job: object
    host: int
    begun: float = 0.0
    old: dict[int, int] = field(default_factory=dict)
    """Process ids of the ranks before the fault."""

    def happen(self) -> None:
        raise NotImplementedError

    def repair(self, jobs) -> None:
        """Bring the job back as the documents say; returns at once if torchrun does it alone."""

    def reachable(self) -> tuple[int, ...]:
        return (1, 2)


class WorkerDies(Fault):
    def happen(self) -> None:
        (pid,) = self.job.hosts.ranks(self.host).values()
        jobs_send([pid], signal.SIGKILL)


class AgentDies(Fault):
    """torchrun is killed, for example for memory. Started again, it joins the others."""

    def happen(self) -> None:
        jobs_send(self.job.hosts.agents(self.host), signal.SIGKILL)

    def repair(self, jobs) -> None:
        jobs.wait_for(lambda: not self.job.hosts.processes(self.host), "the end of the orphans", self.job)
        self.job.start(self.host)


class LinkIsCut(Fault):
    """For good. Another host takes the place."""

    def happen(self) -> None:
        self.job.hosts.link(self.host, up=False)

    def repair(self, jobs) -> None:
        self.job.start(self.job.hosts.add())

    def reachable(self) -> tuple[int, ...]:
        return tuple({1, 2} - {self.host})


class HeadLosesPower(Fault):
    """Another host takes its name, and all torchruns are started again."""

    def happen(self) -> None:
        self.job.hosts.power_off(1)

    def repair(self, jobs) -> None:
        self.torchrun_ended = jobs.wait_for(lambda: self.job.ended(2), "the end of torchrun on host 2", self.job)
        self.job.start(self.job.hosts.add("node1"), 2)

    def reachable(self) -> tuple[int, ...]:
        return (2,)


def jobs_send(pids: list[int], number: int) -> None:
    import os

    for pid in pids:
        os.kill(pid, number)


FAULTS = {
    "worker": lambda job: WorkerDies(job, 2),
    "agent": lambda job: AgentDies(job, 2),
    "link": lambda job: LinkIsCut(job, 2),
    "head": lambda job: HeadLosesPower(job, 1),
}


def reach_phase(job, phase: str, jobs) -> list[int]:
    """Wait until the job is in this phase. Returns processes that are stopped to keep it there."""
    jobs.wait_for(lambda: len(job.ranks()) == 2, "the ranks", job)
    if phase == "joining":
        return []
    if phase == "step":
        jobs.wait_for(lambda: job.step() >= 13, "step 13", job)
    if phase == "evaluation":
        jobs.wait_for(lambda: job.step() and job.step() % 20 == 0, "step 20", job, pause=0.002)
    if phase == "checkpoint":
        main = job.ranks()[0]
        partial = lambda: list(job.folder.glob("checkpoints/step_*.partial"))  # noqa: E731
        for _ in range(5):
            jobs.wait_for(partial, "a checkpoint that is being saved", job, pause=0.0005)
            jobs_send([main], signal.SIGSTOP)
            if partial():
                return [main]
            jobs_send([main], signal.SIGCONT)
        raise AssertionError("no save lasted long enough")
    return []


def names(host: str) -> re.Pattern:
    """A line of unite_fast that says that this host, or a rank on it, is the problem."""
    return re.compile(rf"error: .*\b{host}\b")


def disturb(job, fault: Fault, stopped: list[int], jobs, row: dict) -> None:
    """Let the fault happen, wait for what follows, and repair it. Fills in the row's seconds."""
    hosts = job.hosts
    fault.old, name = job.ranks(), hosts[fault.host].name
    before = {number: len(job.printed(number)) for number in (1, 2)}
    fault.begun = time.monotonic()
    fault.happen()
    jobs_send(jobs.alive(stopped), signal.SIGCONT)
    others = [number for number in fault.reachable() if number != fault.host]
    watched = [pid for rank, pid in fault.old.items() if rank_is_on(job, rank, fault, pid)]

    def named() -> str:
        for number in others:
            for line in job.printed(number)[before[number] :].splitlines():
                if names(name).search(line):
                    return line
        return ""

    def since() -> float:
        return round(time.monotonic() - fault.begun, 1)

    def over() -> bool:
        return not jobs.alive(watched)

    # In a joining job, torchrun may restart the others before they know.
    jobs.wait_for(lambda: named() or over(), f"{name} named, or the end of the others", job)
    if not named():
        time.sleep(1)
    row["named"], row["line"] = (since(), named()) if named() else ("never", "")
    jobs.wait_for(over, "the end of the old ranks", job)
    row["ended"] = since()
    fault.repair(jobs)
    row["repaired"] = since()
    jobs.wait_for(lambda: set(job.ranks().values()) - set(fault.old.values()), "new ranks", job)
    new_from = job.step()
    jobs.wait_for(lambda: is_new(job, new_from), "a new row", job)
    row["trains again"] = since()


def rank_is_on(job, rank: int, fault: Fault, pid: int) -> bool:
    return any(job.hosts.ranks(number).get(rank) == pid for number in fault.reachable()) or fault.host in fault.reachable()


def is_new(job, step: int) -> bool:
    """Whether the metrics have a later row than `step`, or were cut and written again."""
    now = job.step()
    return now > step or "finished" in job.status()


CASES = [(fault, phase) for fault in FAULTS for phase in PHASES]


@pytest.mark.long
@pytest.mark.parametrize(("kind", "phase"), CASES, ids=[f"{fault}-{phase}" for fault, phase in CASES])
def test_a_fault_is_named_and_the_run_ends_as_if_undisturbed(
    make_hosts, make_job, jobs, undisturbed, assert_same_run, table, kind, phase
):
    hosts = make_hosts(2)
    job = make_job(hosts)
    job.start(1, 2)
    stopped = reach_phase(job, phase, jobs)
    row = {"fault": kind, "phase": phase}
    table.append(row)
    fault = FAULTS[kind](job)
    row["at step"] = job.step()
    disturb(job, fault, stopped, jobs, row)
    jobs.wait_for(lambda: job.status() == "finished at step 60", "the end of the training", job)
    new = [command for command in job.commands if not command.ended() and command.host in fault.reachable()]
    assert_same_run(job.folder, undisturbed(2))
    row["same weights"] = "yes"
    if kind != "link":
        job.wait_until_ended()
    assert new is not None
    assert "Traceback" not in "\n".join(job.errors())
    if phase != "joining" and kind != "head":
        assert row["named"] != "never", job.printed()
        assert row["named"] < PATIENCE * NAMED_WITHIN
