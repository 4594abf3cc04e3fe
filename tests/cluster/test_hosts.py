"""The hosts themselves: names, addresses, cables, power."""

import signal
import sys
import time

SERVER = """
import socket
server = socket.create_server(("", 7000))
print("on", socket.gethostname(), flush=True)
while True:
    server.accept()
"""


def connects(hosts, number: int, to: str, seconds: float = 3.0) -> bool:
    script = f"import socket; socket.create_connection(('{to}', 7000), {seconds})"
    return hosts.run(number, [sys.executable, "-c", script]).wait() == 0


def listens(hosts, number: int, wait_until) -> None:
    server = hosts.run(number, [sys.executable, "-c", SERVER])
    wait_until(lambda: "on" in server.printed())
    assert server.printed() == f"on node{number}\n"


def test_hosts_reach_each_other_by_name_until_a_cable_is_out(make_hosts, wait_until):
    hosts = make_hosts(3)
    listens(hosts, 2, wait_until)
    assert connects(hosts, 1, "node2") and connects(hosts, 3, "node2")
    hosts.link(2, up=False)
    assert not connects(hosts, 1, "node2", 0.5)
    hosts.link(2, up=True)
    assert connects(hosts, 1, "node2", 10)


def test_a_host_without_power_is_replaced_under_its_name(make_hosts, wait_until):
    hosts = make_hosts(2)
    listens(hosts, 2, wait_until)
    server = hosts.commands[-1]
    assert len(hosts.processes(2)) == 1
    hosts.power_off(2)
    assert server.wait() == -signal.SIGKILL and hosts.processes(2) == {}
    assert not connects(hosts, 1, "node2", 0.5)
    new = hosts.add("node2")
    script = "import socket; print(socket.gethostname(), socket.gethostbyname('node2'))"
    for number in (1, new):
        asked = hosts.run(number, [sys.executable, "-c", script])
        asked.wait()
        assert asked.printed().split() == [hosts[number].name, "10.77.0.3"]


def test_a_host_can_have_a_folder_of_its_own(make_hosts, tmp_path):
    hosts = make_hosts(2)
    folder = tmp_path / "files"
    folder.mkdir()
    hosts.hide(2, folder)
    for number in (1, 2):
        hosts.run(number, ["touch", str(folder / f"by{number}")]).wait()
    assert [path.name for path in folder.iterdir()] == ["by1"]
    listing = hosts.run(2, ["ls", str(folder)])
    listing.wait()
    assert listing.printed().split() == ["by2"]


def test_debians_name_is_a_loopback_address_on_the_host_itself(make_hosts):
    hosts = make_hosts(2, debian_names=True)
    script = "import socket; print(*(socket.gethostbyname(f'node{i}') for i in (1, 2)))"
    for number, expected in ((1, ["127.0.1.1", "10.77.0.2"]), (2, ["10.77.0.1", "127.0.1.1"])):
        asked = hosts.run(number, [sys.executable, "-c", script])
        asked.wait()
        assert asked.printed().split() == expected


def test_a_slow_switch_delays_packets(make_hosts, wait_until):
    hosts = make_hosts(2, delay=0.3)
    listens(hosts, 2, wait_until)
    begun = time.monotonic()
    assert connects(hosts, 1, "node2", 10)
    assert time.monotonic() - begun > 2 * 0.3, "the time of one packet to node2 and back"


def test_all_ends_with_the_hosts(make_hosts, wait_until):
    hosts = make_hosts(1)
    sleeping = hosts.run(1, ["sh", "-c", "setsid sleep 1000 & sleep 1000"])
    wait_until(lambda: len(hosts.processes(1)) >= 2)
    hosts.close()
    assert sleeping.ended() and hosts.processes(1) == {}
