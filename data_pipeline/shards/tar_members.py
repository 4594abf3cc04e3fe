"""Read the members of tar files, and of the tar files in them."""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from unite_fast.data_pipeline.listing import CLUTTER, HIDDEN, LINK, LeftOut, is_clutter
from unite_fast.errors import UserError, reason_of
from unite_fast.utils.files import open_regular

DOTS = "with .. in the path"
NESTED = "that are tar files in a tar file in a tar file"
SPARSE = "that are sparse files"
NO_END = "tar files without an end mark, perhaps cut off"
DATA_AFTER_END = "tar files with data after their end mark, which are not read"
"""Reasons to leave a member out."""
PACKED = (".gz", ".tgz", ".zip", ".xz", ".txz", ".bz2", ".tbz2", ".zst", ".7z", ".rar")
"""Extensions of compressed files."""

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"PK\x03\x04": ("zip", "unzip"),
    b"\xfd7zXZ\x00": ("xz", "unxz"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
"""First bytes -> format, and the command that unpacks it."""
_AFTER_END = 2 * tarfile.RECORDSIZE
"""Bytes after the end mark that are looked at. A tar file is padded with zeros to a multiple of half of them."""


class Member(NamedTuple):
    """A regular file in a tar file.

    Attributes:
        path: "/" between folders, without empty parts and ".".
        offset: from the start of the outer tar file, bytes.
        size: bytes.
    """

    path: str
    offset: int
    size: int


@contextmanager
def open_tar(path: Path) -> Iterator[BinaryIO]:
    """Open a tar file. Errors inside the `with` block, where it is read, become UserErrors.

    Raises:
        UserError: the file is damaged, compressed or not a regular file.
    """
    try:
        with open_regular(path) as file:
            _check_not_compressed(file, str(path))
            yield file
    except (OSError, tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"cannot read the tar file {path} to its end: {reason_of(error)}; fetch it again") from None


def read_members(file: BinaryIO, title: str, left_out: LeftOut) -> Iterator[Member]:
    """The regular files in a tar file and in the tar files in it, each of which counts as a folder of its name.

    Args:
        title: name of the tar file.
        left_out: what is not listed is added to it.
    """
    for name, header in _headers_of_all(file, title, left_out):
        parts = [part for part in name.split("/") if part not in ("", ".")]
        path = "/".join(parts)
        if reason := _reason(header, parts):
            left_out.add(reason, path)
        else:
            yield Member(path, header.offset_data, header.size)


def _check_not_compressed(file: BinaryIO, title: str) -> None:
    place = file.tell()
    start = file.read(8)
    file.seek(place)
    for magic, (kind, command) in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"{title} is compressed ({kind}), so single images in it cannot be read: unpack it with {command}, and "
                "give what it held"
            )


def _headers_of_all(file: BinaryIO, title: str, left_out: LeftOut) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Name and header of each file in a tar file and in the tar files in it."""
    end = file.seek(0, 2)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as outer:
        for member in _headers(outer, end, "it"):
            if not (member.isreg() and member.name.lower().endswith(".tar")):
                yield member.name, member
                continue
            folder = member.name[: -len(".tar")]
            # Opened from the same file object, so its members' offsets count from the start of the outer file.
            file.seek(member.offset_data)
            inner_title, inner_end = f"{member.name} in {title}", member.offset_data + member.size
            _check_not_compressed(file, inner_title)
            with tarfile.open(fileobj=file, mode="r:") as inner:
                for below in _headers(inner, inner_end, f"{member.name} in it"):
                    if below.name.lower().endswith(".tar"):
                        left_out.add(NESTED, f"{folder}/{below.name}")
                    else:
                        yield f"{folder}/{below.name}", below
                _check_end(file, inner.offset, inner_end, inner_title, left_out)
        _check_end(file, outer.offset, end, title, left_out)


def _check_end(file: BinaryIO, place: int, end: int, title: str, left_out: LeftOut) -> None:
    """Look at what stands where tarfile found no more headers: it takes a damaged one for the end.

    Args:
        place: where the end mark should be, bytes.
        end: of the tar file, bytes.

    Raises:
        tarfile.ReadError: it is a damaged header.
    """
    file.seek(place)
    after = file.read(max(0, min(_AFTER_END, end - place)))
    if len(after) < tarfile.BLOCKSIZE:
        left_out.add(NO_END, title)
    elif any(after[: tarfile.BLOCKSIZE]):
        raise tarfile.ReadError(f"a header of {title} is damaged, at byte {place}")
    elif any(after):
        left_out.add(DATA_AFTER_END, title)


def _headers(tar: tarfile.TarFile, end: int, title: str) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar file that ends at the offset `end`, except those of folders."""
    # Without an end mark, the headers of the outer file would follow.
    while (member := tar.next()) is not None and member.offset < end:
        # Otherwise it keeps the headers of all members. The type stubs do not know the attribute.
        tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
        if member.isreg() and member.offset_data + member.size > end:
            # Otherwise the read would run into what comes after.
            raise tarfile.ReadError(f"{title} ends early")
        if not member.isdir():
            yield member


def _reason(header: tarfile.TarInfo, parts: list[str]) -> str:
    """Why a member is left out, whatever its extension; empty if it is not."""
    if any(part.startswith(".") and part != ".." for part in parts):
        return HIDDEN
    if ".." in parts:
        return DOTS
    if any(map(is_clutter, parts[:-1])):
        return CLUTTER
    if not header.isreg():
        return LINK
    return SPARSE if header.issparse() else ""
