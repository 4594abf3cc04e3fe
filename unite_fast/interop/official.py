"""Import and export checkpoints of the released code.

Shapes: N latent tokens (as many as patches), D encoder width, T rows of a rotary table, K head dimension.
"""

import math
import pickle
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from unite_fast.checkpoint.folders import checkpoint_files
from unite_fast.checkpoint.model_file import check_model_target, empty_network, load_model, save_model
from unite_fast.config import IMAGES, Config, DataConfig, DecoderConfig, EncoderConfig, ModelConfig
from unite_fast.errors import UserError, reason_of, require
from unite_fast.interop.names import FIXED_DRAWS, UNREAD, our_name, plain_name, their_name
from unite_fast.model.layers import sincos_2d
from unite_fast.model.unite import UNITE
from unite_fast.recipes import load_config
from unite_fast.utils.file_lock import lock_output
from unite_fast.utils.files import BEGINNINGS, atomic_write, check_not_read, check_npz, check_replaceable
from unite_fast.utils.pretrained import fault_of

RECIPE = "imagenet256_b"
"""Recipe whose sampling settings an imported model gets; the three ImageNet recipes have the same."""

DECODER_HEAD_DIM = 64
"""Head dimension of all published decoders; checkpoints do not store it."""

SAVED = "archive/data.pkl"
"""A member of the files that `save_torch` writes. `torch.save` to a path names the folder after the path."""

SAME_TABLE = 0.01
"""Tables that differ by less count as equal: bfloat16 rounds values near 1 by 0.004."""


def our_state(theirs: dict[str, Tensor], source: str = "the checkpoint") -> dict[str, Tensor]:
    """Convert a released state dict to ours. Computed and unread tensors are left out.

    Raises:
        UserError: unknown tensor.
    """
    ours = {}
    for name, value in theirs.items():
        fault = fault_of(value, whole=True)
        require(not fault, f"{source}: {name} is {fault}, not a tensor of numbers")
        try:
            renamed = our_name(plain_name(name))
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        if renamed is not None:
            ours[renamed] = value
    return ours


def their_state(model: UNITE) -> dict[str, Tensor]:
    """Convert this model's weights to a complete state dict of the released code.

    `encoder.t_embedder.special_time_emb` is zero: nothing reads it, and our model has no such parameter.
    """
    # A plain LayerNorm stores no weight and bias; the released code always has them.
    norm = {f"latent_norm.{name}": getattr(model.latent_norm, name) for name in ("weight", "bias")}
    weights = {their_name(name): value.detach() for name, value in (model.state_dict() | norm).items()}
    return weights | fixed_tensors(model.config)


def fixed_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """The released tensors that our model does not store: computed and unread ones, float32."""
    encoder, tokens = config.encoder, config.latent_tokens
    side = math.isqrt(tokens)
    decoder_grid = sincos_2d(side, config.decoder.width)
    tables = {
        "patch_embed.position_embeddings": torch.zeros(1, config.patches + 1, encoder.width),
        "encoder.pos_embed": sincos_2d(side, encoder.width)[None],
        "encoder.t_embedder.special_time_emb": torch.zeros(encoder.width),
        "decoder.decoder_pos_embed": torch.cat((torch.zeros_like(decoder_grid[:1]), decoder_grid))[None],
    }
    positions = tokens + config.patches
    cos, sin = their_rope(positions, encoder.width // encoder.heads)
    tables |= {"encoder.feat_rope.freqs_cos": cos, "encoder.feat_rope.freqs_sin": sin}
    if encoder.in_context_tokens:
        unrotated = torch.ones(encoder.in_context_tokens, cos.shape[1])
        tables["encoder.feat_rope_incontext.freqs_cos"] = torch.cat((unrotated, cos))
        tables["encoder.feat_rope_incontext.freqs_sin"] = torch.cat((torch.zeros_like(unrotated), sin))
    return tables


def their_rope(positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, K], each column twice.

    Angles are float32 as in the released code, so values agree to the last bit. Our own table, computed in float64,
    differs by up to 8e-6 at 512 positions.
    """
    rates = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.outer(torch.arange(positions).float(), rates).repeat_interleave(2, dim=-1)
    return angle.cos(), angle.sin()


def released_model(config: ModelConfig, theirs: dict[str, Tensor], source: str) -> UNITE:
    """A model of these sizes with the weights of a released checkpoint.

    Raises:
        UserError: tensors are missing, unknown or of another shape, or a fixed table differs from the released one.
    """
    # First the checks: memory is not taken for sizes that the tensors do not have.
    ours = our_state(theirs, source)
    _check_state(empty_network(config, len(theirs), source).state_dict(), ours, source)
    theirs = {plain_name(name): value for name, value in theirs.items()}
    for name, table in fixed_tensors(config).items():
        if name in theirs and name not in UNREAD:
            _require_shape(source, name, theirs[name], table)
            same = torch.allclose(theirs[name].float(), table, rtol=0, atol=SAME_TABLE)
            require(same, f"{source}: {name} is not the released model's table, which is fixed")
    model = UNITE(config)
    model.load_state_dict(ours)
    for name, value in model.state_dict().items():  # float64 may hold what float32 does not
        require(bool(value.isfinite().all()), f"{source}: {their_name(name)} has values beyond {value.dtype}")
    return model


def _check_state(expected: dict[str, Tensor], ours: dict[str, Tensor], source: str) -> None:
    unexpected = [their_name(name) for name in ours if name not in expected]
    if unexpected:
        raise UserError(f"{source}: {_summary(unexpected)} does not belong to a model of these sizes")
    missing = [their_name(name) for name in expected if name not in ours]
    if missing:
        raise UserError(f"{source} lacks {_summary(missing)}")
    for name, value in expected.items():
        _require_shape(source, their_name(name), ours[name], value)


def _require_shape(source: str, name: str, tensor: Tensor, expected: Tensor) -> None:
    require(
        tensor.shape == expected.shape,
        f"{source}: {name} has shape {list(tensor.shape)}; the other tensors imply {list(expected.shape)}",
    )


def _summary(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return names[0] + more


def import_official(
    source: str | Path,
    out: str | Path,
    *,
    weights: str = "ema",
    decoder_heads: int | None = None,
    in_context_start: int = 4,
) -> None:
    """Convert a released .pt file to a model file of ours.

    The model file works for sampling with the published settings, reconstruction, evaluation on a folder of images, and
    export. Training cannot resume from it: it has no optimizer state.

    Args:
        weights: which state dict to take from a file with several; ignored for a plain state dict.
        decoder_heads: attention heads of the decoder; by default its width / 64, as published.
        in_context_start: block at which the in-context tokens enter. Checkpoints store neither this nor the heads.

    Raises:
        UserError: not a checkpoint of the released code, or its tensors do not fit together.
    """
    source, out = Path(source), Path(out)
    check_model_target(out, source)
    theirs = choose_weights(read_torch(source), weights, source)
    config = Config(
        name=source.stem,
        data=DataConfig(source="folder"),
        model=model_config(theirs, source, decoder_heads, in_context_start),
        sampling=load_config(RECIPE).sampling,
    )
    model = released_model(config.model, theirs, str(source))
    save_model(out, config, 0, model.state_dict())


def read_torch(source: Path) -> dict:
    """Read a file of `torch.save` without running code from it."""
    require(source.is_file(), f"there is no file {source}")
    require(zipfile.is_zipfile(source), f"{source} is not a file of torch.save, or is incomplete")
    try:
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        name = f" ({match.group(1)})" if match else ""
        raise UserError(
            f"{source} has Python objects{name}, which could run code and are not loaded; save only its state dicts"
        ) from error
    except Exception as error:  # of pickle, zip, torch and others
        raise UserError(f"{source} is not a readable file of torch.save") from error
    require(isinstance(content, dict), f"{source} holds a {type(content).__name__}, not a state dict")
    for state in (content, *(value for value in content.values() if isinstance(value, dict))):
        wrong = next((key for key in state if not isinstance(key, str) or not key.isprintable()), None)
        require(wrong is None, f"{source}: {wrong!r} is no name of a tensor or a state dict")
    return content


def choose_weights(content: dict, weights: str, source: Path) -> dict[str, Tensor]:
    """The state dict named `weights`, with plain names; `content` itself if it is a state dict."""
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return _plain_names(content, source)
    names = [str(key) for key, value in content.items() if isinstance(value, dict)]
    available = ", ".join(names) or "none"
    require(weights in names, f"{source} has no {weights!r} weights; state dicts in it: {available}")
    chosen = _plain_names(content[weights], source)
    # EMA weights cover trainable parameters only; take the fixed random tensors from the model.
    raw = content["model"] if "model" in names else {}
    fixed = _plain_names(raw, source)
    return {name: fixed[name] for name in FIXED_DRAWS if name in fixed} | chosen


def _plain_names(state: dict, source: Path) -> dict[str, Tensor]:
    plain = {}
    for name, value in state.items():
        require(plain_name(name) not in plain, f"{source} has {plain_name(name)} twice, with different prefixes")
        plain[plain_name(name)] = value
    return plain


def model_config(
    theirs: dict[str, Tensor], source: Path, decoder_heads: int | None = None, in_context_start: int = 4
) -> ModelConfig:
    """Sizes of a released model, from the shapes of its tensors.

    Raises:
        UserError: a required tensor is missing, or the sizes are inconsistent.
    """

    def shape(name: str, dims: int) -> torch.Size:
        require(name in theirs, f"{source} lacks {name}: it is not a state dict of the released UNITE")
        fault = fault_of(theirs[name], whole=True)
        require(not fault, f"{source}: {name} is {fault}, not a tensor of numbers")
        require(
            theirs[name].dim() == dims, f"{source}: {name} has shape {list(theirs[name].shape)}, not {dims} dimensions"
        )
        return theirs[name].shape

    def count(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0] for name in theirs if name.startswith(prefix)})

    width, channels = shape("encoder.up_sample.weight", 2)
    tokens = shape("latent_tokens", 3)[1]
    require(math.isqrt(tokens) ** 2 == tokens, f"{source}: {tokens} latent tokens do not form a square")
    patch_size = shape("patch_embed.patch_embeddings.projection.weight", 4)[-1]
    qk_norm = "encoder.blocks.0.attn.q_norm.weight" in theirs
    if qk_norm:
        (head_dim,) = shape("encoder.blocks.0.attn.q_norm.weight", 1)
    else:
        head_dim = shape("encoder.feat_rope.freqs_cos", 2)[1]
    require(head_dim > 0 and width % head_dim == 0, f"{source}: heads of {head_dim} do not divide the width {width}")
    context = "encoder.in_context_posemb"
    decoder_width, embed_width = shape("decoder.decoder_embed.weight", 2)
    if decoder_heads is None:
        require(
            decoder_width % DECODER_HEAD_DIM == 0,
            f"{source}: the decoder's width {decoder_width} is not a multiple of {DECODER_HEAD_DIM}; give its heads",
        )
        decoder_heads = decoder_width // DECODER_HEAD_DIM
    return ModelConfig(
        image_size=math.isqrt(tokens) * patch_size,
        patch_size=patch_size,
        latent_channels=channels,
        num_classes=shape("encoder.y_embedder.embedding_table.weight", 2)[0] - 2,
        encoder=EncoderConfig(
            width=width,
            depth=count("encoder.blocks."),
            heads=width // head_dim,
            in_context_tokens=shape(context, 3)[1] if context in theirs else 0,
            in_context_start=in_context_start,
            qk_norm=qk_norm,
        ),
        decoder=DecoderConfig(
            width=decoder_width,
            depth=count("decoder.decoder_layers."),
            heads=decoder_heads,
            mlp_width=shape("decoder.decoder_layers.0.ffn_up.weight", 2)[0],
            embed_width=embed_width,
        ),
    )


def export_official(checkpoint: str | Path, out: str | Path) -> None:
    """Convert a checkpoint of ours to a .pt file of the released code: {"model": ..., "ema": ...} with its names.

    Args:
        checkpoint: a checkpoint, a run folder (its newest intact checkpoint), or a model file, whose one set of weights
            is written as both.

    Raises:
        UserError: no such checkpoint, tensors are missing, or `out` cannot be written.
    """
    check_not_read(Path(out), checkpoint_files(Path(checkpoint)))
    check_replaceable(Path(out), BEGINNINGS[".pt"])
    check_npz(Path(out), SAVED)
    loaded = load_model(checkpoint)
    require(
        loaded.config.model.modality == IMAGES,
        f"{checkpoint} is a model of molecules, which the authors' code does not have; unite-fast export writes a file "
        "that unite-fast reads",
    )
    model = UNITE(loaded.config.model)
    states = {}
    for kind, weights in (("model", loaded.weights), ("ema", loaded.averages)):
        model.load_state_dict(weights)
        states[kind] = {name: value.clone() for name, value in their_state(model).items()}
    save_torch(Path(out), states)


def save_torch(path: Path, content: dict) -> None:
    """`torch.save` with `atomic_write`; the folder is created if missing."""
    with lock_output(path), atomic_write(path) as partial:
        try:
            # An open file: the archive would name its folder after a path.
            with partial.open("wb") as file:
                torch.save(content, file)
        except RuntimeError as error:  # from torch's own writer, for example on a full disk
            raise OSError(reason_of(error)) from error
