"""Validation of a model of molecules during training: the shares of valid connected molecules and of stable atoms."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from unite_fast.config import MOLECULES, TRAINING_SAMPLES
from unite_fast.evaluation.molecules.perception import rdkit
from unite_fast.evaluation.molecules.scores import generation_scores
from unite_fast.model.unite import UNITE
from unite_fast.sampling.molecules import draw_sizes, unpack
from unite_fast.training.validation import ValidationCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCORES = ("valid_connected", "atom_stable", "valid", "mol_stable")
"""Fields of a row, see `scores.GENERATION`."""
SHOWN = SCORES[:2]
"""Scores that are drawn, printed and sent to TensorBoard."""


class MoleculeValidation(ValidationCurve):
    """Of molecules with sizes as in training, the same sizes and noise each time. Rank 0 scores them."""

    def open(self, device: torch.device) -> None:
        """
        Raises:
            UserError: RDKit is not installed.
        """
        rdkit("Chem")
        self.count, self.measured = self.config.evaluation.count or TRAINING_SAMPLES[MOLECULES], {}

    def score(self, model: UNITE) -> tuple[dict, int]:
        sizes = draw_sizes(model.size_counts, self.count, self.config.seed)
        own = list(self.samples(model, sizes))
        bad = sum(self.ranks.gather(self.nonfinite))
        if bad:
            return {}, bad
        parts = [part for each in self.ranks.gather(own) for part in each]
        scores = None
        if self.ranks.main:
            order = torch.cat([positions for positions, _ in parts]).argsort()
            atoms = torch.cat([atoms for _, atoms in parts])[order]
            found = generation_scores(unpack(atoms, sizes, self.config.model.symbols))
            scores = {name: found[name] for name in SCORES}
        return self.ranks.broadcast(scores), 0

    def scalars(self, row: dict) -> dict[str, float]:
        return {name: row[name] for name in SHOWN}

    def line(self, row: dict) -> str:
        return ", ".join(f"{name} {row[name]:.1%}" for name in SHOWN)

    def plot(self, axes: "Axes") -> None:
        for name in SHOWN:
            rows = [row for row in self.rows if isinstance(row.get(name), float)]
            shares = 100 * np.array([row[name] for row in rows])
            axes.plot([row["step"] for row in rows], shares, marker="o", markersize=3, label=name)
        if self.rows:
            axes.set(xlabel="step", ylabel=f"%\n{self.rows[-1]['count']} samples", ylim=(0, None))
        axes.legend()
