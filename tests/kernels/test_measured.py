"""The table of measured times, and what kernels=auto makes of it. The card is made up."""

import json
from dataclasses import asdict
from unittest import mock

import pytest
import torch

from unite_fast import kernels
from unite_fast.errors import UserError
from unite_fast.kernels import backend, measured, registry

CARD = "NVIDIA H100 80GB HBM3"


def row(op: str, triton: float, reference: float, dtype: str = "bfloat16", shape: str = "64x544x768") -> measured.Row:
    winner = "triton" if triton <= reference else "reference"
    return measured.Row(CARD, op, shape, dtype, winner, triton, reference, "0123abc", "2026-11-28T10:00:00Z")


@pytest.fixture
def on_a_card(monkeypatch):
    """on_a_card(rows): a process on CARD with this table and kernels=auto."""

    def use(rows: list[measured.Row]) -> None:
        monkeypatch.setattr(measured, "_shipped", lambda: rows)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: CARD)
        monkeypatch.setattr(backend, "_triton_installed", True)
        backend.use("auto", torch.device("cuda"))

    before = backend.current()
    yield use
    monkeypatch.undo()
    backend.use(before)


def tensor(dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> torch.Tensor:
    """As much of a tensor as the choice reads."""
    return mock.Mock(dtype=dtype, device=torch.device(device))


@pytest.fixture
def compiling(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def test_the_shipped_table_has_the_fastest_of_known_ops():
    rows = measured.read()
    assert {each.op for each in rows} <= registry.OPS.keys()
    assert all(each.winner == ("triton" if each.triton_ms <= each.reference_ms else "reference") for each in rows)
    assert len({each.case for each in rows}) == len(rows)


def test_an_op_that_lost_runs_the_compiled_reference(on_a_card, compiling):
    on_a_card([row("swiglu", 2.0, 1.5), row("qk_norm_rope", 1.0, 1.5)])
    assert backend.choose(tensor(), op="swiglu") == "reference"
    assert backend.choose(tensor(), op="qk_norm_rope") == "triton"
    assert backend.choose(tensor(), op="adaln_modulate") == "triton"
    assert backend.choose(tensor(torch.float32), op="swiglu") == "triton"
    with backend.using("reference"):
        assert backend.choose(tensor(), op="qk_norm_rope") == "reference"
    assert backend.choose(tensor(), op="swiglu") == "reference"
    backend.use("auto", torch.device("cpu"))
    assert backend.choose(tensor(), op="swiglu") == "triton"


def test_all_shapes_count_together(on_a_card, compiling):
    wide = "64x544x1152"
    on_a_card([row("swiglu", 1.0, 1.2), row("swiglu", 3.0, 2.0, shape=wide), row("adaln_modulate", 1.0, 1.0)])
    assert backend.choose(tensor(), op="swiglu") == "reference"
    assert backend.choose(tensor(), op="adaln_modulate") == "triton"


def test_without_torch_compile_triton_runs(on_a_card):
    """The reference was measured compiled."""
    on_a_card([row("swiglu", 2.0, 1.5)])
    assert backend.choose(tensor(), op="swiglu") == "triton"


def test_the_cpu_is_not_affected(on_a_card, compiling):
    on_a_card([row("swiglu", 2.0, 1.5)])
    x = tensor(device="cpu")
    assert backend.choose(x, op="swiglu") == backend.backend_on(x.device)


def test_an_op_is_chosen_by_its_own_name(monkeypatch):
    """Every op that the benchmark measures names itself."""
    ops = {name: op for name, op in registry.OPS.items() if op.part in ("block", "latents")}
    asked = []

    def record(x, out_dtype=None, op=""):
        asked.append(op)
        return "reference"

    monkeypatch.setattr(backend, "choose", record)
    size = registry.Size(1, 4, 8, heads=2, head_dim=4, hidden=8)
    for name, op in ops.items():
        asked.clear()
        example = op.example(size, registry.empty)
        if "philox" in example:
            continue  # draws need numbers
        op.function(**example)
        assert set(asked) == {name}


def test_a_table_does_not_break_the_graph(monkeypatch):
    monkeypatch.setattr(backend, "_slower", {"swiglu": ["float32"]})
    torch._dynamo.reset()
    x = torch.randn(2, 3, 8)
    compiled = torch.compile(kernels.swiglu, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), kernels.swiglu(x))


def test_a_card_without_rows_is_named_once_at_start(on_a_card):
    device = torch.device("cuda")
    on_a_card([])
    assert CARD in backend.unmeasured(device) and "unite-fast tune" in backend.unmeasured(device)
    assert not backend.unmeasured(torch.device("cpu"))
    on_a_card([row("swiglu", 1.0, 1.5)])
    assert not backend.unmeasured(device)


def times(op: str, triton: float, reference: float | None, **facts) -> list[dict]:
    """What benchmarks/kernels.py --json prints of one case."""
    facts = {"card": CARD, "cuda": "13.0", "commit": "0123abc", "date": "2026-11-28T10:00:00Z"} | facts
    case = {"op": op, "shape": "64x544x768", "dtypes": "float32 residual, bfloat16"}
    figures = {"eager": 9.0, "compiled": reference, "triton": triton}
    return [
        {**case, "way": way, "backend": name, "ms_p50": ms / (1 if way == "both" else 2), **facts}
        for way in ("forward", "both")
        for name, ms in figures.items()
        if ms is not None
    ]


def write(path, rows: list[dict]):
    path.write_text(json.dumps(rows))
    return path


def test_times_of_a_gpu_are_recorded(tmp_path):
    table = write(tmp_path / "measured.json", [asdict(row("swiglu", 1.0, 1.5))])
    new = times("swiglu", 2.0, 1.5) + times("adaln_modulate", 1.0, 1.5)
    measured.record(write(tmp_path / "times.json", new), table)
    assert measured.read(table) == [
        row("adaln_modulate", 1.0, 1.5, "float32"),
        row("swiglu", 1.0, 1.5),
        row("swiglu", 2.0, 1.5, "float32"),
    ]
    measured.record(write(tmp_path / "times.json", times("swiglu", 1.0, 1.5)), table)
    assert [each.triton_ms for each in measured.read(table)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "rows, said",
    [
        (times("swiglu", 1.0, 1.5, card="Xeon, 2 cores", cuda=""), "Xeon"),
        (times("swiglu", 1.0, 1.5, commit="0123abc+"), "0123abc+"),
        (times("swiglu", 1.0, 1.5, commit="0.2.0"), "0.2.0"),
        (times("swiglu", 1.0, 1.5, commit=""), "commit"),
        (times("swiglu", 1.0, None), "--no-compiled"),
    ],
    ids=["a CPU", "changed code", "a version", "no commit", "no reference"],
)
def test_other_times_are_refused(rows, said, tmp_path, mentions):
    table = write(tmp_path / "measured.json", [])
    with pytest.raises(UserError, match=mentions(said)):
        measured.record(write(tmp_path / "times.json", rows), table)
    assert measured.read(table) == []


@pytest.mark.parametrize("text", [None, "", "no json", b"\xff\xfe"])
def test_a_file_that_is_no_output_of_the_benchmark_is_refused(text, tmp_path, mentions):
    table, broken = write(tmp_path / "measured.json", []), tmp_path / "times.json"
    if text is not None:
        broken.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=mentions("times.json")):
        measured.record(broken, table)
    assert [each.name for each in tmp_path.iterdir() if each != broken] == ["measured.json"]
