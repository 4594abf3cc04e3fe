"""Network interfaces and addresses of this host, and those that the processes use. Linux; elsewhere mostly empty."""

import fcntl
import ipaddress
import os
import socket
import struct
from array import array
from contextlib import suppress
from pathlib import Path

SIOCGIFCONF = 0x8912
"""Asks for all IPv4 addresses with the names of their interfaces: netdevice(7)."""
REQUEST_BYTES = 40
"""sizeof(struct ifreq) on 64-bit Linux: 16 bytes for the name, then family, port and address."""
MOST_ADDRESSES = 1024
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
    for name, address in (*_ipv4(), *_ipv6()):
        # An alias such as eth0:1 is an address of eth0.
        found.setdefault(name.partition(":")[0], {"addresses": [], "state": "", "speed": 0})["addresses"].append(
            address
        )
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


def is_loopback(address: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    return False


def interface_of(address: str, found: dict[str, dict]) -> str:
    """The interface with an address, of those that `interfaces` found; empty if none has it."""
    return next((name for name, one in found.items() if address in one["addresses"]), "")


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


def _ipv4() -> list[tuple[str, str]]:
    buffer = array("B", bytes(REQUEST_BYTES * MOST_ADDRESSES))
    address, length = buffer.buffer_info()
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
            answer = fcntl.ioctl(channel, SIOCGIFCONF, struct.pack("iP", length, address))
    except OSError:
        return []
    filled = buffer.tobytes()[: struct.unpack("iP", answer)[0]]
    requests = [filled[i : i + REQUEST_BYTES] for i in range(0, len(filled), REQUEST_BYTES)]
    return [(one[:16].partition(b"\0")[0].decode(errors="replace"), socket.inet_ntoa(one[20:24])) for one in requests]


def _ipv6() -> list[tuple[str, str]]:
    lines = [line.split() for line in _read(Path("/proc/net/if_inet6")).splitlines()]
    return [(line[5], str(ipaddress.IPv6Address(bytes.fromhex(line[0])))) for line in lines]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:  # a loopback device has no speed
        return ""
