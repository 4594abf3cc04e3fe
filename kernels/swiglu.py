"""swiglu: out = silu(u) * w, where u and w are the two halves of the last dimension.

Shapes: uw [..., 2 M] -> [..., M] in uw's dtype; silu and the product are float32.
Source: Shazeer, arXiv 2002.05202.
"""

from torch import Tensor
from torch.nn import functional as F

from unite_fast.kernels.common import check, upcast


def swiglu(uw: Tensor) -> Tensor:
    """Gate the second half by SiLU of the first; see the module's docstring.

    Raises:
        ValueError: an odd last dimension.
    """
    check(uw.shape[-1] % 2 == 0, "swiglu", f"the last dimension must be even, got {uw.shape[-1]}")
    return swiglu_ref(uw)


def swiglu_ref(uw: Tensor) -> Tensor:
    u, w = upcast(uw).chunk(2, dim=-1)
    return (F.silu(u) * w).to(uw.dtype)
