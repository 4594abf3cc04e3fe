"""Machines that accept a connection, refuse it, or are silent."""

import socket
import threading
import time

import pytest

from unite_fast.distributed import reach
from unite_fast.distributed.reach import answers_within, probe, wait_for_listener

NOBODY = "nobody.invalid"


def test_a_probe_tells_a_closed_port_from_a_missing_machine(free_port):
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert probe("127.0.0.1", server.getsockname()[1]) == "accepted"
    assert probe("127.0.0.1", free_port) == "refused"
    assert probe(NOBODY, free_port) == "silent"


def test_a_machine_answers_if_one_of_its_addresses_does(free_port, monkeypatch):
    """The last address is one to which nothing leads: an IPv6 address on a machine without IPv6."""
    nowhere = (socket.AF_UNIX, socket.SOCK_STREAM, 0, "", "/nowhere")
    here = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", free_port))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [here, nowhere])
    assert probe("node1", free_port) == "refused"
    with socket.create_server(("127.0.0.1", free_port)):
        assert probe("node1", free_port) == "accepted"


def test_a_probe_without_answer_ends(monkeypatch):
    """A listener whose queue is full answers no further connection, as a machine without power."""
    monkeypatch.setattr(reach, "PROBE", 0.3)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        start = time.monotonic()
        assert probe(*server.getsockname()) == "silent"
        assert 0.2 < time.monotonic() - start < 3
        for one in waiting:
            one.close()


def test_a_listener_that_comes_late_is_waited_for(free_port):
    servers = []
    timer = threading.Timer(1.0, lambda: servers.append(socket.create_server(("127.0.0.1", free_port))))
    timer.start()
    start = time.monotonic()
    # The machine is up all the time, so its silence does not count.
    assert wait_for_listener("127.0.0.1", free_port, timeout=20, silence=0.3)
    assert time.monotonic() - start > 0.9
    timer.join()
    servers[0].close()


@pytest.mark.parametrize(("host", "timeout", "silence"), [("127.0.0.1", 0.5, 60), (NOBODY, 60, 0.5)])
def test_waiting_ends_after_the_timeout_or_a_silence(free_port, host, timeout, silence):
    start = time.monotonic()
    assert not wait_for_listener(host, free_port, timeout, silence)
    assert 0.5 <= time.monotonic() - start < 5


def test_a_machine_that_refuses_answers(free_port):
    assert answers_within("127.0.0.1", free_port, 0)
    start = time.monotonic()
    assert not answers_within(NOBODY, free_port, 0.5)
    assert 0.5 <= time.monotonic() - start < 5
