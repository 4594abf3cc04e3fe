"""float32 arithmetic with randomly drawn summation orders and roundings, to measure how large an error may be.

The error of a float32 result depends on chance: on the order of each sum, so on the CPU's vectors, the library's blocks
and the threads, and on the direction of each rounding. A tolerance must not depend on one machine's luck.

- Sums. The error of a sum of n terms is at most (n - 1) 2^-24 sum |x|, in any order (Higham, Accuracy and Stability of
  Numerical Algorithms, section 4.2). Adding one term after the other has the largest partial sums: with independent
  roundings the error grows as sqrt(n), and any order that adds sums of blocks stays below. The order is drawn.
- All else is computed in float64 and rounded up or down at random, with the right mean (random rounding: Forsythe 1959;
  Parker's Monte Carlo arithmetic). The error of one rounding is then sqrt(2) times that of rounding to the nearest.

The results are the same on every machine.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten


class DrawnArithmetic(TorchDispatchMode):
    """Runs PyTorch's float32 operators as the module's docstring says, with draws from `seed`.

    bfloat16 is summed in float32, as PyTorch promises, and rounded to the nearest. Operators that hide a sum raise
    NotImplementedError: write the formula in plain operators.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op in SUMS:
            return getattr(self, SUMS[op])(*args, **kwargs)
        if op in SEVERAL_ROUNDINGS and args[0].dtype == torch.float32:
            return getattr(self, SEVERAL_ROUNDINGS[op])(*args)
        if op.is_view or op.overloadpacket in EXACT:
            return op(*args, **kwargs)
        if torch.Tag.pointwise not in op.tags or op._schema.is_mutable:
            raise NotImplementedError(f"{op}: add how it is rounded to tests/drawn_arithmetic.py")
        return self._rounded(op(*tree_map_only(Tensor, _exact, args), **kwargs))

    def _rounded(self, x: Tensor) -> Tensor:
        """Round to float32, up or down at random."""
        if x.dtype != torch.float64:
            return x
        near = x.float()
        far = torch.nextafter(near, torch.where(x > near.double(), torch.inf, -torch.inf).float())
        share = ((x - near.double()) / (far.double() - near.double())).nan_to_num(0, 0, 0)
        uniform = torch.rand(x.shape, generator=self.generator, dtype=torch.float64).to(x.device)
        return torch.where(uniform < share, far, near)

    def _step(self, f, *inputs: Tensor) -> Tensor:
        """One float32 operation."""
        return self._rounded(f(*(x.double() for x in inputs)))

    def _normal_distribution(self, x: Tensor) -> Tensor:
        erf = self._step(torch.erf, self._step(lambda x: x * 0.5**0.5, x))
        return 0.5 * self._step(lambda e: 1 + e, erf)

    def _gelu(self, x: Tensor) -> Tensor:
        return self._step(torch.mul, x, self._normal_distribution(x))

    def _gelu_backward(self, d_out: Tensor, x: Tensor) -> Tensor:
        """d_out (Phi(x) + x phi(x))."""
        power = self._step(torch.exp, -0.5 * self._step(torch.mul, x, x))
        density = self._step(lambda p: p * (2 * torch.pi) ** -0.5, power)
        slope = self._step(torch.add, self._normal_distribution(x), self._step(torch.mul, x, density))
        return self._step(torch.mul, d_out, slope)

    def _order(self, n: int) -> list[int]:
        return torch.randperm(n, generator=self.generator).tolist()

    def _sum(self, x: Tensor, dim=None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
        input_shape, dims = x.shape, sorted(d % x.dim() for d in (dim or range(x.dim())))
        terms = x.movedim(dims, tuple(range(len(dims)))).flatten(0, len(dims) - 1) if dims else x[None]
        total = torch.zeros_like(terms[0], dtype=_wide(x.dtype))
        for i in self._order(len(terms)):
            total += terms[i]
        if keepdim:
            total = total.view([1 if d in dims else size for d, size in enumerate(input_shape)])
        return total.to(dtype or x.dtype)

    def _mean(self, x: Tensor, dim=None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
        total = self._sum(x, dim, keepdim, dtype=_wide(x.dtype))
        return (total / (x.numel() // total.numel())).to(dtype or x.dtype)

    def _norm(self, x: Tensor, order=2, dim=None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
        assert order == 2
        wide = x.to(_wide(x.dtype))
        return self._sum(wide * wide, dim, keepdim).sqrt().to(dtype or x.dtype)

    def _matmul(self, a: Tensor, b: Tensor) -> Tensor:
        return self._add_matmul(None, a, b)

    def _add_matmul(self, start: Tensor | None, a: Tensor, b: Tensor, *, beta=1, alpha=1) -> Tensor:
        wide = _wide(a.dtype)
        columns, rows = a.to(wide).unbind(-1), b.to(wide).unbind(-2)
        total = torch.zeros(*a.shape[:-1], b.shape[-1], dtype=wide, device=a.device)
        for k in self._order(len(columns)):
            total += columns[k][..., None] * rows[k][..., None, :]
        return (total if start is None else alpha * total + beta * start).to(a.dtype)

    def _softmax(self, x: Tensor, dim: int, half_to_float: bool) -> Tensor:
        powers = (x.to(_wide(x.dtype)) - x.amax(dim, keepdim=True)).exp()
        return (powers / self._sum(powers, [dim], keepdim=True)).to(x.dtype)

    def _softmax_backward(self, d_out: Tensor, out: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        weighted = d_out.to(_wide(out.dtype)) * out
        return (weighted - out * self._sum(weighted, [dim], keepdim=True)).to(dtype)


def _exact(x: Tensor) -> Tensor:
    return x.double() if x.dtype == torch.float32 else x


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.bfloat16 else dtype


SUMS = {
    aten.sum.default: "_sum",
    aten.sum.dim_IntList: "_sum",
    aten.mean.default: "_mean",
    aten.mean.dim: "_mean",
    aten.linalg_vector_norm.default: "_norm",
    aten.mm.default: "_matmul",
    aten.bmm.default: "_matmul",
    aten.addmm.default: "_add_matmul",
    aten.baddbmm.default: "_add_matmul",
    aten._softmax.default: "_softmax",
    aten._softmax_backward_data.default: "_softmax_backward",
}
SEVERAL_ROUNDINGS = {aten.gelu.default: "_gelu", aten.gelu_backward.default: "_gelu_backward"}
"""Pointwise operators that round several times inside."""
EXACT = {
    aten._to_copy,
    aten.cat,
    aten.stack,
    aten.zeros,
    aten.zeros_like,
    aten.new_zeros,
    aten.ones_like,
    aten.empty,
    aten.empty_like,
    aten.new_empty,
    aten.new_empty_strided,
    aten.full_like,
    aten.clone,
    aten.slice_backward,
    aten.select_backward,
    aten._unsafe_view,
    aten.copy_,
    aten.fill_,
    aten.masked_fill_,
    aten.max_pool2d_with_indices,
    aten.max_pool2d_with_indices_backward,  # exact where windows do not overlap
    aten.arange,
    aten.constant_pad_nd,
    aten.scalar_tensor,
    aten.promote_types,
    aten.randn,
    aten._local_scalar_dense,
}
