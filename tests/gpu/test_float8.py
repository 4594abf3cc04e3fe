"""float8 on a GPU: the rounding kernel bit for bit, the scaled matmul and a training step against the emulation."""

from dataclasses import replace

import pytest
import torch

from unite_fast.config import Config
from unite_fast.kernels import float8
from unite_fast.kernels.float8 import dequantise, quantise, quantise_ref
from unite_fast.recipes import load_config
from unite_fast.training.trainer import train
from unite_fast.utils.rows import read_rows

pytestmark = pytest.mark.gpu

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def float8_here(device):
    if why := float8.why_missing(device):
        pytest.skip(why)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", [(37, 768), (64, 2048), (5, 1152)])
def test_rounding_equals_the_definition(shape, dtype, device, draw):
    x = (draw(*shape) * torch.logspace(-30, 30, shape[0], device=device)[:, None]).to(dtype)
    x[1], x[2, 3], x[3, 5] = 0, float("inf"), float("nan")
    for rows in (x, x.mT):
        actual, expected = quantise(rows), quantise_ref(rows)
        assert torch.equal(actual.values.view(torch.uint8), expected.values.view(torch.uint8))
        torch.testing.assert_close(actual.scale, expected.scale, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [37, 256, 8352])
def test_the_scaled_matmul_against_float64(rows, with_bias, on_cuda, draw, record_property):
    """Rows that are no multiple of 128 or 256 too: pytorch issue 133334. Fast accumulation keeps about 14 bits."""
    if not on_cuda:
        pytest.skip("tests/kernels/test_float8.py has the CPU's")
    a, b = quantise(100 * draw(rows, 768)), quantise(draw(2304, 768))
    bias = draw(2304, dtype=HALF) if with_bias else None
    actual = float8.scaled_matmul(a, b, bias).double()
    x, w = (dequantise(one, torch.float32).double() for one in (a, b))
    exact, sizes = x @ w.mT, x.abs() @ w.mT.abs()
    if bias is not None:
        exact, sizes = exact + bias.double(), sizes + bias.double().abs()
    error = (actual - exact).abs() - 2.0**-8 * exact.abs()
    record_property("of the sizes", (error / sizes).max().item())
    assert (error <= 2.0**-10 * sizes).all()


def test_losses_of_a_run_are_near_those_in_bfloat16(tiny_run, tmp_path, device):
    rows = {}
    for precision in ("bfloat16", "float8"):
        settings = (*tiny_run, f"train.precision={precision}", f"train.out={tmp_path / precision}", "train.log_every=5")
        config: Config = load_config("digits", settings)
        config = replace(config, train=replace(config.train, device=device.type, compile=False, steps=10))
        rows[precision] = [row["total"] for row in read_rows(train(config).folder / "metrics.jsonl")]
    assert rows["float8"] != rows["bfloat16"]
    assert rows["float8"] == pytest.approx(rows["bfloat16"], rel=0.05)
