"""PyTorch's flight recorder: the last collectives of this process, written when the process hangs or lost contact."""

import threading
from contextlib import suppress
from pathlib import Path

from torch._C import _distributed_c10d as c10d

from unite_fast.utils.files import atomic_write

WRITE_SECONDS = 5.0
"""For the files; the disk may be what hangs."""
# For reading, and for PyTorch's tool (`torchfrtrace FOLDER -p rank_`), which takes NCCL's collectives only.
_DUMPS = {"_dump_nccl_trace_json": ".json", "_dump_nccl_trace": ""}
_DUMPS_WITHOUT_NCCL = {"_dump_fr_trace_json": ".json"}


def dump(folder: Path, rank: int) -> None:
    """Write the collectives that `distributed.launch` lets PyTorch record to FOLDER/rank_N.json, and with NCCL in the
    format of PyTorch's tool to FOLDER/rank_N. Waits at most a few seconds; never fails."""
    thread = threading.Thread(target=_write, args=(folder, rank), daemon=True)
    thread.start()
    thread.join(WRITE_SECONDS)


def _write(folder: Path, rank: int) -> None:
    with suppress(Exception):
        if folder.is_symlink():
            return
        folder.mkdir(exist_ok=True)
        for take, suffix in (_DUMPS if hasattr(c10d, "_dump_nccl_trace") else _DUMPS_WITHOUT_NCCL).items():
            with atomic_write(folder / f"rank_{rank}{suffix}", durable=False) as partial:
                partial.write_bytes(getattr(c10d, take)())
