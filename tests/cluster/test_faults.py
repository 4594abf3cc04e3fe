"""Faults of a cluster: a worker, torchrun, the head or the network of a host fails while the job starts, joins, trains,
saves, evaluates or generates. Each test checks that the survivors name the host, that the job goes on by the
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
from pathlib import Path

import pytest

import unite_fast
from unite_fast.distributed.peers import HEARTBEAT

pytestmark = pytest.mark.timeout(1800)
STEPS = 60
"""Of the jobs; see conftest.py."""
PHASES = ("starting", "joining", "step", "checkpoint", "evaluation")
"""While starting, a process has not yet told that it is there; while joining it has, and loads its settings."""
NAMED_WITHIN = 30.0
"""Seconds in which a dead host must be named, on an idle machine."""
CUT_OFF = 100.0
"""Seconds in which torchrun must end on a host that lost the head."""
PATIENCE = 3
"""Factor on these for a busy one."""
TRAINER = Path(unite_fast.__file__).parent / "training" / "trainer.py"
"""Imported after a process has told that it is there."""
TIMEOUT = 60.0
"""parallel.timeout of the jobs; see conftest.py."""


class Fault:
    """A fault of host 2, in a job of hosts 1 and 2, and what a user does about it."""

    host, others = 2, (1,)

    def __init__(self, job, row: dict):
        self.job, self.row = job, row

    def happen(self) -> None:
        raise NotImplementedError

    def repair(self) -> None:
        """Bring the job back as the documents say, once the old ranks have ended."""


class WorkerDies(Fault):
    """torchrun starts all ranks again."""

    def happen(self) -> None:
        self.job.kill(self.job.hosts.ranks(self.host).values())


class AgentDies(Fault):
    """torchrun is killed, for example for memory. All ranks save and end. The other torchrun waits for its return."""

    def happen(self) -> None:
        self.job.kill(self.job.hosts.agents(self.host))

    def repair(self) -> None:
        self.row["status"] = self.job.status()
        self.job.start(self.host)


class HeadAgentDies(AgentDies):
    """Without the torchrun that holds the meeting place the others end too, and all start again."""

    host, others = 1, (2,)

    def repair(self) -> None:
        self.row["status"] = self.job.status()
        self.row["torchrun ended"] = round(self.job.wait(lambda: self.job.ended(2), "the end of the other torchrun"), 1)
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
    """The other torchrun is ended, as it cannot go on. Another host takes the name, and all torchruns start again."""

    host, others = 1, (2,)

    def happen(self) -> None:
        self.job.hosts.power_off(1)

    def repair(self) -> None:
        job = self.job
        seconds = job.wait(lambda: job.ended(2), "the end of the other torchrun")
        self.row["torchrun ended"] = round(seconds, 1)
        assert seconds < PATIENCE * CUT_OFF and not job.hosts.processes(2)
        job.start(job.hosts.add("node1"), 2)


FAULTS = {
    "worker": WorkerDies,
    "agent": AgentDies,
    "head-agent": HeadAgentDies,
    "link": LinkIsCut,
    "power": PowerFails,
    "head": HeadLosesPower,
}
CASES = [
    (fault, phase) for fault in FAULTS for phase in PHASES if fault not in ("power", "head-agent") or phase == "step"
]


def reach_phase(job, phase: str, held: Path) -> list[int]:
    """Start the job on hosts 1 and 2, and wait until it is in this phase. Returns the processes that were stopped to
    keep it there.

    Args:
        held: a new file, for the phase joining. There host 2 does not get beyond its first imports.
    """
    if phase == "joining":
        held.with_suffix(".py").write_text(f"import time\nopen({str(held)!r}, 'w').close()\ntime.sleep(1e6)\n")
        job.hosts.mount_file(2, held.with_suffix(".py"), TRAINER)
    job.start(1, 2)
    job.wait(lambda: len(job.ranks()) == 2, "the ranks")
    if phase == "joining":
        job.wait(held.exists, "rank 1 while it joins")
        job.hosts.unmount(2, TRAINER)
        time.sleep(3 * HEARTBEAT)
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
    make_hosts, make_job, undisturbed, assert_same_run, table, tmp_path, kind, phase
):
    job = make_job(make_hosts(2, debian_names=kind == "power"))
    stopped = reach_phase(job, phase, tmp_path / "held")
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
    last = job.commands[-2:] if kind.startswith("head") else [job.commands[0], job.commands[-1]]
    job.wait(lambda: all(command.ended() for command in last), "the end of torchrun")
    row["statuses"] = [command.status for command in last]
    assert row["statuses"] == [0, 0], job.printed()
    # torchrun ends all processes within a second of another one's death, before they can name it, unless they train.
    if kind != "worker" or phase in ("step", "checkpoint", "evaluation"):
        assert row["named"] != "-", job.printed()
        # A process that vanishes before it has told that it is there is waited for: parallel.timeout.
        assert row["named"] < PATIENCE * NAMED_WITHIN + TIMEOUT * (phase == "starting")


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
