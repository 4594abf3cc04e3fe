"""The formulas against torch's counter, the model and the figures of the released code."""

from collections import Counter

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unite_fast.config import PRESETS, Config, DecoderConfig, EncoderConfig, ModelConfig
from unite_fast.kernels import backend
from unite_fast.lpips import LINEAR_SHAPES, LPIPS, VGG_SHAPES
from unite_fast.model.layers import hidden_width
from unite_fast.model.unite import UNITE
from unite_fast.objective import draw_step, flow_losses, reconstruct, reconstruct_molecules
from unite_fast.optim import muon
from unite_fast.optim.param_groups import split_parameters
from unite_fast.planning import flops
from unite_fast.randomness import Philox
from unite_fast.recipes import from_tree, load_config, to_tree


def published(encoder: str) -> Config:
    sizes = {"encoder": {"preset": encoder}, "decoder": {"preset": "B"}}
    return from_tree(Config, {"model": sizes, "perceptual": {"weight": 1.0}})


def changed(config: Config, **encoder) -> Config:
    tree = to_tree(config)
    tree["model"]["encoder"] |= encoder
    return from_tree(Config, tree)


@pytest.mark.parametrize("encoder, millions", [("B", 217.64), ("M", 318.82), ("L", 545.53), ("XL", 762.78)])
def test_the_published_sizes_have_the_published_numbers_of_parameters(encoder, millions):
    model = published(encoder).model
    assert round(sum(flops.parameters(model).values()) / 1e6, 2) == millions


@pytest.mark.parametrize("encoder", [{}, {"qk_norm": False}, {"in_context_tokens": 0}, PRESETS[EncoderConfig]["L"]])
def test_shapes_and_optimizers_are_those_of_the_model(tiny_config, encoder):
    assert_counted(changed(tiny_config, **encoder))


MOLECULES = [
    ("qm9_tiny", ()),
    ("qm9_s", ()),
    ("qm9_tiny", ("model.atom_order=false",)),
    ("qm9_tiny", ("model.latent_norm=layer",)),
    ("qm9_tiny", ("model.elements=H C N O F S P", "model.encoder.qk_norm=false")),
]


@pytest.mark.parametrize(("recipe", "settings"), MOLECULES)
def test_shapes_and_optimizers_of_molecules_are_those_of_the_model(recipe, settings):
    assert_counted(load_config(recipe, settings))


def test_images_with_a_plain_norm_are_counted(tiny_config):
    tree = to_tree(tiny_config)
    tree["model"]["latent_norm"] = "layer_plain"
    assert_counted(from_tree(Config, tree))


def test_unite_s_has_the_parameters_of_the_specification():
    """33 M in the Generative Encoder, as in the paper; 21.3 M in the decoder."""
    found = flops.parameters(load_config("qm9_s").model)
    assert {name: round(count / 1e6, 1) for name, count in found.items()} == {
        "encoder": 32.8,
        "norm": 0.0,
        "decoder": 21.6,
    }


def assert_counted(config: Config) -> None:
    """The shapes, by optimizer, and the sums by part are those of the model."""
    with torch.device("meta"):
        model = UNITE(config.model)
    actual = Counter()
    for of_muon, parameters in zip((True, False), split_parameters(model), strict=True):
        actual.update((tuple(p.shape), of_muon) for p in parameters.values())
    expected = Counter()
    for shape in flops.parameter_shapes(config.model):
        expected[shape.shape, shape.muon] += shape.count
    assert expected == actual
    by_part = {"encoder": model.encoder, "norm": model.latent_norm, "decoder": model.decoder}
    assert flops.parameters(config.model) == {
        name: sum(p.numel() for p in part.parameters()) for name, part in by_part.items()
    }


# Counted on the released code when this project was designed: GFLOP per image by part, and in total for F = 3 and 14.
RELEASED = {
    "B": (304.2, 150.2, 140.1, 120.3, 1015, 2667),
    "L": (1063.3, 536.7, 140.1, 120.3, 2934, 8838),
    "XL": (1558.3, 790.9, 140.1, 120.3, 4191, 12891),
}


@pytest.mark.parametrize("encoder", RELEASED)
def test_parts_and_sums_of_the_released_code(encoder):
    config = published(encoder)
    tokenizer, draw, decoder, lpips, three, fourteen = RELEASED[encoder]
    parts = flops.parts(config, skip_unread=False)
    assert parts["tokenizer"].total / 1e9 == pytest.approx(tokenizer, abs=0.06)
    assert parts["flow"].total / 3e9 == pytest.approx(draw, abs=0.06)
    assert parts["decoder"].total / 1e9 == pytest.approx(decoder, abs=0.06)
    assert parts["lpips"].total / 1e9 == pytest.approx(lpips, abs=0.06)
    assert flops.image_flops(config, skip_unread=False) / 1e9 == pytest.approx(three, abs=0.6)
    config.objective.flow_draws = 14
    assert flops.image_flops(config, skip_unread=False) / 1e9 == pytest.approx(fourteen, abs=1.5)


def test_our_model_skips_tokens_that_are_not_read():
    """In the last block of B: queries, output and SwiGLU of 288 tokens in the tokenizer and of 32 in each flow draw."""
    config = published("B")
    d = config.model.encoder.width
    hidden = hidden_width(d)

    def unread(count: int, keys: int) -> int:
        return 3 * count * (2 * d * d + 6 * d * hidden + 4 * keys * d)

    saved = flops.image_flops(config, skip_unread=False) - flops.image_flops(config)
    assert saved == unread(288, 544) + 3 * unread(32, 288)
    assert flops.image_flops(config) / 1e9 == pytest.approx(1001.2, abs=0.05)


MIDDLE = {
    "model": {
        "image_size": 64,
        "encoder": {"width": 128, "depth": 4, "heads": 2, "in_context_tokens": 8, "in_context_start": 1},
        "decoder": {"width": 96, "depth": 3, "heads": 2, "mlp_width": 512},
    },
    "objective": {"flow_draws": 2},
}


@pytest.mark.parametrize("encoder", [{}, {"qk_norm": False}, {"in_context_tokens": 0}, {"depth": 1}, "middle"])
def test_a_step_has_the_flops_that_torch_counts(tiny_config, encoder):
    if encoder == "middle":
        config = from_tree(Config, MIDDLE)
    else:
        config = changed(tiny_config, in_context_start=0, **encoder)
    images, size = 2, config.model.image_size
    model = UNITE.create(config.model, seed=0)
    draws = draw_step(
        config.objective, Philox(0, 0, torch.arange(images)), (config.model.patches, model.config.latent_channels)
    )
    labels = torch.zeros(images, dtype=torch.int64)
    # The reference backend runs matmuls that the counter sees, and so does attention by its formula (MATH).
    with backend.using("reference"), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            reconstruction = reconstruct(model, torch.rand(images, 3, size, size), draws, config)
            loss = reconstruction.loss + flow_losses(model, reconstruction.z, labels, draws)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    parts = flops.parts(config).values()
    assert images * sum(part.forward for part in parts) == forward.get_total_flops()
    assert images * sum(part.backward for part in parts) == backward.get_total_flops()


@pytest.mark.parametrize(("recipe", "settings"), MOLECULES)
def test_a_step_of_molecules_has_the_flops_that_torch_counts(recipe, settings):
    """Of molecules padded to the same size, as on a GPU."""
    config = load_config(recipe, settings)
    count, model = 2, UNITE.create(config.model, seed=0)
    latents = config.model.latent_tokens, config.model.latent_channels
    draws = draw_step(config.objective, Philox(0, 0, torch.arange(count)), latents)
    sizes, atoms = torch.tensor([9, 17]), torch.zeros(count, config.model.latent_tokens, 4)
    with backend.using("reference"), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            reconstruction = reconstruct_molecules(model, atoms, sizes, draws, config)
            loss = reconstruction.loss + flow_losses(model, reconstruction.z, sizes, draws, sizes)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    parts = flops.parts(config).values()
    assert count * sum(part.forward for part in parts) == forward.get_total_flops()
    assert count * sum(part.backward for part in parts) == backward.get_total_flops()


def test_lpips_has_the_flops_that_torch_counts():
    vgg = {name: torch.full(shape, 0.01) for name, shape in VGG_SHAPES.items()}
    lpips = LPIPS(vgg, {name: torch.ones(shape) for name, shape in LINEAR_SHAPES.items()})
    recon = torch.rand(2, 3, 32, 32, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        distance = lpips(torch.rand(2, 3, 32, 32), recon).sum()
    with FlopCounterMode(display=False) as backward:
        distance.backward()
    expected = flops.lpips_flops(32)
    assert (forward.get_total_flops(), backward.get_total_flops()) == (2 * expected.forward, 2 * expected.backward)


def test_newton_schulz_has_the_flops_that_torch_counts(tiny_config):
    model = UNITE.create(tiny_config.model, seed=0)
    matrices, _ = split_parameters(model)
    with FlopCounterMode(display=False) as counter:
        for p in matrices.values():
            muon._newton_schulz(p.detach()[None], 1e-6)
    assert flops.newton_schulz(tiny_config.model) == counter.get_total_flops()


def test_decoder_presets_are_counted_too():
    for name, sizes in PRESETS[DecoderConfig].items():
        model = ModelConfig(decoder=DecoderConfig(**sizes))
        with torch.device("meta"):
            expected = sum(p.numel() for p in UNITE(model).decoder.parameters())
        assert flops.parameters(model)["decoder"] == expected, name
