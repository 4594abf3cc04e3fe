"""The file of a molecule set: an .npz that holds arrays and, if known, the molecules' names.

| member | content |
|---|---|
| Z.npy | atomic numbers, uint8 [m, T], 0 in pads |
| pos.npy | positions in Angstrom, float32 [m, T, 3], 0 in pads |
| n.npy | atoms of each molecule, int16 [m], from 1 to T |
| index.npy | number of each molecule where it came from, int64 [m] |
| split.npy | 0 train, 1 validation, 2 test; uint8 [m] |
| smiles.txt, inchi.txt | optional: UTF-8, a line for each molecule |

m is at least 1, T at most `MOST_ATOMS`.
"""

import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from unite_fast.data_pipeline.molecules.elements import SYMBOLS
from unite_fast.data_pipeline.molecules.molecule_set import LARGEST_COORDINATE, MOST_ATOMS, SPLITS, MoleculeSet
from unite_fast.errors import UserError, reason_of
from unite_fast.utils.files import atomic_write, open_regular, writing
from unite_fast.utils.npz import read_npz

MEMBER = "Z.npy"
"""A member by which a molecule set is known; for `utils.files.check_npz`."""
LONGEST_NAME = 4096
"""Bytes of a SMILES or an InChI, on average."""

_ARRAYS = {
    "Z": ("numbers", np.dtype(np.uint8)),
    "pos": ("positions", np.dtype(np.float32)),
    "n": ("sizes", np.dtype(np.int16)),
    "index": ("index", np.dtype(np.int64)),
    "split": ("split", np.dtype(np.uint8)),
}
"""Member -> field of `MoleculeSet`, and the type in the file."""
_NAMES = {"smiles.txt": "smiles", "inchi.txt": "inchi"}
_LONGEST_REASON = 200
_TIME = (1980, 1, 1, 0, 0, 0)


def read_set(path: str | Path) -> MoleculeSet:
    """Read a file that may have come from elsewhere: every length, type and value is checked, and nothing is unpickled.

    Raises:
        UserError: the file is missing or no molecule set; the message names the first fault.
    """
    path = Path(path)
    try:
        arrays = read_npz(path, _ARRAYS.__contains__)
        for member, (_, dtype) in _ARRAYS.items():
            _expect(member in arrays, f"it has no {member}.npy")
            _expect(arrays[member].dtype == dtype, f"{member}.npy is {arrays[member].dtype}, not {dtype}")
        numbers, positions, sizes, index, split = (arrays[member] for member in _ARRAYS)
        molecules = MoleculeSet(numbers, positions, sizes, split, index)
        _check_arrays(molecules)
        molecules.sizes = molecules.sizes.astype(np.int64)
        for member, field in _NAMES.items():
            setattr(molecules, field, _read_names(path, member, len(molecules)))
    except FileNotFoundError as error:
        raise UserError(
            f"there is no {path}: make it with `unite-fast molecules qm9 {path.name}`, or of your own files"
        ) from error
    except (OSError, ValueError) as error:
        reason = reason_of(error)[:_LONGEST_REASON]  # those of zipfile may quote much of the file
        raise UserError(f"{path} is not a molecule set: {reason}") from error
    return molecules


def check_no_molecules(path: str | Path) -> None:
    """Check, where images are expected, that a file holds no molecules, by its name and its members.

    Raises:
        UserError: it does.
    """
    path, names = Path(path), []
    if path.suffix == ".npz" and path.is_file():
        with suppress(zipfile.BadZipFile, OSError, ValueError), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    if MEMBER in names or (path.suffix in (".xyz", ".extxyz", ".sdf") and path.is_file()):
        raise UserError(
            f"{path} holds molecules, and this is for images; unite-fast molecules makes an .npz of files of "
            "molecules, and unite-fast train qm9_tiny data.path=FILE.npz trains on it"
        )


def write_set(path: str | Path, molecules: MoleculeSet) -> None:
    """Write a file that `read_set` reads; its folder is created if missing, and a file at `path` is replaced.

    Equal molecules give equal bytes, so the members are not compressed: that would depend on the version of zlib.
    Compression would also save little, because digits of coordinates are random.

    Raises:
        UserError: the file cannot be written, or `read_set` would refuse it.
    """
    path = Path(path)
    try:
        _check_arrays(molecules)
        texts = {member: _join_names(getattr(molecules, field), len(molecules)) for member, field in _NAMES.items()}
    except ValueError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for member, (field, dtype) in _ARRAYS.items():
            array = np.ascontiguousarray(getattr(molecules, field), dtype.newbyteorder("<"))
            with archive.open(zipfile.ZipInfo(f"{member}.npy", _TIME), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        for member, text in texts.items():
            if text:
                archive.writestr(zipfile.ZipInfo(member, _TIME), text)


def _expect(condition: object, fault: str) -> None:
    if not condition:
        raise ValueError(fault)


def _check_arrays(molecules: MoleculeSet) -> None:
    """Check shapes and values.

    Raises:
        ValueError: the first fault, with the row of a molecule that has it.
    """
    shape = molecules.numbers.shape
    _expect(len(shape) == 2 and shape[0] > 0 and 0 < shape[1] <= MOST_ATOMS, f"Z.npy has the shape {shape}")
    wanted = {"numbers": shape, "positions": (*shape, 3), "sizes": shape[:1], "index": shape[:1], "split": shape[:1]}
    for member, (field, _) in _ARRAYS.items():
        found = getattr(molecules, field).shape
        _expect(found == wanted[field], f"{member}.npy has the shape {found}, and Z.npy {shape}")
    numbers, sizes = molecules.numbers, molecules.sizes
    is_atom = np.arange(shape[1]) < sizes[:, None]
    _expect_all((sizes >= 1) & (sizes <= shape[1]), f"has a size that is not one of 1 to {shape[1]}")
    _expect_all(molecules.split < len(SPLITS), "has a split that is not 0, 1 or 2")
    _expect_all(((numbers > 0) & (numbers < len(SYMBOLS)) | ~is_atom).all(1), "has an atom that is no element")
    _expect_all(((numbers == 0) | is_atom).all(1), "has an atom beyond its size")
    # Not true for NaN either.
    inside = np.abs(molecules.positions) <= LARGEST_COORDINATE
    _expect_all(np.all(inside, (1, 2)), f"has a position that is not finite, or beyond {LARGEST_COORDINATE:,.0f} A")
    is_zero = (molecules.positions == 0).all(2)
    _expect_all((is_zero | is_atom).all(1), "has a position beyond its size")


def _expect_all(good: np.ndarray, fault: str) -> None:
    """`good`: bool [m]."""
    if not good.all():
        raise ValueError(f"molecule {int(np.argmin(good))} {fault}")


def _join_names(names: list[str], count: int) -> bytes:
    if not names:
        return b""
    _expect(len(names) == count, f"there are {len(names)} names for {count} molecules")
    _expect(not any("\n" in name for name in names), "a name has a line break")
    return "".join(f"{name}\n" for name in names).encode()


def _read_names(path: Path, member: str, count: int) -> list[str]:
    """The lines of a text member; none if there is no such member.

    Raises:
        OSError: the file cannot be read.
        ValueError: the member is damaged, too long, no UTF-8 or has not `count` lines.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            infos = [info for info in archive.infolist() if info.filename == member]
            if not infos:
                return []
            _expect(len(infos) == 1, f"{member} stands twice")
            size = infos[0].file_size
            _expect(size <= LONGEST_NAME * count, f"{member} is too long for {count} molecules")
            with archive.open(infos[0]) as text:
                # With a length: without one, zipfile would decompress all that is there, whatever the size says.
                content = text.read(size)  # at the end of a member, its CRC-32 is compared
        lines = content.decode().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{member} is no UTF-8") from error
    except (OSError, ValueError):
        raise
    except Exception as error:  # zipfile and zlib raise several for damaged files
        raise ValueError(f"{member}: {reason_of(error)}") from error
    _expect(lines.pop() == "" and len(lines) == count, f"{member} must have a line for each of {count} molecules")
    return lines
