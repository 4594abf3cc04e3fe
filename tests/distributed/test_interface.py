"""The network interface that leads to another machine."""

import socket

import pytest

from unite_fast.distributed import interface
from unite_fast.distributed.interface import choose_interface, interface_of, is_loopback, own_address_towards


def test_the_loopback_interface_has_its_address():
    assert own_address_towards("127.0.0.1", 9) == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.77") == ""  # an address for documentation, RFC 5737
    assert [is_loopback(address) for address in ("127.0.1.1", "::1", "10.0.0.1")] == [True, True, False]


def test_an_ipv6_address_is_found_as_the_kernel_writes_it(monkeypatch, tmp_path):
    if socket.has_ipv6 and own_address_towards("::1", 9) == "::1":
        assert interface_of("::1") == "lo"
    assert interface_of("2001:db8::77") == ""


def test_a_name_that_does_not_resolve_leads_nowhere():
    assert own_address_towards("no-such-host.invalid", 9) == ""


@pytest.fixture
def two_interfaces(monkeypatch):
    """Debian's names: MASTER_ADDR is a loopback address on its own machine."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    routes = {"node1": "127.0.1.1", "10.0.0.2": "10.0.0.1", "10.9.0.2": "10.9.0.1"}
    monkeypatch.setattr(interface, "own_address_towards", lambda host, port: routes.get(host, ""))
    monkeypatch.setattr(interface, "interface_of", {"10.0.0.1": "eth0", "10.9.0.1": "ib0", "127.0.1.1": "lo"}.get)


def test_the_interface_leads_to_the_first_other_machine(two_interfaces):
    assert choose_interface(["10.9.0.2", "10.0.0.2"], 9) == "ib0"
    assert choose_interface(["node1", "", "10.0.0.2", "10.9.0.2"], 9) == "eth0"
    assert choose_interface(["node1"], 9) == ""


def test_the_user_s_choice_counts(two_interfaces, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert choose_interface(["10.0.0.2"], 9) == ""
