"""Write files safely, and open files that came from elsewhere."""

import errno
import os
import secrets
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from unite_fast.errors import UserError, require

PARTIAL = ".partial"
"""Suffix of files that are being written, or that a killed process left."""
BEGINNINGS = {
    ".png": b"\x89PNG\r\n\x1a\n",
    ".npz": b"PK\x03\x04",
    ".pt": b"PK\x03\x04",
    ".pth": b"PK\x03\x04",
    ".html": b"<!DOCTYPE html>",
    ".json": b"{",
}
"""First bytes of the files that we write, by suffix."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError (disk full, no permission) into a `UserError` that names `path`; often the OSError names no
    file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def atomic_write(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield the path of a new file in the same folder to write to, and rename it to `path` on success. Until then, and
    after any failure, the old file stays intact. A link at `path` is replaced, not followed.

    Args:
        durable: wait until the file is on the disk, so that a power cut cannot leave an empty one. False for files that
            are many and can be made again.

    Raises:
        UserError: see `writing`; or `path` is a folder, a pipe or a device.
    """
    with writing(path):
        with suppress(FileNotFoundError):
            kind = path.lstat().st_mode
            require(stat.S_ISREG(kind) or stat.S_ISLNK(kind), f"{path} is in the way: it is not a regular file")
        # The name is new and cannot be guessed, so no file and no link of others is in its place.
        partial = path.with_name(f"{_partial_prefix(path)}{secrets.token_hex(8)}{PARTIAL}")
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
        try:
            yield partial
            if durable:
                flush(partial)
            os.replace(partial, path)
            if durable:
                flush(path.parent)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def _partial_prefix(path: Path) -> str:
    # A checksum, because a name may already be as long as the file system allows.
    return f".unite_fast-{zlib.crc32(os.fsencode(path.name)):08x}-"


@contextmanager
def private_folder(partial: Path) -> Iterator[Path]:
    """A new folder beside `partial`, a path from `atomic_write`, for a library that chooses names itself. It is deleted
    at the end."""
    with tempfile.TemporaryDirectory(prefix=partial.stem, suffix=PARTIAL, dir=partial.parent) as folder:
        yield Path(folder)


def remove_partial(path: Path) -> None:
    """Delete what killed processes left of writing `path`. Only for the process that holds the lock on `path`."""
    with suppress(OSError):
        for leftover in path.parent.glob(f"{_partial_prefix(path)}*{PARTIAL}"):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def clear_partial(folder: Path) -> None:
    """Delete what killed processes left in a folder. Only for the process that holds the lock on the folder."""
    if folder.is_symlink():
        return
    with suppress(OSError):
        for leftover in folder.glob(f".unite_fast-*{PARTIAL}"):
            leftover.unlink()


def flush(path: Path) -> None:
    """fsync a file or folder, so that a power cut after a rename cannot leave an empty file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def home_path(path: str | Path) -> Path:
    """The path, with the home folder in place of ~ or ~NAME.

    Raises:
        UserError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{path}: there is no such user; write the whole path, or ./{path} for a name with ~"
        ) from error


def make_folder(path: Path) -> None:
    """Make a folder of a run, unless it exists. A link in its place is refused: a run folder that came from elsewhere
    could lead the files of this run anywhere.

    Raises:
        OSError: it is a link or a file, or no permission.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link; put a folder in its place", os.fspath(path))
    if path.exists() and not path.is_dir():
        raise OSError(errno.ENOTDIR, "it is no folder; move it away", os.fspath(path))
    path.mkdir(parents=True, exist_ok=True)


def open_to_append(path: Path) -> BinaryIO:
    """Open a log to append bytes to; made if it is missing, never followed if it is a link.

    Raises:
        OSError: a link, not a regular file, the same file as one with another name, or no permission.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        if state.st_nlink > 1:
            raise OSError(errno.EMLINK, "it has a second name (a hard link)", os.fspath(path))
        return open(descriptor, "ab", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def check_target(out: Path, suffixes: tuple[str, ...] = (".png", ".npz", ""), sources: tuple = ()) -> None:
    """Check an output path before the work starts; the suffix "" stands for a folder.

    A file that exists is replaced only if it begins like the files that we write there (see `BEGINNINGS`), or is empty.

    Args:
        sources: what the command reads; see `check_not_read`.

    Raises:
        UserError: another suffix; a file in place of a folder, or a folder in place of a file; a file of another kind;
            one of the sources.
    """
    allowed = ", ".join(suffix or "a folder (no suffix)" for suffix in suffixes)
    require(out.suffix in suffixes, f"{out} ends in {out.suffix or 'nothing'}; the output can be: {allowed}")
    require(not out.exists() or out.is_dir() == (not out.suffix), f"{out} is in the way; choose another --out")
    check_not_read(out, *sources)
    if out.suffix:
        check_replaceable(out, BEGINNINGS.get(out.suffix, b""))


def check_replaceable(out: Path, *beginnings: bytes) -> None:
    """Check that a file that exists is one of those that we write, by its first bytes; an empty one is as good as none.

    Raises:
        UserError: a file of another kind, or not a regular file.
    """
    if not out.exists():
        return
    require(not out.is_dir(), f"{out} is in the way: it is a folder; choose another output")
    try:
        with open_regular(out) as file:
            start = file.read(max(map(len, beginnings)))
    except OSError as error:
        raise UserError(f"{out} is in the way: {error.strerror or error}; choose another output") from error
    ours = not start or any(start.startswith(beginning) for beginning in beginnings)
    require(ours, f"{out} is in the way: unite_fast did not write it; move it, or choose another output")


def check_npz(out: Path, member: str) -> None:
    """Check that an .npz or a .pt that exists has a member of this name. Both are zip archives, as many formats are,
    and one of samples may not replace one of statistics.

    Raises:
        UserError: another kind of archive, or a damaged one.
    """
    if not out.is_file() or not out.stat().st_size:
        return
    names = []
    with suppress(zipfile.BadZipFile, OSError, ValueError), zipfile.ZipFile(out) as archive:
        names = archive.namelist()
    require(member in names, f"{out} is in the way: it has no {member}, so it is another file; choose another output")


def check_not_read(out: Path, *sources: str | Path) -> None:
    """Check that an output is not what the command reads, by whatever name.

    Args:
        sources: files, or folders, in which nothing may be written. Others (digits, an address) are ignored.

    Raises:
        UserError: `out` is one of the sources, a link to one, or inside one.
    """
    try:
        for source in map(Path, sources):
            if not os.path.exists(source):  # also one that no system has
                continue
            folder, target = source.resolve(), out.resolve()
            same = target == folder or (out.exists() and out.samefile(source))
            if source.is_dir():
                same = same or folder in target.parents
                if not same and out.is_file() and out.stat().st_nlink > 1:
                    same = any(file.is_file() and out.samefile(file) for file in source.rglob("*"))
            require(not same, f"{out} is what this command reads ({source}); choose another output")
    except (OSError, ValueError, RuntimeError) as error:
        # A loop of links, a name that is too long, a null byte.
        raise UserError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}") from error


def save_text(text: str, out: Path) -> None:
    """Write a text file in UTF-8, atomically; its folder is created if missing.

    Raises:
        UserError: see `writing`.
    """
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # names may hold bytes that are not text


def open_regular(path: str | Path, buffering: int = -1) -> BinaryIO:
    """Open a file for reading bytes, if it is a regular file or a link to one. A pipe could block for ever, and a
    device such as /dev/zero has no end.

    Raises:
        OSError: no such file, no permission, or not a regular file; `strerror` says which.
    """
    # Without O_NONBLOCK, opening a pipe waits for its writer. On regular files the flag has no effect.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        return open(descriptor, "rb", buffering=buffering)
    except BaseException:
        os.close(descriptor)
        raise


def read_small(path: str | Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        OSError: see `open_regular`; or the file is larger.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", os.fspath(path))
    return content
