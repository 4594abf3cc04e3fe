"""Training data: sources hold labelled images, the loader batches them in an order that depends only on the seed."""

from unite_fast.data_pipeline.choose_loader import choose_loader
from unite_fast.data_pipeline.image_folder import read_image
from unite_fast.data_pipeline.loader import Loader
from unite_fast.data_pipeline.open_source import detect_source, open_held_out, open_source, register_source
from unite_fast.data_pipeline.readers import Batch
from unite_fast.data_pipeline.source import Source, UnreadableSample, read_readable

__all__ = [
    "Batch",
    "Loader",
    "Source",
    "UnreadableSample",
    "choose_loader",
    "detect_source",
    "open_held_out",
    "open_source",
    "read_image",
    "read_readable",
    "register_source",
]
