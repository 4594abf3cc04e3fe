"""The command line, `unite-fast COMMAND`. The commands are in `commands/`."""

import io
import os
import sys
import time
import traceback
from typing import NoReturn

import typer

from unite_fast.commands import (
    bench,
    checkpoints,
    data,
    evaluation,
    gallery,
    guidance,
    images,
    planning,
    training,
    tune,
)
from unite_fast.errors import UserError

FIRST_RANK_SECONDS = 10.0
"""Seconds that the other ranks of a machine give the first one to print an error that all have."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Train and use UNITE, one network that is image tokenizer and latent denoiser.",
)
for module in (training, bench, tune, planning, images, evaluation, guidance, gallery, data, checkpoints):
    app.add_typer(module.app)


def main() -> None:
    """Run a command. A UserError becomes one line on stderr and its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold bytes that are not text
    try:
        app()
    except UserError as error:
        _exit(str(error), error.status)
    except OSError as error:
        # An error of the file system: no permission, a full disk, a folder in place of a file.
        _exit(f"{error.filename or 'a file'}: {error.strerror or error}", UserError.status)
    except Exception as error:
        if _out_of_memory(error):
            reason = str(error).split("DefaultCPUAllocator: ")[-1].splitlines()[0]
            _exit(
                f"out of memory: {reason[:200]}; use a smaller batch (train.micro_batch, --batch) or model",
                UserError.status,
            )
        if not _in_process_group():
            raise
        _exit(traceback.format_exc(), 1)


def _exit(message: str, status: int) -> NoReturn:
    """Print an error and exit with `status`."""
    distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1
    rank = f"rank {os.environ.get('RANK', '?')}: " if distributed else ""
    if not _in_process_group() and os.environ.get("LOCAL_RANK", "0") != "0":
        # Before the process group exists, the ranks of a machine mostly fail alike. The first one prints, and torchrun
        # then ends the others. If this rank exited before, torchrun would end the first one. A rank that is still here
        # after the wait failed alone.
        time.sleep(FIRST_RANK_SECONDS)
    text = message if status == 1 else " ".join(message.splitlines())
    # One write, so that lines of several processes do not mix.
    sys.stderr.write(f"error: {rank}{text.rstrip()}\n")
    sys.stderr.flush()
    if _in_process_group():
        # Exit at once: the clean-up of Python and PyTorch may wait for dead processes.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _out_of_memory(error: Exception) -> bool:
    """Whether a GPU, PyTorch on a CPU, or numpy ran out of memory."""
    torch = sys.modules.get("torch")  # not imported here: only some commands need it
    of_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return of_gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


def _in_process_group() -> bool:
    """Whether this process is in an initialized process group."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
