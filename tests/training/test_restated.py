"""The real trainer against an independent restatement (restated.py): weights, averages and metrics of three steps."""

import hashlib
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from unite_fast.checkpoint.reader import load_checkpoint
from unite_fast.data_pipeline import open_source
from unite_fast.distributed.dtensor import copy_full, full_tensor
from unite_fast.interop.names import their_name
from unite_fast.lpips import LINEAR_SHAPES, VGG_SHAPES
from unite_fast.model.unite import UNITE
from unite_fast.recipes import load_config
from unite_fast.training.trainer import train
from unite_fast.utils.files import read_rows

STEPS, BATCH, SIDE = 3, 6, 16
LOSS = 2e-6
"""Relative error of a logged loss, float32 against float64. Measured: at most 4e-7."""
NORM = 2e-5
"""The same of the gradient's norm. Measured: at most 2e-6."""
MOVED = 1e-3
"""Error of a tensor relative to how far it moved. Newton-Schulz raises what float32 rounding leaves in the directions
of small singular values by up to 3.4445^5 = 485, that of 6e-8 to 3e-5. Measured: 2e-5 to 3e-5."""
KINKS = 50
"""With LPIPS these are this many times larger: rounding switches one of VGG16's million ReLUs now and then,
which changes the gradient of a reconstruction by up to 5e-3 (tests/test_lpips.py)."""
NEAREST = 2e-6
"""No pixel may come nearer to its image: float32 could turn its gradient around."""

SETTINGS = (
    "data.source=folder",
    "data.workers=0",
    "data.flip=true",
    "model.image_size=16",
    "model.patch_size=4",
    "model.latent_channels=6",
    "model.num_classes=3",
    "model.encoder.width=24",
    "model.encoder.depth=2",
    "model.encoder.heads=2",
    "model.encoder.in_context_tokens=2",
    "model.encoder.in_context_start=1",
    "model.decoder.width=16",
    "model.decoder.depth=1",
    "model.decoder.heads=2",
    "model.decoder.mlp_width=40",
    "model.decoder.embed_width=20",
    f"train.steps={STEPS}",
    f"train.batch_size={BATCH}",
    "train.log_every=1",
    "train.checkpoint_every=3",
    "train.device=cpu",
    "train.threads=1",
    "train.compile=false",
    "train.precision=float32",
    "sampling.solver=euler",
    "sampling.steps=1",
    # Nothing here is what it is by default, so that no setting can be ignored.
    "objective.flow_draws=2",
    "objective.flow_weight=0.3",
    "objective.time_mean=0.2",
    "objective.time_std=0.9",
    "objective.time_shift=0.6",
    "objective.tokenize_time_max=0.3",
    "objective.decoder_noise_probability=0.4",
    "objective.decoder_noise_time_min=0.6",
    "objective.label_drop=0.35",
    "schedule.lr=2e-3",
    "schedule.lr_2=5e-4",
    "schedule.reference_batch=4",
    "schedule.warmup_steps=0",
    "schedule.hold_until=0",
    "schedule.decay_until=4",
    "optim.clip_norm=0.7",
    "optim.ema_decay=0.6",
    "optim.muon_momentum=0.8",
    "optim.muon_dtype=float32",
    "optim.adamw_betas=0.8,0.95",
    "optim.eps=1e-4",
)
LPIPS_ON = ("perceptual.weight=0.7",)


@pytest.fixture(scope="module")
def restated():
    spec = importlib.util.spec_from_file_location("restated", Path(__file__).with_name("restated.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def released():
    path = Path(__file__).parents[1] / "interop" / "released.py"
    spec = importlib.util.spec_from_file_location("released", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def perceptual_weights() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """VGG16 whose features keep their size from layer to layer, and linear weights."""
    generator = torch.Generator().manual_seed(3)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    vgg = {
        name: normal(shape) * (math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.1)
        for name, shape in VGG_SHAPES.items()
    }
    return vgg, {name: normal(shape).abs() for name, shape in LINEAR_SHAPES.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory, perceptual_weights) -> tuple[str, ...]:
    """Pictures of three classes and the files of LPIPS on disk; the settings that name them."""
    folder = tmp_path_factory.mktemp("restated")
    generator = np.random.default_rng(0)
    for split, count in (("train", 7), ("val", 1)):
        for label in ("a", "b", "c"):
            (folder / "data" / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "data" / split / label / f"{i}.png")
    settings = [f"data.path={folder / 'data'}"]
    for key, weights in zip(("vgg", "lpips"), perceptual_weights, strict=True):
        path = folder / f"{key}.pth"
        torch.save(weights, path)
        settings += [f"perceptual.{key}_path={path}"]
        settings += [f"perceptual.{key}_sha256={hashlib.sha256(path.read_bytes()).hexdigest()}"]
    return tuple(settings)


@pytest.fixture(autouse=True)
def far_from_the_start(monkeypatch) -> None:
    """Start values moved by N(0, 0.1): as created, modulation, gates and output are zero, which would hide mistakes."""
    initialize = UNITE.initialize

    def moved(self, seed: int) -> None:
        initialize(self, seed)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                copy_full(parameter, full_tensor(parameter) + 0.1 * torch.randn(parameter.shape, generator=generator))

    monkeypatch.setattr(UNITE, "initialize", moved)


@pytest.fixture
def settings(files, tmp_path):
    def make(*overrides: str):
        return load_config("digits", (*SETTINGS, *files, f"train.out={tmp_path / 'run'}", *overrides))

    return make


@pytest.fixture
def take(restated, released, perceptual_weights):
    """The restatement's run of the same settings."""

    def run(config, dtype=torch.float64, autocast=False):
        model = UNITE.create(config.model, config.seed)
        weights = {their_name(name): value.detach().clone() for name, value in model.state_dict().items()}
        grid = int(config.model.latent_tokens**0.5)
        table = released.grid_table(grid, config.model.decoder.width)
        weights["decoder.decoder_pos_embed"] = torch.cat([torch.zeros(1, 1, table.shape[-1]), table], 1)
        ours = restated.Restated(released, config, weights, *perceptual_weights, dtype, autocast)
        source = open_source("folder", config.data.path, SIDE, "train")
        order = torch.cat([source.order(config.seed, epoch) for epoch in range(2)])
        for step in range(STEPS):
            ours.step(*source.read(order[step * BATCH : (step + 1) * BATCH]))
        start = {name: weights[name].double() for name in ours.trained}
        return ours, start, len(source)

    return run


def errors(folder: Path, want, start: dict[str, Tensor]) -> dict[str, float]:
    """Of each weight and average in the newest checkpoint, relative to how far it moved."""
    saved = load_checkpoint(folder).tensors
    found = {}
    names = {their_name(name.removeprefix("model.")): name for name in saved if name.startswith("model.")}
    assert names.keys() >= want.trained.keys()
    for theirs, first in start.items():
        name = names[theirs].removeprefix("model.")
        for kind, exact in (("model", want.trained[theirs]), ("ema", want.averages[theirs])):
            exact = exact.detach().double()
            moved = (exact - first).norm()
            assert moved > 1e-5, theirs
            found[f"{kind}.{name}"] = ((saved[f"{kind}.{name}"].double() - exact).norm() / moved).item()
    return found


WAYS = {
    "plain": (),
    "lpips": LPIPS_ON,
    "lpips without dropout": (*LPIPS_ON, "perceptual.dropout=false"),
    "micro-batches": (*LPIPS_ON, "train.micro_batch=2"),
    "another seed, no flip": (*LPIPS_ON, "seed=12345678901", "data.flip=false"),
    "two processes": (*LPIPS_ON, "parallel.strategy=ddp", "train.micro_batch=1"),
    "three processes, sharded": ("parallel.strategy=fsdp",),
    "reference kernels": ("kernels=reference",),
}


@pytest.mark.parametrize("way", WAYS)
def test_three_steps_are_the_restatements(way, settings, take, ranks):
    config = settings(*WAYS[way])
    world = {"two processes": 2, "three processes, sharded": 3}.get(way, 1)
    if world > 1:
        ranks(world, train, config)
    else:
        train(config)
    want, start, images = take(config)
    assert want.nearest > NEAREST
    folder, kinks = Path(config.train.out), KINKS if config.perceptual.weight else 1

    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in want.rows] == [1, 2, 3]
    for row, exact in zip(rows, want.rows, strict=True):
        for name in ("total", "l1", "lpips", "flow"):
            assert row[name] == pytest.approx(exact[name], rel=kinks * LOSS, abs=0), (row["step"], name)
        assert row["grad_norm"] == pytest.approx(exact["grad_norm"], rel=kinks * NORM, abs=0)
        assert row["grad_norm"] > 2 * config.optim.clip_norm  # or clipping would not show
        assert row["lr"] == pytest.approx(exact["lr"], rel=1e-12, abs=0)
        assert row["epoch"] == pytest.approx(row["step"] * BATCH / images, rel=1e-12, abs=0)
        assert row["skipped_steps"] == 0
    assert len({row["lr"] for row in rows}) == STEPS
    assert (rows[0]["lpips"] > 0) == bool(config.perceptual.weight)

    found = errors(folder, want, start)
    worst = max(found, key=found.get)
    print(f"{way}: {worst} {found[worst]:.1e}")
    assert found[worst] <= kinks * MOVED, worst


def test_bfloat16_is_as_far_from_the_truth_as_the_restatements(settings, take):
    """The products really are bfloat16, and nothing else is: three steps end as far from float64's as those of the
    plain program under autocast."""
    config = settings(*LPIPS_ON, "train.precision=bfloat16")
    train(config)
    (exact, start, _), (low, _, _) = take(config), take(config, torch.float32, autocast=True)
    folder = Path(config.train.out)

    ours = errors(folder, exact, start)
    theirs = {}
    for name, weight in low.trained.items():
        true = exact.trained[name].detach()
        theirs[name] = ((weight.detach().double() - true).norm() / (true - start[name]).norm()).item()
    mean = [sum(part.values()) / len(part) for part in (ours, theirs)]
    assert 0.4 < mean[0] / mean[1] < 2.5, mean

    rows = read_rows(folder / "metrics.jsonl")
    for name in ("total", "l1", "lpips", "flow"):
        mine, other = (
            math.sqrt(sum((row[name] / true[name] - 1) ** 2 for row, true in zip(part, exact.rows, strict=True)))
            for part in (rows, low.rows)
        )
        # Three numbers are few to measure an error by: the floor is one rounding to bfloat16.
        assert mine <= 3 * other + 2**-9, name


def test_rows_of_several_steps_are_their_means(settings, take):
    config = settings("train.log_every=3")
    train(config)
    want, _, _ = take(config)
    (row,) = read_rows(Path(config.train.out) / "metrics.jsonl")
    for name in ("total", "l1", "flow", "grad_norm"):
        assert row[name] == pytest.approx(sum(one[name] for one in want.rows) / 3, rel=NORM, abs=0)
    assert row["lr"] == pytest.approx(want.rows[-1]["lr"], rel=1e-12, abs=0)
