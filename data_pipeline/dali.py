"""Decoding by NVIDIA DALI: nvJPEG on a GPU, its own operators on a CPU.

DALI's own readers shuffle in a buffer and cannot start in the middle of an epoch. So this reader picks the samples
through the shards' indices, and DALI only decodes, resizes and crops: the order is as exact as with the other loaders.
"""

import importlib.util
import io
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from unite_fast.data_pipeline.images import crop_region
from unite_fast.data_pipeline.readers import Batch, Broken, OpenReader, Reader, first_readable
from unite_fast.data_pipeline.shards.source import ShardSource
from unite_fast.data_pipeline.source import Source, UnreadableSample
from unite_fast.errors import UserError, one_line


def missing() -> str | None:
    """Why DALI cannot be used; None if it can."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return "NVIDIA DALI is not installed: pip install 'unite-fast[dali]'"
    return None


def dali_reader(device: torch.device) -> OpenReader:
    """The `reader` argument of a Loader that decodes on `device`.

    Raises:
        UserError: DALI is not installed.
    """
    if reason := missing():
        raise UserError(f"data.loader is dali, but {reason}")

    def open_dali(source: Source, b: int, workers: int) -> Reader:
        assert isinstance(source, ShardSource), "the only source with the loader dali"
        return DaliReader(source, b, workers, device)

    return open_dali


class DaliReader:
    """One thread passes files to DALI, which decodes a batch with `workers` threads or on the GPU."""

    ahead = 2

    def __init__(self, source: ShardSource, b: int, workers: int, device: torch.device):
        self.source, self.b, self.workers, self.device = source, b, workers, device
        self.crop = source.manifest.image_size == 0
        self.known_broken: dict[int, Broken] = {}
        self.begun: deque[Future] = deque()
        self.pipeline = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="unite_fast-dali")

    def begin(self, indices: list[int]) -> None:
        self.begun.append(self.thread.submit(self.read, indices))

    def take(self) -> tuple[Batch, list[Broken]]:
        return self.begun.popleft().result()

    def close(self) -> None:
        """Waits for the batch that is being read."""
        self.begun.clear()
        self.thread.shutdown(wait=True, cancel_futures=True)
        self.pipeline = None

    def read(self, indices: list[int]) -> tuple[Batch, list[Broken]]:
        broken: list[Broken] = []
        samples = [
            first_readable(self.source, index, self.source.encoded, self.known_broken, broken) for index in indices
        ]
        try:
            images = self.decode([data for _, (data, _) in samples])
        except (RuntimeError, UnidentifiedImageError) as error:
            # Some image of the batch is broken; the error does not say which.
            if not self.find_broken([index for index, _ in samples]):
                raise UserError(
                    f"DALI fails on images that Pillow can read: {one_line(str(error))[:300]}; set data.loader"
                ) from None
            return self.read(indices)
        ids = torch.tensor([index for index, _ in samples])
        labels = torch.tensor([label for _, (_, label) in samples])
        return Batch(images, labels, ids), broken

    def decode(self, files: list[memoryview]) -> Tensor:
        """Decode image files: uint8 [b, 3, s, s] on the device."""
        if self.pipeline is None:
            self.pipeline = build_pipeline(self.b, self.workers, self.device, self.source.image_size, self.crop)
            self.pipeline.build()
        inputs: dict[str, list[np.ndarray] | np.ndarray] = {"files": [np.frombuffer(data, np.uint8) for data in files]}
        if self.crop:
            regions = [crop_region(*encoded_size(data), self.source.image_size) for data in files]
            inputs["start"] = np.array([region[:2] for region in regions], dtype=np.float32)
            inputs["end"] = np.array([region[2:] for region in regions], dtype=np.float32)
        try:
            for name, values in inputs.items():
                self.pipeline.feed_input(name, values)
            (images,) = self.pipeline.run()
        except RuntimeError:
            self.pipeline = None  # after an error a pipeline is unusable
            raise
        if self.device.type == "cuda":
            # Copy, and finish before DALI reuses its memory. Only this thread waits, not the trainer's.
            copy = torch.from_dlpack(images.as_tensor()).clone()
            torch.cuda.current_stream(self.device).synchronize()
            return copy
        return torch.from_numpy(np.array(images.as_tensor()))

    def find_broken(self, indices: list[int]) -> bool:
        """Mark the samples that Pillow cannot read either as broken; returns whether there are any."""
        image = np.empty((3, self.source.image_size, self.source.image_size), np.uint8)
        any_broken = False
        for index in indices:
            try:
                self.source.read_into(index, image)
            except UnreadableSample as error:
                self.known_broken[index] = (error.name, error.reason)
                any_broken = True
        return any_broken


def build_pipeline(b: int, threads: int, device: torch.device, size: int, crop: bool):
    """The DALI graph: JPEG or PNG files in, uint8 [b, 3, size, size] out; `crop` says whether to crop them.

    The crop approximates ADM's: DALI resizes in one bicubic step with a stretched filter, where ADM halves with a box
    filter first. tests/data_pipeline/test_dali.py bounds the difference.
    """
    from nvidia.dali import Pipeline, fn, types  # pyright: ignore[reportMissingImports]  # an optional dependency

    gpu = device.type == "cuda"
    device_id = (device.index or 0) if gpu else None
    pipeline = Pipeline(b, max(1, threads), device_id, prefetch_queue_depth=1)
    with pipeline:
        files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
        images = fn.decoders.image(
            files,
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,  # ignore EXIF, as ADM's loader does
            jpeg_fancy_upsampling=True,  # as Pillow does
        )
        if crop:
            images = fn.resize(
                images,
                roi_start=fn.external_source(name="start", dtype=types.FLOAT, ndim=1),
                roi_end=fn.external_source(name="end", dtype=types.FLOAT, ndim=1),
                size=(size, size),
                interp_type=types.INTERP_CUBIC,
                antialias=True,
            )
        pipeline.set_outputs(fn.transpose(images, perm=[2, 0, 1]))
    return pipeline


def encoded_size(data: memoryview) -> tuple[int, int]:
    """Width and height of an image file, read from its header."""
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
        return image.size
