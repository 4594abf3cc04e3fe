"""`unite-fast check-cluster`: the parts in order, and what rank 0 makes of them."""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from unite_fast.cluster_check import clock, network, report, shared_folder
from unite_fast.cluster_check.addresses import addresses_in_use
from unite_fast.cluster_check.coordinator import Coordinator, Outcome, open_store
from unite_fast.cluster_check.findings import all_findings, part_findings
from unite_fast.cluster_check.host import host_facts, rank_facts
from unite_fast.cluster_check.rates import LOADER_SECONDS, disk_rates, loader_rate
from unite_fast.cluster_check.records import Cluster, Finding, Host
from unite_fast.config import Config
from unite_fast.distributed.environment import restart_count
from unite_fast.distributed.launch import ranks_of_torchrun
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import UserError, require
from unite_fast.planning.memory import training_state
from unite_fast.training.run_folder import choose_folder
from unite_fast.utils.files import check_target, home_path, save_text

TOTAL = 70.0
"""Seconds for all parts; one that hangs takes all of its own."""
LIMITS = {"facts": 10.0, "folder": 22.0, "clocks": 8.0, "join": 20.0, "network": 25.0, "disk": 12.0, "loader": 20.0}
"""Seconds for each part. Usually the whole check takes half a minute."""
MEETING = 30.0
"""Seconds to wait for all processes at the start."""
LATE_IS_NO_ERROR = ("loader",)
"""Opening millions of files may take minutes, and is no fault."""


def check_cluster(config: Config, folder: str = "", out: Path | None = None) -> int:
    """Check hosts, network and folder, and print the result on rank 0. All ranks call this.

    Args:
        folder: instead of the run folder of the settings.
        out: a JSON file for all facts.

    Returns:
        Exit status, the same on all ranks: 0, or 2 if there is an error.

    Raises:
        UserError: ranks do not meet; wrong settings.
    """
    # The flags of a training ask torchrun for restarts. A second check would find the same.
    require(restart_count() == 0, "the check failed, see above; torchrun starts it again because of --max-restarts")
    if out is not None:
        check_target(out, (".json",))
    run_folder = home_path(folder) if folder else choose_folder(config)
    check = _Check(config, run_folder, Ranks.from_environment())
    status = check.run(out)
    check.leave(status)
    return status


class _Check:
    """The state of a check on this rank."""

    def __init__(self, config: Config, folder: Path, ranks: Ranks):
        self.config, self.folder, self.ranks = config, folder, ranks
        self.store = open_store(ranks, MEETING)
        self.coordinator = Coordinator(ranks, self.store, TOTAL)
        self.results: dict[str, dict[int, Outcome]] = {}
        self.stack = ExitStack()
        self.made: list[Path] = []
        self.device = torch.device("cpu")

    def part(self, name: str, work: Callable[[], Any], needs: tuple[str, ...] = ()) -> dict[int, Any]:
        """Run a part on all ranks. Returns the values of those that succeeded, on rank 0."""
        outcomes = self.coordinator.run(name, work, LIMITS[name], needs)
        self.results[name] = outcomes
        return {rank: outcome.value for rank, outcome in outcomes.items() if outcome.ok}

    def run(self, out: Path | None) -> int:
        begun = time.monotonic()
        facts = self.part("facts", self._facts)
        # What all ranks must know of the others.
        plan = self.coordinator.broadcast("plan", self._plan(facts))
        self.leaders, problem = plan["leaders"], plan["problem"]
        self.leads = self.ranks.rank in self.leaders
        folders = self.part("folder", self._folder)
        clocks = self.part("clocks", self._clock)
        self.part("join", lambda: self._join(plan["device"], problem), ("facts",))
        networks = self.part("network", self._network, ("join",))
        disks = self.part("disk", self._disk)
        loaders = self.part("loader", self._loader)
        if self.ranks.main:
            shared_folder.remove_made(self.made)
            hosts = self._hosts(facts)
            for host in hosts:
                first = host.ranks[0]
                host.folder, host.clock = folders.get(first) or {}, clocks.get(first) or {}
                host.disk = disks.get(first) or {}
                host.used = (networks.get(first) or {}).get("used", [])
                host.link = (networks.get(0) or {}).get("links", {}).get(str(first), {})
                host.loaders = [loaders[rank] for rank in host.ranks if loaders.get(rank)]
            status = self._report(hosts, networks.get(0) or {}, plan, out, time.monotonic() - begun)
        return self.coordinator.broadcast("status", status if self.ranks.main else None)

    def _facts(self) -> dict:
        facts = rank_facts(self.config.train.device) | {"leader": self.ranks.rank - self.ranks.local_rank}
        return facts | ({"facts": host_facts()} if not self.ranks.local_rank else {})

    def _plan(self, facts: dict[int, dict]) -> dict:
        """From the facts of all ranks: the first rank of each host, the device, and why the ranks cannot join."""
        kinds = {one["device"] for one in facts.values()} - {""}
        errors = [one["device_error"] for one in facts.values() if one["device_error"]]
        problem = "the ranks have different devices" if len(kinds) > 1 else (errors[0] if errors else "")
        leaders = sorted({one["leader"] for one in facts.values()} & facts.keys())
        return {"leaders": leaders, "problem": problem, "device": min(kinds, default="cpu")}

    def _guests(self) -> list[int]:
        return [rank for rank in self.leaders if rank and rank not in self.coordinator.absent]

    def _folder(self) -> dict | None:
        patience = LIMITS["folder"] / 2
        if self.ranks.main:
            self.made = shared_folder.make_folder(self.folder)
            return shared_folder.serve(self.folder, self.store, self._guests(), patience)
        if not self.leads or self.store is None:
            return None
        return shared_folder.visit(self.folder, self.store, self.ranks.rank, patience)

    def _clock(self) -> dict | None:
        if self.store is None or not self.leads:
            return None
        if self.ranks.main:
            return clock.serve_time(self.store, self._guests(), LIMITS["clocks"] / 2)
        return clock.measure_offset(self.store, self.ranks.rank, LIMITS["clocks"] - 1)

    def _join(self, kind: str, problem: str) -> None:
        require(not problem, problem)
        require(not self.coordinator.absent, "not all processes answer")
        # In the thread of this part: it lasts as long as the process.
        joined = self.stack.enter_context(ranks_of_torchrun(torch.device(kind)))
        self.device = torch.device(kind, self.ranks.local_rank) if kind == "cuda" else torch.device(kind)
        joined.wait()

    def _network(self) -> dict | None:
        if self.ranks.world == 1:
            return None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # it holds for one thread
        all_reduce = network.all_reduce_by_size(self.ranks, self.device, network.SIZES)
        links = network.link_speeds(self.ranks, self.leaders, self.device, LIMITS["network"] / 3)
        used = addresses_in_use(int(os.environ["MASTER_PORT"])) if self.leads else []
        return {"all_reduce": all_reduce, "links": {str(rank): link for rank, link in links.items()}, "used": used}

    def _disk(self) -> dict | None:
        # A host that does not share the folder may lack it, which is an error already.
        return disk_rates(self.folder) if self.leads and self.folder.is_dir() else None

    def _loader(self) -> dict:
        return loader_rate(self.config, self.ranks, self.device, LOADER_SECONDS)

    def _hosts(self, facts: dict[int, dict]) -> list[Host]:
        """The hosts of the ranks whose facts are known, rank 0's first."""
        hosts = []
        for leader in sorted({one["leader"] for one in facts.values()}):
            ranks = [rank for rank, one in facts.items() if one["leader"] == leader]
            name = facts[ranks[0]]["host"]
            others = any(one["host"] == name and one["leader"] != leader for one in facts.values())
            label = f"{name} (rank {leader})" if others else name
            hosts.append(Host(label, ranks, facts.get(leader, {}).get("facts", {}), [facts[rank] for rank in ranks]))
        return hosts

    def _report(self, hosts: list[Host], measured: dict, plan: dict, out: Path | None, seconds: float) -> int:
        state = training_state(self.config.model)
        cluster = Cluster(
            hosts,
            self.config.name,
            str(self.folder),
            {"cuda": "NCCL", "cpu": "gloo"}[plan["device"]] if self.ranks.world > 1 else plan["device"],
            state.gradients,
            state.total - state.gradients,
            joined="join" not in self.coordinator.failed,
            all_reduce=measured.get("all_reduce", []),
        )
        findings = [*self._part_findings(hosts), *all_findings(cluster)]
        status = UserError.status if any(finding.kind == "error" for finding in findings) else 0
        print("\n".join(report.lines(cluster, findings)) + f", after {seconds:.0f} s", flush=True)
        if out is not None:
            save_text(json.dumps(report.as_json(cluster, findings, status), indent=1) + "\n", out)
        return status

    def _part_findings(self, hosts: list[Host]) -> list[Finding]:
        labels = {rank: host.label for host in hosts for rank in host.ranks}
        several = self.ranks.world > len(hosts)
        named = {rank: f"rank {rank} on {label}" if several else label for rank, label in labels.items()}
        found = [
            Finding("error", f"{named.get(rank, f'rank {rank}')} does not answer, since the part {part}")
            for rank, part in self.coordinator.absent.items()
        ]
        for part, outcomes in self.results.items():
            words = {named.get(rank, f"rank {rank}"): outcome for rank, outcome in outcomes.items()}
            found += part_findings(part, words, part in LATE_IS_NO_ERROR)
        return found

    def leave(self, status: int) -> None:
        """Leave the process group, or end the process at once if something hangs in it."""
        sys.stdout.flush()
        self.coordinator.leave()
        stuck = self.coordinator.late or self.coordinator.absent
        if stuck or (self.ranks.world > 1 and {"join", "network"} & self.coordinator.failed):
            os._exit(status)
        self.stack.close()
