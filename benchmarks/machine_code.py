"""What the machine code of a compiled Triton kernel does in its loop over rows or tiles."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

LOADS = re.compile(r"\b(LDG|LDGSTS)((?:\.\w+)*) ")
LABEL = re.compile(r"(\.L_x_\d+):")
BRANCH = re.compile(r"\bBRA\b[^`]*`\((\.L_x_\d+)\)")


class Loop(NamedTuple):
    """One turn of the loop that loads the most bytes, or the whole kernel if it has no loop that loads."""

    barriers: int
    loaded_bytes: int
    """Bytes that a thread loads from global memory. Loads that no thread executes are not counted."""
    ahead: bool
    """Whether the loads of a later turn are in flight during a turn: asynchronous copies that it does not wait for."""


def disassemble(cubin: bytes) -> str:
    """SASS, with labels."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm", "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loop(sass: str) -> Loop:
    lines, labels, bodies = sass.splitlines(), {}, []
    for number, line in enumerate(lines):
        if label := LABEL.match(line.strip()):
            labels[label[1]] = number
        elif (branch := BRANCH.search(line)) and branch[1] in labels:
            bodies.append(lines[labels[branch[1]] : number])
    loops = [measure(body) for body in bodies]
    loading = [each for each in loops if each.loaded_bytes]
    return max(loading, key=lambda each: each.loaded_bytes) if loading else measure(lines)


def measure(body: list[str]) -> Loop:
    loaded, ahead = 0, False
    for line in body:
        # An asynchronous copy with the predicate !PT, never, is that of a piece of a row that is all padding.
        if (load := LOADS.search(line)) and "!PT" not in line:
            loaded += width(load[2])
        # DEPBAR.LE SB0, 0x0 waits for all copies.
        ahead |= bool(re.search(r"DEPBAR\.LE SB0, 0x[1-9a-f]", line))
    return Loop(sum("BAR.SYNC" in line for line in body), loaded, ahead)


def width(suffixes: str) -> int:
    """Bytes of a load by the suffixes of its name."""
    for suffix, size in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
        if suffix in suffixes:
            return size
    return 4
