"""Which loader reads a source: the setting `data.loader`."""

from dataclasses import dataclass

import torch

from unite_fast.data_pipeline import dali
from unite_fast.data_pipeline.pinning import pinned
from unite_fast.data_pipeline.readers import OpenReader, open_reader
from unite_fast.data_pipeline.source import Source
from unite_fast.errors import UserError

_REASONS = {
    "memory": "reading only copies memory",
    "folder": "the only loader for an image folder; unite-fast shards converts it to a faster format",
    "raw": "the shards hold pixels, so nothing is decoded",
    "source": "the source reads its own samples",
}


@dataclass(frozen=True)
class LoaderChoice:
    """
    Attributes:
        name: one of `config.LOADERS` except auto.
        why: the reason, one line.
        decoder: "dali", or "pillow" for every other loader. Loaders with the same decoder give the same pixels.
        reader: the `reader` argument of Loader.
    """

    name: str
    why: str
    decoder: str
    reader: OpenReader


def choose_loader(name: str, source: Source, device: torch.device) -> LoaderChoice:
    """The loader called `name`; for "auto", the fastest one that can read `source`.

    Raises:
        UserError: the loader cannot read this source, or is not installed.
    """
    if name == "auto":
        name, why = _fastest(source.loaders, device)
    elif name in source.loaders:
        why = "set by data.loader"
    else:
        raise UserError(f"data.loader {name} cannot read these data: choose auto or {' or '.join(source.loaders)}")
    if name == "dali":
        return LoaderChoice(name, why, "dali", dali.dali_reader(device))
    return LoaderChoice(name, why, "pillow", pinned(open_reader, device) if device.type == "cuda" else open_reader)


def _fastest(loaders: tuple[str, ...], device: torch.device) -> tuple[str, str]:
    """Name of the loader, and the reason."""
    if "dali" not in loaders:
        return loaders[0], _REASONS[loaders[0]]
    if device.type != "cuda":
        return "webdataset", "on a CPU; same pixels as an image folder"
    if reason := dali.missing():
        return "webdataset", reason
    return "dali", "the GPU decodes"
