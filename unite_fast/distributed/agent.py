"""torchrun's agent: the process on each machine that starts the ranks, watches and restarts them. Imports no torch."""

import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

from unite_fast.distributed.environment import read_environment, restarts_left
from unite_fast.distributed.reach import answers_within

CUT_OFF = 60.0
"""Seconds. If the machine at which the torchruns meet does not answer for so long, torchrun here is ended."""
MEETING_PORT = 29400
"""Where torchruns meet if --rdzv-endpoint names no port."""
_RUN_ID = "TORCHELASTIC_RUN_ID"


def under_torchrun() -> bool:
    return _RUN_ID in os.environ


def launch_name() -> str:
    """Identifies this launch of torchrun, restarts included; empty without torchrun."""
    name = os.environ.get(_RUN_ID, "")
    # "none" is torchrun's default name.
    return f"{socket.gethostname()}-{os.getppid()}" if name == "none" else name


def agent_process() -> int:
    """Process id of this machine's agent; 0 without torchrun. It changes if the agent ends before this process.

    The agent gives its variables to its children alone, so it is the nearest ancestor without them: torchrun may have
    started a script that starts this process.
    """
    if not under_torchrun():
        return 0
    process = os.getppid()
    while process > 1 and _has_run_id(process):
        process = _parent(process)
    return process


def is_orphan() -> bool:
    """Whether torchrun started this process and has ended: the system's first process has taken its place."""
    return agent_process() == 1 and not _may_be_torchrun(1)


def end_agent() -> None:
    """End this machine's agent and with it all ranks here, because a restart would fail in the same way. Does nothing
    if the agent would not restart them anyway: then it reports the failed rank itself."""
    process = agent_process()
    if process and restarts_left() and _may_be_torchrun(process):
        with suppress(OSError):
            os.kill(process, signal.SIGTERM)


def end_agent_if_cut_off() -> None:
    """End torchrun here if the machine at which the torchruns meet has gone silent: call this after other machines were
    lost. torchrun would wait for it for ever, in a call that only SIGKILL ends.

    It waits `CUT_OFF` seconds for an answer, since after a short outage torchrun restarts the ranks. Has no effect on
    the first process of a container, which SIGKILL from inside does not reach.
    """
    process = agent_process()
    place = _meeting_place(process)
    if process <= 1 or place is None or not read_environment().several_machines or answers_within(*place, 0):
        return
    if read_environment().local_rank == 0:
        sys.stderr.write(
            f"note: {place[0]}, where the torchruns meet, does not answer; torchrun on {socket.gethostname()} is ended "
            f"in {CUT_OFF:g} s if it still does not\n"
        )
        sys.stderr.flush()
    if not answers_within(*place, CUT_OFF) and agent_process() == process:
        with suppress(OSError):
            os.kill(process, signal.SIGKILL)


def _meeting_place(process: int) -> tuple[str, int] | None:
    """Host and port at which torchruns of several machines meet: --rdzv-endpoint of the torchrun with this process id,
    or PET_RDZV_ENDPOINT. None if there is none, or no fixed port."""
    words = _strings(process, "cmdline")
    variable = "PET_RDZV_ENDPOINT="
    set_there = [word for word in _strings(process, "environ") if word.startswith(variable)]
    endpoint = set_there[0].removeprefix(variable) if set_there else ""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option.replace("_", "-") == "--rdzv-endpoint":
            endpoint = value if equals else following
            break
    if not endpoint:
        return None
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint  # imports torch

    with suppress(ValueError):
        host, port = parse_rendezvous_endpoint(endpoint, MEETING_PORT)
        return (host, port) if port else None
    return None


def _may_be_torchrun(process: int) -> bool:
    """Whether a process has loaded PyTorch, as torchrun and similar launchers do, also as the first process of a
    container. Where that cannot be read, any but the first may be."""
    maps = _read(process, "maps")
    return b"libtorch" in maps if maps else process > 1


def _has_run_id(process: int) -> bool:
    return f"\0{_RUN_ID}=".encode() in b"\0" + _read(process, "environ")


def _parent(process: int) -> int:
    with suppress(ValueError, IndexError):
        # After the name in parentheses, which may hold anything: state, parent.
        return int(_read(process, "stat").rpartition(b")")[2].split()[1])
    return 0


def _strings(process: int, name: str) -> list[str]:
    """The words of a file in /proc that ends each with a zero byte."""
    return [os.fsdecode(word) for word in _read(process, name).split(b"\0")]


def _read(process: int, name: str) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{process}/{name}").read_bytes()
    return b""
