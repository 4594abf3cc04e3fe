import pytest
import torch

from unite_fast.kernels import qk_norm_rope, split_heads
from unite_fast.kernels.qk_norm_rope import qk_norm_rope_ref

SHAPES = [(5, 41, 3, 14), (2, 20, 4, 16)]
"""B, T, heads, head dimension."""
fast_backends = pytest.mark.parametrize("backend_name", ["native", "triton"], indirect=True)
native_only = pytest.mark.parametrize("backend_name", ["native"], indirect=True)


def angles(draw, t, k):
    angle = 3 * draw(t, k // 2)
    return angle.cos(), angle.sin()


def formula(heads, cos, sin):
    """Head by head and pair by pair, with the rotation as a 2 x 2 matrix."""

    def apply(qkv, q_weight=None, k_weight=None):
        d = qkv.shape[-1] // 3
        k = d // heads
        matrix = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2).to(qkv.dtype)
        results = []
        for part, weight in enumerate((q_weight, k_weight, None)):
            per_head = []
            for head in range(heads):
                x = qkv[:, :, part * d + head * k : part * d + (head + 1) * k]
                if part < 2:
                    if weight is not None:
                        x = (x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-6) * weight).to(qkv.dtype)
                    x = torch.einsum("tpij,btpj->btpi", matrix, x.unflatten(-1, (-1, 2))).flatten(-2)
                per_head.append(x)
            results.append(torch.stack(per_head, dim=1))
        return tuple(results)

    return apply


@pytest.mark.parametrize("op", [qk_norm_rope, qk_norm_rope_ref])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_against_float64(op, norm, dtype, shape, judge, draw):
    b, t, heads, k = shape
    cos, sin = angles(draw, t, k)
    inputs = {"qkv": draw(b, t, 3 * heads * k, dtype=dtype)}
    if norm:
        inputs |= {"q_weight": draw(k, around=1.0), "k_weight": draw(k, around=1.0)}

    def ours(qkv, q_weight=None, k_weight=None):
        return op(qkv, heads, q_weight, k_weight, cos, sin)

    judge(ours, formula(heads, cos, sin), inputs, (dtype, dtype, dtype))


def test_strided_input(judge, draw):
    cos, sin = angles(draw, 9, 8)

    def ours(qkv):
        return qk_norm_rope(qkv, 2, None, None, cos, sin)

    judge(ours, formula(2, cos, sin), {"qkv": draw(3, 18, 48)[:, ::2]}, (torch.float32,) * 3)


def test_cos_1_and_sin_0_rotate_nothing(draw):
    qkv = draw(2, 5, 48)
    q, k, v = qk_norm_rope(qkv, 2, None, None, torch.ones(5, 4), torch.zeros(5, 4))
    for actual, part in zip((q, k, v), qkv.chunk(3, dim=-1), strict=True):
        assert torch.equal(actual, part.unflatten(-1, (2, 8)).transpose(1, 2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"qkv": (3, 48)}, r"qkv must be \[B, T, 3 \* heads \* head_dim\]"),
        ({"qkv": (3, 9, 50)}, "width 50 is not 3 x 2 heads of even size"),
        ({"qkv": (3, 9, 42)}, "width 42 is not 3 x 2 heads of even size"),
        ({"k_weight": None}, "q_weight and k_weight must both be given or both be None"),
        ({"q_weight": (7,)}, r"q_weight and k_weight must be \[8\]"),
        ({"k_weight": (16,)}, r"q_weight and k_weight must be \[8\]"),
        ({"cos": (8, 4)}, r"cos and sin must be \[9, 4\]"),
        ({"sin": (9, 8)}, r"cos and sin must be \[9, 4\]"),
    ],
)
def test_inconsistent_arguments_are_refused(wrong, message, draw):
    shapes = {"qkv": (3, 9, 48), "q_weight": (8,), "k_weight": (8,), "cos": (9, 4), "sin": (9, 4)} | wrong
    arguments = {name: shape and draw(*shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=f"qk_norm_rope: {message}"):
        qk_norm_rope(**arguments, heads=2)


@fast_backends
@pytest.mark.parametrize("head_dim", [2, 6, 16, 32, 64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_dimensions(backend_name, head_dim, dtype, judge, draw):
    angle = draw(7, head_dim // 2)

    def bind(function):
        def op(qkv, q_weight, k_weight):
            return function(qkv, 3, q_weight, k_weight, angle.cos().to(q_weight), angle.sin().to(q_weight))

        return op

    inputs = {"qkv": draw(2, 7, 9 * head_dim, dtype=dtype), "q_weight": draw(head_dim), "k_weight": draw(head_dim)}
    judge(bind(qk_norm_rope), bind(qk_norm_rope_ref), inputs, (dtype,) * 3)


@fast_backends
def test_views_share_the_memory_of_qkv(backend_name, draw):
    qkv = draw(2, 5, 48)
    v = qk_norm_rope(qkv, 2, None, None, draw(5, 4), draw(5, 4))[2]
    for view in (v, *split_heads(qkv, 2)):
        assert view.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()


@fast_backends
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_bias_that_qkv_contains(backend_name, norm, dtype, judge, draw):
    """More tokens than a program of the Triton backend takes."""
    cos, sin = angles(draw, 67, 6)
    inputs = {"qkv": draw(2, 67, 36, dtype=dtype), "qkv_bias": draw(36)}
    if norm:
        inputs |= {"q_weight": draw(6, around=1.0), "k_weight": draw(6, around=1.0)}

    def ours(qkv, qkv_bias, q_weight=None, k_weight=None):
        return qk_norm_rope(qkv, 2, q_weight, k_weight, cos, sin, qkv_bias=qkv_bias)

    def exact(qkv, qkv_bias, *weights):
        return formula(2, cos, sin)(qkv + (qkv_bias - qkv_bias.detach()), *weights)

    judge(ours, exact, inputs, (dtype,) * 3)


@pytest.mark.parametrize("backend_name", ["reference", "native", "triton"], indirect=True)
@pytest.mark.parametrize("bias", [True, False])
def test_split_heads_and_its_gradients(backend_name, bias, judge, draw):
    def exact(qkv, qkv_bias=None):
        if qkv_bias is not None:
            qkv = qkv + (qkv_bias - qkv_bias.detach())
        return tuple(
            torch.stack([qkv[:, :, first + h * 5 : first + h * 5 + 5] for h in range(3)], 1) for first in (0, 15, 30)
        )

    inputs = {"qkv": draw(2, 67, 45)} | ({"qkv_bias": draw(45)} if bias else {})
    judge(lambda qkv, qkv_bias=None: split_heads(qkv, 3, qkv_bias), exact, inputs, (torch.float32,) * 3)


@pytest.mark.parametrize(
    ("shape", "bias", "message"),
    [((2, 5, 50), 50, r"qkv must be \[B, T, 3 x 2 heads x K\]"), ((2, 5, 48), 16, r"qkv_bias must be \[48\]")],
)
def test_split_heads_refuses_other_shapes(shape, bias, message, draw):
    with pytest.raises(ValueError, match=f"split_heads: {message}"):
        split_heads(draw(*shape), 2, draw(bias))


def test_cos_and_sin_get_no_gradient(draw):
    with pytest.raises(ValueError, match="qk_norm_rope: cos and sin get no gradient; detach them"):
        qk_norm_rope(draw(2, 5, 48), 2, None, None, draw(5, 4).requires_grad_(), draw(5, 4))
