"""Read files of version 0.1: a run folder, an exported model, an interrupted generation."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import unite_fast
from unite_fast.checkpoint.format import places_of

FILES = Path(__file__).parent / "data" / "version_0_1"
TINY = (
    "train.batch_size=16",
    "train.log_every=2",
    "train.checkpoint_every=4",
    *(f"model.encoder.{size}" for size in ("width=16", "depth=2", "heads=2")),
    *(f"model.decoder.{size}" for size in ("width=16", "heads=2", "mlp_width=32", "embed_width=16")),
    "model.latent_channels=8",
    *(f"schedule.{stage}" for stage in ("warmup_steps=1", "hold_until=2", "decay_until=4")),
)
WEIGHTS = "d765ee369193bb5d621c4249cda671e7afa468089e49400c10a63386d3696197"
"""SHA-256 of the averaged weights, as version 0.1 computed it."""
LOSSES = {"l1": 0.5448799431324005, "flow": 1.644769012928009, "grad_norm": 1.6191290616989136}
"""At step 6, after version 0.1 resumed the run."""


@pytest.mark.parametrize("name", ["run", "run/checkpoints/step_00000004", "model.safetensors"])
def test_weights_are_read_unchanged(name, command, tmp_path):
    out = tmp_path / "one.npz"
    ended = command("generate", FILES / name, "--count", 1, "--steps", 1, "--out", out)
    assert ended.status == 0, ended.err
    assert json.loads(out.with_suffix(".json").read_text())["weights"] == WEIGHTS


def test_a_run_resumes(command, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(FILES / "run", run, symlinks=True)
    ended = command("train", "digits", "train.steps=6", *TINY, f"train.out={run}", "--resume")
    assert ended.status == 0, ended.err
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    # Other CPUs round differently.
    assert {name: rows[-1][name] for name in LOSSES} == pytest.approx(LOSSES, rel=1e-4)


def test_an_interrupted_generation_is_finished(command, tmp_path):
    out = tmp_path / "generation.npz"
    parts = tmp_path / "generation.npz.parts"
    shutil.copytree(FILES / "generation.npz.parts", parts)
    manifest = json.loads((parts / "generation.json").read_text())
    manifest["torch"] = torch.__version__  # another version of torch is refused, since its images may differ
    (parts / "generation.json").write_text(json.dumps(manifest))
    # A batch generated again would overwrite this.
    marked = bytearray((parts / "batch_00000000.uint8").read_bytes())
    marked[0] ^= 0xFF
    (parts / "batch_00000000.uint8").write_bytes(marked)
    ended = command(
        "generate", FILES / "model.safetensors", "--count", 10, "--seed", 5, "--batch", 4, "--steps", 4, "--out", out
    )
    assert ended.status == 0, ended.err
    with np.load(out) as images, np.load(FILES / "generation_finished.npz") as expected:
        assert np.array_equal(images["arr_1"], expected["arr_1"])
        changed = images["arr_0"].astype(int) - expected["arr_0"]
    first = np.zeros_like(changed, dtype=bool)
    first[0, 0, 0, 0] = True
    assert abs(changed[~first]).max() <= 1  # other CPUs round differently
    assert abs(changed[first]).item() > 100 or marked[0] in range(100, 156)


def test_settings_keep_their_defaults():
    model = unite_fast.load(FILES / "model.safetensors")
    assert model.step == 4 and model.config.optim.eps == 1e-6
    assert model.config.train.out == "" and places_of(model.config) == {"train.out": "run"}, "it is shown, not used"
