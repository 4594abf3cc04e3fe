"""Whether another machine answers. Imports no torch."""

import socket
import time
from contextlib import suppress
from typing import Literal

PROBE = 3.0
"""Seconds to wait for an answer. A machine that is up answers at once, also if nothing listens at the port."""
PAUSE = 0.25
"""Seconds between two probes."""

Answer = Literal["accepted", "refused", "silent"]


def probe(host: str, port: int) -> Answer:
    """What a machine answers to a connection: "refused" if it is up and nothing listens at this port, "silent" if it
    is down, cut off or unknown."""
    answer: Answer = "silent"
    with suppress(OSError):  # unknown name
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            try:
                with socket.socket(family, kind, protocol) as connection:
                    connection.settimeout(PROBE)
                    connection.connect(address)
                    # To a free port of this machine, the system may connect a socket to itself.
                    if connection.getsockname() != connection.getpeername():
                        return "accepted"
                    answer = "refused"
            except ConnectionRefusedError:
                answer = "refused"
            except OSError:  # no answer in time, no route
                pass
    return answer


def wait_for_listener(host: str, port: int, timeout: float, silence: float) -> bool:
    """Wait until something listens at this port.

    Args:
        timeout: seconds to wait.
        silence: seconds without any answer of the machine after which waiting ends early.

    Returns:
        Whether something does.
    """
    start = answered = time.monotonic()
    while (answer := probe(host, port)) != "accepted":
        now = time.monotonic()
        if answer == "refused":
            answered = now
        if now - start > timeout or now - answered > silence:
            return False
        time.sleep(PAUSE)
    return True


def answers_within(host: str, port: int, seconds: float) -> bool:
    """Wait until the machine answers, even by refusing; False if it does not within `seconds`."""
    start = time.monotonic()
    while probe(host, port) == "silent":
        if time.monotonic() - start > seconds:
            return False
        time.sleep(PAUSE)
    return True
