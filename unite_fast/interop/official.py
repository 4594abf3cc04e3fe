"""The authors' checkpoint names, and ours.

Three of their tensors have no counterpart here: tables that never change or are never read. Going out, they are written as
the released code has them.
"""

import re

from torch import Tensor

from unite_fast.config import require
from unite_fast.errors import UserError

RENAMES = (
    (r"^latent_tokens$", "encoder.latent_tokens"),
    (r"^patch_embed\.patch_embeddings\.projection\.", "encoder.patch_embed."),
    (r"^encoder\.in_context_posemb$", "encoder.in_context_posemb"),
    (r"^encoder\.up_sample\.", "encoder.input_proj."),
    (r"^encoder\.t_embedder\.W$", "encoder.time_embed.frequencies"),
    (r"^encoder\.t_embedder\.mlp\.0\.", "encoder.time_embed.fc1."),
    (r"^encoder\.t_embedder\.mlp\.2\.", "encoder.time_embed.fc2."),
    (r"^encoder\.y_embedder\.embedding_table\.", "encoder.label_embed."),
    (r"^encoder\.blocks\.(\d+)\.(norm[123]|attn\.(?:qkv|q_norm|k_norm|proj))\.", r"encoder.blocks.\1.\2."),
    (r"^encoder\.blocks\.(\d+)\.mlp\.w12\.", r"encoder.blocks.\1.mlp.fc_in."),
    (r"^encoder\.blocks\.(\d+)\.mlp\.w3\.", r"encoder.blocks.\1.mlp.fc_out."),
    (r"^encoder\.blocks\.(\d+)\.adaLN_modulation\.1\.", r"encoder.blocks.\1.modulation."),
    (r"^encoder\.final_layer\.norm_final\.", "encoder.final_layer.norm."),
    (r"^encoder\.final_layer\.adaLN_modulation\.1\.", "encoder.final_layer.modulation."),
    (r"^encoder\.final_layer\.linear\.", "encoder.final_layer.linear."),
    (r"^encoder_layer_norm\.", "latent_norm."),
    (r"^up_sample_decoder\.", "decoder.input_proj."),
    (r"^decoder\.decoder_embed\.", "decoder.embed."),
    (r"^decoder\.trainable_cls_token$", "decoder.cls_token"),
    (r"^decoder\.decoder_layers\.(\d+)\.layernorm_before\.", r"decoder.layers.\1.norm1."),
    (r"^decoder\.decoder_layers\.(\d+)\.layernorm_after\.", r"decoder.layers.\1.norm2."),
    (r"^decoder\.decoder_layers\.(\d+)\.qkv\.", r"decoder.layers.\1.qkv."),
    (r"^decoder\.decoder_layers\.(\d+)\.attn_proj\.", r"decoder.layers.\1.proj."),
    (r"^decoder\.decoder_layers\.(\d+)\.ffn_up\.", r"decoder.layers.\1.fc1."),
    (r"^decoder\.decoder_layers\.(\d+)\.ffn_down\.", r"decoder.layers.\1.fc2."),
    (r"^decoder\.decoder_norm\.", "decoder.norm."),
    (r"^decoder\.decoder_pred\.", "decoder.pred."),
)
"""Their names, as patterns, and ours."""

FIXED = (
    r"^patch_embed\.position_embeddings$",
    r"^encoder\.pos_embed$",
    r"^encoder\.t_embedder\.special_time_emb$",
    r"^encoder\.feat_rope(_incontext)?\.freqs_(cos|sin)$",
    r"^decoder\.decoder_pos_embed$",
)
"""Tensors of theirs that we compute or that nobody reads."""


def our_name(theirs: str) -> str | None:
    """Our name of one of their tensors; None for one that has no counterpart.

    Raises:
        UserError: a name that the released model does not have.
    """
    for pattern, ours in RENAMES:
        name, found = re.subn(pattern, ours, theirs)
        if found:
            return name
    if any(re.match(pattern, theirs) for pattern in FIXED):
        return None
    raise UserError(f"{theirs} is not a tensor of the released UNITE")


def our_state(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from theirs, names with torch.compile's `_orig_mod.` or DDP's `module.` included.

    Raises:
        UserError: a foreign tensor, or a patch position table that is in use (every released one is zero).
    """
    ours = {}
    for name, value in theirs.items():
        name = name.replace("_orig_mod.", "").removeprefix("module.")
        renamed = our_name(name)
        if renamed is not None:
            ours[renamed] = value
        elif name == "patch_embed.position_embeddings":
            require(not value.any(), f"{name} is not zero: this checkpoint is not of the released UNITE")
    return ours
