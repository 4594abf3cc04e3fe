"""The page as a browser parses it, and the geometry of the interpolations."""

import base64
import io
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import unite_fast
from unite_fast.errors import UserError
from unite_fast.evaluation.gallery import Counts, GallerySettings, SectionBuilder, between_latents, make_gallery
from unite_fast.evaluation.gallery_page import render

VOID = {"meta", "img", "line", "polyline", "br"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects images, links and attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.images, self.links, self.ids, self.rows, self.attributes = [], [], [], set(), {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)
        if "id" in values:
            self.ids.add(values["id"])
            self.section = values["id"]
        if tag == "a":
            self.links.append(values["href"])
        if tag == "img" and "src" in values:
            self.images.append((self.section, values["alt"], values["src"]))

    def handle_startendtag(self, tag, attributes):
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def count(self, section: str) -> int:
        return sum(name == section for name, _, _ in self.images)


def decode(source: str) -> np.ndarray:
    head, _, data = source.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))


@pytest.fixture
def trained(trained_folder):
    return unite_fast.load(trained_folder)


def test_the_page_is_complete_and_needs_no_network(command, trained_folder, tmp_path, mentions):
    out = tmp_path / "new" / "page.html"
    ended = command("gallery", trained_folder, "--out", out, "--per-class", 2, "--scales", "1,2.5")
    assert (ended.status, ended.err) == (0, "")
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert re.search(mentions(len(page.images), f"{out.stat().st_size / 2**20:.1f} MiB", out), ended.out)
    # Ten classes; five of them at two scales; 20 pairs; four paths of nine points, those between real images with both
    # originals. Euler with two steps evaluates at two times; the result is the third image.
    counts = {name: page.count(name) for name in page.ids if name != "curves"}
    assert counts == {
        "samples": 20,
        "guidance": 10,
        "reconstructions": 40,
        "between-images": 44,
        "between-noises": 36,
        "denoising": 12,
    }
    assert page.links == [f"#{name}" for name in (*counts, "curves")] or set(page.links) == {
        f"#{name}" for name in page.ids
    }
    for _, alt, source in page.images:
        assert alt and decode(source).shape == (8, 8, 3)
    addresses = [value for name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in addresses)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text and "image-rendering: pixelated" in text
    assert text.count("<polyline") == 2, "the curves of L1 and flow loss; there is no LPIPS in this run"


def test_the_page_shows_the_outputs_of_the_model(trained, trained_folder):
    settings = GallerySettings(classes=[7, 2], per_class=3, scales=(1.0, 4.0), seed=5, sampling={"steps": 3})
    head, sections = make_gallery(trained, trained_folder, settings)
    by_key = {section.key: section for section in sections}
    assert head["sampling"] == "euler, 3 steps, unguided" and head["seed"] == "5"
    expected = trained.generate([7, 7, 7, 2, 2, 2], seed=5, steps=3)
    shown = [figure.images[0] for row in by_key["samples"].rows for figure in row.figures]
    assert torch.equal(torch.stack(shown), expected)
    for column, scale in enumerate(settings.scales):
        guided = [row.figures[column].images[0] for row in by_key["guidance"].rows]
        assert torch.equal(torch.stack(guided), trained.generate([7, 2], seed=5, steps=3, guidance=scale))
    originals, copies = zip(*(figure.images for figure in by_key["reconstructions"].rows[0].figures), strict=True)
    assert torch.equal(torch.stack(copies), trained.reconstruct(torch.stack(originals), seed=5))
    # The ends of the paths are reconstructions of the two images and samples of the two noises; the denoising ends with
    # the sample.
    paths = [[figure.images[0] for figure in row.figures] for row in by_key["between-images"].rows]
    ends = trained.reconstruct(torch.stack([path[0] for path in paths] + [path[-1] for path in paths]), seed=5)
    for i, (_, first, *_, last, _) in enumerate(paths):
        # Undoing and redoing LayerNorm's affine rounds once, which can move a truncated pixel by a level.
        assert (first.int() - ends[i].int()).abs().max() <= 1
        assert (last.int() - ends[len(paths) + i].int()).abs().max() <= 1
    both = trained.generate([7, 2, 7, 2], seed=5, steps=3)
    for i, row in enumerate(by_key["between-noises"].rows):
        assert torch.equal(row.figures[0].images[0], both[i])
        assert (row.figures[-1].images[0].int() - both[2 + i].int()).abs().max() <= 1, "cos(pi / 2) is 6e-17"
    for i, row in enumerate(by_key["denoising"].rows):
        assert [figure.caption for figure in row.figures] == ["t = 0.00", "t = 0.20", "t = 0.50", "t = 1.00"]
        assert torch.equal(row.figures[-1].images[0], both[i])


def test_the_same_seed_gives_the_same_page(trained, trained_folder):
    pages = [
        render(*make_gallery(trained, trained_folder, GallerySettings(per_class=1, seed=seed, batch=batch)), "today")
        for seed, batch in ((0, 64), (0, 64), (1, 64))
    ]
    assert pages[0] == pages[1]
    assert pages[0] != pages[2]


@pytest.mark.parametrize("solver", ["heun", "multistep", "dopri5"])
def test_every_solver_gives_a_trajectory_from_noise_to_result(trained, solver):
    settings = unite_fast.config.SamplingConfig(solver=solver, steps=4, guidance=2.0, interval=(0.0, 1.0))
    names = [str(i) for i in range(10)]
    builder = SectionBuilder(trained, settings, names, [3], [1.0], Counts.for_size(8), None, 0, 64)
    row = builder.denoising().rows[0].figures
    assert row[0].caption == "t = 0.00" and row[-1].caption == "t = 1.00"
    expected = trained.generate([3], solver=solver, steps=4, guidance=2.0, interval=(0.0, 1.0))
    assert torch.equal(row[-1].images[0], expected[0])


def test_names_cannot_break_out_of_the_page(trained, trained_folder):
    head, sections = make_gallery(trained, trained_folder, GallerySettings(per_class=1, data=None))
    sections[0].rows[0].title = '<script>"&'
    sections[0].rows[0].figures[0].alts[0] = '"><b>'
    page = Page(render({**head, "recipe": "</title><h1>"}, sections, "today"))
    assert page.images[0][1] == '"><b>'
    assert {name for name, _, _ in page.images} == {"samples", "guidance", "between-noises", "denoising"}, (
        "no real images"
    )


def test_real_images_are_called_what_they_are(trained, trained_folder, tmp_path, mentions):
    def text(data):
        sections = make_gallery(trained, trained_folder, GallerySettings(per_class=1, data=str(data)))[1]
        return " ".join(section.text for section in sections)

    for name in ("flat", "apart/train", "apart/val", "alone/train"):
        for label in range(10):
            (tmp_path / name / f"{label}\x1b").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{label}\x1b" / "0.png")
    assert "Held-out images" in text(tmp_path / "apart") and "Training images" in text(tmp_path / "alone")
    assert "Given images" in text(tmp_path / "flat") and "\x1b" not in text(tmp_path / "flat")
    shutil.rmtree(tmp_path / "apart" / "val" / "3\x1b")
    (tmp_path / "apart" / "val" / "four").mkdir()
    with pytest.raises(UserError, match=mentions("four", "--no-real")):
        text(tmp_path / "apart")


def test_a_large_page_stays_small_enough(trained):
    """84 photographs of 256 x 256; their PNGs take about 112 kB each. See the docstring of `Counts.for_size`."""
    counts = Counts.for_size(256)
    guided = counts.guided * len(GallerySettings().scales)
    paths = counts.paths * (counts.points + 2) + 2 * counts.paths * counts.points
    images = counts.classes * counts.per_class + guided + 2 * counts.pairs + paths
    assert images == 84
    assert images * 112e3 * 4 / 3 < 15e6


@pytest.mark.parametrize("s", [0.0, 0.25, 0.5, 1.0])
def test_interpolated_latents_are_results_of_layer_norm(s):
    generator = torch.Generator().manual_seed(0)
    norm = nn.LayerNorm(16).double().requires_grad_(False)
    norm.weight += 0.2 * torch.randn(16, generator=generator)
    norm.bias += 0.2 * torch.randn(16, generator=generator)
    a, b = norm(torch.randn(2, 5, 16, generator=generator).double())
    b[4] = a[4]  # no great circle, and no NaN
    between = between_latents(a, b, s, norm).double()

    def angle(x, y):
        x, y = ((z[:4] - norm.bias) / norm.weight for z in (x, y))
        return torch.nn.functional.cosine_similarity(x, y, dim=-1).clamp(-1, 1).acos()

    free = nn.functional.layer_norm((between - norm.bias) / norm.weight, (16,), eps=norm.eps)
    # LayerNorm does not change its own output, up to its eps (1e-5 beside a variance of 1) and float32.
    assert torch.allclose(free * norm.weight + norm.bias, between, atol=3e-5)
    assert torch.allclose(between[4], a[4], atol=1e-6)
    # The arc from a to b is divided as s : 1 - s. acos makes a rounding of 1e-7 an angle of 4e-4 near zero.
    assert torch.allclose(angle(a, between), s * angle(a, b), atol=1e-3)
    assert torch.allclose(angle(b, between), (1 - s) * angle(a, b), atol=1e-3)


def test_a_channel_without_scale_stays_constant():
    norm = nn.LayerNorm(4).requires_grad_(False)
    norm.weight[1], norm.bias[1] = 0, 0.7
    a, b = norm(torch.tensor([[[1.0, 2, 3, 4]], [[2.0, -1, 5, 0]]]))
    assert torch.equal(between_latents(a, b, 0.3, norm)[:, 1], torch.tensor([0.7]))


def test_interpolated_noise_is_noise(trained):
    """cos a + sin b at the angle of each image: mean 0 and variance 1 everywhere, for independent a and b."""
    builder = SectionBuilder(
        trained, trained.config.sampling, list("0123456789"), [1], [1.0], Counts.for_size(8), None, 0, 64
    )
    noises = []
    builder._sample_latents = lambda labels, noise: noises.append(noise) or torch.zeros_like(noise)
    builder.between_noises()
    (a,), (b,) = builder._noise(2).split(1)
    weights = [(math.cos(angle), math.sin(angle)) for angle in np.linspace(0, math.pi / 2, 9)]
    assert torch.allclose(noises[0], torch.stack([u * a + v * b for u, v in weights]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        (("--classes", "10"), ("class", 10, "0..9")),
        (("--classes", "a"), ("--classes", "'a'")),
        (("--scales", "1,x"), ("--scales", "'1,x'")),
        (("--scales", "nan"), ("--scales", "finite")),
        (("--steps", "0"), ("sampling.steps", "positive")),
        (("--interval", "1,0"), ("sampling.interval", "LOW,HIGH")),
        (("--seed", "-1"), ("seed", -1)),
        (("--batch", "0"), ("batch", 0)),
        (("--data", "/nowhere"), ("/nowhere", "--data", "--no-real")),
        (("--out", "page.png"), ("page.png", ".html")),
    ],
)
def test_mistakes_are_one_line(command, trained_folder, tmp_path, monkeypatch, options, tokens):
    monkeypatch.chdir(tmp_path)
    command("gallery", trained_folder, *options).error(*tokens)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_at_the_path_of_the_page_is_a_mistake(command, trained_folder, tmp_path):
    (tmp_path / "page.html").mkdir()
    command("gallery", trained_folder, "--out", tmp_path / "page.html").error(tmp_path / "page.html", "--out")
