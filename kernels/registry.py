"""The list of ops. Tests, the kernels benchmark, the traffic count and cross-compilation walk `OPS`; each op file adds
its entry with `register`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from unite_fast.kernels.fused_op import FusedOp

New = Callable[..., Tensor]
"""new(*shape, dtype=torch.float32, around=0.0) -> a tensor: normal numbers around a mean in a test or a benchmark, no
data where only shapes matter."""


@dataclass(frozen=True)
class Size:
    """The size of an op's example inputs: of an encoder block, or of latents with `width` channels."""

    batch: int
    tokens: int
    width: int
    heads: int = 1
    head_dim: int = 0
    hidden: int = 0
    """Hidden width of SwiGLU."""
    draws: int = 3
    """Flow draws of one latent."""
    residual: torch.dtype = torch.float32
    """Dtype of the residual stream, or of the latents z."""
    other: torch.dtype = torch.bfloat16
    """Dtype of branches, modulation and results."""
    weights: torch.dtype = torch.float32


@dataclass(frozen=True)
class Op:
    """One op, as tests and benchmarks see it."""

    function: Callable[..., Any]
    """The public function."""
    reference: Callable[..., Any] | None
    """The formula in plain PyTorch, with the function's arguments; None where the function contains it."""
    fused: FusedOp
    example: Callable[[Size, New], dict[str, Any]]
    """(size, new) -> keyword arguments of the function."""
    part: Literal["block", "latents", "composed", "lpips"] = "block"
    """Where the model uses it; "composed": a Linear or attention, together with other work. An op of a block has
    results [B, T, ...] or [B, H, T, K], and tests/kernels/test_fused_op.py compares it with its reference; ops of
    blocks and latents are benchmarked."""
    roundings: int = 1
    """Roundings to bfloat16 between an input and a result when everything is bfloat16."""
    variants: dict[str, Callable[[Size, New], dict[str, Any]]] = field(default_factory=dict)
    """Further examples by name, with optional arguments that `example` leaves out and benchmarks do not time."""
    op_inputs: Callable[..., tuple] | None = None
    """(**example) -> inputs of `fused`; by default the arguments of the same names."""

    @property
    def name(self) -> str:
        return self.fused.name

    @property
    def examples(self) -> dict[str, Callable[[Size, New], dict[str, Any]]]:
        """`example`, named "", and its variants."""
        return {"": self.example, **self.variants}

    @property
    def gradients(self) -> list[str]:
        """Names of the arguments that get a gradient."""
        count = len(self.fused.backward_op._schema.returns)
        return [argument.name for argument in self.fused.op._schema.arguments[:count]]

    def inputs(self, example: dict[str, Any]) -> tuple:
        """The inputs of `fused` in a call of the function with `example`."""
        if self.op_inputs:
            return self.op_inputs(**example)
        return tuple(example[argument.name] for argument in self.fused.op._schema.arguments)


OPS: dict[str, Op] = {}
"""By name, in the order in which `unite_fast.kernels` imports them."""


def register(function: Callable[..., Any], reference: Callable[..., Any] | None, fused: FusedOp, **fields) -> None:
    """Add an op to `OPS`; `fields` are those of `Op`."""
    OPS[fused.name] = Op(function, reference, fused, **fields)


def empty(*shape: int, dtype: torch.dtype = torch.float32, around: float = 0.0) -> Tensor:
    """A tensor without data, for `Op.example`."""
    return torch.empty(shape, dtype=dtype, device="meta")
