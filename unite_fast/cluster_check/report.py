"""The table by host, and the facts as JSON."""

from collections.abc import Sequence
from dataclasses import asdict

from unite_fast import __version__
from unite_fast.cluster_check.findings import OWN_SOFTWARE
from unite_fast.cluster_check.records import Cluster, Finding, Host, duration
from unite_fast.distributed.interface import is_loopback
from unite_fast.errors import printable

MISSING = "-"


def lines(cluster: Cluster, findings: Sequence[Finding]) -> list[str]:
    """What is printed: a table of hosts, the network, then errors and warnings."""
    processes = f"{cluster.world} process{'es' * (cluster.world > 1)}"
    hosts = f"{len(cluster.hosts)} host{'s' * cluster.several}"
    settings = f"recipe {printable(cluster.recipe)}, run folder {printable(cluster.run_folder)}"
    text = [f"{hosts}, {processes}, {cluster.backend}; {settings}", ""]
    text += table(cluster)
    if common := _common_software(cluster):
        text += ["", f"on all hosts: {common}"]
    if cluster.all_reduce:
        text += ["", *_all_reduce(cluster)]
    text.append("")
    for kind in ("error", "warning"):
        text += [f"{kind}: {finding.text}" for finding in findings if finding.kind == kind]
    errors = sum(finding.kind == "error" for finding in findings)
    warnings = len(findings) - errors
    counted = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    text.append(f"failed: {counted}" if errors else f"ok: {counted}")
    return text


def table(cluster: Cluster) -> list[str]:
    """A row for each host; columns without any value are left out."""
    rows = [_row(host, cluster.hosts[0]) for host in cluster.hosts]
    columns = [name for name in rows[0] if any(row[name] != MISSING for row in rows)]
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in columns]
    cells = [columns, *([row[name] for name in columns] for row in rows)]
    return [
        "  ".join(
            cell.ljust(width) if index in (0, 1, 2, 3) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def as_json(cluster: Cluster, findings: Sequence[Finding], status: int) -> dict:
    """All facts; sizes in bytes, times in seconds, rates per second."""
    return {
        "format": "unite_fast cluster check 1",
        "unite_fast": __version__,
        "status": status,
        **{kind + "s": [one.text for one in findings if one.kind == kind] for kind in ("error", "warning")},
        "world": cluster.world,
        **asdict(cluster),
    }


def _row(host: Host, head: Host) -> dict[str, str]:
    facts, first = host.facts, host is head
    memory = facts.get("memory", 0)
    return {
        "host": printable(host.label),
        "address": _address(host),
        "interface": _interface(host) or MISSING,
        "device": _device(host),
        "processes": str(len(host.ranks)),
        "cores": str(facts.get("cores", MISSING)),
        "memory GB": f"{memory / 1e9:.0f}" if memory else MISSING,
        "open files": str(facts["descriptors"]["soft"]) if facts else MISSING,
        "clock ms": f"{host.clock['offset'] * 1e3:+.1f}" if host.clock else MISSING,
        "folder": _folder(host, first),
        "write MB/s": f"{host.disk['write'] / 1e6:.0f}" if host.disk else MISSING,
        "read MB/s": f"{host.disk['read'] / 1e6:.0f}" if host.disk else MISSING,
        "images/s": f"{host.images_per_s:.0f}" if host.loaders else MISSING,
        "link ms": f"{host.link['latency'] * 1e3:.2f}" if host.link else MISSING,
        "link GB/s": f"{host.link['bandwidth'] / 1e9:.3g}" if host.link else MISSING,
    }


def _interface(host: Host) -> str:
    """Of `_address`, as this host's own interfaces have it."""
    address, interfaces = _address(host), host.facts.get("interfaces", {})
    return next((name for name, one in interfaces.items() if address in one["addresses"]), "")


def _address(host: Host) -> str:
    """The address that the processes use, or else one of an interface."""
    used = [address for address in host.used if not is_loopback(address)]
    every = [address for one in host.facts.get("interfaces", {}).values() for address in one["addresses"]]
    others = [address for address in every if not is_loopback(address) and not address.startswith("fe80:")]
    return next(iter((*used, *others, *host.used, *every)), MISSING)


def _device(host: Host) -> str:
    gpus = host.facts.get("gpus", [])
    if gpus and host.devices and host.devices[0]["device"] == "cuda":
        return f"{len(gpus)} x {gpus[0]}"
    return (host.devices[0]["device"] if host.devices else "") or MISSING


def _folder(host: Host, first: bool) -> str:
    if not host.folder or (not first and host.folder["sees"] is None):
        return MISSING
    return host.folder["file_system"] if first or host.folder["sees"] else "not shared"


def _common_software(cluster: Cluster) -> str:
    tables = [host.facts["software"] for host in cluster.hosts if host.facts]
    if not tables:
        return ""
    same = {key: value for key, value in tables[0].items() if all(one.get(key) == value for one in tables)}
    return ", ".join(f"{key} {value}" for key, value in same.items() if value and key not in OWN_SOFTWARE)


def _all_reduce(cluster: Cluster) -> list[str]:
    text = [f"all-reduce over {cluster.world} processes   time        bus GB/s"]
    for row in cluster.all_reduce:
        rate = f"{row['bus_bandwidth'] / 1e9:.3g}"
        text.append(f"{_size(row['bytes']):>{len(text[0]) - 24}}   {duration(row['seconds']):<10}  {rate:>8}")
    gradients = f"the gradients of {printable(cluster.recipe)}, {cluster.gradient_bytes / 1e6:.1f} MB"
    text.append(f"{gradients}: about {duration(cluster.gradient_seconds)} per all-reduce")
    return text


def _size(count: int) -> str:
    for unit, size in (("MB", 2**20), ("KB", 2**10)):
        if count >= size:
            return f"{count // size} {unit}"
    return f"{count} B"
