"""Which parameter belongs to which optimizer (docs/method.md, Optimizers)."""

from torch import nn

ADAMW_NAMES = ("patch_embed", "final_layer", "in_context_posemb", "latent_tokens", "atom_embed", "atom_table")


def split_parameters(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(Muon's parameters, AdamW's parameters) by name.

    Muon trains all weights of two or more dimensions except those whose name contains one of `ADAMW_NAMES`. As in the
    released code, that includes the label table and the adaLN Linears.
    """
    muon, adamw = {}, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_muon = parameter.dim() >= 2 and not any(part in name for part in ADAMW_NAMES)
            (muon if by_muon else adamw)[name] = parameter
    return muon, adamw
