"""The authors' names of tensors, and ours."""

import re

from unite_fast.errors import require

NAMES = {
    "latent_tokens": "encoder.latent_tokens",
    "patch_embed.patch_embeddings.projection": "encoder.patch_embed",
    "encoder.in_context_posemb": "encoder.in_context_posemb",
    "encoder.up_sample": "encoder.input_proj",
    "encoder.t_embedder.W": "encoder.time_embed.frequencies",
    "encoder.t_embedder.mlp.0": "encoder.time_embed.fc1",
    "encoder.t_embedder.mlp.2": "encoder.time_embed.fc2",
    "encoder.y_embedder.embedding_table": "encoder.label_embed",
    "encoder.blocks.*.norm1": "encoder.norm1.*",
    "encoder.blocks.*.norm2": "encoder.blocks.*.norm2",
    "encoder.blocks.*.norm3": "encoder.blocks.*.norm3",
    "encoder.blocks.*.attn.qkv": "encoder.blocks.*.attn.qkv",
    "encoder.blocks.*.attn.q_norm": "encoder.blocks.*.attn.q_norm",
    "encoder.blocks.*.attn.k_norm": "encoder.blocks.*.attn.k_norm",
    "encoder.blocks.*.attn.proj": "encoder.blocks.*.attn.proj",
    "encoder.blocks.*.mlp.w12": "encoder.blocks.*.mlp.fc_in",
    "encoder.blocks.*.mlp.w3": "encoder.blocks.*.mlp.fc_out",
    "encoder.blocks.*.adaLN_modulation.1": "encoder.modulation.*",
    "encoder.final_layer.norm_final": "encoder.final_layer.norm",
    "encoder.final_layer.adaLN_modulation.1": "encoder.final_layer.modulation",
    "encoder.final_layer.linear": "encoder.final_layer.linear",
    "encoder_layer_norm": "latent_norm",
    "up_sample_decoder": "decoder.input_proj",
    "decoder.decoder_embed": "decoder.embed",
    "decoder.trainable_cls_token": "decoder.cls_token",
    "decoder.decoder_layers.*.layernorm_before": "decoder.layers.*.norm1",
    "decoder.decoder_layers.*.layernorm_after": "decoder.layers.*.norm2",
    "decoder.decoder_layers.*.qkv": "decoder.layers.*.qkv",
    "decoder.decoder_layers.*.attn_proj": "decoder.layers.*.proj",
    "decoder.decoder_layers.*.ffn_up": "decoder.layers.*.fc1",
    "decoder.decoder_layers.*.ffn_down": "decoder.layers.*.fc2",
    "decoder.decoder_norm": "decoder.norm",
    "decoder.decoder_pred": "decoder.pred",
}
"""Theirs and ours without `.weight` and `.bias`; `*` is the number of a block or layer."""

THEIRS = {ours: theirs for theirs, ours in NAMES.items()}

UNREAD = ("encoder.pos_embed", "encoder.t_embedder.special_time_emb")
"""Tensors of theirs that no computation reads."""

FIXED_DRAWS = ("encoder.t_embedder.W",)
"""Tensors of theirs that are drawn once and never trained."""

COMPUTED = (
    "patch_embed.position_embeddings",
    "encoder.feat_rope.freqs_cos",
    "encoder.feat_rope.freqs_sin",
    "encoder.feat_rope_incontext.freqs_cos",
    "encoder.feat_rope_incontext.freqs_sin",
    "decoder.decoder_pos_embed",
)
"""Tables of theirs that never change and that we compute."""


def our_name(theirs: str) -> str | None:
    """Our name of one of their tensors; None for one that has no counterpart (`UNREAD` and `COMPUTED`).

    Raises:
        UserError: a name that the released model does not have.
    """
    if theirs in UNREAD or theirs in COMPUTED:
        return None
    ours = _translate(theirs, NAMES)
    require(ours is not None, f"{theirs} is not a tensor of the released UNITE")
    return ours


def their_name(ours: str) -> str:
    """Their name of one of our tensors."""
    theirs = _translate(ours, THEIRS)
    assert theirs is not None, ours
    return theirs


def plain_name(name: str) -> str:
    """A name without what torch.compile and DistributedDataParallel put in."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _translate(name: str, table: dict[str, str]) -> str | None:
    match = re.fullmatch(r"(.*?)(\.weight|\.bias)?", name)
    assert match is not None  # the pattern matches any name
    stem, leaf = match.groups("")
    if stem in table:
        return table[stem] + leaf
    number = re.search(r"\.(\d+)(?=\.|$)", stem)
    if number is None:
        return None
    ours = table.get(stem.replace(number.group(), ".*", 1))
    return None if ours is None else ours.replace(".*", number.group()) + leaf
