"""The command line, `unite-fast COMMAND`. The commands are in `commands/`."""

import os
import re
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer
from typer.core import TyperGroup

from unite_fast.commands import (
    bench,
    checkpoints,
    cluster,
    data,
    evaluation,
    gallery,
    guidance,
    images,
    molecules,
    planning,
    training,
    tune,
)
from unite_fast.distributed.agent import end_agent, end_agent_if_cut_off
from unite_fast.distributed.environment import Environment, read_environment
from unite_fast.distributed.hosts import name_ranks
from unite_fast.errors import TemporaryError, UserError, printable
from unite_fast.utils.standard_streams import guard_streams, report_lost_output

FIRST_RANK_SECONDS = 10.0
"""Seconds that the other ranks of a machine give the first one to print an error that all have."""

SHARED = ("train", "bench", "tune", "evaluate", "stats", "generate", "search-guidance", "check-cluster")
"""Commands whose processes share the work under torchrun. The others run on rank 0 alone."""
WATCHED_EARLY = ("train", "evaluate", "stats", "generate", "search-guidance")
"""Commands whose processes watch each other before they meet, since they may list data for minutes."""
LONGEST_MESSAGE = 2000
"""Characters of an error; a message from a library may hold a whole file."""


class _Ended(Exception):
    """Carries an exception past typer, which would end the process itself."""


class _Commands(TyperGroup):
    def resolve_command(self, ctx, args: list[str]):
        found = super().resolve_command(ctx, args)
        ranks = read_environment()
        if ranks.world > 1 and found[0] not in SHARED:
            if ranks.rank:
                raise typer.Exit(0)
            sys.stderr.write(f"note: {found[0]} runs in one process; rank 0 of {ranks.world} does it alone\n")
            for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
                os.environ.pop(name, None)
        if ranks.several_machines and found[0] in WATCHED_EARLY:
            from unite_fast.distributed import joining  # imports torch, as these commands do

            joining.begin()
        return found

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, EOFError, OSError) as error:
            raise _Ended from error


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Train and use UNITE, one network that is image tokenizer and latent denoiser.",
)
for module in (
    *(training, cluster, bench, tune, planning, images, evaluation, guidance, gallery, data, molecules, checkpoints),
):
    app.add_typer(module.app)


@app.callback()
def options(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="print the traceback of an error, before or after the command")
    ] = False,
) -> None:
    # `main` takes the option from the arguments, wherever it stands.
    pass


def main() -> None:
    """Run a command. An error becomes one line on stderr: exit status 2 for a `UserError`, 1 for one of ours, whose
    traceback goes into a file."""
    guard_streams()
    threading.excepthook = _report_thread
    words, show_traceback = _read_words(sys.argv[1:])
    try:
        read_environment()
        app(words)
    except SystemExit:
        _end_joining()
        report_lost_output()
        raise
    except BaseException as error:
        cause = error.__cause__ if isinstance(error, _Ended) and error.__cause__ else error
        if show_traceback:
            sys.stderr.write(_traceback(cause))
        _exit(*_explain(cause, show_traceback), cause)


def _read_words(words: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without --traceback, and whether it was there. ~ and ~NAME are the home folder, also after = where
    shells leave them: train.out=~/x, --out=~/x."""
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word != "--traceback"]
    expanded = [
        re.sub(r"^([\w.-]+=|)(~[\w.-]*)(?=/|$)", lambda match: match[1] + os.path.expanduser(match[2]), word)
        for word in (*kept, *words[end:])
    ]
    return expanded, len(kept) < end


def _explain(error: BaseException, shown: bool) -> tuple[str, int]:
    """Message and exit status of an exception. `shown`: its traceback was printed."""
    if isinstance(error, UserError):
        return str(error), error.status
    if isinstance(error, OSError) and error.errno is not None:
        # An error of the file system: no permission, a full disk, a folder in place of a file.
        return f"{error.filename or 'a file'}: {error.strerror or error}", UserError.status
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 1
    if _out_of_memory(error):
        reason = (str(error).split("DefaultCPUAllocator: ")[-1].splitlines() or ["no more to be had"])[0]
        hint = "use a smaller batch (train.micro_batch, --batch) or model"
        return f"out of memory: {reason[:200]}; {hint}", UserError.status
    return f"{type(error).__name__}: {error}; {'see above' if shown else _save_traceback(error)}", 1


def _save_traceback(error: BaseException) -> str:
    """Write a traceback to a new file; returns a clause that names it."""
    try:
        descriptor, path = tempfile.mkstemp(prefix="unite_fast_", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{sys.argv}\n{_traceback(error)}")
    except OSError as failure:
        return f"its traceback cannot be written ({failure.strerror}); the same command with --traceback prints it"
    return f"its traceback is in {path} (--traceback prints it)"


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _report_thread(arguments: threading.ExceptHookArgs) -> None:
    """An exception in a thread does not end the command; print one line. TensorBoard's thread hands its errors to the
    next call, where the run reports them."""
    if not type(arguments.thread).__module__.startswith("tensorboard."):
        reason = printable(str(arguments.exc_value)) or arguments.exc_type.__name__
        sys.stderr.write(f"warning: a thread ended with {arguments.exc_type.__name__}: {reason}\n")


def _exit(message: str, status: int, error: BaseException | None = None) -> NoReturn:
    """Print an error in one line and exit with `status`. Under torchrun, a mistake of the user ends that too.

    Args:
        error: its attribute `raised_by` is the rank from which this one got it; None: the message says so.
    """
    try:
        ranks = read_environment()
    except UserError:
        ranks = Environment()
    _end_joining()
    source = getattr(error, "raised_by", ranks.rank)
    rank = f"{name_ranks([source])}: " if ranks.world > 1 and source is not None else ""
    mistake = isinstance(error, UserError) and status == UserError.status
    if mistake and ranks.several_machines and source == ranks.rank and not _in_process_group():
        from unite_fast.distributed.store import announce_early_mistake  # imports torch

        announce_early_mistake(message)
    if not _in_process_group() and ranks.local_rank:
        # Before the process group exists, the ranks of a machine mostly fail alike. The first one prints, and torchrun
        # then ends the others. If this rank exited before, torchrun would end the first one. A rank that is still here
        # after the wait failed alone.
        time.sleep(FIRST_RANK_SECONDS)
    if source == ranks.rank or ranks.local_rank == 0:
        # One write, so that lines of several processes do not mix.
        sys.stderr.write(f"error: {rank}{printable(message)[:LONGEST_MESSAGE]}\n")
        sys.stderr.flush()
    else:
        # The first rank of this machine prints the error of another rank, and has time for it.
        time.sleep(1)
    if mistake:
        end_agent()
    elif isinstance(error, TemporaryError):
        end_agent_if_cut_off()
    report_lost_output()
    if _in_process_group():
        # Exit at once: the clean-up of Python and PyTorch may wait for dead processes.
        os._exit(status)
    sys.exit(status)


def _end_joining() -> None:
    if joining := sys.modules.get("unite_fast.distributed.joining"):
        joining.end()


def _out_of_memory(error: BaseException) -> bool:
    """Whether a GPU, PyTorch on a CPU, or numpy ran out of memory."""
    torch = sys.modules.get("torch")  # not imported here: only some commands need it
    of_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return of_gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


def _in_process_group() -> bool:
    """Whether this process is in an initialized process group."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
