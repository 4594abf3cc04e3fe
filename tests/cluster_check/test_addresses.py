"""Addresses of this machine."""

import socket
import threading

import pytest

from unite_fast.cluster_check import addresses
from unite_fast.cluster_check.addresses import addresses_in_use, interfaces, resolve
from unite_fast.distributed.interface import interface_of, is_loopback


@pytest.fixture
def connection():
    """The port of a connection of this process with itself."""
    with socket.create_server(("127.0.0.2", 0)) as server:
        accepted = []
        thread = threading.Thread(target=lambda: accepted.append(server.accept()[0]))
        thread.start()
        with socket.create_connection(server.getsockname(), source_address=("127.0.0.2", 0)):
            thread.join()
            yield server.getsockname()[1]
            accepted[0].close()


def test_interfaces():
    found = interfaces()
    assert "127.0.0.1" in found["lo"]["addresses"]
    assert interface_of("127.0.0.1") == "lo" and interface_of("192.0.2.99") == ""
    assert all(set(one) == {"addresses", "state", "speed"} for one in found.values())


def test_names():
    assert "127.0.0.1" in resolve("localhost") or "::1" in resolve("localhost")
    assert resolve("no-such-host.invalid") == []
    assert resolve("x" * 300) == []


@pytest.mark.parametrize(
    ("address", "loopback"), [("127.0.1.1", True), ("::1", True), ("10.0.0.1", False), ("", False)]
)
def test_loopback(address, loopback):
    assert is_loopback(address) is loopback


def test_connections(connection):
    assert "127.0.0.2" in addresses_in_use(port=1)


def test_connections_to_the_store_do_not_count(connection):
    assert "127.0.0.2" not in addresses_in_use(connection)


def test_addresses_in_hexadecimal():
    assert addresses._from_hexadecimal("0100007F") == "127.0.0.1"
    assert addresses._from_hexadecimal("0000000000000000FFFF00000100007F") == "127.0.0.1"
    assert addresses._from_hexadecimal("00000000000000000000000001000000") == "::1"


def test_infiniband_devices(tmp_path, monkeypatch):
    port = tmp_path / "mlx5_0/ports/1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    monkeypatch.setattr(addresses, "Path", lambda _: tmp_path)
    assert addresses.infiniband() == {"mlx5_0": "ACTIVE, 400 Gb/sec (4X NDR)"}
