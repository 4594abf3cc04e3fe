"""Network interfaces and addresses of this host, and those that the processes use. Linux; elsewhere mostly empty."""

import ipaddress
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path

from unite_fast.distributed.interface import interface_addresses

ESTABLISHED = "01"
"""State of a connection in /proc/net/tcp: proc_net_tcp.rst of Linux's documentation."""


def interfaces() -> dict[str, dict]:
    """Name -> `addresses` (IPv4 and IPv6, as text), `state` (up, down, unknown) and `speed` in Mbit/s (0: unknown)."""
    found: dict[str, dict] = {}
    with suppress(OSError):
        for _, name in socket.if_nameindex():
            folder = Path("/sys/class/net") / name
            speed = _read(folder / "speed")
            found[name] = {
                "addresses": [],
                "state": _read(folder / "operstate"),
                "speed": int(speed) if speed.isdigit() else 0,
            }
    for name, address in interface_addresses():
        found.setdefault(name, {"addresses": [], "state": "", "speed": 0})["addresses"].append(address)
    return found


def infiniband() -> dict[str, str]:
    """Devices of RDMA networks -> state and rate of their first port: {"mlx5_0": "ACTIVE, 400 Gb/sec (4X NDR)"}."""
    folder = Path("/sys/class/infiniband")
    devices = sorted(folder.iterdir()) if folder.is_dir() else []
    return {
        device.name: f"{_read(device / 'ports/1/state').rpartition(' ')[2]}, {_read(device / 'ports/1/rate')}"
        for device in devices
    }


def resolve(name: str) -> list[str]:
    """The addresses of a host name, sorted; empty if it has none."""
    try:
        return sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    except (OSError, UnicodeError):
        return []


def addresses_in_use(port: int) -> list[str]:
    """Local addresses of this process's TCP connections, sorted.

    Args:
        port: connections from or to it, to torchrun's store, do not count.
    """
    own = set()
    with suppress(OSError):
        for descriptor in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                own.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    used = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        for line in _read(Path(table)).splitlines()[1:]:
            _, local, remote, state, *rest = line.split()
            ports = {int(end.partition(":")[2], 16) for end in (local, remote)}
            if state == ESTABLISHED and port not in ports and f"socket:[{rest[5]}]" in own:
                used.add(_from_hexadecimal(local.partition(":")[0]))
    return sorted(used)


def _from_hexadecimal(text: str) -> str:
    """An address as /proc/net/tcp writes it: 32-bit words in the host's byte order."""
    raw = b"".join(struct.pack("=I", int(text[i : i + 8], 16)) for i in range(0, len(text), 8))
    address = ipaddress.ip_address(raw)
    return str(getattr(address, "ipv4_mapped", None) or address)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:  # a loopback device has no speed
        return ""
