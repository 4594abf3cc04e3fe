"""check-cluster under real torchrun on two network namespaces as hosts, healthy and with faults, by hand:

    sudo python tests/cluster_check/on_namespaces.py [healthy unshared slow ...]

It prints what a user would see, and exits with 1 if a fault was not named. Needs root, iproute2 and /dev/net/tun. Not a
test of the suite: each scenario takes half a minute.
"""

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PREFIX, NETWORK = os.environ.get("UNITE_FAST_NAMESPACES", "ca"), os.environ.get("UNITE_FAST_NETWORK", "10.71.0")
TUNSETIFF, TAP_WITHOUT_HEADER = 0x400454CA, 0x1002
DELAY, LOSS = 0.05, 0.02
"""Seconds in each direction, and the share of lost frames, of the slow link."""
ROOT = Path(__file__).parents[2]


def shell(*words: object, check: bool = True) -> None:
    subprocess.run([str(word) for word in words], check=check, stderr=None if check else subprocess.DEVNULL)


class Hosts:
    """node1 and node2, each with its own network, name, /etc/hosts and mounts."""

    def __init__(self, folder: Path):
        self.folder, self.keepers = folder, {}
        self.down()
        shell("ip", "link", "add", f"{PREFIX}-bridge", "type", "bridge")
        shell("ip", "link", "set", f"{PREFIX}-bridge", "up")
        for i in (1, 2):
            shell("ip", "netns", "add", f"{PREFIX}{i}")
            shell("ip", "-n", f"{PREFIX}{i}", "link", "set", "lo", "up")
            self.connect(i)
            self.write_hosts(i)
            setup = f"hostname node{i}; mount --make-rprivate /; mount --bind {folder}/hosts.{i} /etc/hosts; echo"
            keeper = subprocess.Popen(
                [
                    "ip",
                    "netns",
                    "exec",
                    f"{PREFIX}{i}",
                    "unshare",
                    "-m",
                    "-u",
                    "bash",
                    "-c",
                    f"{setup}; exec sleep 9999",
                ],
                stdout=subprocess.PIPE,
            )
            keeper.stdout.readline()
            self.keepers[i] = keeper

    def connect(self, i: int) -> None:
        shell("ip", "link", "add", f"{PREFIX}v{i}", "type", "veth", "peer", "name", "eth0", "netns", f"{PREFIX}{i}")
        shell("ip", "link", "set", f"{PREFIX}v{i}", "master", f"{PREFIX}-bridge", "up")
        self.address(i)

    def address(self, i: int) -> None:
        shell("ip", "-n", f"{PREFIX}{i}", "addr", "add", f"{NETWORK}.{i}/24", "dev", "eth0")
        shell("ip", "-n", f"{PREFIX}{i}", "link", "set", "eth0", "up")

    def write_hosts(self, i: int, own: str = "") -> None:
        lines = [
            "127.0.0.1 localhost",
            *(f"{own or f'{NETWORK}.{i}'} node{i}" if j == i else f"{NETWORK}.{j} node{j}" for j in (1, 2)),
        ]
        (self.folder / f"hosts.{i}").write_text("\n".join(lines) + "\n")

    def start(self, i: int, *words: object, **named) -> subprocess.Popen:
        enter = ["nsenter", "-t", str(self.keepers[i].pid), "-m", "-u", "-n", "--"]
        return subprocess.Popen([*enter, *map(str, words)], **named)

    def run(self, i: int, *words: object) -> None:
        assert self.start(i, *words).wait() == 0, words

    def down(self) -> None:
        for keeper in self.keepers.values():
            keeper.kill()
            keeper.wait()
        for i in (1, 2):
            shell("ip", "netns", "del", f"{PREFIX}{i}", check=False)
        shell("ip", "link", "del", f"{PREFIX}-bridge", check=False)


def relay(i: int, ready: int) -> None:
    """Be the link of host i: frames wait `DELAY` seconds, and some are lost. Like tc's netem, which not every kernel
    has."""
    libc = ctypes.CDLL(None, use_errno=True)

    def tap(name: str) -> int:
        descriptor = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH14x", name.encode(), TAP_WITHOUT_HEADER))
        return descriptor

    outer = tap(f"{PREFIX}v{i}")
    with open(f"/run/netns/{PREFIX}{i}") as space:
        assert libc.setns(space.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
    inner = tap("eth0")
    os.write(ready, b"!")
    other, waiting = {outer: inner, inner: outer}, []
    while True:
        pause = max(waiting[0][0] - time.monotonic(), 0) if waiting else None
        for source in select.select(list(other), [], [], pause)[0]:
            frame = os.read(source, 65536)
            if random.random() >= LOSS:
                heapq.heappush(waiting, (time.monotonic() + DELAY, other[source], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, target, frame = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # the device is not up yet
                os.write(target, frame)


def check(
    hosts: Hosts, name: str, *settings: str, processes: int = 1, before: str = "", during=None
) -> tuple[str, list[int]]:
    """Run check-cluster on both hosts; prints and returns what the first one prints, and torchrun's exit statuses."""
    torchrun = (
        f"{before} exec {sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node {processes} "
        f"--rdzv-backend c10d --rdzv-id {name} --rdzv-endpoint node1:29400 -m unite_fast check-cluster digits "
        + " ".join(settings)
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    outputs = [hosts.folder / f"{name}.{i}" for i in (1, 2)]
    begun, started = time.monotonic(), []
    for i, output in enumerate(outputs, 1):
        with output.open("w") as file:
            started.append(
                hosts.start(i, "bash", "-c", torchrun, stdout=file, stderr=file, env=environment, cwd=hosts.folder)
            )
    if during:
        during(started)
    statuses = [one.wait() for one in started]
    print(f"\n===== {name}: torchrun's exit statuses {statuses}, {time.monotonic() - begun:.0f} s", flush=True)
    for i, output in enumerate(outputs, 1):
        # Without torchrun's own report of a failure, and without torch's remarks on sockets.
        text = output.read_text().partition("Traceback (most recent call last)")[0]
        lines = [
            line
            for line in text.splitlines()
            if not re.match(r"\[[WE]|[WE]\d{4} |frame #|Exception raised|<omit", line)
        ]
        print(f"--- node{i}", *lines, sep="\n", flush=True)
    return outputs[0].read_text(), statuses


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def freeze_second_host(started: list[subprocess.Popen]) -> None:
    """Stop node2's worker as soon as it has met the others."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        workers = children(started[1].pid)
        # It has imported everything when it has threads of its own.
        if workers and len(os.listdir(f"/proc/{workers[0]}/task")) > 2:
            time.sleep(3)
            os.kill(workers[0], signal.SIGSTOP)
            return
        time.sleep(0.05)


def main() -> None:
    chosen = sys.argv[1:] or ["healthy", "unshared", "slow", "names", "name2", "limits", "frozen", "data"]
    folder, faults = Path(tempfile.mkdtemp()), []
    shared = folder / "shared"
    shared.mkdir()
    hosts = Hosts(folder)

    def expect(name: str, output: str, statuses: list[int], status: int, *words: str) -> None:
        if statuses != [status, status] or not any(all(word in line for word in words) for line in output.splitlines()):
            faults.append(f"{name}: {statuses}, no line with {words}")
        if left := [str(path) for path in shared.rglob("*")]:
            faults.append(f"{name}: left behind {left}")

    run = f"train.out={shared}/run"
    try:
        if "healthy" in chosen:
            expect("healthy", *check(hosts, "healthy", run), 0, "ok: 0 errors, 0 warnings")
        if "unshared" in chosen:
            hosts.run(2, "mount", "-t", "tmpfs", "none", shared)
            expect("unshared", *check(hosts, "unshared", run, processes=2), 1, "error: ", "node2", "tmpfs")
            hosts.run(2, "umount", shared)
        if "slow" in chosen:
            shell("ip", "link", "del", f"{PREFIX}v2")
            readable, writable = os.pipe()
            link = os.fork()
            if link == 0:
                relay(2, writable)
            os.read(readable, 1)
            shell("ip", "link", "set", f"{PREFIX}v2", "master", f"{PREFIX}-bridge", "up")
            hosts.address(2)
            expect("slow", *check(hosts, "slow", run), 0, "warning: ", "node2", "latency of")
            os.kill(link, signal.SIGKILL)
            os.waitpid(link, 0)
            hosts.connect(2)
        if "names" in chosen:
            for i in (1, 2):
                hosts.write_hosts(i, "127.0.1.1")
            output, statuses = check(hosts, "names", run)
            expect("names", output, statuses, statuses[0], "node2", "127.0.1.1", "GLOO_SOCKET_IFNAME")
            for i in (1, 2):
                hosts.write_hosts(i)
        if "name2" in chosen:
            hosts.write_hosts(2, "127.0.1.1")
            expect("name2", *check(hosts, "name2", run), 0, "warning: ", "node2", "127.0.1.1", "GLOO_SOCKET_IFNAME")
            hosts.write_hosts(2)
        if "limits" in chosen:
            expect(
                "limits", *check(hosts, "limits", run, before="ulimit -Sn 250;"), 1, "error: ", "node2", "250", "ulimit"
            )
        if "frozen" in chosen:
            expect("frozen", *check(hosts, "frozen", run, during=freeze_second_host), 1, "error: ", "node2", "answer")
        if "data" in chosen:
            output, statuses = check(hosts, "data", run, "data.source=folder", "data.path=/nowhere")
            expect("data", output, statuses, 1, "error: ", "loader", "/nowhere")
    finally:
        hosts.down()
        shutil.rmtree(folder)
    print("\n" + ("\n".join(faults) or "every fault was named"))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
