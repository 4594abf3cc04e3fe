"""The network interface on which this process reaches the other machines."""

import fcntl
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_GET_ADDRESS = 0x8915
"""SIOCGIFADDR of linux/sockios.h: the IPv4 address of an interface."""


def own_address_towards(host: str, port: int) -> str:
    """The address from which this machine sends to `host`; empty if there is none. Sends nothing."""
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return probe.getsockname()[0]
    return ""


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def interface_of(address: str) -> str:
    """The interface with this address; empty if there is none."""
    if ":" in address:
        return _interface_of_ipv6(address)
    for _, name in socket.if_nameindex():
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack("256s", name.encode()[:15])
            found = fcntl.ioctl(probe, _GET_ADDRESS, request)[20:24]
            if socket.inet_ntoa(found) == address:
                return name
    return ""


def _interface_of_ipv6(address: str) -> str:
    wanted = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            number, *_, name = line.split()
            if number == wanted:
                return name
    return ""


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
