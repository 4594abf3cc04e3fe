"""`unite-fast plan`: its arithmetic and its output."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from unite_fast.errors import UserError
from unite_fast.kernels import backend
from unite_fast.kernels.fused_op import triton_function
from unite_fast.planning import flops, memory, predict, step_bytes
from unite_fast.planning.flops import tokens_per_block
from unite_fast.planning.gpus import find_gpu
from unite_fast.planning.lpips import lpips_bytes
from unite_fast.planning.predict import (
    FAST,
    Cluster,
    Work,
    image_seconds,
    image_work,
    make_plan,
)
from unite_fast.recipes import load_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def plan(recipe: str, gpu: str, nodes: int, *overrides: str, per_node: int = 8):
    return make_plan(load_config(recipe, overrides), Cluster(find_gpu(gpu), nodes, per_node))


# The first time model of this project: its work of UNITE-B, and below its images/s (docs/performance.md, 2026-11-22).
FIRST_WORK = Work(
    matmul=895e9,
    float8=0,
    attention=0,
    convolutions=120e9,
    encoder_bytes=157 * 16384 * 768,
    decoder_bytes=0.5e9,
    float8_bytes=0,
    lpips_bytes=0,
    pixel_bytes=0.07e9,
)


@pytest.mark.parametrize("gpu, images_per_s", [("h100", 395), ("h200", 442), ("b200", 914)])
def test_the_time_model_gives_the_first_figures(gpu, images_per_s):
    assert 1 / sum(image_seconds(FIRST_WORK, find_gpu(gpu), FAST).values()) == pytest.approx(images_per_s, rel=5e-3)


def test_the_work_of_unite_b_differs_from_the_first_model_in_unread_tokens_and_lpips():
    work = predict.image_work(load_config("imagenet256_b"))
    assert work.matmul + work.attention == pytest.approx(FIRST_WORK.matmul, rel=0.02)
    # Tokens squared: 4 blocks without in-context tokens, 7 with, the last one with 256 queries; the decoder.
    tokenizer, flow = 4 * 512**2 + 7 * 544**2 + 544 * 256, 4 * 256**2 + 7 * 288**2 + 288 * 256
    assert work.attention == 12 * 768 * (tokenizer + 3 * flow + 12 * 257**2)
    assert work.convolutions == pytest.approx(FIRST_WORK.convolutions, rel=0.005)
    # Kernels that read the inputs anyway write the recomputed tensors: 134 bytes instead of 157. A decoder layer moves
    # 120 bytes, not the 211 of 0.5 GB.
    assert work.encoder_bytes == pytest.approx(step_bytes.BLOCK_BYTES * 16384 * 768, rel=0.04)
    assert work.decoder_bytes == step_bytes.DECODER_BYTES * 257 * 12 * 768
    assert work.lpips_bytes == lpips_bytes(256)


def test_block_bytes_are_those_of_the_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    traffic = importlib.import_module("traffic")
    sys.modules.pop("traffic")
    assert round(traffic.block_bytes(torch.float32, "triton", recompute=True)) == step_bytes.BLOCK_BYTES
    assert round(sum(traffic.decoder_layer_bytes(torch.float32).values())) == step_bytes.DECODER_BYTES


@pytest.mark.skipif(bool(backend.why_missing("triton")), reason=backend.why_missing("triton") or "here")
@pytest.mark.skipif(not backend.interpreted(), reason="the bytes are counted by Triton's interpreter")
def test_optimizer_bytes_are_those_of_its_kernels(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    moved, n = 0, 16384

    def count(name: str, mask: int) -> None:
        access = getattr(InterpreterBuilder, name)

        def counted(self, pointers, *others):
            nonlocal moved
            if pointers.data.size > 1:  # not a scalar
                moved += int(others[mask].data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
            return access(self, pointers, *others)

        monkeypatch.setattr(InterpreterBuilder, name, counted)

    count("create_masked_load", 0)
    count("create_masked_store", 1)

    def bytes_of(name: str, *arguments) -> float:
        nonlocal moved
        moved = 0
        triton_function("optimizer", name)(*arguments)
        return round(moved / n, 1)

    a, b, c, d, e = ([torch.ones(n)] for _ in range(5))
    half, norm, steps = [torch.ones(n, dtype=torch.bfloat16)], torch.tensor(1.0), [torch.ones(())]
    gradient = bytes_of("gradient_norm", a)
    momentum = bytes_of("muon_momentum", a, b, half, norm, 1.0, 0.9, None)
    update = bytes_of("muon_update", a, b, half, [0.1], 0.9, None)
    adamw = bytes_of("adamw_update", a, b, c, (d, e), steps, norm, 1.0, 0.1, (0.9, 0.9), 1e-6, 0.9, None)
    assert gradient + momentum + update == step_bytes.MUON_BYTES
    assert gradient + adamw == step_bytes.ADAMW_BYTES


def test_sharding_divides_the_state_and_sends_the_parameters():
    replicated, sharded, hybrid = (
        plan("imagenet256_xl", "h100", 2, f"parallel.strategy={name}") for name in ("ddp", "fsdp", "hsdp")
    )
    for name in ("parameters", "optimizers", "EMA"):
        assert sharded.memory[name] == pytest.approx(replicated.memory[name] / 16)
        assert hybrid.memory[name] == pytest.approx(replicated.memory[name] / 8)
    assert {one.name for one in replicated.collectives} == {"all-reduce of gradients", "all-gather of Muon's updates"}
    gathers = [one for one in sharded.collectives if one.name == "all-gather of parameters"]
    assert gathers[0].times == 2 * sharded.micro_steps == 4 and gathers[0].group == 16
    decoder, encoder = (flops.parameters(sharded.config.model)[part] for part in ("decoder", "encoder"))
    assert gathers[0].size == pytest.approx(2 * (decoder + 2 * encoder), rel=1e-6)
    gathered = plan("imagenet256_xl", "h100", 2, "parallel.strategy=fsdp", "parallel.reshard_after_forward=false")
    assert gathered.collectives[0].times == 1 and gathered.collectives[0].size == pytest.approx(
        2 * (decoder + encoder), rel=1e-6
    )
    assert gathered.memory["gathered in bfloat16"] > sharded.memory["gathered in bfloat16"]


def test_one_gpu_does_not_communicate():
    alone = plan("imagenet256_b", "h200", 1, per_node=1)
    assert (alone.strategy, alone.collectives, alone.fast.seconds["communication"]) == ("ddp", [], 0)
    assert "gathered in bfloat16" not in alone.memory
    total = sum(flops.parameters(alone.config.model).values())
    assert alone.memory["weights in bfloat16"] == 2 * total
    # A pass's own gradients grow while its activations are freed: with few images they are the larger part.
    assert "gradients of a pass" not in alone.memory
    few = plan("imagenet256_xl", "h200", 1, "train.micro_batch=1", per_node=1)
    saved, total = memory.activations(few.config), sum(flops.parameters(few.config.model).values())
    left = few.memory["gradients of a pass"]
    assert left > 1e9 and left == pytest.approx(4 * total - max(saved.reconstruction, saved.flow))


@pytest.mark.parametrize(
    "gpu, recipe", [("rtx4090", "imagenet256_b"), ("l40s", "imagenet256_l"), ("h100", "imagenet256_xl")]
)
def test_the_largest_micro_batch_fits_and_the_next_does_not(gpu, recipe):
    chosen = plan(recipe, gpu, 1)
    limit = chosen.cluster.gpu.memory * 1e9 * (1 - predict.RESERVED)
    sizes = predict.micro_batches(1024 // 8)

    def needed(images: int) -> float:
        return sum(predict.memory_parts(chosen.config, chosen.cluster, chosen.strategy, images).values())

    place = sizes.index(chosen.largest_micro_batch)
    assert place > 0 and needed(chosen.largest_micro_batch) <= limit < needed(sizes[place - 1])
    assert chosen.fits == (chosen.micro_batch <= chosen.largest_micro_batch)


def test_a_gpu_that_is_too_small_is_reported_without_a_price(command):
    settings = ("parallel.strategy=ddp", "train.micro_batch=128")
    tiny = plan("imagenet256_xl", "l4", 1, *settings)
    assert not tiny.fits and sum(tiny.memory.values()) > 24e9
    ended = command("plan", "imagenet256_xl", "--gpu", "l4", "--price", 2, "--", *settings)
    assert ended.status == 0 and "does NOT fit" in ended.out and "EUR" not in ended.out and "GPU hours" not in ended.out


def test_activations_are_the_larger_of_the_two_passes():
    for recipe in ("imagenet256_b", "imagenet256_xl"):
        chosen = plan(recipe, "h200", 1)
        saved = memory.activations(chosen.config)
        named = sum(
            size for name, size in chosen.memory.items() if name.endswith("activations") or name == "padded weights"
        )
        assert named == pytest.approx(saved.peak(chosen.micro_batch))


def test_speed_and_cost_follow_the_machines(command):
    one, four = plan("imagenet256_b", "h100", 1), plan("imagenet256_b", "h100", 4)
    for few, many in ((one.fast, four.fast), (one.slow, four.slow)):
        assert few.images_per_s < many.images_per_s < 4 * few.images_per_s
        assert few.images_per_s == pytest.approx(1024 / sum(few.seconds.values()))
    assert one.slow.images_per_s < one.fast.images_per_s
    assert one.fast.mfu == pytest.approx(one.fast.images_per_s / 8 * flops.image_flops(one.config) / 989e12)

    ended = command("plan", "imagenet256_b", "--gpu", "h100", "--nodes", 4, "--price", 2)
    hours = 300240 * 1024 / four.fast.images_per_s / 3600
    assert ended.status == 0 and f"{hours * 32:.0f} to" in ended.out and f"{hours * 64:.0f} to" in ended.out
    assert "measured" not in ended.out


def test_the_output_separates_predictions_from_measurements(command, mentions):
    ended = command("plan", "imagenet256_b", "--gpu", "h200")
    assert ended.status == 0
    assert re.match(mentions("PREDICTION", "imagenet256_b", "1 x 8 h200"), ended.out)
    assert re.search(mentions(8, "H200", "102.7 images/s"), ended.out)
    chosen = plan("imagenet256_b", "h200", 1)
    assert f"{chosen.slow.images_per_s / 8:.0f} to {chosen.fast.images_per_s / 8:.0f}" in ended.out
    for part in (*chosen.memory, *(part for part, seconds in chosen.fast.seconds.items() if seconds)):
        assert f"  {part} " in ended.out
    assert re.search(mentions("bound", chosen.fast.bound_by), ended.out) and "assumptions\n" in ended.out
    # With another objective the measured speed does not apply.
    assert "102.7" not in command("plan", "imagenet256_b", "--gpu", "h200", "--", "objective.flow_draws=14").out


@pytest.mark.parametrize(
    "arguments, tokens",
    [
        (("imagenet256_b", "--gpu", "h1000"), ("'h1000'", "h100")),
        (("imagenet256_b", "--nodes", "3"), ("train.batch_size", 1024, 24)),
        (("imagenet256_b", "--nodes", "0"), ("--nodes", "--gpus-per-node")),
        (("imagenet256_b", "--data", "floppy"), ("--data", "'floppy'", "folder")),
        (("digits",), ("train.precision=bfloat16",)),
        (("imagenet256_b", "--gpu", "a100", "--", "train.precision=float8"), ("a100", "train.precision=bfloat16")),
        (("imagenet256_z",), ("imagenet256_z", "imagenet256_b")),
    ],
)
def test_mistakes_are_named(command, arguments, tokens):
    command("plan", *arguments).error(*tokens)


def test_float8_changes_two_of_three_matmuls_of_the_wide_linears(command):
    off, on = (
        make_plan(load_config("imagenet256_b", (f"train.precision={name}",)), Cluster(find_gpu("h100"), 1, 1))
        for name in ("bfloat16", "float8")
    )
    work = image_work(off.config), image_work(on.config)
    assert work[0].float8 == work[0].float8_bytes == 0 and "float8 matmuls" not in off.fast.seconds
    assert work[0].matmul == work[1].matmul + work[1].float8
    # Outside the wide Linears are adaLN, embeddings and the first and last Linears, about 2 % of B.
    assert 0.64 < work[1].float8 / work[0].matmul < 2 / 3
    seconds, before = on.fast.seconds, off.fast.seconds["matmuls"]
    assert seconds["matmuls"] + 2 * seconds["float8 matmuls"] == pytest.approx(before)
    # By hand for a block: x of four Linears is 5.67 D wide, d_y 10.33 D, 3 bytes each.
    tokens = sum(queries + keys for queries, keys in tokens_per_block(on.config.model, True)) / 2
    tokens += 3 * sum(queries + keys for queries, keys in tokens_per_block(on.config.model, False)) / 2
    decoder = 12 * 257 * 3 * (3 * 768 + 3072 + 5 * 768 + 3072)
    assert work[1].float8_bytes == pytest.approx(tokens * 16 * 768 * 3 + decoder, rel=0.02)
    assert on.memory["weights in float8"] == 2 * (12 * (4 + 8) * 768**2 + 12 * 12 * 768**2)
    assert "weights in float8" not in off.memory
    ended = command("plan", "imagenet256_b", "--gpu", "h100", "--", "train.precision=float8")
    assert "float8: 66% of the matmul FLOPs" in ended.out and "1978 float8" in ended.out


def test_an_unknown_format_is_also_an_error_of_the_library():
    with pytest.raises(UserError, match="--data"):
        make_plan(load_config("imagenet256_b"), Cluster(find_gpu("h100"), 1, 8), "floppy")
