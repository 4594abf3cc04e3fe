"""Images and labels for the trainer: where they come from (sources) and in which order (the loader)."""

from unite_fast.data_pipeline.choose_loader import choose_loader
from unite_fast.data_pipeline.image_folder import read_image
from unite_fast.data_pipeline.loader import Loader
from unite_fast.data_pipeline.open_source import open_source
from unite_fast.data_pipeline.readers import Batch
from unite_fast.data_pipeline.source import Source, UnreadableSample, read_readable

__all__ = [
    "Batch",
    "Loader",
    "Source",
    "UnreadableSample",
    "choose_loader",
    "open_source",
    "read_image",
    "read_readable",
]
