"""The trainer against an independent restatement (restated.py): weights, averages and metrics of three steps."""

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
from unite_fast.utils.rows import read_rows

STEPS, BATCH, SIDE = 3, 6, 16
LOSS = 2e-6
"""Relative error of a logged loss, float32 against float64. Measured: at most 4e-7."""
NORM = 2e-5
"""Relative error of the gradient norm. Measured: at most 2e-6."""
MOVED = 1e-3
"""Error of a tensor relative to the distance it moved. Newton-Schulz amplifies float32 rounding (6e-8) in directions of
small singular values by up to 3.4445^5 = 485, to 3e-5. Measured: 2e-5 to 3e-5."""
LPIPS_FACTOR = 50
"""With LPIPS, these bounds are larger by this factor: rounding occasionally flips one of VGG16's million ReLUs, which
changes the gradient of a reconstruction by up to 5e-3 (tests/test_lpips.py)."""
MIN_PIXEL_ERROR = 2e-6
"""Every pixel must differ from its image by more than this: below, float32 could flip the sign of its gradient."""

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
    # None of these is the default, so that an ignored setting shows.
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
    """VGG16 weights that keep the scale of the features from layer to layer, and linear weights."""
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
    """Images of three classes and LPIPS weights on disk; returns the settings with their paths."""
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
def perturb_initial_weights(monkeypatch) -> None:
    """Perturb initial weights by N(0, 0.1): modulation, gates and output start at zero, which would hide mistakes."""
    initialize = UNITE.initialize

    def initialize_and_perturb(self, seed: int) -> None:
        initialize(self, seed)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                copy_full(parameter, full_tensor(parameter) + 0.1 * torch.randn(parameter.shape, generator=generator))

    monkeypatch.setattr(UNITE, "initialize", initialize_and_perturb)


@pytest.fixture
def settings(files, tmp_path):
    def make(*overrides: str):
        return load_config("digits", (*SETTINGS, *files, f"train.out={tmp_path / 'run'}", *overrides))

    return make


@pytest.fixture
def restate(restated, released, perceptual_weights):
    """Runs the restatement with a config; returns it, its initial weights and the number of images."""

    def run(config, dtype=torch.float64, autocast=False):
        model = UNITE.create(config.model, config.seed)
        weights = {their_name(name): value.detach().clone() for name, value in model.state_dict().items()}
        grid = int(config.model.latent_tokens**0.5)
        table = released.grid_table(grid, config.model.decoder.width)
        weights["decoder.decoder_pos_embed"] = torch.cat([torch.zeros(1, 1, table.shape[-1]), table], 1)
        restatement = restated.Restated(released, config, weights, *perceptual_weights, dtype, autocast)
        source = open_source("folder", config.data.path, SIDE, "train")
        order = torch.cat([source.order(config.seed, epoch) for epoch in range(2)])
        for step in range(STEPS):
            restatement.step(*source.read(order[step * BATCH : (step + 1) * BATCH]))
        start = {name: weights[name].double() for name in restatement.trained}
        return restatement, start, len(source)

    return run


def errors(folder: Path, expected, start: dict[str, Tensor]) -> dict[str, float]:
    """Errors of weights and averages in the newest checkpoint, relative to the distance each moved."""
    saved = load_checkpoint(folder).tensors
    relative = {}
    names = {their_name(name.removeprefix("model.")): name for name in saved if name.startswith("model.")}
    assert names.keys() >= expected.trained.keys()
    for theirs, first in start.items():
        name = names[theirs].removeprefix("model.")
        for kind, exact in (("model", expected.trained[theirs]), ("ema", expected.averages[theirs])):
            exact = exact.detach().double()
            moved = (exact - first).norm()
            assert moved > 1e-5, theirs
            relative[f"{kind}.{name}"] = ((saved[f"{kind}.{name}"].double() - exact).norm() / moved).item()
    return relative


VARIANTS = {
    "plain": (),
    "lpips": LPIPS_ON,
    "lpips without dropout": (*LPIPS_ON, "perceptual.dropout=false"),
    "micro-batches": (*LPIPS_ON, "train.micro_batch=2"),
    "another seed, no flip": (*LPIPS_ON, "seed=12345678901", "data.flip=false"),
    "two processes": (*LPIPS_ON, "parallel.strategy=ddp", "train.micro_batch=1"),
    "three processes, sharded": ("parallel.strategy=fsdp",),
    "reference kernels": ("kernels=reference",),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_three_steps_match_the_restatement(variant, settings, restate, ranks):
    config = settings(*VARIANTS[variant])
    world = {"two processes": 2, "three processes, sharded": 3}.get(variant, 1)
    if world > 1:
        ranks(world, train, config)
    else:
        train(config)
    expected, start, images = restate(config)
    assert expected.min_pixel_error > MIN_PIXEL_ERROR
    folder, factor = Path(config.train.out), LPIPS_FACTOR if config.perceptual.weight else 1

    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in expected.rows] == [1, 2, 3]
    for row, exact in zip(rows, expected.rows, strict=True):
        for name in ("total", "l1", "lpips", "flow"):
            assert row[name] == pytest.approx(exact[name], rel=factor * LOSS, abs=0), (row["step"], name)
        assert row["grad_norm"] == pytest.approx(exact["grad_norm"], rel=factor * NORM, abs=0)
        assert row["grad_norm"] > 2 * config.optim.clip_norm  # or clipping would not show
        assert row["lr"] == pytest.approx(exact["lr"], rel=1e-12, abs=0)
        assert row["epoch"] == pytest.approx(row["step"] * BATCH / images, rel=1e-12, abs=0)
        assert row["skipped_steps"] == 0
    assert len({row["lr"] for row in rows}) == STEPS
    assert (rows[0]["lpips"] > 0) == bool(config.perceptual.weight)

    relative = errors(folder, expected, start)
    worst = max(relative, key=relative.get)
    print(f"{variant}: {worst} {relative[worst]:.1e}")
    assert relative[worst] <= factor * MOVED, worst


def test_bfloat16_is_as_accurate_as_the_restatement_under_autocast(settings, restate):
    """Matmuls are bfloat16 and nothing else is: after three steps, the distance from float64 is about that of the
    restatement."""
    config = settings(*LPIPS_ON, "train.precision=bfloat16")
    train(config)
    (exact, start, _), (low, _, _) = restate(config), restate(config, torch.float32, autocast=True)
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
        # The floor, one rounding to bfloat16: three steps give only a rough estimate of an error.
        assert mine <= 3 * other + 2**-9, name


def test_a_row_of_several_steps_has_their_means(settings, restate):
    config = settings("train.log_every=3")
    train(config)
    expected, _, _ = restate(config)
    (row,) = read_rows(Path(config.train.out) / "metrics.jsonl")
    for name in ("total", "l1", "flow", "grad_norm"):
        assert row[name] == pytest.approx(sum(one[name] for one in expected.rows) / 3, rel=NORM, abs=0)
    assert row["lr"] == pytest.approx(expected.rows[-1]["lr"], rel=1e-12, abs=0)
