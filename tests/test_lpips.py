"""LPIPS against a float64 reference written from the papers, with random weights; dropout masks; errors."""

import hashlib
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unite_fast.config import PerceptualConfig
from unite_fast.errors import UserError
from unite_fast.kernels import backend
from unite_fast.kernels.tap_distance import dropout_mask
from unite_fast.lpips import LINEAR_SHAPES, LPIPS, VGG_SHAPES, load_lpips, tap_shapes
from unite_fast.randomness import Philox, Stream

SIDE = 16  # the smallest that VGG16 can take
SHAPES = tap_shapes(SIDE, SIDE)
MASK_SHAPES = tap_shapes(32, 32)

# Bounds on |actual - float64 reference| / |float64 reference|, both 2-norms, and the largest measured.
FLOAT64 = 1e-12  # 7e-16 for the value, 2e-14 for the gradient
FLOAT32_VALUE = 2e-6  # 3e-7
# The gradient jumps where a ReLU or a pooling switches, and rounding sometimes switches one of 10^6 activations:
# measured 7e-6 without a switch, 5e-3 with one. The float64 test shows that the gradient is right.
FLOAT32_GRADIENT = 0.02
BFLOAT16_VALUE = 0.01  # 1.3e-3; one rounding to 8 bits is at most 4e-3


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vgg() -> dict[str, Tensor]:
    """VGG16 with weights of variance 2 / fan-in, which keeps the features' size from layer to layer."""
    state = {}
    for seed, (name, shape) in enumerate(VGG_SHAPES.items()):
        deviation = math.sqrt(2 / math.prod(shape[1:])) if name.endswith("weight") else 0.1
        state[name] = _normal(shape, seed) * deviation
    return state


@pytest.fixture(scope="module")
def linear() -> dict[str, Tensor]:
    return {name: _normal(shape, 100 + seed).abs() for seed, (name, shape) in enumerate(LINEAR_SHAPES.items())}


@pytest.fixture(scope="module")
def lpips(vgg: dict[str, Tensor], linear: dict[str, Tensor]) -> LPIPS:
    return LPIPS(vgg, linear)


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def recon(image: Tensor) -> Tensor:
    return image + 0.2 * _normal(image.shape, 8)


def _philox(positions: list[int], seed: int = 3, step: int = 5) -> Philox:
    return Philox(seed, step, torch.tensor(positions))


def _masks(philox: Philox, shapes: list[tuple[int, int, int]]) -> list[Tensor]:
    return [dropout_mask(philox, Stream.LPIPS_DROPOUT, layer, shape) for layer, shape in enumerate(shapes)]


def _reference(
    vgg: dict[str, Tensor],
    linear: dict[str, Tensor],
    image: Tensor,
    recon: Tensor,
    signed: bool = False,
    masks: list[Tensor] | None = None,
) -> Tensor:
    """LPIPS in float64, [B], from configuration D of arXiv 1409.1556 and equation 1 of arXiv 1801.03924."""

    def features(pixels: Tensor) -> list[Tensor]:
        # Float32 constants, as in every implementation.
        mean = torch.tensor([-0.030, -0.088, -0.188]).double().view(1, 3, 1, 1)
        deviation = torch.tensor([0.458, 0.448, 0.450]).double().view(1, 3, 1, 1)
        h = pixels.double() * 2 - 1 if signed else pixels.double()
        h = (h - mean) / deviation
        taps = []
        index = 0
        for entry in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512):
            if entry == "M":
                taps.append(h)
                h = F.max_pool2d(h, kernel_size=2, stride=2)
                index += 1
            else:
                weight, bias = vgg[f"features.{index}.weight"].double(), vgg[f"features.{index}.bias"].double()
                assert weight.shape[0] == entry
                h = F.conv2d(h, weight, bias, padding=1).clamp(min=0)
                index += 2
        return [*taps, h]

    total = torch.zeros(image.shape[0], dtype=torch.float64)
    for layer, (x, y) in enumerate(zip(features(image), features(recon), strict=True)):
        x = x / ((x**2).sum(1, keepdim=True) ** 0.5 + 1e-10)
        y = y / ((y**2).sum(1, keepdim=True) ** 0.5 + 1e-10)
        squared = (x - y) ** 2
        if masks is not None:
            squared = squared * masks[layer].double()
        total = total + F.conv2d(squared, linear[f"lin{layer}.model.1.weight"].double()).mean((1, 2, 3))
    return total


def _assert_close(name: str, actual: Tensor, expected: Tensor, bound: float) -> None:
    error = ((actual.double() - expected).norm() / expected.norm()).item()
    assert error <= bound, f"{name}: relative error {error:.2e} above {bound:.0e}"


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("input_range", ["unit", "signed"])
def test_value_and_gradient_match_float64(vgg, linear, image, recon, input_range, masked):
    philox = _philox([0, 1, 2, 3]) if masked else None
    masks = _masks(philox, SHAPES) if philox else None
    cotangent = torch.tensor([1.0, -2.0, 0.5, 3.0])
    expected_recon = recon.double().requires_grad_()
    expected = _reference(vgg, linear, image, expected_recon, input_range == "signed", masks)
    expected.backward(cotangent.double())

    for dtype, value_bound, gradient_bound in (
        (torch.float64, FLOAT64, FLOAT64),
        (torch.float32, FLOAT32_VALUE, FLOAT32_GRADIENT),
    ):
        target = image.to(dtype, copy=True).requires_grad_()
        actual_recon = recon.to(dtype, copy=True).requires_grad_()
        actual = LPIPS(vgg, linear, input_range).to(dtype)(target, actual_recon, philox)
        actual.backward(cotangent.to(dtype))
        assert actual.shape == (4,) and actual.dtype == dtype
        _assert_close("value", actual, expected, value_bound)
        _assert_close("gradient", actual_recon.grad, expected_recon.grad, gradient_bound)
        assert target.grad is None


def test_sides_that_are_not_multiples_of_16(vgg, linear, lpips):
    image, recon = torch.rand(1, 3, 37, 51), torch.rand(1, 3, 37, 51)
    expected = _reference(vgg, linear, image, recon, masks=_masks(_philox([0]), tap_shapes(37, 51)))
    _assert_close("value", lpips(image, recon, _philox([0])), expected, FLOAT32_VALUE)


def test_equal_images_are_at_distance_zero(lpips, image):
    recon = image.clone().requires_grad_()
    distance = lpips(image, recon)
    distance.sum().backward()
    assert torch.equal(distance, torch.zeros(4))
    assert torch.equal(recon.grad, torch.zeros_like(image))


def test_dead_features_give_finite_gradients(linear, image, recon):
    dead = {name: torch.full(shape, 0.0 if name.endswith("weight") else -1.0) for name, shape in VGG_SHAPES.items()}
    recon = recon.clone().requires_grad_()
    distance = LPIPS(dead, linear)(image, recon)
    distance.sum().backward()
    assert torch.equal(distance, torch.zeros(4))
    assert torch.equal(recon.grad, torch.zeros_like(recon))


def test_it_is_frozen_and_always_in_evaluation_mode(lpips, image, recon):
    before = lpips(image, recon)
    lpips.train()
    assert not any(module.training for module in lpips.modules())
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    assert torch.equal(lpips(image, recon), before)


def test_bfloat16_autocast(vgg, linear, lpips, image, recon):
    recon = recon.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        distance = lpips(image, recon)
    distance.sum().backward()
    assert distance.dtype == torch.float32
    assert recon.grad.isfinite().all()
    _assert_close("value", distance, _reference(vgg, linear, image, recon), BFLOAT16_VALUE)


def test_the_triton_kernels_in_bfloat16(vgg, linear):
    """Value and gradient have at most twice the error of the reference in bfloat16, with odd sides from the start."""
    if missing := backend.why_missing("triton"):
        pytest.skip(missing)
    device = "cpu" if backend.interpreted() else "cuda"
    image = torch.rand(2, 3, 17, 19, generator=torch.Generator().manual_seed(9))
    recon = image + 0.2 * _normal(image.shape, 10)
    philox, exact_recon = _philox([4, 7]), recon.double().requires_grad_()
    exact = _reference(vgg, linear, image, exact_recon, masks=_masks(philox, tap_shapes(17, 19)))
    truth = exact.detach(), *torch.autograd.grad(exact.sum(), exact_recon)
    errors = {}
    for name in ("reference", "triton"):
        lpips, leaf = LPIPS(vgg, linear).to(device), recon.to(device).requires_grad_()
        on_device = Philox(philox.seed, philox.step, philox.positions.to(device))
        with backend.using(name), torch.autocast(device, torch.bfloat16):
            value = lpips(image.to(device), leaf, on_device)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        errors[name] = [(x.cpu().double() - y).norm() / y.norm() for x, y in zip((value, gradient), truth, strict=True)]
    for ours, plain in zip(errors["triton"], errors["reference"], strict=True):
        assert ours <= 2 * plain


def test_it_compiles_to_one_graph(lpips, image, recon):
    """No graph break, forward or backward, and the in-place ReLUs survive functionalisation."""
    compiled = torch.compile(lpips.forward, fullgraph=True, backend="aot_eager")
    philox = _philox([0, 1, 2, 3])
    actual_recon, expected_recon = recon.clone().requires_grad_(), recon.clone().requires_grad_()
    actual, expected = compiled(image, actual_recon, philox), lpips(image, expected_recon, philox)
    actual.sum().backward()
    expected.sum().backward()
    _assert_close("value", actual, expected.double(), FLOAT32_VALUE)
    _assert_close("gradient", actual_recon.grad, expected_recon.grad.double(), FLOAT32_GRADIENT)


@pytest.mark.parametrize(
    ("image_shape", "recon_shape", "samples"),
    [
        ((2, 3, 32, 32), (2, 3, 32, 16), 2),
        ((2, 1, 32, 32), (2, 1, 32, 32), 2),
        ((3, 32, 32), (3, 32, 32), 3),
        ((2, 3, 32, 8), (2, 3, 32, 8), 2),
        ((2, 3, 32, 32), (2, 3, 32, 32), 3),
    ],
    ids=["different", "one channel", "no batch", "small", "random numbers of other samples"],
)
def test_wrong_inputs_are_refused(lpips, image_shape, recon_shape, samples):
    with pytest.raises(ValueError, match=r"3, H, W|16 pixels|positions"):
        lpips(torch.zeros(image_shape), torch.zeros(recon_shape), _philox(list(range(samples))))


# Dropout masks


def test_masks_are_the_bits_of_the_words():
    """Bit k of word (h W + w) C/32 + j decides channel 32 j + k of pixel (h, w)."""
    philox = _philox([4, 9])
    for layer, ((c, h, w), mask) in enumerate(zip(MASK_SHAPES, _masks(philox, MASK_SHAPES), strict=True)):
        assert mask.shape == (2, c, h, w) and mask.dtype == torch.uint8
        assert mask.is_contiguous(memory_format=torch.channels_last)
        words = philox.words(Stream.LPIPS_DROPOUT, (h * w * c // 32,), draw=layer)
        for sample, channel, row, column in [(0, 0, 0, 0), (0, 31, 0, 1), (1, 32, 1, 0), (1, c - 1, h - 1, w - 1)]:
            word = int(words[sample, (row * w + column) * (c // 32) + channel // 32])
            assert int(mask[sample, channel, row, column]) == 2 * (word >> channel % 32 & 1)


def test_masks_keep_half():
    masks = _masks(_philox(list(range(8))), MASK_SHAPES)
    for layer, mask in enumerate(masks):
        assert set(mask.unique().tolist()) == {0, 2}
        # Five standard deviations of the mean of a fair coin. The draws are fixed.
        bound = 5 / math.sqrt(mask.numel())
        assert abs(mask.double().mean().item() - 1) < bound, f"layer {layer}"
        # Each of the 32 bits of the words is set equally often.
        by_bit = mask.double().permute(0, 2, 3, 1).reshape(-1, 32).mean(0)
        assert (by_bit - 1).abs().max() < bound * math.sqrt(32), f"layer {layer}"


def test_masks_depend_on_seed_step_position_and_layer_only():
    whole = _masks(_philox([0, 1, 2, 3]), MASK_SHAPES)
    first, second = _masks(_philox([0, 1]), MASK_SHAPES), _masks(_philox([2, 3]), MASK_SHAPES)
    for mask, upper, lower in zip(whole, first, second, strict=True):
        assert torch.equal(mask, torch.cat([upper, lower]))
    for other in (_philox([0, 1], seed=4), _philox([0, 1], step=6), _philox([2, 1])):
        for mask, changed in zip(first, _masks(other, MASK_SHAPES), strict=True):
            assert not torch.equal(mask[0], changed[0])
    same_shape = _masks(_philox([0]), [(64, 8, 8)] * 2)
    assert not torch.equal(*same_shape)


def test_distance_with_masks_does_not_depend_on_the_batch(lpips, image, recon):
    whole = lpips(image, recon, _philox([0, 1, 2, 3]))
    parts = [lpips(image[i : i + 2], recon[i : i + 2], _philox([i, i + 1])) for i in range(0, 4, 2)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=FLOAT32_VALUE, atol=0)


def test_dropout_keeps_the_mean(lpips, image, recon, monkeypatch):
    plain = lpips(image, recon)
    philox = _philox([0, 1, 2, 3])
    dropped = lpips(image, recon, philox)
    # The distance is linear in the masks, and a mask and its complement have mean 1.
    words = Philox.words
    monkeypatch.setattr(Philox, "words", lambda *arguments: 2**32 - 1 - words(*arguments))
    halves = dropped + lpips(image, recon, philox)
    monkeypatch.undo()
    torch.testing.assert_close(halves / 2, plain, rtol=FLOAT32_VALUE, atol=0)

    draws = 32
    one = slice(0, 1)
    distances = lpips(
        image[one].expand(draws, -1, -1, -1),
        recon[one].expand(draws, -1, -1, -1),
        _philox(list(range(draws))),
    )
    assert distances.std() > 0
    assert abs(distances.mean() - plain[0]) < 4 * distances.std() / math.sqrt(draws)


# Files and configuration


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _tiny(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of the right shapes that share one element, so that the file is small."""
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}


def _config(vgg: Path, linear: Path, **changes) -> PerceptualConfig:
    named = {
        "vgg_path": str(vgg),
        "lpips_path": str(linear),
        "vgg_sha256": _sha256(vgg),
        "lpips_sha256": _sha256(linear),
    }
    return PerceptualConfig(**{"weight": 1.0, **named, **changes})


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("UNITE_FAST_VGG16", raising=False)
    monkeypatch.delenv("UNITE_FAST_LPIPS", raising=False)


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    vgg, linear = tmp_path / "vgg16.pth", tmp_path / "linear.pth"
    torch.save(_tiny(VGG_SHAPES), vgg)
    torch.save(_tiny(LINEAR_SHAPES), linear)
    return vgg, linear


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_weights_are_loaded(tmp_path, monkeypatch, vgg, linear, lpips, image, recon, zipped):
    """Paths from settings and from the environment; both formats, since the published files predate torch 1.6."""
    vgg_path, linear_path = tmp_path / "vgg16.pth", tmp_path / "linear.pth"
    classifier = {"classifier.0.weight": torch.ones(2, 2)}
    torch.save({**vgg, **classifier}, vgg_path, _use_new_zipfile_serialization=zipped)
    torch.save(linear, linear_path, _use_new_zipfile_serialization=zipped)
    config = _config(vgg_path, linear_path)
    if not zipped:
        monkeypatch.setenv("UNITE_FAST_VGG16", str(vgg_path))
        monkeypatch.setenv("UNITE_FAST_LPIPS", str(linear_path))
        config = PerceptualConfig(
            weight=1.0, vgg_sha256=config.vgg_sha256[:8].upper(), lpips_sha256=config.lpips_sha256[:8].upper()
        )
    assert torch.equal(load_lpips(config)(image, recon), lpips(image, recon))


def test_the_input_range_is_passed_on(files):
    assert load_lpips(_config(*files, input_range="signed")).input_range == "signed"


def _error(config: PerceptualConfig) -> str:
    with pytest.raises(UserError) as caught:
        load_lpips(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_unset_path_is_refused(files):
    message = _error(PerceptualConfig(weight=1.0))
    for part in ("perceptual.vgg_path", "vgg16-397923af.pth", "UNITE_FAST_VGG16"):
        assert part in message
    message = _error(_config(*files, lpips_path=""))
    for part in ("perceptual.lpips_path", "vgg.pth", "weights/v0.1", "UNITE_FAST_LPIPS"):
        assert part in message


def test_a_missing_file_is_named(files, tmp_path, monkeypatch):
    absent = str(tmp_path / "absent.pth")
    message = _error(_config(*files, vgg_path=absent))
    assert message.startswith("perceptual.vgg_path:") and absent in message and "vgg16-397923af.pth" in message
    monkeypatch.setenv("UNITE_FAST_LPIPS", str(tmp_path))
    assert _error(_config(*files, lpips_path="")).startswith("UNITE_FAST_LPIPS:")


def test_a_wrong_size_is_refused(files):
    """With a published digest the size is checked first, which is faster."""
    size = files[0].stat().st_size
    message = _error(_config(*files, vgg_sha256=PerceptualConfig().vgg_sha256))
    for part in (f"{size} bytes", "553433881", "truncated", "perceptual.vgg_sha256"):
        assert part in message
    assert "553433881" in _error(_config(*files, vgg_sha256="397923af"))
    assert "7289" in _error(_config(*files, lpips_sha256=PerceptualConfig().lpips_sha256))


def test_a_wrong_digest_is_refused(files):
    digest = _sha256(files[1])
    message = _error(_config(*files, lpips_sha256="0123456789abcdef"))
    for part in (digest, "0123456789abcdef", "perceptual.lpips_sha256"):
        assert part in message


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04 cut off"], ids=["empty", "page", "cut zip"])
def test_a_file_that_torch_did_not_save_is_refused(files, content):
    files[0].write_bytes(content)
    assert "torch.save" in _error(_config(*files))


def test_a_file_without_named_tensors_is_refused(files):
    torch.save([torch.zeros(2)], files[1])
    assert "holds a list" in _error(_config(*files))


def test_a_pickle_that_runs_code_is_refused(files):
    """The pickle names a function."""
    torch.save({"features.0.weight": print}, files[0])
    assert "torch.save" in _error(_config(*files))


def test_a_missing_tensor_is_named(files):
    torch.save({**_tiny(VGG_SHAPES), "features.28.bias": None}, files[0])
    assert "has no tensor features.28.bias" in _error(_config(*files))
    torch.save({"lin0": torch.zeros(1)}, files[1])
    files[0].unlink()
    torch.save(_tiny(VGG_SHAPES), files[0])
    assert "has no tensor lin0.model.1.weight" in _error(_config(*files))


def test_a_wrong_shape_is_named(files):
    torch.save({**_tiny(LINEAR_SHAPES), "lin3.model.1.weight": torch.zeros(1, 256, 1, 1)}, files[1])
    message = _error(_config(*files))
    for part in ("lin3.model.1.weight", "(1, 256, 1, 1)", "(1, 512, 1, 1)"):
        assert part in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight", -1.0),
        ("weight", math.nan),
        ("weight", math.inf),
        ("vgg_sha256", "39792"),
        ("lpips_sha256", "no digest"),
        ("input_range", "0..1"),
    ],
)
def test_invalid_settings_are_refused(field, value):
    with pytest.raises(UserError, match=f"perceptual.{field}"):
        PerceptualConfig(**{field: value})
