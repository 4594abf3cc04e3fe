"""Hosts of a cluster on one machine: namespaces of network, name, mounts and processes, on a switch of their own.

Needs root, iproute2 and util-linux. Nothing of it is visible outside: interfaces, addresses and names exist in these
namespaces only, so several clusters can run side by side. The kernel removes all when this process ends, even by
SIGKILL.
"""

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.77.0"
PROGRAMS = ("ip", "unshare", "nsenter", "setpriv")
# A child of this process ends with it. `--kill-child` does the same for the first process of a host.
_ENDS_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")


def why_missing() -> str:
    """Why this machine cannot have such hosts; empty if it can."""
    if sys.platform != "linux":
        return "needs Linux"
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"needs {', '.join(missing)} (Debian: iproute2, util-linux)"
    if os.getuid():
        return "needs root"
    made = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "ip", "link", "add", "switch", "type", "bridge"],
        capture_output=True,
        text=True,
    )
    return f"needs network namespaces: {made.stderr.strip()}" if made.returncode else ""


@dataclass
class Host:
    number: int
    name: str
    address: str
    holder: subprocess.Popen
    first_process: int
    """Process id, as seen from outside. The host ends with it."""
    hosts_file: Path
    own_line: str
    """The line of its /etc/hosts with its own name."""
    up: bool = True


class Command:
    """A running command on a host. Its output, stdout and stderr together, is in the file `output`."""

    def __init__(self, host: int, process: subprocess.Popen, output: Path):
        self.host, self.process, self.output = host, process, output

    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self) -> int:
        """Returns the exit status."""
        return self.process.wait()

    @property
    def status(self) -> int | None:
        return self.process.poll()

    def printed(self) -> str:
        return self.output.read_text(errors="replace")


class Hosts:
    """Hosts 1 to `count`, named node1 and so on, that share this machine's files. Use it as a context manager.

    Args:
        folder: for the hosts' files and the output of commands.
        debian_names: each host takes its own name for 127.0.1.1, as after an installation of Debian.
        delay: seconds that the switch keeps each packet.
        loss: share of packets that the switch drops.
    """

    def __init__(self, count: int, folder: Path, debian_names: bool = False, delay: float = 0.0, loss: float = 0.0):
        self.folder, self.debian_names = folder, debian_names
        self.hosts: dict[int, Host] = {}
        self.addresses: dict[str, str] = {}
        self.commands: list[Command] = []
        self.relay: subprocess.Popen | None = None
        self.slow = bool(delay or loss)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.switch = self._start("unshare", "--net", "--", "sh", "-c", f"{_BRIDGE}; {_STAY}")
            for _ in range(count):
                self.add()
            if self.slow:
                self._connect_slowly(delay, loss)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, number: int) -> Host:
        return self.hosts[number]

    def add(self, name: str = "") -> int:
        """Make a new host with an address of its own; returns its number.

        Args:
            name: of a host that is gone: the new one takes it over, and all hosts learn its address.
        """
        number = len(self.hosts) + 1
        name, address = name or f"node{number}", f"{NETWORK}.{number}"
        hosts_file = self.folder / f"hosts.{number}"
        hosts_file.touch()
        script = f"hostname {name}; mount --bind {hosts_file} /etc/hosts; ip link set lo up; {_STAY}"
        namespaces = ("--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        holder = self._start("unshare", *namespaces, "--", "sh", "-c", script)
        (first_process,) = children_of(holder.pid)
        own_line = f"127.0.1.1 {name}" if self.debian_names else f"{address} {name}"
        self.hosts[number] = Host(number, name, address, holder, first_process, hosts_file, own_line)
        self.addresses[name] = address
        self._write_names()
        if not self.slow:
            self._on_switch(f"ip link add port{number} type veth peer name eth0 netns {first_process}")
            self._on_switch(f"ip link set port{number} master switch up")
            self._in_network(number, f"ip addr add {address}/24 dev eth0 && ip link set eth0 up")
        return number

    def run(
        self, number: int, command: list[str], env: dict[str, str] | None = None, folder: Path | None = None
    ) -> Command:
        """Start a command on a host.

        Args:
            env: added to this process's environment.
            folder: the working directory; the hosts' folder by default.
        """
        output = self.folder / f"output.{len(self.commands)}.node{number}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                # The folder as the host sees it.
                [*self._enter(number, "-m", "-u", "-n", "-p"), "env", "-C", str(folder or self.folder), *command],
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.commands.append(Command(number, process, output))
        return self.commands[-1]

    def link(self, number: int, up: bool) -> None:
        """Plug in or pull out a host's network cable."""
        self._on_switch(f"ip link set port{number} {'up' if up else 'down'}")

    def power_off(self, number: int) -> None:
        """Cut a host's power: its network is silent, and then all of its processes are gone."""
        host = self.hosts[number]
        if host.up:
            if not self.slow:
                self.link(number, up=False)
            with contextlib.suppress(ProcessLookupError):
                os.kill(host.first_process, signal.SIGKILL)
            host.holder.wait()
            host.up = False

    def hide(self, number: int, folder: Path) -> None:
        """From now on the host has a file system of its own at `folder`, empty at first."""
        subprocess.run([*self._enter(number, "-m"), "mount", "-t", "tmpfs", "none", str(folder)], check=True)

    def mount_file(self, number: int, file: Path, over: Path) -> None:
        """From now on the host sees `file` in the place of `over`."""
        subprocess.run([*self._enter(number, "-m"), "mount", "--bind", str(file), str(over)], check=True)

    def unmount(self, number: int, over: Path) -> None:
        """The host sees the original file again."""
        subprocess.run([*self._enter(number, "-m", "-p"), "umount", str(over)], check=True)

    def processes(self, number: int) -> dict[int, str]:
        """Process ids, as seen from outside, and command lines of a host's running processes, without the first."""
        host, found = self.hosts[number], {}
        if host.up:
            namespace = os.readlink(f"/proc/{host.first_process}/ns/pid")
            for entry in Path("/proc").iterdir():
                with contextlib.suppress(OSError):  # it ended
                    if entry.name.isdecimal() and os.readlink(entry / "ns/pid") == namespace:
                        found[int(entry.name)] = _text_of(entry / "cmdline")
            found.pop(host.first_process, None)
        return {pid: line for pid, line in found.items() if line}  # an ended process has no command line

    def agents(self, number: int) -> list[int]:
        """Process ids of torchrun on a host."""
        return [pid for pid, line in self.processes(number).items() if " -m torch.distributed.run " in line]

    def ranks(self, number: int) -> dict[int, int]:
        """Process ids of the ranks on a host, by rank."""
        found: dict[int, int] = {}
        for agent in self.agents(number):
            for pid in children_of(agent):
                for variable in _text_of(Path(f"/proc/{pid}/environ")).split():
                    if variable.startswith("RANK="):
                        found[int(variable.removeprefix("RANK="))] = pid
        return found

    def close(self) -> None:
        """Remove hosts, commands and network."""
        for host in self.hosts.values():
            if host.up:
                host.holder.kill()  # and with it the first process, which ends all others
                host.holder.wait()
                host.up = False
        for command in self.commands:
            command.wait()
        for helper in (self.relay, getattr(self, "switch", None)):
            if helper is not None:
                helper.kill()
                helper.wait()

    def _start(self, *command: str) -> subprocess.Popen:
        """Start a helper process and wait until it prints "ready"."""
        log = self.folder / "setup.txt"
        with log.open("ab") as errors:
            process = subprocess.Popen(
                [*_ENDS_WITH_US, *command], stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            process.kill()
            raise RuntimeError(f"{' '.join(command)} did not start: {log.read_text()}")
        return process

    def _write_names(self) -> None:
        for host in self.hosts.values():
            others = [f"{address} {name}" for name, address in self.addresses.items() if name != host.name]
            # In place, because the file itself is mounted.
            host.hosts_file.write_text("\n".join(["127.0.0.1 localhost", host.own_line, *others]) + "\n")

    def _connect_slowly(self, delay: float, loss: float) -> None:
        pids = [host.first_process for host in self.hosts.values()]
        self.relay = self._start(sys.executable, __file__, *map(str, (delay, loss, *pids)))
        for number, host in self.hosts.items():
            self._in_network(number, f"ip addr add {host.address}/24 dev eth0 && ip link set eth0 up")

    def _enter(self, number: int, *namespaces: str) -> list[str]:
        return [*_ENDS_WITH_US, "nsenter", "-t", str(self.hosts[number].first_process), *namespaces, "--"]

    def _in_network(self, number: int, script: str) -> None:
        subprocess.run([*self._enter(number, "-n"), "sh", "-c", script], check=True)

    def _on_switch(self, script: str) -> None:
        subprocess.run(["nsenter", "-t", str(self.switch.pid), "-n", "--", *script.split()], check=True)


_BRIDGE = "ip link add switch type bridge && ip link set switch up"
# The kernel then forgets ended processes whose parents are gone, as a host's init would.
_STAY = "echo ready; exec env --ignore-signal=CHLD sleep infinity"


def children_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    with contextlib.suppress(OSError):
        return sorted(map(int, children.read_text().split()))
    return []


def _text_of(file: Path) -> str:
    """A text of /proc with its parts separated by spaces; empty if the process ended."""
    with contextlib.suppress(OSError):
        return file.read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


# A switch that delays and drops packets: this kernel may lack netem. Each host's eth0 is a TAP device of this process.
# https://www.kernel.org/doc/html/latest/networking/tuntap.html
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_CLONE_NEWNET = 0x40000000


def _open_taps(pids: list[int]) -> Iterator[int]:
    libc = ctypes.CDLL(None, use_errno=True)
    for pid in pids:
        with open(f"/proc/{pid}/ns/net") as namespace:
            if libc.setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", b"eth0", _IFF_TAP | _IFF_NO_PI))
        yield tap


def relay_packets(delay: float, loss: float, pids: list[int]) -> None:
    """Pass each packet of a host on to all others, `delay` seconds later or, with probability `loss`, not at all."""
    taps, rng = list(_open_taps(pids)), random.Random(5)
    print("ready", flush=True)
    waiting: list[tuple[float, int, int, bytes]] = []
    while True:
        ready, _, _ = select.select(taps, [], [], max(0.0, waiting[0][0] - time.monotonic()) if waiting else None)
        for tap in ready:
            with contextlib.suppress(OSError):  # the host is off
                packet = os.read(tap, 65536)
                if rng.random() >= loss:
                    heapq.heappush(waiting, (time.monotonic() + delay, len(waiting), tap, packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, source, packet = heapq.heappop(waiting)
            for tap in taps:
                if tap != source:
                    with contextlib.suppress(OSError):
                        os.write(tap, packet)


if __name__ == "__main__":
    relay_packets(float(sys.argv[1]), float(sys.argv[2]), [int(pid) for pid in sys.argv[3:]])
