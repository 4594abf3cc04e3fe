"""A trained model in Python: what it generates, and what it refuses."""

import shutil

import numpy as np
import pytest
import torch

import unite_fast
from unite_fast.checkpoint.reader import load_checkpoint
from unite_fast.errors import UserError


@pytest.fixture(scope="module")
def model(trained_folder):
    return unite_fast.load(trained_folder)


@pytest.fixture
def changed(trained_folder, rewrite, tmp_path):
    """A copy of the trained run whose newest checkpoint is changed."""

    def make(change):
        shutil.copytree(trained_folder, tmp_path / "changed", symlinks=True)
        rewrite(tmp_path / "changed", change)
        return tmp_path / "changed"

    return make


@pytest.fixture
def images(model):
    size = model.config.model.image_size
    return torch.randint(256, (5, 3, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_a_run_its_checkpoint_folder_and_a_checkpoint_load_alike(trained_folder, model):
    assert model.step == 20
    for path in (trained_folder / "checkpoints", trained_folder / "checkpoints" / "step_00000020"):
        other = unite_fast.load(str(path))
        assert torch.equal(other.generate([3]), model.generate([3]))
    assert unite_fast.load(trained_folder / "checkpoints" / "step_00000010").step == 10


def test_it_has_the_averaged_weights_and_no_gradients(trained_folder, model):
    tensors = load_checkpoint(trained_folder).tensors
    for name, parameter in model.network.named_parameters():
        assert torch.equal(parameter, tensors[f"ema.{name}"])
        assert not parameter.requires_grad
    assert any(not torch.equal(p, tensors[f"model.{n}"]) for n, p in model.network.named_parameters())
    assert not model.network.training


def test_an_image_depends_on_seed_label_and_index_only(model):
    labels = [3, 1, 4, 1, 5]
    whole = model.generate(labels, seed=7)
    assert whole.shape == (5, 3, 8, 8) and whole.dtype == torch.uint8
    for batch in (1, 2, 64):
        assert torch.equal(model.generate(labels, seed=7, batch=batch), whole)
    assert torch.equal(model.generate(labels[2:], seed=7, first=2), whole[2:])
    assert torch.equal(model.generate(np.array(labels), seed=7), whole)
    assert not torch.equal(model.generate(labels, seed=8), whole)
    assert not torch.equal(whole[1], whole[3]), "the same class at another index has other noise"


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_any_seed_of_64_bits_works(model, seed):
    assert model.generate([0], seed=seed).float().std() > 0


def test_sampling_settings_are_used(trained_folder, model):
    plain = model.generate([0, 1, 2])
    assert not torch.equal(model.generate([0, 1, 2], steps=7), plain)
    assert not torch.equal(model.generate([0, 1, 2], solver="dopri5"), plain)
    assert not torch.equal(model.generate([0, 1, 2], guidance=9.0), plain)
    assert torch.equal(model.generate([0, 1, 2], guidance=9.0, interval=(0.5, 0.5)), plain)
    assert model.config == load_checkpoint(trained_folder).config, "settings of one call are not stored"


@pytest.mark.parametrize(
    ("labels", "settings", "tokens"),
    [
        ([10], {}, ("class", 10, "0..9")),
        ([3, -1], {}, ("class", -1, "0..9")),
        ([], {}, ("labels", "[]")),
        (3, {}, ("labels", 3)),
        ([[3]], {}, ("labels", "[[3]]")),
        ([3], {"seed": -1}, ("seed", -1)),
        ([3], {"seed": 2**64}, ("seed", 2**64)),
        ([3], {"batch": 0}, ("batch", 0)),
        ([3], {"solver": "rk4"}, ("sampling.solver", "'rk4'")),
        ([3], {"guidence": 2.0}, ("sampling.guidence", "solver", "steps", "guidance", "interval")),
        ([3], {"steps": 0}, ("sampling.steps", "positive")),
        ([3], {"guidance": float("nan")}, ("sampling.guidance", "finite")),
        ([3], {"interval": (0.9, 0.1)}, ("sampling.interval", "LOW,HIGH")),
    ],
)
def test_invalid_labels_and_settings_are_refused(model, labels, settings, tokens, mentions):
    with pytest.raises(UserError, match=mentions(*tokens)):
        model.generate(labels, **settings)


def test_reconstructions_do_not_depend_on_the_batch(model, images):
    whole = model.reconstruct(images)
    assert whole.shape == images.shape and whole.dtype == torch.uint8
    assert torch.equal(model.reconstruct(images, batch=2), whole)
    assert torch.equal(model.reconstruct(images.numpy()), whole)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 3, 8, 9, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
        torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_images_of_another_shape_or_dtype_are_refused(model, wrong, mentions):
    for use in (model.reconstruct, model.encode):
        with pytest.raises(UserError, match=mentions(list(wrong.shape) if len(wrong) else "one image")):
            use(wrong)


def test_reconstruct_is_encode_then_decode(model, images):
    config = model.config.model
    latents = model.encode(images, seed=3)
    assert latents.shape == (5, config.latent_tokens, config.latent_channels) and latents.dtype == torch.float32
    assert not latents.requires_grad
    assert torch.equal(model.decode(latents), model.reconstruct(images, seed=3))
    assert torch.equal(model.decode(latents.double().numpy(), batch=2), model.decode(latents))
    assert torch.equal(model.encode(images[2:], seed=3, first=2), latents[2:]), "registers depend on seed and position"
    assert not torch.equal(model.encode(images[2:], seed=3), latents[2:])


@pytest.mark.parametrize("shape", [(4, 4), (0, 4, 4), (1, 5, 4), (1, 4, 5)])
def test_latents_of_another_shape_are_refused(model, shape, mentions):
    config = model.config.model
    assert (config.latent_tokens, config.latent_channels) == (4, 4)
    with pytest.raises(UserError, match="latents"):
        model.decode(torch.zeros(shape))


NORM = "latent_norm.weight"


@pytest.mark.parametrize(
    ("change", "tokens"),
    [
        (
            lambda s: setattr(s.config.model.encoder, "width", 32),
            ("encoder.blocks.0.attn.k_norm.weight", "[8]", "[16]"),
        ),
        (lambda s: setattr(s.config.model.encoder, "depth", 3), ("encoder.blocks.2.attn.k_norm.weight",)),
        (lambda s: setattr(s.config.model.decoder, "mlp_width", 8), ("decoder.layers.0.fc1.bias", "[16]", "[8]")),
        (lambda s: s.tensors.pop(f"model.{NORM}"), (NORM,)),
        (lambda s: s.tensors.pop(f"ema.{NORM}"), (NORM,)),
        (lambda s: s.tensors.update({f"ema.{NORM}": torch.zeros(5)}), (NORM, "[5]", "[4]")),
        (lambda s: s.tensors.update({"model.foreign": torch.zeros(5)}), ("foreign",)),
        (lambda s: s.tensors[f"ema.{NORM}"].fill_(torch.nan), (NORM, "finite")),
    ],
)
def test_invalid_weights_are_refused(changed, change, tokens, mentions):
    path = changed(change)
    with pytest.raises(UserError, match=mentions(*tokens)) as refusal:
        unite_fast.load(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("trained", "sampled"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float8", "bfloat16")]
)
def test_a_model_samples_in_its_training_precision_but_never_in_float8(model, monkeypatch, trained, sampled):
    monkeypatch.setattr(model.config.train, "precision", trained)
    assert model.precision_and_compile(None, None) == (sampled, False)
    assert model.precision_and_compile("float32", True) == ("float32", True)
