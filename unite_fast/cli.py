"""The command line: `unite-fast COMMAND`. The commands themselves are in `commands/`."""

import os
import sys
import traceback

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

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Train UNITE, one network that is image tokenizer and latent denoiser, and use it.",
)
for part in (training, bench, tune, planning, images, evaluation, guidance, gallery, data, checkpoints):
    app.add_typer(part.app)


def main() -> None:
    """Run a command; a user's mistake is one line on stderr and its status, mostly 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text
    try:
        app()
    except UserError as error:
        _leave(str(error), error.status)
    except OSError as error:
        # A file of the user's that the system refuses: a folder in its place, no permission, a full disk.
        _leave(f"{error.filename or 'a file'}: {error.strerror or error}", UserError.status)
    except Exception as error:
        if _out_of_memory(error):
            said = str(error).split("DefaultCPUAllocator: ")[-1].splitlines()[0]
            _leave(
                f"out of memory: {said[:200]}; a smaller batch (train.micro_batch, --batch) or model takes less",
                UserError.status,
            )
        if not _among_others():
            raise
        _leave(traceback.format_exc(), 1)


def _leave(message: str, status: int) -> None:
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    rank = f"rank {os.environ.get('RANK', '?')}: " if several else ""
    # What is wrong before the processes met is wrong for all of a machine; the first of them says it.
    if _among_others() or os.environ.get("LOCAL_RANK", "0") == "0":
        text = message if status == 1 else " ".join(message.splitlines())
        # In one piece, or it would mix with what other processes write.
        sys.stderr.write(f"error: {rank}{text.rstrip()}\n")
        sys.stderr.flush()
    if _among_others():
        # At once: what Python and PyTorch tidy up at the end may wait for processes that are gone.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _out_of_memory(error: Exception) -> bool:
    """Of a GPU, or as PyTorch says it of a CPU, or numpy."""
    torch = sys.modules.get("torch")  # which the commands import that need it
    of_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return of_gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


def _among_others() -> bool:
    """Whether this process has met the other processes of its run."""
    torch = sys.modules.get("torch")  # which the commands import that need it
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
