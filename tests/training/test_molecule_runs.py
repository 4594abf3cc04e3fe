"""Runs on molecules: several processes, resume, kill, sampling and files, with the tiny model of the fixture."""

import importlib.util
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import unite_fast
from unite_fast.data_pipeline.molecules.of_config import molecules_of
from unite_fast.data_pipeline.molecules.set_file import read_set
from unite_fast.distributed.launch import join_training
from unite_fast.evaluation.molecules.alignment import rmsd_of_sets
from unite_fast.evaluation.molecules.scores import same_elements
from unite_fast.recipes import load_config
from unite_fast.sampling.molecules import reconstruct
from unite_fast.training.trainer import Trainer

DATA = Path(__file__).parents[1] / "data" / "qm9_200.npz"
TOLERANCE = 1e-5
"""Relative error of float32 losses, summed over the batch in another order."""


@pytest.fixture(scope="module")
def configured(tiny_molecules):
    """Makes configs of tiny runs."""

    def make(folder: Path, *overrides: str):
        return load_config("qm9_tiny", (*tiny_molecules, f"train.out={folder}", *overrides))

    return make


def run_steps(config, count: int) -> list[list[float]]:
    """Logged losses and gradient norm of each step."""
    with join_training("cpu", 60) as (ranks, device, _):
        trainer = Trainer(config, False, ranks, device)
        rows = []
        for step in range(count):
            trainer.averages.add(step, *trainer.step(next(trainer.loader)))
            rows.append(list(trainer.averages.take().values()))
        trainer.close()
        return rows


@pytest.fixture(scope="module")
def single_process(configured, tmp_path_factory) -> torch.Tensor:
    return torch.tensor(run_steps(configured(tmp_path_factory.mktemp("one")), 10), dtype=torch.float64)


@pytest.mark.parametrize(
    ("world", "nodes", "strategy", "batching"),
    [(2, 1, "ddp", "groups"), (4, 1, "fsdp", "padded"), (4, 2, "hsdp", "groups")],
)
def test_losses_match_a_single_process(world, nodes, strategy, batching, configured, ranks, single_process, tmp_path):
    config = configured(tmp_path, f"parallel.strategy={strategy}", f"molecules.batching={batching}")
    rows = torch.tensor(ranks(world, run_steps, config, 10, nodes=nodes), dtype=torch.float64)
    assert (rows == rows[0]).all()
    difference = ((rows[0] - single_process).abs() / single_process.clamp(min=1e-300))[:, :4].max()
    assert difference <= TOLERANCE
    assert single_process[0, 0] > 1.1 * single_process[-1, 0]  # the model learns


def test_a_resumed_run_has_the_same_bits(tiny_molecules, command, assert_same_run, tmp_path):
    for folder, steps in (("whole", 12), ("parts", 5), ("parts", 12)):
        options = ("--resume",) if folder == "parts" else ()
        words = (*tiny_molecules, f"train.steps={steps}", f"train.out={tmp_path / folder}", "molecules.rotate=random")
        assert command("train", "qm9_tiny", *words, *options).status == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_killed_run_resumes_with_the_same_bits(tiny_molecules, process, wait_until, assert_same_run, tmp_path):
    run = tmp_path / "run"
    for kill in range(2):
        running = process("train", "qm9_tiny", *tiny_molecules, "train.steps=1000000", "train.out=run", "--resume")
        wait_until(lambda kill=kill: len(list((run / "checkpoints").glob("step_*"))) > min(kill, 1))
        time.sleep(0.05 * kill)
        running.signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
        running.output.unlink()
    reached = int((run / "checkpoints" / "latest").resolve().name.removeprefix("step_"))
    assert reached >= 4
    steps = f"train.steps={reached + 3}"
    assert process("train", "qm9_tiny", *tiny_molecules, steps, "train.out=run", "--resume").wait() == 0
    assert process("train", "qm9_tiny", *tiny_molecules, steps, "train.out=undisturbed").wait() == 0
    assert_same_run(run, tmp_path / "undisturbed")


@pytest.fixture(scope="module")
def trained(configured, tmp_path_factory) -> Path:
    """A run of 12 steps."""
    folder = tmp_path_factory.mktemp("molecules") / "run"
    with join_training("cpu", 60) as (ranks, device, _):
        trainer = Trainer(configured(folder), False, ranks, device)
        trainer.run()
        trainer.close()
    return folder


def test_a_run_has_metrics_pictures_and_sizes(configured, trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(row["cross_entropy"] > 0 and row["l1"] > 0 and "lpips" not in row for row in rows)
    for kind in ("samples", "reconstructions", "curves"):
        assert (trained / f"{kind}.png").stat().st_size > 1000
    model = unite_fast.load(trained)
    source = molecules_of(configured(trained), "train")
    assert model.network.size_counts.tolist() == source.class_counts()


def test_sizes_are_those_of_the_training_molecules(trained):
    model = unite_fast.load(trained)
    drawn = np.bincount(model.draw_sizes(20_000, seed=1), minlength=33) / 20_000
    expected = model.network.size_counts.numpy() / model.network.size_counts.sum().item()
    assert np.abs(drawn - expected).max() < 5 * (0.25 / 20_000) ** 0.5
    assert (drawn[expected == 0] == 0).all()
    assert torch.equal(model.draw_sizes(10, seed=1, first=5), model.draw_sizes(15, seed=1)[5:])


def test_generated_molecules_do_not_depend_on_batches_or_pads(trained):
    model = unite_fast.load(trained)
    sizes = [9, 21, 13, 17, 3]
    whole, parts = model.generate(sizes, seed=4), model.generate(sizes, seed=4, batch=2)
    assert whole.sizes.tolist() == sizes
    assert (whole.numbers == parts.numbers).all()
    np.testing.assert_allclose(whole.positions, parts.positions, rtol=0, atol=1e-4)
    alone = model.generate([17], seed=4, first=3)
    np.testing.assert_allclose(alone.positions[0], whole.positions[3], rtol=0, atol=1e-4)
    for row, size in enumerate(sizes):
        assert (whole.numbers[row, :size] > 0).all() and (whole.numbers[row, size:] == 0).all()
        np.testing.assert_allclose(whole.positions[row, :size].mean(0), 0, atol=1e-5)


def test_latents_decode_to_the_reconstructions(trained):
    model = unite_fast.load(trained)
    molecules = read_set(DATA).take(range(6))
    latents = model.encode(molecules, seed=2)
    assert latents.shape == (6, 32, 16)
    for row, size in enumerate(molecules.sizes):
        assert (latents[row, size:] == 0).all() and (latents[row, :size] != 0).all()
    copies = model.reconstruct(molecules, seed=2)
    decoded = model.decode(latents, molecules.sizes)
    assert (copies.numbers == decoded.numbers).all() and (copies.positions == decoded.positions).all()


def test_interpolation_begins_and_ends_at_the_two_molecules(trained):
    model = unite_fast.load(trained)
    molecules = read_set(DATA)
    size = np.bincount(molecules.sizes).argmax()
    pair = molecules.take(np.flatnonzero(molecules.sizes == size)[:2])
    between = model.interpolate(pair, 5)
    ends = model.reconstruct(pair)
    for row, end in ((0, 0), (-1, 1)):
        np.testing.assert_allclose(between.positions[row], ends.positions[end], atol=1e-3)
    assert len(between) == 5 and not np.allclose(between.positions[2], between.positions[0], atol=1e-3)


@pytest.mark.parametrize("suffix", [".sdf", ".npz"])
def test_generated_files_do_not_depend_on_processes(suffix, trained, ranks, command, tmp_path):
    pytest.importorskip("rdkit")
    out = tmp_path / f"one{suffix}"
    words = ("generate", trained, "--count", "10", "--batch", "3", "--device", "cpu")
    assert command(*words, "--out", out).status == 0
    assert json.loads(out.with_suffix(".json").read_text())["images"] == 10
    several = tmp_path / f"two{suffix}"
    ranks(2, generate_file, trained, several)
    assert several.read_bytes() == out.read_bytes()


def generate_file(trained: Path, out: Path) -> None:
    from unite_fast.distributed.launch import ranks_of_torchrun
    from unite_fast.evaluation.molecules.perception import bonds_of
    from unite_fast.sampling.distributed_sampler import Generation
    from unite_fast.sampling.sample_writer import write_samples

    with ranks_of_torchrun(torch.device("cpu")) as group:
        model = unite_fast.load(trained)
        generation = Generation(model.draw_sizes(10), model.config.sampling, 0, 3)
        write_samples(model, generation, out, group, bonds_of)


def test_evaluation_stands_beside_the_true_molecules(trained, command, tmp_path):
    pytest.importorskip("rdkit")
    words = ("evaluate", trained, "--data", DATA, "--count", "12", "--out", tmp_path / "e", "--device", "cpu")
    assert command(*words).status == 0
    result = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert result["reconstruction"]["counts"]["molecules"] == 30
    assert result["generated"]["counts"]["molecules"] == 12
    assert result["true"]["counts"]["molecules"] == 12
    assert result["true"]["valid_connected"] > 0.9 > result["generated"]["valid_connected"]
    for name in ("evaluation.md", "samples.png", "reconstructions.png"):
        assert (tmp_path / "e" / name).stat().st_size > 500


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("model.elements=H C N O", "model"),
        ("model.latent_tokens=8", "model.num_classes"),
        ("data.source=digits", "data.source"),
        ("perceptual.weight=1", "perceptual.weight"),
        ("objective.label_drop=0.1", "objective.label_drop"),
        ("sampling.guidance=2", "sampling.guidance"),
        ("train.precision=float8", "train.precision"),
        ("data.path=missing.npz", "missing.npz"),
        ("molecules.heavy=1", "heavy"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(change, key, tiny_molecules, command, tmp_path):
    ended = command("train", "qm9_tiny", *tiny_molecules, f"train.out={tmp_path / 'run'}", change)
    assert ended.status == 2
    assert key in ended.error()
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("qm9pack") is None, reason="needs QM9: pip install qm9pack")
def test_the_recipe_learns_small_molecules_in_a_minute(tmp_path):
    """QM9 with at most 6 heavy atoms: 605 molecules. Measured: all elements right, 0.21 A."""
    from unite_fast.data_pipeline.molecules.qm9 import import_qm9
    from unite_fast.data_pipeline.molecules.set_file import write_set

    molecules = import_qm9()
    write_set(tmp_path / "small.npz", molecules.take(molecules.heavy <= 6))
    settings = ("molecules.heavy=0", "objective.flow_weight=0.1", "objective.flow_draws=1", "schedule.warmup_steps=10")
    words = (f"data.path={tmp_path / 'small.npz'}", f"train.out={tmp_path / 'run'}", "train.device=cpu", *settings)
    config = load_config("qm9_tiny", words)
    trainer = Trainer(config, False)
    for _ in range(60):
        trainer.step(next(trainer.loader))
    truth = molecules_of(config, "test").molecules
    copies = reconstruct(trainer.state.model, truth)
    trainer.close()
    assert same_elements(truth, copies).all()
    assert rmsd_of_sets(truth, copies).mean() < 0.35
