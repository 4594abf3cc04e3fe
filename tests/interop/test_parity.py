"""`compare` must pass every true trace, whatever its settings, and fail every false one."""

import json
import math
import re

import numpy as np
import pytest
import torch

from unite_fast.errors import UserError
from unite_fast.interop import parity
from unite_fast.interop.parity import Row, compare, notes, run, summarise
from unite_fast.interop.trace import Trace
from unite_fast.model import generative_encoder

KINDS = ["forward", "sampling", "optimizers", "gradients", "losses", "learning rates", "final parameters"]

VARIANTS = {
    "no in-context tokens": dict(in_content_len=0, method="euler"),
    "no q/k norm": dict(use_qknorm_encoder=False, method="euler"),
    "cfg_first": dict(cfg_norm_order="cfg_first", cfg_interval=[0.0, 0.8]),
    "unguided": dict(cfg_scale=1.0),
    "heun": dict(method="heun2", num_time_points=6, timestep_shift_alpha=0.3),
    "past the decay": dict(steps=7, flow_steps_per_recon=2, gen_loss_weight=0.7, method="euler"),
    "other sizes": dict(
        batch=3,
        num_classes=7,
        encoder={"depth": 4, "hidden_size": 48, "num_heads": 3},
        decoder={"depth": 1, "hidden_size": 40, "num_heads": 5, "mlp_size": 56},
        in_content_start=3,
        diffusion_input_dim=4,
        method="euler",
    ),
}


def failures(rows: list[Row]) -> list[str]:
    return [f"{row.name}: {row.error:.1e} > {row.tolerance:.1e}" for row in rows if not row.passed]


def settings(arrays: dict[str, np.ndarray]) -> dict:
    return json.loads(bytes(arrays["meta_json"]))


def test_official_trace(official):
    rows = compare(official)
    assert failures(rows) == []
    groups = summarise(rows)
    assert sorted(group.kind for group in groups) == sorted(KINDS)
    # Everything recorded is compared exactly once, except the inputs of the comparison.
    names = [row.name for row in rows]
    assert sum(group.count for group in groups) == len(rows) == len(set(names))
    inputs = {"meta_json", "tokenize/registers", "tokenize/t", "denoise/xt", "denoise/t", "sample/noise"}
    results = {name for name in official.arrays if not re.match(r"(state|in|step\d+)/", name)} - inputs
    losses = {f"step{k}/{name}" for k, recorded in enumerate(official.meta["losses"]) for name in recorded}
    assert len(losses) > 0 and set(names) >= results | losses
    assert notes(rows, official) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_traces(released, write_trace, variant):
    size = 64 if variant == "other sizes" else 32
    # The format says that gradients are recorded before clipping; the official trace has them after.
    arrays = released.record(released.new_meta(variant, **VARIANTS[variant]), size, clipped=variant == "unguided")
    assert failures(compare(Trace(write_trace(arrays)))) == []


def test_amplified_rounding_is_measured_and_noted(released, write_trace, monkeypatch):
    # How much rounding is amplified depends on the machine; a tolerance below any rounding simulates a bad case.
    monkeypatch.setattr(parity, "SAMPLED", 1e-9)
    trace = Trace(write_trace(released.record(released.new_meta("touchy"), size=32, seed=2)))
    rows = compare(trace)
    assert failures(rows) == []
    sampled = next(row for row in rows if row.name == "sample/latents")
    assert sampled.error > parity.SAMPLED
    (note,) = notes(rows, trace)
    assert "while everything else agrees" in note and "amplify rounding" in note


# A change of a trace's arrays or settings that makes it false, and a kind of row that must fail.
FALSEHOODS = {
    "a block's norm": ("state/encoder.blocks.1.norm2.weight", lambda w: w * np.float32(1.01), "forward"),
    "q norm": ("state/encoder.blocks.2.attn.q_norm.weight", lambda w: w * np.float32(1.01), "forward"),
    "latent norm": ("state/encoder_layer_norm.bias", lambda w: w + np.float32(0.001), "forward"),
    "decoder bias": ("state/decoder.decoder_pred.bias", lambda w: w + np.float32(0.001), "forward"),
    "in-context table": ("state/encoder.in_context_posemb", lambda w: w * np.float32(1.01), "forward"),
    "registers": ("tokenize/registers", lambda x: x[::-1].copy(), "forward"),
    "not a number": ("denoise/x_pred", lambda x: x * np.float32("nan"), "forward"),
    "samples": ("sample/latents", lambda x: x * np.float32(1.01), "sampling"),
    "noisy decoder input": ("step1/decoder_noise_mask", np.logical_not, "losses"),
    "dropped labels": ("step2/label_drop", np.logical_not, "losses"),
    "flow times": ("step0/flow_t", lambda t: 1 - t, "gradients"),
    "a gradient": ("grad0/encoder.blocks.0.attn.qkv.weight", lambda g: g * np.float32(1.01), "gradients"),
    "a final norm": ("final_norm/encoder.blocks.0.norm1.weight", lambda n: n * np.float32(1.001), "final parameters"),
    "an unmoved weight": ("final_head/encoder.blocks.0.norm1.weight", None, "final parameters"),
    "a moved table": ("final_head/encoder.pos_embed", lambda w: w + np.float32(0.01), "final parameters"),
    "in_content_start": ("config.in_content_start", lambda start: start + 1, "forward"),
    "guidance": ("sampling.cfg_scale", lambda scale: 1.1 * scale, "sampling"),
    "interval": ("sampling.cfg_interval", lambda interval: [0.3, 1.0], "sampling"),
    "guidance order": ("sampling.cfg_norm_order", lambda order: "cfg_first", "sampling"),
    "time shift": ("config.timestep_shift_alpha", lambda a: 0.6, "sampling"),
    "flow weight": ("config.loss.gen_loss_weight", lambda weight: 1.1, "losses"),
    "learning rate": ("optim.schedule.base_lr_1", lambda rate: 1.001 * rate, "learning rates"),
    "decay": ("optim.schedule.decay_1_until", lambda step: step + 1, "learning rates"),
    "clipping": ("optim.clip_grad", lambda norm: 0.9 * norm, "gradients"),
    "AdamW": ("optim.adamw.betas", lambda betas: [0.5, 0.999], "final parameters"),
    "Muon": ("optim.muon.momentum", lambda momentum: 0.5, "final parameters"),
    "whose parameter": ("muon_params", lambda names: names[1:], "optimizers"),
}


@pytest.mark.parametrize("falsehood", FALSEHOODS)
def test_false_traces_fail(small, write_trace, falsehood):
    place, change, kind = FALSEHOODS[falsehood]
    arrays, meta = dict(small), settings(small)
    if falsehood == "an unmoved weight":
        unmoved = arrays[place.replace("final_head", "state")][:8]
        # A weight moves only this little in a few steps.
        assert np.linalg.norm(unmoved - arrays[place]) < 5e-3 * np.linalg.norm(unmoved)
        arrays[place] = unmoved
    elif "/" in place:
        arrays[place] = change(arrays[place])
    else:
        *groups, key = place.split(".")
        holder = meta
        for group in groups:
            holder = holder[group]
        holder[key] = change(holder[key])
    failed = {group.kind for group in summarise(compare(Trace(write_trace(arrays, meta)))) if not group.passed}
    assert kind in failed


def test_small_trace_is_true(small, write_trace):
    assert failures(compare(Trace(write_trace(small)))) == []


def test_wrong_rotary_embedding_fails(small, write_trace, monkeypatch):
    right = generative_encoder.rope_table
    # Rotated in the other direction: only relative positions matter, so only the sign changes.
    monkeypatch.setattr(generative_encoder, "rope_table", lambda *sizes: (right(*sizes)[0], -right(*sizes)[1]))
    failed = {row.name for row in compare(Trace(write_trace(small))) if not row.passed}
    assert {"tokenize/z", "denoise/x_pred"} <= failed


def test_a_trace_with_lpips_is_noted(small, write_trace):
    meta = settings(small)
    for step in meta["losses"]:
        step["total"] += 0.3
    trace = Trace(write_trace(small, meta))
    rows = compare(trace)
    assert {group.kind for group in summarise(rows) if not group.passed} == {"losses"}
    assert any("LPIPS" in note for note in notes(rows, trace))


def test_summarise_names_the_worst():
    rows = [
        Row("grad0/a", 1e-9, 1e-3),
        Row("grad0/b", 2e-3, 1e-3),
        Row("step3/lr", math.nan, 1e-12),
        Row("step3/l1", 0.0, 0.0),
    ]
    gradients, rates, losses = summarise(rows)
    assert (gradients.kind, gradients.count, gradients.failed, gradients.worst.name) == ("gradients", 2, 1, "grad0/b")
    assert (rates.kind, rates.failed) == ("learning rates", 1)
    assert (losses.kind, losses.passed) == ("losses", True)


def test_step_numbers_do_not_hide_the_kind():
    kinds = {
        name: Row(name, 0, 0).kind
        for name in ("step12/lr", "step12/grad_norm", "step12/flow", "final_head/latent_tokens")
    }
    assert list(kinds.values()) == ["learning rates", "gradients", "losses", "final parameters"]


def test_printed_report(small, write_trace, capsys, mentions):
    assert run(write_trace(small))
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in KINDS) and "FAILED" not in printed
    assert printed.splitlines()[-1].startswith("all 3")

    assert not run(write_trace(small | {"sample/latents": 2 * small["sample/latents"]}))
    printed = capsys.readouterr().out
    assert re.search("FAILED *sample/latents", printed) and re.match(r"1 of \d+", printed.splitlines()[-1])

    with pytest.raises(UserError, match=mentions("'magic'")):
        run(write_trace(small), "magic")


def test_the_number_of_threads_is_restored(small, write_trace):
    torch.set_num_threads(2)
    try:
        with pytest.raises(UserError):
            compare(Trace(write_trace({name: a for name, a in small.items() if name != "denoise/t"})))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
