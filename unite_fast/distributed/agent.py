"""torchrun's agent: the process on each machine that starts the ranks, watches and restarts them. Imports no torch."""

import os
import signal
import socket
from contextlib import suppress
from pathlib import Path

from unite_fast.distributed.environment import restarts_left

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


def end_agent() -> None:
    """End this machine's agent and with it all ranks here, because a restart would fail in the same way. Does nothing
    if the agent would not restart them anyway: then it reports the failed rank itself."""
    process = agent_process()
    # In a container the agent may be process 1; elsewhere that is the system's.
    if process and restarts_left() and (process > 1 or b"torch" in _read(1, "cmdline")):
        with suppress(OSError):
            os.kill(process, signal.SIGTERM)


def _has_run_id(process: int) -> bool:
    return f"\0{_RUN_ID}=".encode() in b"\0" + _read(process, "environ")


def _parent(process: int) -> int:
    with suppress(ValueError, IndexError):
        # After the name in parentheses, which may hold anything: state, parent.
        return int(_read(process, "stat").rpartition(b")")[2].split()[1])
    return 0


def _read(process: int, name: str) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{process}/{name}").read_bytes()
    return b""
