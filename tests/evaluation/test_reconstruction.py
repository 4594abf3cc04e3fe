"""Scores of the reconstructions of a model whose outputs are known."""

import hashlib
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import unite_fast
from unite_fast.config import PerceptualConfig
from unite_fast.data_pipeline import open_source
from unite_fast.data_pipeline.source import MemorySource
from unite_fast.distributed.process_group import Ranks
from unite_fast.evaluation import metrics, reconstruction
from unite_fast.evaluation.evaluator import Evaluator
from unite_fast.evaluation.pixel_features import fit_pixels
from unite_fast.evaluation.reconstruction import score_reconstructions
from unite_fast.evaluation.reference import make_reference
from unite_fast.evaluation.settings import EvaluationSettings
from unite_fast.lpips import LINEAR_SHAPES, VGG_SHAPES, load_lpips
from unite_fast.utils.progress import no_progress

SIDE = 16


@pytest.fixture(scope="module")
def source() -> MemorySource:
    images = torch.randint(0, 256, (10, SIDE, SIDE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return MemorySource("noise", images, torch.zeros(10, dtype=torch.int64), ["noise"])


@pytest.fixture
def evaluator(source) -> Evaluator:
    features = fit_pixels(source.read(range(10))[0])
    return Evaluator(features, make_reference(source, features, Ranks(), 4, 0))


@pytest.fixture
def lpips_files(tmp_path, monkeypatch) -> PerceptualConfig:
    """Small files with one number per tensor, named by the environment variables."""
    digests = {}
    for kind, variable, shapes in (("vgg", "VGG16", VGG_SHAPES), ("lpips", "LPIPS", LINEAR_SHAPES)):
        path = tmp_path / f"{kind}.pth"
        # 0.1: small enough that features do not grow from layer to layer without bound.
        torch.save({name: torch.full((1,), 0.1).expand(shape) for name, shape in shapes.items()}, path)
        monkeypatch.setenv(f"UNITE_FAST_{variable}", str(path))
        digests[f"{kind}_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return PerceptualConfig(**digests)


def copy(images: torch.Tensor) -> torch.Tensor:
    """Half as bright on the left; the first image is unchanged."""
    copies = images.clone()
    copies[1:, :, :, : SIDE // 2] = images[1:, :, :, : SIDE // 2] // 2
    return copies


def test_scores_are_means_over_all_images(source, evaluator, lpips_files, monkeypatch):
    monkeypatch.setattr(reconstruction, "LPIPS_BATCH", 3)
    model = SimpleNamespace(
        config=SimpleNamespace(perceptual=lpips_files, data=SimpleNamespace(workers=0)),
        network=SimpleNamespace(device=torch.device("cpu")),
        reconstruct=lambda images, seed, batch, first: copy(whole)[first : first + len(images)],
    )
    whole = source.read(range(10))[0]
    scores, (originals, copies) = score_reconstructions(
        model, source, evaluator, EvaluationSettings(batch=4), Ranks(), no_progress
    )
    assert torch.equal(originals, whole[:4]) and torch.equal(copies, copy(whole)[:4])
    pair = whole, copy(whole)
    assert scores["l1"] == pytest.approx(metrics.l1(*pair).mean().item(), rel=1e-12)
    assert scores["ssim"] == pytest.approx(metrics.ssim(*pair).mean().item(), rel=1e-12)
    decibels = metrics.psnr(*pair)
    assert decibels[0] == float("inf")
    # Counted as one level off in one of the 768 values.
    decibels[0] = -10 * torch.log10(torch.tensor(1 / (255**2 * 3 * SIDE**2), dtype=torch.float64))
    assert scores["psnr"] == pytest.approx(decibels.mean().item(), rel=1e-12)
    errors = (10 ** (-decibels / 10)).numpy()
    assert scores["psnr_of_mean_error"] == pytest.approx(-10 * math.log10(errors.mean()), rel=1e-12)
    signed = PerceptualConfig(**{**vars(lpips_files), "input_range": "signed"})
    distances = load_lpips(signed)(*(images.float() / 255 for images in pair))
    assert scores["lpips"] == pytest.approx(distances.mean().item(), rel=1e-5) and scores["lpips"] > 0
    assert scores["class_agreement"] is None
    # Ten images have nine components.
    (note,) = scores["notes"]
    assert note.startswith("10 held-out images for 9 features: ")
    few, (originals, _) = score_reconstructions(
        model, source, evaluator, EvaluationSettings(batch=4, reconstructions=4), Ranks(), no_progress
    )
    # Evenly spaced: the source may be sorted by class.
    assert few["images"] == 4 and torch.equal(originals, whole[[0, 3, 6, 9]])


def test_the_setting_wins_over_the_environment(lpips_files, tmp_path, monkeypatch, mentions):
    paths = {"vgg_path": str(tmp_path / "vgg.pth"), "lpips_path": str(tmp_path / "lpips.pth")}
    for variable in ("UNITE_FAST_VGG16", "UNITE_FAST_LPIPS"):
        monkeypatch.setenv(variable, "/nowhere")
    lpips, (note,) = reconstruction._load_lpips(lpips_files, SIDE, torch.device("cpu"))
    assert lpips is None and re.search(mentions("UNITE_FAST_VGG16", "UNITE_FAST_LPIPS"), note)
    one_missing = replace(lpips_files, **paths | {"vgg_path": "/nowhere"})
    lpips, (note,) = reconstruction._load_lpips(one_missing, SIDE, torch.device("cpu"))
    assert lpips is None and re.search(mentions("perceptual.vgg_path"), note) and "lpips_path" not in note
    lpips, notes = reconstruction._load_lpips(replace(lpips_files, **paths), SIDE, torch.device("cpu"))
    assert lpips is not None and notes == []


def test_the_registers_of_an_image_do_not_depend_on_its_batch(trained_folder):
    model = unite_fast.load(trained_folder)
    images = open_source("digits", "", 8, "test").read(range(6))[0]
    whole = model.reconstruct(images, seed=3)
    assert torch.equal(model.reconstruct(images[2:], seed=3, first=2), whole[2:])
    assert not torch.equal(model.reconstruct(images[2:], seed=3), whole[2:])
