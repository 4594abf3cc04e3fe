"""Decoding by NVIDIA DALI: nvJPEG on a GPU, its own operators on a CPU.

DALI's readers shuffle in a buffer and cannot start in the middle of an epoch. So ours picks the samples, through the
shards' indices, and DALI decodes, resizes and crops them: the order is exact, like everybody's.
"""

import importlib.util
import io
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from unite_fast.data_pipeline.images import crop_region
from unite_fast.data_pipeline.readers import Bad, Batch, Reader, first_readable
from unite_fast.data_pipeline.shards.source import ShardSource
from unite_fast.data_pipeline.source import UnreadableSample
from unite_fast.errors import UserError


def missing() -> str | None:
    """What is missing to use DALI; None: nothing."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return "NVIDIA DALI is not installed: pip install 'unite-fast[dali]'"
    return None


def dali_reader(device: torch.device) -> Callable[[ShardSource, int, int], Reader]:
    """What a Loader takes as `reader`.

    Raises:
        UserError: DALI is not installed.
    """
    if reason := missing():
        raise UserError(f"data.loader is dali, but {reason}")
    return lambda source, b, workers: DaliReader(source, b, workers, device)


class DaliReader:
    """One thread hands files to DALI, which decodes a batch with `workers` threads of its own or on the GPU."""

    ahead = 2

    def __init__(self, source: ShardSource, b: int, workers: int, device: torch.device):
        self.source, self.b, self.workers, self.device = source, b, workers, device
        self.crop = source.manifest.image_size == 0
        self.known: dict[int, Bad] = {}
        self.begun: deque[Future] = deque()
        self.pipeline = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="unite_fast-dali")

    def begin(self, wanted: list[int]) -> None:
        self.begun.append(self.thread.submit(self.read, wanted))

    def take(self) -> tuple[Batch, list[Bad]]:
        return self.begun.popleft().result()

    def close(self) -> None:
        """Waits for the batch under way."""
        self.begun.clear()
        self.thread.shutdown(wait=True, cancel_futures=True)
        self.pipeline = None

    def read(self, wanted: list[int]) -> tuple[Batch, list[Bad]]:
        bad: list[Bad] = []
        samples = [first_readable(self.source, index, self.source.encoded, self.known, bad) for index in wanted]
        try:
            images = self.decode([data for _, (data, _) in samples])
        except (RuntimeError, UnidentifiedImageError) as error:
            # Either says that a picture of the batch is broken, not which.
            if not self.find_broken([index for index, _ in samples]):
                raise UserError(f"DALI cannot decode what Pillow can: {one_line(error)}; set data.loader") from None
            return self.read(wanted)
        ids = torch.tensor([index for index, _ in samples])
        labels = torch.tensor([label for _, (_, label) in samples])
        return Batch(images, labels, ids), bad

    def decode(self, files: list[memoryview]) -> Tensor:
        """Picture files to uint8 [b, 3, s, s] on the device."""
        if self.pipeline is None:
            self.pipeline = build_pipeline(self.b, self.workers, self.device, self.source.image_size, self.crop)
            self.pipeline.build()
        inputs = {"files": [np.frombuffer(data, np.uint8) for data in files]}
        if self.crop:
            regions = [crop_region(*picture_size(data), self.source.image_size) for data in files]
            inputs["start"] = np.array([region[:2] for region in regions], dtype=np.float32)
            inputs["end"] = np.array([region[2:] for region in regions], dtype=np.float32)
        try:
            for name, values in inputs.items():
                self.pipeline.feed_input(name, values)
            (images,) = self.pipeline.run()
        except RuntimeError:
            self.pipeline = None  # a pipeline that failed once cannot be used again
            raise
        if self.device.type == "cuda":
            # A copy, and done before DALI uses its memory again; this thread can wait, the trainer's goes on.
            copy = torch.from_dlpack(images.as_tensor()).clone()
            torch.cuda.current_stream(self.device).synchronize()
            return copy
        return torch.from_numpy(np.array(images.as_tensor()))

    def find_broken(self, indices: list[int]) -> bool:
        """Enter what Pillow cannot read either as broken."""
        image = np.empty((3, self.source.image_size, self.source.image_size), np.uint8)
        found = False
        for index in indices:
            try:
                self.source.read_into(index, image)
            except UnreadableSample as error:
                self.known[index] = (error.name, error.reason)
                found = True
        return found


def build_pipeline(b: int, threads: int, device: torch.device, size: int, crop: bool):
    """The graph: JPEG or PNG files in, uint8 [b, 3, size, size] out, cropped to that unless they are so already.

    The crop is ADM's as DALI resamples it. Where Pillow halves with a box filter before it goes down to `size` by
    bicubic, this takes one bicubic step with its filter stretched: the same but for a difference that
    tests/data_pipeline/test_dali.py bounds.
    """
    from nvidia.dali import Pipeline, fn, types

    gpu = device.type == "cuda"
    device_id = (device.index or 0) if gpu else None
    pipeline = Pipeline(b, max(1, threads), device_id, prefetch_queue_depth=1)
    with pipeline:
        files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
        images = fn.decoders.image(
            files,
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,  # as ADM's loader, and so every model compared with, does
            jpeg_fancy_upsampling=True,  # as Pillow
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


def picture_size(data: memoryview) -> tuple[int, int]:
    """Width and height, from the header alone."""
    with Image.open(io.BytesIO(data)) as picture:
        return picture.size


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
