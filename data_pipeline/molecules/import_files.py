"""Molecules of any number of files as one set: centred, without duplicates, split by their contents."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from unite_fast.data_pipeline.molecules.frames import Frame, LeftOut
from unite_fast.data_pipeline.molecules.molecule_set import TEST, TRAIN, VALIDATION, MoleculeSet
from unite_fast.data_pipeline.molecules.sdf import read_sdf
from unite_fast.data_pipeline.molecules.set_file import read_set
from unite_fast.data_pipeline.molecules.xyz import read_xyz
from unite_fast.errors import require
from unite_fast.utils.progress import track

SUFFIXES = (".xyz", ".extxyz", ".sdf", ".npz")
RESOLUTION = 1e-3
"""Angstrom. Molecules whose positions agree after rounding to this are one."""

_CENTRED = 1e-5
"""Angstrom. Positions with a mean below this stay as they are, so that a set imported again has the same bits."""


def import_files(paths: Sequence[str | Path]) -> tuple[MoleculeSet, LeftOut]:
    """Read molecules of .xyz, .extxyz, .sdf and .npz (molecule set) files, in the order of `paths`.

    Positions are centred on the unweighted mean of the atoms. Of identical molecules the first is kept; a molecule that
    is turned, or whose atoms stand in another order, is not identical. The split of a molecule depends only on its
    contents (see `split_of`), also in a molecule set with its own split, so more files never move it to another one.
    Its index is its number among all molecules of all files, from 0. Names are kept if every file has them.

    Returns:
        The set, and what was left out.

    Raises:
        UserError: no file, a file of another kind, or one that cannot be read or has no good molecule.
    """
    require(bool(paths), f"give files with molecules: {', '.join(SUFFIXES)}")
    for path in map(Path, paths):
        require(path.suffix.lower() in SUFFIXES, f"{path} is not one of {', '.join(SUFFIXES)}")
    left_out = LeftOut()
    seen: set[bytes] = set()
    frames, splits, index, names = [], [], [], []
    good = 0
    for path in track(map(Path, paths), len(paths), "Reading files"):
        start = good + left_out.broken - 1  # the numbers in a file begin at 1
        for number, frame, name in _read(path, left_out):
            good += 1
            frame = _centre(frame)
            digest = digest_of(*frame)
            if digest in seen:
                left_out.duplicates += 1
                continue
            seen.add(digest)
            frames.append(frame)
            splits.append(split_of(digest))
            index.append(start + number)
            names.append(name)
    molecules = _pad(frames)
    molecules.split = np.array(splits, np.uint8)
    molecules.index = np.array(index, np.int64)
    smiles, inchi = zip(*names, strict=True)
    molecules.smiles = list(smiles) if None not in smiles else []
    molecules.inchi = list(inchi) if None not in inchi else []
    return molecules, left_out


def digest_of(numbers: np.ndarray, positions: np.ndarray) -> bytes:
    """SHA-256 of a molecule's contents: elements, and positions rounded to `RESOLUTION`.

    Args:
        numbers: uint8 [n].
        positions: [n, 3], Angstrom, centred.
    """
    steps = np.rint(positions.astype(np.float64) / RESOLUTION).astype("<i8")
    return hashlib.sha256(numbers.astype(np.uint8).tobytes() + steps.tobytes()).digest()


def split_of(digest: bytes) -> int:
    """The split of a molecule, by the digest as a big-endian integer modulo 10: 0 test, 1 validation, others train."""
    return {0: TEST, 1: VALIDATION}.get(int.from_bytes(digest, "big") % 10, TRAIN)


def _read(path: Path, left_out: LeftOut) -> Iterator[tuple[int, Frame, tuple[str | None, str | None]]]:
    """Number in the file, from 1, the molecule, and SMILES and InChI if known."""
    if path.suffix.lower() == ".npz":
        molecules = read_set(path)
        for row, size in enumerate(molecules.sizes.tolist()):
            names = (
                molecules.smiles[row] if molecules.smiles else None,
                molecules.inchi[row] if molecules.inchi else None,
            )
            yield row + 1, Frame(molecules.numbers[row, :size], molecules.positions[row, :size]), names
    else:
        read = read_sdf if path.suffix.lower() == ".sdf" else read_xyz
        for number, frame in read(path, left_out):
            yield number, frame, (None, None)


def _centre(frame: Frame) -> Frame:
    """Positions float32, with mean 0."""
    positions = frame.positions.astype(np.float64)
    mean = positions.mean(0)
    if (np.abs(mean) >= _CENTRED).any():
        positions = positions - mean
    return Frame(frame.numbers, positions.astype(np.float32))


def _pad(frames: Sequence[Frame]) -> MoleculeSet:
    sizes = np.array([len(numbers) for numbers, _ in frames])
    numbers = np.zeros((len(frames), sizes.max()), np.uint8)
    positions = np.zeros((*numbers.shape, 3), np.float32)
    for row, frame in enumerate(frames):
        numbers[row, : sizes[row]], positions[row, : sizes[row]] = frame
    return MoleculeSet.of(numbers, positions, sizes)
