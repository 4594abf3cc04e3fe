"""Which parameter belongs to which optimizer (docs/method.md, Optimizers)."""

from torch import nn

ADAMW_NAMES = ("patch_embed", "final_layer", "in_context_posemb", "latent_tokens")


def split_parameters(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(Muon's parameters, AdamW's parameters) by name.

    Muon has every weight of two or more dimensions, label table and adaLN Linears included as in the released code,
    but for those whose name holds one of `ADAMW_NAMES`.
    """
    muon, adamw = {}, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.dim() >= 2 and not any(part in name for part in ADAMW_NAMES)
            (muon if matrix else adamw)[name] = parameter
    return muon, adamw
