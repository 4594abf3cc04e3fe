"""The figures of benchmarks/muon.py that are counted or computed, without its times."""

import importlib.util
from pathlib import Path

import pytest
import torch

from unite_fast.optim.muon import newton_schulz_flops

FILE = Path(__file__).parents[2] / "benchmarks" / "muon.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmarks_muon", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_b_has_115_matrices(bench):
    shapes = bench.muon_shapes("b")
    assert len(shapes) == 115
    assert torch.Size((1002, 768)) in shapes  # the label table is Muon's too


def test_work_by_hand(bench):
    """Three equal matrices on two ranks: one rank has two of them."""
    shapes = [torch.Size((8, 6))] * 3
    each = newton_schulz_flops((8, 6))
    alone = {"gflop": 3 * each / 1e9, "everywhere": 3 * each / 1e9, "batches": 1, "sent_mb": 0.0}
    assert bench.work(shapes, 1, 1) == alone
    spread = bench.work(shapes, 2, 1)
    assert spread["gflop"] == 2 * each / 1e9 and spread["everywhere"] == alone["everywhere"]
    assert spread["sent_mb"] == 2 * 48 * 2 / 1e6  # padded to the fuller rank
    # One rank receives half of two matrices and sends it back, the other half of one.
    assert bench.work(shapes, 1, 2)["sent_mb"] == 3 * 24 * 2 / 1e6


def test_agreement_measures_a_difference(bench):
    g = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    cosine, error = bench.agreement(g, g)
    assert abs(cosine) < 1e-12 and error == 0
    cosine, error = bench.agreement(-1.5 * g, g)
    assert cosine == pytest.approx(2) and error == pytest.approx(2.5)


def test_torch_in_float32_is_accurate(bench):
    """Against float64, its error in bfloat16 is a hundred times that in float32."""
    g = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    expected = -0.2 * 40**0.5 * bench.newton_schulz(g[None].double(), bench.EPS)[0]
    single, half = (
        bench.agreement(bench.torch_update(g, dtype), expected)[1] for dtype in (torch.float32, torch.bfloat16)
    )
    assert single < 1e-5 and 1e-3 < half < 3e-2
