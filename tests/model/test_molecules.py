"""Encoder and decoder of molecules: the order of atoms, pads, precision and the norm of the latents."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from unite_fast.checkpoint.model_file import load_model, save_model
from unite_fast.config import DecoderConfig, EncoderConfig, ModelConfig
from unite_fast.model.generative_encoder import GenerativeEncoder
from unite_fast.model.molecules import AtomEmbedding, MoleculeDecoder, centred
from unite_fast.model.unite import UNITE
from unite_fast.recipes import load_config

N, C, T = 9, 6, 12
"""Atoms of a molecule, channels, atoms of the largest molecule."""


def sizes(**changes) -> ModelConfig:
    return ModelConfig(
        modality="molecules",
        elements="H C N O F",
        latent_tokens=T,
        num_classes=T + 1,
        latent_channels=C,
        encoder=EncoderConfig(width=32, depth=3, heads=4, in_context_tokens=0),
        decoder=DecoderConfig(width=24, depth=2, heads=3, mlp_width=40, embed_width=20),
        **changes,
    )


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def molecules(batch: int = 2, atoms: int = N) -> Tensor:
    elements = torch.randint(5, (batch, atoms, 1), generator=torch.Generator().manual_seed(1))
    positions = 1.4 * draw(batch, atoms, 3, seed=2)
    return torch.cat((elements, positions - positions.mean(1, keepdim=True)), dim=-1)


TIMES, LABELS = torch.tensor([0.3, 0.8]), torch.tensor([N, N])


def passes(model: UNITE, atoms: Tensor, latents: Tensor) -> dict[str, Tensor]:
    """Results of all passes over two molecules; the latents are registers and noisy latents as well."""
    z = model.tokenize(atoms, latents, 0.01 * TIMES)
    decoded = model.decode(z)
    denoised = model.denoise(latents, TIMES, LABELS)
    return {"z": z, "logits": decoded.logits, "positions": decoded.positions, "denoised": denoised}


def test_without_atom_order_a_permutation_of_the_atoms_permutes_everything(make_model):
    model = make_model(sizes(atom_order=False))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    atoms, latents = molecules(), draw(2, N, C)
    plain = passes(model, atoms, latents)
    permuted = passes(model, atoms[:, order], latents[:, order])
    for name, expected in plain.items():
        torch.testing.assert_close(permuted[name], expected[:, order], rtol=0, atol=1e-5)
    assert not torch.allclose(plain["z"], plain["z"][:, order], atol=0.1)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_with_atom_order_the_place_of_an_atom_matters(part, make_model):
    model = make_model(sizes())
    order = torch.arange(N).flip(0)
    if part == "encoder":
        one, other = (model.encoder.embed(draw(2, N, C)[:, rows], None) for rows in (torch.arange(N), order))
        table = model.encoder.latent_tokens[0, :N]
        torch.testing.assert_close(other - one[:, order], (table - table[order]).expand(2, -1, -1))
    else:
        z = draw(2, N, C)
        assert (model.decode(z[:, order]).positions - model.decode(z).positions[:, order]).abs().max() > 1e-3


def test_pads_change_nothing(make_model):
    """N atoms in T tokens, and the pads hold numbers that would show."""
    model = make_model(sizes())
    atoms, latents, lengths = molecules(), draw(2, N, C), torch.tensor([N, N])
    plain = passes(model, atoms, latents)
    wide_atoms = torch.cat((atoms, 4 * torch.ones(2, T - N, 4)), dim=1)
    wide_latents = torch.cat((latents, 9 * draw(2, T - N, C, seed=3)), dim=1)
    z = model.tokenize(wide_atoms, wide_latents, 0.01 * TIMES, lengths)
    decoded = model.decode(z, lengths)
    denoised = model.denoise(wide_latents, TIMES, LABELS, lengths)
    padded = {"z": z, "logits": decoded.logits, "positions": decoded.positions, "denoised": denoised}
    for name, expected in plain.items():
        assert padded[name].shape[1] == T
        torch.testing.assert_close(padded[name][:, :N], expected, rtol=0, atol=2e-5)


def test_molecules_of_a_batch_do_not_see_each_other(make_model):
    model = make_model(sizes())
    atoms, latents = molecules(), draw(2, N, C)
    lengths = torch.tensor([5, 9])
    both = model.decode(model.tokenize(atoms, latents, 0.01 * TIMES, lengths), lengths)
    alone = model.decode(model.tokenize(atoms[:1, :5], latents[:1, :5], 0.01 * TIMES[:1]))
    torch.testing.assert_close(both.positions[:1, :5], alone.positions, rtol=0, atol=2e-5)


def test_positions_have_mean_zero_and_the_scale_of_the_config(make_model):
    z, lengths = draw(2, T, C), torch.tensor([7, 12])
    positions = make_model(sizes()).decode(z, lengths).positions
    for row, length in enumerate(lengths):
        assert positions[row, :length].std() > 0.1
        torch.testing.assert_close(positions[row, :length].mean(0), torch.zeros(3), rtol=0, atol=1e-6)
    larger = make_model(sizes(coordinate_scale=2.8)).decode(z, lengths).positions
    torch.testing.assert_close(larger[1], 2 * positions[1])
    torch.testing.assert_close(centred(z[..., :3], None), z[..., :3] - z[..., :3].mean(1, keepdim=True))


def test_positions_enter_in_units_of_the_scale():
    atoms = molecules()
    embedding = AtomEmbedding(5, 32, 1.4)
    nn.init.normal_(embedding.none)
    other = copy.deepcopy(embedding)
    other.scale = 2.8
    doubled = torch.cat((atoms[..., :1], 2 * atoms[..., 1:]), dim=-1)
    torch.testing.assert_close(other(doubled), embedding(atoms))
    assert not torch.allclose(embedding(doubled), embedding(atoms), atol=1e-2)


def test_coordinates_stay_float32_under_autocast(make_model):
    """5 Angstrom in bfloat16 is off by up to 0.02: the head and the embedding of atoms run in float32."""
    model = make_model(sizes())
    decoder: MoleculeDecoder = model.decoder
    atoms, before_head = molecules(), []
    atoms[..., 1:] *= 3
    decoder.norm.register_forward_pre_hook(lambda module, inputs: before_head.append(inputs[0]))
    with torch.no_grad():
        decoder.pred.weight.normal_(0, 0.7, generator=torch.Generator().manual_seed(6))
        embedded = model.encoder.atom_embed(atoms)
        with torch.autocast("cpu", torch.bfloat16):
            decoded, under_autocast = decoder(draw(2, N, C)), model.encoder.atom_embed(atoms)
            coarse = 1.4 * centred(decoder.pred(decoder.norm(before_head[0])).float()[..., 5:], None)
        exact = copy.deepcopy(decoder).double()
        exact_positions = 1.4 * centred(exact.pred(exact.norm(before_head[0].double()))[..., 5:], None)
    assert exact_positions.abs().max() > 5
    assert decoded.positions.dtype == decoded.logits.dtype == torch.float32
    assert (decoded.positions - exact_positions).abs().max() < 1e-3
    assert (coarse - exact_positions).abs().max() > 0.01
    assert torch.equal(under_autocast, embedded)


def test_every_parameter_has_a_gradient_in_one_of_the_two_passes(make_model):
    """With weight and bias in the norm, and without."""
    for norm in ("layer", "layer_plain"):
        model = make_model(sizes(latent_norm=norm))
        z = model.tokenize(molecules(), draw(2, N, C), 0.01 * TIMES)
        decoded = model.decode(z)
        (decoded.logits.square().mean() + decoded.positions.square().mean()).backward()
        reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert "encoder.atom_embed.none" not in reached
        model.denoising_loss(draw(1, 2, N, C), TIMES[None], LABELS[None], z.detach()).sum().backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert without == []


def test_the_class_is_the_number_of_atoms(make_model):
    model, latents = make_model(sizes()), draw(2, N, C)
    assert model.encoder.label_embed.weight.shape[0] == T + 3
    one, other = (model.denoise(latents, TIMES, torch.full((2,), label)) for label in (N, N - 1))
    assert (one - other).abs().max() > 1e-3


def test_there_is_no_rotation():
    encoder = UNITE.create(sizes(), 0).encoder
    assert isinstance(encoder, GenerativeEncoder)
    assert (encoder.rope_cos == 1).all() and (encoder.rope_sin == 0).all()
    assert len(encoder.rope_cos) >= T


def test_a_plain_norm_is_one_and_zero_after_loading_a_file(tmp_path):
    """Its weight and bias are in no file, and loading does not call `initialize`."""
    config = load_config("qm9_tiny", ("model.encoder.width=16", "model.decoder.width=16"))
    model = UNITE.create(config.model, 0)
    assert not [name for name in model.state_dict() if name.startswith("latent_norm")]
    assert not [name for name, _ in model.named_parameters() if name.startswith("latent_norm")]
    save_model(tmp_path / "model.safetensors", config, 1, model.state_dict())
    loaded = UNITE(config.model)
    loaded.load_state_dict(load_model(tmp_path / "model.safetensors").averages)
    for one in (model, loaded):
        assert (one.latent_norm.weight == 1).all() and (one.latent_norm.bias == 0).all()
    affine = UNITE.create(dataclasses.replace(config.model, latent_norm="layer"), 0)
    assert {"latent_norm.weight", "latent_norm.bias"} <= {name for name, _ in affine.named_parameters()}


def test_latents_have_mean_zero_and_variance_one_with_a_plain_norm(make_model):
    z = make_model(sizes(latent_norm="layer_plain")).tokenize(molecules(), draw(2, N, C), 0.01 * TIMES)
    torch.testing.assert_close(z.mean(-1), torch.zeros(2, N), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.square().mean(-1), torch.ones(2, N), rtol=1e-3, atol=0)
