"""The molecules that a run's settings name."""

from unite_fast.config import Config
from unite_fast.data_pipeline.molecules.source import MoleculeSource, open_molecules, synthetic_molecules
from unite_fast.errors import require


def molecules_of(config: Config, split: str, path: str = "") -> MoleculeSource:
    """
    Args:
        split: a word for a split, see `splits.words_of`.
        path: of the molecules; empty: `data.path`.

    Raises:
        UserError: `data.source` is none of molecules, or see `open_molecules`.
    """
    data, model, molecules = config.data, config.model, config.molecules
    if data.source == "synthetic" and not path:
        return synthetic_molecules(model.symbols, model.latent_tokens, split)
    require(
        data.source in ("molecules", "synthetic"),
        f"data.source is {data.source}, but model.modality is molecules; set data.source=molecules",
    )
    path = path or data.path
    require(
        bool(path),
        "data.source molecules needs data.path: a file of molecules; unite-fast molecules qm9 qm9.npz makes QM9's",
    )
    return open_molecules(path, split, model.symbols, model.latent_tokens, molecules.heavy, molecules.group)
