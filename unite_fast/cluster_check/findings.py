"""What is wrong with a cluster, from the facts that were measured: pure functions, one per topic."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from unite_fast.cluster_check.coordinator import Outcome
from unite_fast.cluster_check.records import Cluster, Finding, Host, duration
from unite_fast.distributed.interface import is_loopback
from unite_fast.errors import printable

SLOWEST_LATENCY = 5e-3
"""Seconds one way between hosts. Ethernet within a data centre takes a tenth of a millisecond."""
SLOWEST_LINK = 0.125e9
"""Bytes/s between hosts: 1 Gbit/s."""
CLOCK_DIFFERENCE = 1.0
"""Seconds. Only the order of log lines and the age of files depend on clocks."""
SOCKETS_PER_PEER = 2
"""Connections of each process to the store, which rank 0 may hold. Process groups connect only ranks that exchange
something."""
OTHER_DESCRIPTORS = 256
"""Files, pipes of data workers, libraries."""
LEAST_SHARED_MEMORY = 2**30
"""Bytes of /dev/shm that NCCL's documentation asks of containers (troubleshooting, "Docker")."""
LONGEST_CHECKPOINT = 120.0
"""Seconds to write one."""
SAME_SOFTWARE = ("unite_fast", "unite_fast source", "torch", "cuda", "nccl")
"""Software that must be the same: processes that differ may train different models or fail to talk."""
OWN_SOFTWARE = ("kernel",)
OWN_ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "UNITE_FAST_INCEPTION")
"""Variables that name what a host calls otherwise than another."""
MOST_NAMES = 4
ADVICE = {
    "facts": "try again with --traceback",
    "folder": "look at the mount and at the file server",
    "clocks": "look at the network",
    "join": "every host must reach every other one on all TCP ports: look at addresses, firewall and the variables "
    "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
    "network": "look at the other errors, and with NCCL_DEBUG=INFO at NCCL's",
    "disk": "look at the mount and at the file server",
    "loader": "look at the settings data.*, or with unite-fast inspect at the data",
}
"""What to do if a part failed."""


def all_findings(cluster: Cluster) -> list[Finding]:
    topics = (names, interfaces, limits, clocks, shared_folder, software, devices, network, rates)
    return [finding for topic in topics for finding in topic(cluster)]


def names(cluster: Cluster) -> list[Finding]:
    found = []
    plain = [host.facts.get("name", host.label) for host in cluster.hosts]
    for name in sorted({name for name in plain if plain.count(name) > 1}):
        text = (
            f"{plain.count(name)} hosts are called {name}: messages cannot tell them apart; give each its own hostname"
        )
        found.append(Finding("warning", text))
    if not cluster.several:
        return found
    head = cluster.hosts[0]
    for host in (one for one in cluster.hosts if one.facts):
        own, master = host.facts["own_addresses"], host.facts["master"]
        chosen = host.facts["environment"].get("GLOO_SOCKET_IFNAME")
        if not chosen and all(map(is_loopback, own)):
            what = f"{', '.join(own)}, an address of the host alone" if own else "no address"
            text = (
                f"{host.label}: its own name has {what}, and gloo may take it for the host's; write the address in its "
                "network into /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface"
            )
            # If the processes joined nevertheless, only other programs may stumble.
            found.append(Finding("warning" if cluster.joined else "error", text))
        expected = {address for address in head.facts.get("master", master)["addresses"] if not is_loopback(address)}
        if host is not head and expected and not expected & set(master["addresses"]):
            here = f"{printable(master['name'])} is {', '.join(master['addresses']) or 'unknown'} here"
            there = f"{', '.join(sorted(expected))} on {head.label}"
            text = f"{host.label}: MASTER_ADDR {here}, but {there}; make /etc/hosts or DNS agree"
            found.append(Finding("warning", text))
    return found


def interfaces(cluster: Cluster) -> list[Finding]:
    found = []
    for host in (one for one in cluster.hosts if one.facts):
        there = list(host.facts["interfaces"])
        for variable, fits in (("GLOO_SOCKET_IFNAME", _fits_gloo), ("NCCL_SOCKET_IFNAME", _fits_nccl)):
            value = host.facts["environment"].get(variable)
            if value and there and not fits(value, there):
                text = f"{host.label}: {variable} is {printable(value)}, but its interfaces are {', '.join(there)}"
                found.append(Finding("error", text))
        if cluster.several and cluster.joined and host.used and all(map(is_loopback, host.used)):
            text = f"{host.label}: all connections are on {', '.join(host.used)}, which no other host reaches"
            found.append(Finding("warning", text))
        down = [name for name, port in host.facts["infiniband"].items() if not port.startswith("ACTIVE")]
        if down and len(down) < len(host.facts["infiniband"]):
            text = f"{host.label}: InfiniBand ports that are not active: {', '.join(down)}; NCCL uses the others alone"
            found.append(Finding("warning", text))
    return found


def _fits_gloo(value: str, there: Sequence[str]) -> bool:
    """torch takes whole names, separated by commas."""
    return all(name in there for name in value.split(","))


def _fits_nccl(value: str, there: Sequence[str]) -> bool:
    """NCCL takes beginnings of names; = before them asks for whole names, ^ for all others
    (https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html)."""
    excluded, value = value.startswith("^"), value.removeprefix("^")
    exact, value = value.startswith("="), value.removeprefix("=")
    parts = [part.partition(":")[0] for part in value.split(",")]
    fits = [any(name == part if exact else name.startswith(part) for part in parts) for name in there]
    return any(fit != excluded for fit in fits)


def descriptors_needed(world: int) -> int:
    """Open files of a process among `world`."""
    return SOCKETS_PER_PEER * (world - 1) + OTHER_DESCRIPTORS


def limits(cluster: Cluster) -> list[Finding]:
    found = []
    for host in (one for one in cluster.hosts if one.facts):
        facts, processes = host.facts, len(host.ranks)
        # Each process raises its soft limit to the hard one.
        hard, needed = facts["descriptors"]["hard"], descriptors_needed(cluster.world)
        if 0 <= hard < needed:
            text = f"{host.label}: a process may open {hard} files, but {cluster.world} processes need {needed}"
            found.append(Finding("error", f"{text}; raise the hard limit (ulimit -Hn)"))
        threads = facts["environment"].get("OMP_NUM_THREADS", "")
        if processes > 1 and not threads:
            text = f"{host.label}: OMP_NUM_THREADS is not set, so each process uses all {facts['cores']} cores"
            found.append(Finding("warning", f"{text}; set it to 4"))
        elif threads.isdigit() and int(threads) * processes > max(facts["cores"], processes):
            text = (
                f"{host.label}: OMP_NUM_THREADS is {threads}, so {processes} processes use {int(threads) * processes} "
                f"threads on {facts['cores']} cores; set it to {max(facts['cores'] // processes, 1)}"
            )
            found.append(Finding("warning", text))
        room = facts["shared_memory"].get("size", LEAST_SHARED_MEMORY)
        if _is_cuda(host) and processes > 1 and room < LEAST_SHARED_MEMORY:
            text = (
                f"{host.label}: /dev/shm has {room / 2**20:.0f} MB, and NCCL asks for 1 GB; start the container with "
                "--shm-size=1g, or mount an emptyDir of medium Memory"
            )
            found.append(Finding("warning", text))
        if facts["infiniband"] and facts["locked_memory"] >= 0:
            text = (
                f"{host.label}: locked memory is limited to {facts['locked_memory']} bytes, and InfiniBand needs more"
            )
            found.append(Finding("warning", f"{text}; set ulimit -l unlimited"))
    return found


def clocks(cluster: Cluster) -> list[Finding]:
    head = cluster.hosts[0].label
    return [
        Finding(
            "warning", f"{host.label}: its clock is {host.clock['offset']:+.1f} s from {head}'s; run chrony or ntpd"
        )
        for host in cluster.hosts
        if host.clock and abs(host.clock["offset"]) - host.clock["error"] > CLOCK_DIFFERENCE
    ]


def shared_folder(cluster: Cluster) -> list[Finding]:
    found, head = [], cluster.hosts[0]
    for host in cluster.hosts[1:]:
        state = host.folder
        if not state or state["sees"] is None:
            continue
        where = f"{host.label}: the run folder {printable(cluster.run_folder)}"
        here = f"({state['file_system']} mounted on {printable(state['mount'])})"
        if not state["sees"]:
            text = f"{where} {here} is not {head.label}'s: a file written there does not appear here"
            text += "; set train.out to a folder on a file system that all hosts mount"
            found.append(Finding("error", text))
        elif state["error"]:
            found.append(Finding("error", f"{where} cannot be written: {state['error']}; check owner, mode and mount"))
        else:
            if host.ranks[0] in head.folder.get("missing", []):
                text = f"{where} {here} shows {head.label}'s files, but not the other way round; mount the same folder"
                found.append(Finding("error", text))
            if not state["lock_refused"]:
                text = f"{where} {here}: a lock held by {head.label} is not seen, so two runs could train in one folder"
                found.append(Finding("error", f"{text}; mount it with locks (for NFS without nolock)"))
            if state["renamed_after"] is None:
                text = f"{where} {here}: a file that {head.label} replaced stays the old one for seconds"
                found.append(Finding("warning", f"{text}; mount it with a shorter cache (for NFS actimeo=3)"))
    return found


def software(cluster: Cluster) -> list[Finding]:
    found = []
    hosts = [host for host in cluster.hosts if host.facts]
    for key in _keys(host.facts["software"] for host in hosts):
        if key not in OWN_SOFTWARE:
            kind = "error" if key in SAME_SOFTWARE else "warning"
            found += _differ(
                kind, key, hosts, lambda host, key=key: host.facts["software"].get(key), "install the same"
            )
    for key in _keys(host.facts["environment"] for host in hosts):
        if key not in OWN_ENVIRONMENT:
            found += _differ(
                "warning", key, hosts, lambda host, key=key: host.facts["environment"].get(key), "set it alike"
            )
    return found


def devices(cluster: Cluster) -> list[Finding]:
    found = []
    hosts = [host for host in cluster.hosts if host.facts]
    for host in hosts:
        for error in sorted({one["device_error"] for one in host.devices if one["device_error"]}):
            found.append(Finding("error", f"{host.label}: {error}"))
        if _is_cuda(host) and len(host.ranks) > len(host.facts["gpus"]):
            text = f"{host.label}: {len(host.ranks)} processes, but torch sees {len(host.facts['gpus'])} CUDA devices"
            found.append(Finding("error", f"{text}; start one process per device"))
    kinds = [host for host in hosts if host.devices and not host.devices[0]["device_error"]]
    found += _differ("error", "the device", kinds, lambda host: host.devices[0]["device"], "set train.device")
    found += _differ(
        "warning", "the GPU", hosts, lambda host: _counted(host.facts["gpus"]), "the slowest sets the pace"
    )
    found += _differ(
        "warning", "the number of processes", hosts, lambda host: len(host.ranks), "hsdp needs the same on each host"
    )
    found += _differ("warning", "the processor", hosts, lambda host: host.facts["cpu"], "the slowest sets the pace")
    found += _differ(
        "warning", "the number of cores", hosts, lambda host: host.facts["cores"], "data workers need them"
    )
    found += _differ(
        "warning",
        "the number of InfiniBand ports",
        hosts,
        lambda host: len(host.facts["infiniband"]),
        "check the cards",
    )
    most = max((host.facts["memory"] for host in hosts), default=0)
    for host in hosts:
        if host.facts["memory"] < 0.8 * most:
            text = (
                f"{host.label}: {host.facts['memory'] / 1e9:.0f} GB of memory, while another host has {most / 1e9:.0f}"
            )
            found.append(Finding("warning", text))
    return found


def network(cluster: Cluster) -> list[Finding]:
    found = []
    head, linked = cluster.hosts[0].label, [host for host in cluster.hosts if host.link]
    usual = statistics.median(host.link["bandwidth"] for host in linked) if len(linked) > 2 else 0.0
    cost = f"one all-reduce of the gradients would take {duration(cluster.gradient_seconds)}"
    left = [host.label for host in cluster.hosts[1:] if not host.link]
    if left and cluster.all_reduce:
        found.append(Finding("warning", f"the time did not suffice for the links from {head} to {_listed(left)}"))
    for host in linked:
        latency, bandwidth = host.link["latency"], host.link["bandwidth"]
        faults = []
        if latency > SLOWEST_LATENCY:
            faults.append(f"a latency of {latency * 1e3:.1f} ms (above {SLOWEST_LATENCY * 1e3:g})")
        if bandwidth < SLOWEST_LINK:
            faults.append(f"{bandwidth / 1e9:.2g} GB/s (below {SLOWEST_LINK / 1e9:g}, 1 Gbit/s)")
        elif bandwidth < usual / 3:
            faults.append(f"{bandwidth / 1e9:.2f} GB/s, while the usual link has {usual / 1e9:.2f}")
        if faults:
            text = f"{host.label}: the link to {head} has {' and '.join(faults)}"
            text += f"; {cost}: look for another interface, a bad cable or port, or leave the host out"
            found.append(Finding("warning", text))
    return found


def rates(cluster: Cluster) -> list[Finding]:
    found = []
    writing = sum(host.disk["write"] for host in cluster.hosts if host.disk)
    seconds = cluster.state_bytes / writing if writing else 0.0
    if seconds > LONGEST_CHECKPOINT:
        text = f"a checkpoint of {cluster.state_bytes / 1e9:.1f} GB into {printable(cluster.run_folder)} would take "
        found.append(Finding("warning", f"{text}{duration(seconds)}; use a faster file system"))
    needed = 3 * cluster.state_bytes
    for host in cluster.hosts[:1]:
        if host.folder and host.folder["free"] < needed:
            text = (
                f"{host.label}: {host.folder['free'] / 1e9:.1f} GB are free for the run folder, and three checkpoints"
            )
            found.append(Finding("error", f"{text}, two kept and one being written, take {needed / 1e9:.1f}"))
    read = [host for host in cluster.hosts if host.loaders]
    for key in ("images", "classes"):
        found += _differ(
            "error", f"the number of {key}", read, lambda host, key=key: host.loaders[0][key], "copy the same data"
        )
    usual = statistics.median(host.images_per_s for host in read) if len(read) > 1 else 0.0
    for host in read:
        if host.images_per_s < usual / 2:
            text = f"{host.label}: loads {host.images_per_s:.0f} images/s, while the median host loads {usual:.0f}"
            found.append(Finding("warning", f"{text}; the slowest sets the pace: look at its disk and cores"))
    return found


def part_findings(part: str, outcomes: dict[str, Outcome], only_warn: bool) -> list[Finding]:
    """Findings for parts that failed, took too long, or were skipped.

    Args:
        outcomes: by the words for a rank: "rank 3 on node1".
        only_warn: whether a part that takes too long is no error.
    """
    found, skipped = [], {one.error for one in outcomes.values() if one.skipped}
    if skipped:
        found.append(Finding("warning", f"{part}: {', '.join(sorted(skipped))}"))
    for error in dict.fromkeys(one.error for one in outcomes.values() if not one.ok and not one.skipped):
        same = {who: one for who, one in outcomes.items() if one.error == error}
        late = all(one.late for one in same.values())
        found.append(
            Finding("warning" if late and only_warn else "error", f"{_listed(same)}: {part}: {error}; {ADVICE[part]}")
        )
    return found


def _is_cuda(host: Host) -> bool:
    return bool(host.devices) and host.devices[0]["device"] == "cuda"


def _counted(values: Sequence[str]) -> str:
    return ", ".join(f"{values.count(value)} x {value}" for value in dict.fromkeys(values)) or "none"


def _keys(tables: Iterable[dict]) -> list[str]:
    return list(dict.fromkeys(key for table in tables for key in table))


def _differ(kind: str, what: str, hosts: Sequence[Host], value_of: Callable[[Host], Any], advice: str) -> list[Finding]:
    """A finding if hosts have different values: which hosts have which."""
    by_value: dict[Any, list[str]] = {}
    for host in hosts:
        by_value.setdefault(value_of(host), []).append(host.label)
    if len(by_value) < 2:
        return []
    values = "; ".join(f"{printable(value or 'none')} on {_listed(labels)}" for value, labels in by_value.items())
    return [Finding(kind, f"{what} differs: {values}: {advice}")]


def _listed(labels: Iterable[str]) -> str:
    every = list(labels)
    more = f" and {len(every) - MOST_NAMES} more" if len(every) > MOST_NAMES else ""
    return ", ".join(every[:MOST_NAMES]) + more
