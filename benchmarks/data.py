"""images/s of each loader and of a plain DataLoader with Pillow, measured in turn within one run.

    python benchmarks/data.py
    python benchmarks/data.py --json --workers 2 --images 2000 --data photographs

The photographs are random crops of those in scikit-image and scikit-learn, at ImageNet's usual sizes. Every loader
reads the same images with the same number of workers. A round is one epoch of each loader. Figures are medians over the
rounds; ratios are computed within a round. CPU seconds include the worker processes and their start.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from unite_fast.data_pipeline import Loader, choose_loader, dali, open_source
from unite_fast.data_pipeline.shards.write import Settings, make_shards

SIZE = 256
GPUS, IMAGES_PER_GPU = 8, 487
"""Images/s of one of eight H200 at half of its peak, on UNITE-B."""
NAMES = ("astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field")


def photographs() -> list[Image.Image]:
    from skimage import data
    from sklearn.datasets import load_sample_images

    left, right, _ = data.stereo_motorcycle()
    arrays = [*(getattr(data, name)() for name in NAMES), left, right, *load_sample_images().images]
    return [Image.fromarray(array).convert("RGB") for array in arrays]


def make_photographs(folder: Path, count: int) -> None:
    """Write JPEGs of quality 90 in ten classes, 500 x 375 on average, a quarter of them in portrait format."""
    rng = np.random.default_rng(0)
    photos = photographs()
    for number in range(count):
        width, height = (int(side) for side in rng.normal((500, 375), (60, 40)).clip(260, 700))
        if number % 4 == 3:
            width, height = height, width
        photo = photos[number % len(photos)]
        enlarge = max(width / photo.width, height / photo.height, 1)
        if enlarge > 1:
            photo = photo.resize((int(np.ceil(photo.width * enlarge)), int(np.ceil(photo.height * enlarge))))
        left, top = (int(rng.integers(0, rest + 1)) for rest in (photo.width - width, photo.height - height))
        file = folder / f"class{number % 10}" / f"{number:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        photo.crop((left, top, left + width, top + height)).save(file, quality=90)


class PlainFolder(torch.utils.data.Dataset):
    """The data pipeline of the released code: Pillow, the ADM crop, a random flip, floats in [0, 1]."""

    def __init__(self, folder: Path):
        self.files = sorted(folder.rglob("*.jpg"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.files[index]) as picture:
            image = picture.convert("RGB")
        while min(image.size) >= 2 * SIZE:
            image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
        scale = SIZE / min(image.size)
        image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
        pixels = np.array(image)
        top, left = (pixels.shape[0] - SIZE) // 2, (pixels.shape[1] - SIZE) // 2
        pixels = pixels[top : top + SIZE, left : left + SIZE]
        if torch.rand(()) < 0.5:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float().div(255), index % 10


def plain_batches(folder: Path, batch: int, workers: int) -> Iterator:
    loader = torch.utils.data.DataLoader(PlainFolder(folder), batch, shuffle=True, num_workers=workers, drop_last=True)
    yield from loader


def our_batches(kind: str, path: Path, name: str, batch: int, workers: int) -> Iterator:
    source = open_source(kind, str(path), SIZE, "train")
    choice = choose_loader(name, source, torch.device("cpu"))
    with Loader(source, batch, 0, workers, reader=choice.reader) as loader:
        for _ in range(len(source) // batch):
            yield next(loader)


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def measure(start: Callable[[], Iterator], batch: int) -> tuple[float, float]:
    """images/s from the first batch until the loader is closed, and CPU seconds per 1,000 images of the whole epoch."""
    cpu, batches, first = cpu_seconds(), 0, 0.0
    for _ in start():
        if not batches:
            first = time.perf_counter()
        batches += 1
    seconds = time.perf_counter() - first
    return (batches - 1) * batch / seconds, (cpu_seconds() - cpu) / (batches * batch) * 1000


def loaders(data: Path, batch: int, workers: int) -> dict[tuple[str, str], Callable[[], Iterator]]:
    def ours(kind: str, path: Path, name: str) -> Callable[[], Iterator]:
        return lambda: our_batches(kind, path, name, batch, workers)

    starts = {
        ("plain", "folder"): lambda: plain_batches(data / "folder", batch, workers),
        ("folder", "folder"): ours("folder", data / "folder", "folder"),
    }
    for format in ("original", "cropped-jpeg"):
        starts["webdataset", format] = ours("shards", data / format, "webdataset")
        if dali.missing() is None:
            starts["dali", format] = ours("shards", data / format, "dali")
    starts["raw", "raw"] = ours("shards", data / "raw", "raw")
    return starts


def run(data: Path, images: int, batch: int, workers: int, rounds: int) -> list[dict]:
    if not (data / "folder").exists():
        make_photographs(data / "folder", images)
    for format in ("original", "cropped-jpeg", "raw"):
        make_shards(data / "folder", data / format, Settings(format, SIZE, per_shard=500), workers)
    starts = loaders(data, batch, workers)
    speeds, cpu = {key: [] for key in starts}, {key: [] for key in starts}
    for round_ in range(rounds + 1):
        for key, start in starts.items():
            speed, seconds = measure(start, batch)
            if round_:  # the first round fills the page cache
                speeds[key].append(speed)
                cpu[key].append(seconds)
            print(f"round {round_} {' '.join(key)}: {speed:.0f} images/s", file=sys.stderr, flush=True)
    plain = speeds["plain", "folder"]
    return [
        {
            "loader": key[0],
            "format": key[1],
            "images_per_s": round(statistics.median(speeds[key]), 1),
            "cpu_s_per_1000": round(statistics.median(cpu[key]), 3),
            "ratio_to_plain": round(statistics.median(a / b for a, b in zip(speeds[key], plain, strict=True)), 2),
            "cores_for_8_gpus": round(statistics.median(cpu[key]) * GPUS * IMAGES_PER_GPU / 1000, 2),
            "workers": workers,
            "images": images,
            "rounds": rounds,
        }
        for key in starts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print a list of rows")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="folder to keep photographs and shards in for reuse")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        data = options.data or Path(scratch)
        rows = run(data, options.images, options.batch, options.workers, options.rounds)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("loader", "format", "images/s", "CPU s / 1,000", "to plain", f"cores for {GPUS} x {IMAGES_PER_GPU}/s")
    for row in rows:
        table.add_row(*(str(value) for value in list(row.values())[:6]))
    Console().print(table)


if __name__ == "__main__":
    main()
