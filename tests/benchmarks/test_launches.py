import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from unite_fast.kernels import backend, matmul
from unite_fast.recipes import load_config

pytestmark = pytest.mark.skipif(bool(backend.why_missing("triton")), reason=backend.why_missing("triton") or "here")

TARGET = 1400
"""Kernels of a micro-batch of UNITE-B with LPIPS. They were 7,997 (2026-11-26, main at 2154585)."""


@pytest.fixture(scope="module")
def launches():
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("launches")
    finally:
        sys.path.remove(folder)
        sys.modules.pop("launches", None)


@pytest.fixture(scope="module")
def unite_b(launches):
    return launches.count(load_config("imagenet256_b"), 64)


def test_a_micro_batch_of_unite_b(launches, unite_b):
    assert launches.total(unite_b) <= TARGET


def test_every_part_was_counted(launches, unite_b):
    parts = unite_b["micro_batch"]
    assert list(parts) == list(launches.PARTS)
    assert all(parts.values())
    blocks = load_config("imagenet256_b").model.encoder.depth
    for part in ("tokenizer forward", "flow forward"):
        assert parts[part]["_swiglu_fwd_kernel"] == parts[part]["_qk_norm_rope_fwd_kernel"] == blocks
    for part in ("reconstruction backward", "flow backward"):
        # The decoder's attention assembles the gradient of qkv with the same kernel.
        layers = load_config("imagenet256_b").model.decoder.depth * (part == "reconstruction backward")
        assert (parts[part]["_swiglu_bwd_kernel"], parts[part]["_qk_norm_rope_bwd_kernel"]) == (blocks, blocks + layers)
    lpips = parts["LPIPS forward"]
    assert lpips["convolution"] == 26 and lpips["_tap_distance_fwd_kernel"] == 5
    # The kernel of a tap adds the bias of the convolution before it, for both images.
    assert lpips["_bias_relu_fwd_kernel"] == 16 and parts["reconstruction backward"]["_bias_relu_bwd_kernel"] == 8
    assert sum(lpips.values()) <= 65


def test_each_draw_is_one_launch(unite_b):
    draws = unite_b["micro_batch"]["draws"]
    assert (draws["_uniforms_kernel"], draws["_normals_kernel"]) == (4, 2)
    assert sum(draws.values()) <= 20


def test_an_optimizer_step_of_unite_b(unite_b):
    """Outside Newton-Schulz, each kernel is launched once for all tensors. Together they were 301 (main at 66e2ed0)."""
    counts = unite_b["optimizer"]
    kernels = {name for name, number in counts.items() if name.endswith("_kernel") and number == 1}
    muon, adamw = {"_muon_momentum_kernel", "_muon_update_kernel"}, {"_adamw_steps_kernel", "_adamw_update_kernel"}
    assert kernels == muon | adamw | {"_gradient_squares_kernel", "_gradient_norm_kernel"}
    newton_schulz = {"bmm", "baddbmm", "linalg_vector_norm", "clamp_min", "div", "copy_"}
    assert set(counts) == kernels | newton_schulz
    shapes = 10
    assert sum(counts[name] for name in newton_schulz) == shapes * (5 * 3 + 4)


def test_weights_are_cast_once(unite_b):
    parts = unite_b["micro_batch"]
    assert set(parts["casts of weights"]) == {"_foreach_copy_"}
    assert sum(names.get("_to_copy", 0) for names in parts.values()) < 60


def test_further_micro_batches_also_add_gradients(launches):
    """With a small recipe; the count is the mean over the micro-batches of a step."""
    config = load_config("digits", ("train.precision=bfloat16",))
    (one, parts), (two, further) = (
        (launches.total(c), c["micro_batch"]) for c in (launches.count(config, 4, n) for n in (1, 2))
    )
    assert further["the rest"]["_foreach_add_"] > parts["the rest"]["_foreach_add_"]
    assert 0.9 * one < two < 2 * one  # what is done once a step is shared


def test_counts_do_not_depend_on_the_cpu(launches, monkeypatch):
    """A CPU without bfloat16 instructions casts the operands of its matmuls to float32; a GPU does not."""
    config, counts = load_config("digits", ("train.precision=bfloat16", "optim.muon_dtype=bfloat16")), []
    for instructions in (True, False):
        monkeypatch.setattr(matmul, "bfloat16_instructions", lambda answer=instructions: answer)
        counts.append(launches.count(config, 2))
    assert counts[0] == counts[1]


def counted(launches, function, *tensors):
    with launches.Launches() as counter:
        function(*tensors)
    return {name: number for (_, name), number in counter.counts.items()}


def test_the_rules(launches):
    x, image = torch.randn(4, 8), torch.randn(2, 3, 8, 8, requires_grad=True)
    weight, bias = torch.randn(5, 3, 3, 3, requires_grad=True), torch.randn(5, requires_grad=True)
    assert counted(launches, lambda x: x.view(8, 4).t().unsqueeze(0), x) == {}
    assert counted(launches, lambda x: torch.empty_like(x), x) == {}
    assert counted(launches, lambda x: x.mul(2).add_(1), x) == {"mul": 1, "add_": 1}
    assert counted(launches, F.conv2d, image, weight, bias) == {"convolution": 2}
    assert counted(launches, F.conv2d, image, weight) == {"convolution": 1}
    y = F.conv2d(image, weight, bias)
    assert counted(launches, y.backward, torch.ones_like(y))["convolution_backward"] == 3
    many = [torch.zeros(10) for _ in range(61)]
    assert counted(launches, torch._foreach_add_, many, 1) == {"_foreach_add_": 3}
    assert counted(launches, torch._foreach_add_, [torch.zeros(2**20)] * 40, 1) == {"_foreach_add_": 2}


def test_an_op_that_ran_no_kernel_is_a_mistake(launches, mentions):
    x = torch.randn(2, 8)
    with pytest.raises(AssertionError, match=mentions("swiglu.default")), launches.Launches():
        torch.ops.unite_fast.swiglu(x, None)


def test_command(launches, monkeypatch, capsys, mentions):
    monkeypatch.setattr(sys, "argv", ["launches.py", "--recipe", "digits", "--micro-batch", "2", "--json"])
    assert launches.main() == 0
    result = json.loads(capsys.readouterr().out)
    assert result["total"] == launches.total(result) > 0
    assert result["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(sys, "argv", ["launches.py", "--recipe", "digits", "--micro-batch", "2"])
    assert launches.main() == 0
    assert "a micro-batch" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["launches.py", "--recipe", "nothing"])
    assert launches.main() == 2
    assert re.search(mentions("nothing"), capsys.readouterr().err)
