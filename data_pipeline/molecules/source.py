"""Molecules as a source: elements and positions in memory, and the order of an epoch, in groups of one size or not."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unite_fast.data_pipeline.molecules.elements import NUMBERS, SYMBOLS
from unite_fast.data_pipeline.molecules.molecule_set import SPLITS, TRAIN, MoleculeSet
from unite_fast.data_pipeline.molecules.qm9 import TRAIN_SIZES
from unite_fast.data_pipeline.molecules.set_file import read_set
from unite_fast.data_pipeline.source import Source
from unite_fast.data_pipeline.splits import choose_split
from unite_fast.errors import require, shown
from unite_fast.randomness import Philox, Stream, permutation

SYNTHETIC, SYNTHETIC_SCALE = 4096, 1.4
"""Number of synthetic molecules, and standard deviation of their coordinates in Angstrom, as in QM9."""


class MoleculeSource(Source):
    """Molecules in memory. A sample is float32 [atoms, 4]: the number of the element in `elements`, and the position in
    Angstrom; pads are 0. Its label is its number of atoms.

    Attributes:
        molecules: the set.
        elements: symbols; number i in column 0 is `elements[i]`.
        atoms: rows of a sample.
        group: molecules of one size that follow each other in an epoch, see `order`; 0 or 1: no groups.
        sizes: atoms of each molecule, int64 [len].
    """

    workers = "none"
    image_size = 0

    def __init__(
        self, molecules: MoleculeSet, elements: Sequence[str], atoms: int, group: int = 0, title: str = "molecule"
    ):
        """
        Args:
            title: a molecule is called "TITLE INDEX" in messages.

        Raises:
            UserError: no molecules, a molecule has another element or more atoms, or an element is none.
        """
        self.molecules, self.elements, self.atoms, self.group = molecules, tuple(elements), atoms, group
        self.title = title
        self.sizes = molecules.sizes
        self.class_names = [str(size) for size in range(atoms + 1)]
        require(len(molecules) > 0, "there are no molecules")
        self._check_sizes()
        table = np.zeros((len(molecules), atoms, 4), np.float32)
        width = min(atoms, molecules.numbers.shape[1])
        table[:, :width, 0] = self._number_elements()[:, :width]
        table[:, :width, 1:] = molecules.positions[:, :width]
        self._table = torch.from_numpy(table)
        self._groups, self._full = _cut(self.sizes, group) if group > 1 else (np.empty((0, 2), np.int64), 0)

    def _check_sizes(self) -> None:
        row = int(self.sizes.argmax())
        require(
            self.sizes[row] <= self.atoms,
            f"{self.name(row)} has {self.sizes[row]} atoms, more than the {self.atoms} of the model: raise its number "
            "of atoms, or choose smaller molecules",
        )

    def _number_elements(self) -> np.ndarray:
        """The number of each atom's element in `elements`, int64 [len, T]; 0 in pads."""
        place_of = np.full(len(SYMBOLS), -1)
        place_of[0] = 0
        place_of[_atomic_numbers(self.elements)] = np.arange(len(self.elements))
        places = place_of[self.molecules.numbers]
        if (places < 0).any():
            row, atom = np.argwhere(places < 0)[0]
            symbol = SYMBOLS[self.molecules.numbers[row, atom]]
            require(
                False,
                f"{self.name(row)} has {symbol}, which is not one of {' '.join(self.elements)}: add it to the model's "
                "elements, or leave such molecules out",
            )
        return places

    def __len__(self) -> int:
        return len(self.sizes)

    def class_counts(self) -> list[int]:
        return size_histogram(self).tolist()

    def name(self, index: int) -> str:
        return f"{self.title} {self.molecules.index[index]}"

    def fingerprint(self) -> str:
        """SHA-256 of elements, positions and sizes."""
        digest = hashlib.sha256(" ".join(self.elements).encode())
        digest.update(self._table.numpy().data)
        digest.update(np.ascontiguousarray(self.sizes).data)
        return digest.hexdigest()

    def read_into(self, index: int, image: np.ndarray) -> int:
        """Write a molecule to `image`, float32 [atoms, 4], and return its number of atoms."""
        image[:] = self._table[index].numpy()
        return int(self.sizes[index])

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Molecules float32 [n, atoms, 4] and their numbers of atoms, int64 [n], in the order of `indices`."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        return self._table[indices], torch.from_numpy(self.sizes)[indices]

    def order(self, seed: int, epoch: int) -> Tensor:
        """The order of one epoch, int64 [len]; every molecule once.

        Without groups it is a uniformly random permutation. With groups, the molecules of each size are permuted and
        cut into groups of `group`; the full groups come first, in random order, then the rests of each size, also in
        random order.
        """
        count, groups = len(self), len(self._groups)
        # One permutation of molecules and groups: the molecules in it, those of one size, and the groups in it are
        # independent permutations. Without groups it is the usual one.
        drawn = permutation(seed, epoch, count + groups)
        if self.group < 2:
            return drawn
        drawn = drawn.numpy()
        molecules = drawn[drawn < count]
        molecules = molecules[np.argsort(self.sizes[molecules], kind="stable")]
        groups = drawn[drawn >= count] - count
        groups = np.concatenate([groups[groups < self._full], groups[groups >= self._full]])
        return torch.from_numpy(np.concatenate([molecules[start:end] for start, end in self._groups[groups]]))


def _atomic_numbers(elements: Sequence[str]) -> list[int]:
    """The atomic numbers of symbols.

    Raises:
        UserError: there are none, one is no element or stands twice.
    """
    require(len(elements) > 0, "there are no elements; give symbols such as H and C")
    unknown = next((symbol for symbol in elements if symbol not in NUMBERS), None)
    require(unknown is None, f"{shown(unknown)} is no element; the elements are symbols such as H and C")
    require(len(set(elements)) == len(elements), f"an element stands twice in {' '.join(elements)}")
    return [NUMBERS[symbol] for symbol in elements]


def _cut(sizes: np.ndarray, group: int) -> tuple[np.ndarray, int]:
    """Cut molecules that are sorted by size into groups of one size.

    Returns:
        Start and end of each group, int64 [groups, 2], first those of `group` molecules; and the number of these.
    """
    full, short, start = [], [], 0
    for count in np.bincount(sizes).tolist():
        end = start + count
        whole = end - count % group
        full += [(first, first + group) for first in range(start, whole, group)]
        short += [(whole, end)] if whole < end else []
        start = end
    return np.array(full + short, np.int64), len(full)


def open_molecules(
    path: str | Path, split: str, elements: Sequence[str], atoms: int, heavy: int = 0, group: int = 0
) -> MoleculeSource:
    """Molecules of a set's file; see `set_file`.

    Args:
        split: a word for a split, see `splits.words_of`.
        elements, atoms, group: see `MoleculeSource`.
        heavy: keep the molecules with at most so many heavy atoms; 0: keep all.

    Raises:
        UserError: the file is missing or no molecule set; it lacks the split (`splits.NoSplit`); no molecule has so few
            heavy atoms; see also `MoleculeSource`.
    """
    molecules = read_set(path)
    there = {SPLITS[value]: SPLITS[value] for value in np.unique(molecules.split)}
    name = choose_split(there, split, path)
    molecules = molecules.take(molecules.split == SPLITS.index(name))
    if heavy:
        few = molecules.heavy <= heavy
        least = int(molecules.heavy.min())
        require(
            bool(few.any()), f"no molecule of {name} in {path} has at most {heavy} heavy atoms; the least is {least}"
        )
        molecules = molecules.take(few)
    source = MoleculeSource(molecules, elements, atoms, group)
    source.split, source.held_out = name, name != SPLITS[TRAIN]
    return source


def synthetic_molecules(elements: Sequence[str], atoms: int, split: str) -> MoleculeSource:
    """Random molecules for timing: sizes as in QM9's training molecules with at most `atoms` atoms, elements uniform,
    normal coordinates, centred. Each split has its own.

    Raises:
        UserError: no molecule of QM9 has so few atoms, or `split` is no split.
    """
    name = choose_split({word: word for word in SPLITS}, split, "synthetic molecules")
    shares = np.cumsum(TRAIN_SIZES[: atoms + 1])
    require(bool(shares[-1]), f"synthetic molecules have at least 3 atoms, not {atoms}: raise the number of atoms")
    philox = Philox(SPLITS.index(name), 0, torch.arange(SYNTHETIC))
    cells = philox.words(Stream.SYNTHETIC).numpy() * int(shares[-1]) >> 32
    sizes = np.searchsorted(shares, cells, side="right")
    width = int(sizes.max())
    is_atom = np.arange(width) < sizes[:, None]
    kinds = np.array(_atomic_numbers(elements), np.uint8)
    numbers = kinds[philox.words(Stream.SYNTHETIC, (width,), draw=1).numpy() % len(kinds)] * is_atom
    positions = philox.normal(Stream.SYNTHETIC, (width, 3), draw=2).numpy() * SYNTHETIC_SCALE
    positions -= (positions * is_atom[..., None]).sum(1, keepdims=True) / sizes[:, None, None]
    source = MoleculeSource(
        MoleculeSet.of(numbers, positions * is_atom[..., None], sizes), elements, atoms, title="synthetic molecule"
    )
    source.split, source.held_out = name, name != SPLITS[TRAIN]
    return source


def size_histogram(source: MoleculeSource) -> np.ndarray:
    """Number of molecules with 0, 1, ... atoms, int64 [atoms + 1]."""
    return np.bincount(source.sizes, minlength=source.atoms + 1)
