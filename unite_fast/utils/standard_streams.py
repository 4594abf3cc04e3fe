"""stdout and stderr that cannot end a command: closed, on a full disk, or a pipe whose reader left."""

import errno
import io
import os
import sys


class _Tolerant(io.FileIO):
    """A file descriptor to write to. The first error is kept, and what cannot be written is dropped."""

    failure: OSError | None = None

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            return memoryview(data).nbytes


def guard_streams() -> None:
    """From now on an error of stdout or stderr raises nothing: a run is not lost because nobody reads its output."""
    # A closed descriptor would be given to the next file, and what libraries print would go there.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when Python started
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            file = io.BufferedWriter(_Tolerant(stream.fileno(), "w", closefd=False))
            # File names may hold bytes that are not text.
            tolerant = io.TextIOWrapper(
                file,
                stream.encoding,
                "backslashreplace",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, tolerant)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def report_lost_output() -> None:
    """Say on stderr that some output is missing, unless its reader left, as `head` does."""
    sys.stdout.flush()
    failure = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "failure", None)
    if failure is not None and failure.errno not in (errno.EPIPE, errno.EBADF):
        sys.stderr.write(f"warning: some output is lost: {failure.strerror}\n")
        sys.stderr.flush()
