"""The network interface on which this process reaches the other machines."""

import fcntl
import ipaddress
import os
import socket
import struct
from array import array
from contextlib import suppress
from pathlib import Path

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
SIOCGIFCONF = 0x8912
"""Asks for all IPv4 addresses with the names of their interfaces: netdevice(7)."""
REQUEST_BYTES = 40
"""sizeof(struct ifreq) on 64-bit Linux: 16 bytes for the name, then family, port and address."""
MOST_ADDRESSES = 1024


def own_address_towards(host: str, port: int) -> str:
    """The address from which this machine sends to `host`; empty if there is none. Sends nothing."""
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return probe.getsockname()[0]
    return ""


def is_loopback(address: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    return False


def interface_of(address: str) -> str:
    """The interface with this address; empty if there is none."""
    plain = address.partition("%")[0]
    return next((name for name, own in interface_addresses() if own == plain), "")


def interface_addresses() -> list[tuple[str, str]]:
    """Interface and address, of all IPv4 and IPv6 addresses of this machine. Linux; elsewhere mostly empty."""
    # An alias such as eth0:1 is an address of eth0.
    return [(name.partition(":")[0], address) for name, address in (*_ipv4(), *_ipv6())]


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
    with suppress(OSError):
        lines = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
        return [(line[5], str(ipaddress.IPv6Address(bytes.fromhex(line[0])))) for line in lines]
    return []


def choose_interface(towards: list[str], port: int) -> str:
    """The interface that leads to the first of these hosts that is another machine. Empty if none is found, or if the
    user chose one with GLOO_SOCKET_IFNAME.

    Gloo would announce the address to which this machine's own name resolves. On Debian that is 127.0.1.1, at which no
    other machine finds it.
    """
    if os.environ.get(GLOO_INTERFACE):
        return ""
    for host in towards:
        address = own_address_towards(host, port)
        if address and not is_loopback(address):
            return interface_of(address)
    return ""
