"""Which loader reads a source: `data.loader`."""

from dataclasses import dataclass

import torch

from unite_fast.data_pipeline import dali
from unite_fast.data_pipeline.image_folder import FolderSource
from unite_fast.data_pipeline.pinning import pinned
from unite_fast.data_pipeline.readers import OpenReader, open_reader
from unite_fast.data_pipeline.shards.source import ShardSource
from unite_fast.data_pipeline.source import Source
from unite_fast.errors import UserError


@dataclass(frozen=True)
class Choice:
    """
    Attributes:
        name: one of `config.LOADERS`, but auto.
        why: one line.
        decoder: "pillow" or "dali": loaders of one decoder give the same pixels.
        reader: what a Loader takes.
    """

    name: str
    why: str
    decoder: str
    reader: OpenReader


def choose_loader(name: str, source: Source, device: torch.device) -> Choice:
    """The loader asked for, or the fastest that fits.

    Raises:
        UserError: it does not fit the data, or is not installed.
    """
    fitting = fitting_loaders(source)
    if name == "auto":
        name, why = _fastest(fitting, device)
    elif name in fitting:
        why = "as data.loader says"
    else:
        raise UserError(f"data.loader {name} cannot read these data: choose auto or {' or '.join(fitting)}")
    if name == "dali":
        return Choice(name, why, "dali", dali.dali_reader(device))
    return Choice(name, why, "pillow", pinned(open_reader, device) if device.type == "cuda" else open_reader)


def fitting_loaders(source: Source) -> tuple[str, ...]:
    if isinstance(source, ShardSource):
        return ("raw",) if source.manifest.format == "raw" else ("webdataset", "dali")
    return ("folder",) if isinstance(source, FolderSource) else ("memory",)


def _fastest(fitting: tuple[str, ...], device: torch.device) -> tuple[str, str]:
    if fitting == ("memory",):
        return "memory", "the data fit in memory"
    if fitting == ("folder",):
        return "folder", "the only one for a folder of pictures; unite-fast shards makes faster data of it"
    if fitting == ("raw",):
        return "raw", "the shards hold pixels, so nothing is decoded"
    if device.type != "cuda":
        return "webdataset", "on a CPU; its pixels are those of a folder"
    if reason := dali.missing():
        return "webdataset", reason
    return "dali", "the GPU decodes"
