"""Images that compress like photographs, and shard sets made of them."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unite_fast.data_pipeline.shards.manifest import Manifest
from unite_fast.data_pipeline.shards.write import Settings, make_shards

SIZE = 32


def photograph(seed: int, width: int = 45, height: int = 40) -> Image.Image:
    """Smooth colours with noise."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height), 3)
    grain = random.integers(-9, 10, (height, width, 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + grain).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """41 JPEGs of several sizes in 3 classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(41):
        file = folder / f"class{number % 3}" / f"{number:03d}.jpg"
        file.parent.mkdir(exist_ok=True)
        photograph(number, 33 + number % 50, 40 + number % 31).save(file, quality=90)
    return folder


@pytest.fixture(scope="session")
def shards(image_folder, tmp_path_factory):
    """format -> folder of a shard set of `image_folder`, made once; tests do not change it."""
    made = {}

    def make(format: str) -> Path:
        if format not in made:
            made[format] = tmp_path_factory.mktemp("shards") / format
            make_shards(image_folder, made[format], Settings(format, SIZE, per_shard=9), workers=2)
        return made[format]

    return make


@pytest.fixture
def make(tmp_path):
    """Makes a small shard set of any source; returns its folder and manifest."""

    def run(source: Path, format: str = "raw", workers: int = 1, **options) -> tuple[Path, Manifest]:
        split, labels = options.pop("split", "train"), options.pop("labels", None)
        out = options.pop("out", tmp_path / "set")
        settings = Settings(format, **{"image_size": SIZE, "per_shard": 5} | options)
        return out, make_shards(source, out, settings, workers, split, labels)

    return run


@pytest.fixture
def odd_images(tmp_path) -> Path:
    """A folder with one class of images in unusual modes and formats; names with "jpeg" are RGB or grey JPEGs."""
    folder = tmp_path / "odd" / "a"
    folder.mkdir(parents=True)
    rgb = photograph(3)
    rgb.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    high = np.random.default_rng(1).integers(0, 65536, (40, 45), dtype=np.uint16)
    Image.fromarray(high).save(folder / "16bit.png")
    rgb.quantize(8).save(folder / "palette.png", transparency=bytes((0, 100, 255)))
    rgb.convert("RGBA").save(folder / "rgba.png")
    rgb.save(folder / "png_named.jpg", format="PNG")
    rgb.convert("L").save(folder / "grey.jpeg")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    rgb.save(folder / "rotated.jpeg", exif=rotated)
    rgb.save(folder / "progressive.jpeg", progressive=True)
    return folder.parent


@pytest.fixture
def assert_flat_memory():
    """Reads 50 batches, the first five to warm up, and checks that memory does not grow. A batch is a small epoch."""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("/proc/self/statm does not exist")

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def check(loader):
        used = []
        for _ in range(10):
            for _ in range(5):
                next(loader)
            used.append(resident())
        assert max(used[1:]) <= 1.05 * used[0], used

    return check
