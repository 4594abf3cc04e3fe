"""Evaluation of a model of molecules: which molecules are compared, with which settings, and on which rank.

test_scores.py has the scores, and tests/training/test_molecule_runs.py the command.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import unite_fast
from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
from unite_fast.data_pipeline.molecules.set_file import read_set, write_set
from unite_fast.distributed.launch import ranks_of_torchrun
from unite_fast.errors import UserError
from unite_fast.evaluation.batches import HELD_OUT, TRAINING
from unite_fast.evaluation.molecules import evaluate
from unite_fast.evaluation.molecules.evaluate import evaluate_molecules, open_true_molecules, training_inchi
from unite_fast.evaluation.molecules.scores import GENERATION, RECONSTRUCTION, generation_scores
from unite_fast.evaluation.settings import EvaluationSettings
from unite_fast.sampling.distributed_sampler import Generation

pytest.importorskip("rdkit")


@pytest.fixture(scope="module")
def molecule_set(tiny_molecules) -> Path:
    """140 training, 30 validation and 30 test molecules of QM9."""
    return Path(tiny_molecules[0].removeprefix("data.path="))


@pytest.fixture(scope="module")
def model(molecule_file):
    return unite_fast.load(molecule_file)


@pytest.fixture(scope="module")
def whole(molecule_set) -> MoleculeSet:
    return read_set(molecule_set)


def of(molecule_set: Path, **changes) -> EvaluationSettings:
    return EvaluationSettings(**({"data": str(molecule_set), "count": 6, "reconstructions": 4} | changes))


@pytest.fixture(scope="module")
def result(model, molecule_set) -> dict:
    return evaluate_molecules(model, of(molecule_set, batch=2, seed=3), None, "the path")


def test_the_result_can_be_written_and_says_what_was_evaluated(result, model):
    again = json.loads(json.dumps(result))
    assert again["checkpoint"]["step"] == model.step == 7 and again["checkpoint"]["weights"] == "EMA"
    assert GENERATION.keys() <= again["generated"].keys() and GENERATION.keys() <= again["true"].keys()
    assert RECONSTRUCTION.keys() <= again["reconstruction"].keys()
    assert (again["generated"]["solver"], again["generated"]["steps"], again["generated"]["seed"]) == ("euler", 2, 3)
    assert again["reconstruction"]["kind"] == again["true"]["kind"] == HELD_OUT
    assert (again["reconstruction"]["counts"]["molecules"], again["generated"]["counts"]["molecules"]) == (4, 6)


def test_what_is_scored_is_what_generate_gives(result, model):
    molecules = model.generate(model.draw_sizes(6, 3), seed=3, batch=2)
    scores = generation_scores(molecules)
    assert {name: result["generated"][name] for name in ("sizes", "elements", "atom_stable")} == {
        name: scores[name] for name in ("sizes", "elements", "atom_stable")
    }
    other = evaluate.generate(
        model,
        Generation(model.draw_sizes(6, 3), model.config.sampling, 3, 2, "float32", False),
        unite_fast.distributed.process_group.ALONE,
        lambda batches, *_: batches,
    )
    assert (other.positions == molecules.positions).all() and (other.sizes == molecules.sizes).all()


def test_the_true_molecules_are_a_fixed_random_part_of_the_test_split(model, molecule_set, whole, monkeypatch):
    """The same ones in each evaluation, of all sizes, and as many as generated ones."""
    scored, rebuilt = [], []
    monkeypatch.setattr(evaluate, "generation_scores", lambda molecules, *_: scored.append(molecules) or {"counts": {}})
    monkeypatch.setattr(
        evaluate, "reconstruction_scores", lambda truth, copies, track: rebuilt.append((truth, copies)) or {}
    )
    evaluate_molecules(model, of(molecule_set))
    test = whole.take(whole.split == 2)
    order = np.random.RandomState(0).permutation(30)
    assert (scored[1].index == test.index[order[:6]]).all()
    truth, copies = rebuilt[0]
    assert (truth.index == test.index[order[:4]]).all()
    assert (copies.positions == model.reconstruct(truth, 0).positions).all()


def test_without_a_held_out_split_training_molecules_are_taken_and_named(model, whole, tmp_path):
    path = tmp_path / "train.npz"
    write_set(path, whole.take(whole.split == 0).take(range(9)))
    source, kind = open_true_molecules(model.config, str(path))
    assert (len(source), kind) == (9, TRAINING)
    write_set(path, whole.take(whole.split < 2))
    source, kind = open_true_molecules(model.config, str(path))
    assert (len(source), kind) == (30, HELD_OUT), "validation, if there is no test split"


def test_novelty_is_against_all_training_molecules_of_the_file(model, molecule_set, whole, tmp_path):
    """Also those that the recipe leaves out for their heavy atoms."""
    model.config.molecules.heavy = 8
    try:
        known = training_inchi(model.config, str(molecule_set))
    finally:
        model.config.molecules.heavy = 0
    assert known == [whole.inchi[row] for row in np.flatnonzero(whole.split == 0)]
    nameless = whole.take(range(200))
    nameless.inchi = []
    write_set(tmp_path / "a.npz", nameless)
    assert training_inchi(model.config, str(tmp_path / "a.npz")) is None
    assert training_inchi(model.config, "") is None, "the path in a received file is not read"


def test_no_reconstructions_if_none_are_asked_for(model, molecule_set, tmp_path):
    result = evaluate_molecules(model, of(molecule_set, reconstructions=0, count=2), tmp_path / "out")
    assert result["reconstruction"] is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "evaluation.json",
        "evaluation.md",
        "samples.png",
    ]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["true"]["counts"]["molecules"] == 2


def on_a_rank(model_file: Path, data: Path) -> dict:
    with ranks_of_torchrun(torch.device("cpu")):
        result = evaluate_molecules(unite_fast.load(model_file), of(data, batch=2, seed=3))
    return {key: result[key] for key in ("generated", "true", "reconstruction", "processes")}


def test_every_rank_has_the_same_scores_as_one_process(ranks, molecule_file, molecule_set, result):
    """Three batches: rank 0 has the first and the last."""
    one, other = ranks(2, on_a_rank, molecule_file, molecule_set)
    assert one == other and one["processes"] == 2
    assert one["generated"] == result["generated"] and one["true"] == result["true"]
    assert one["reconstruction"] == result["reconstruction"]


@pytest.mark.parametrize(
    ("changes", "token"),
    [
        ({"guidance": (2.0,)}, "--guidance"),
        ({"features": "pixels"}, "--features"),
        ({"reference": "ref.npz"}, "--reference"),
        ({"inception": "weights.pth"}, "--inception"),
        ({"data": ""}, "--data"),
        ({"data": "missing.npz"}, r"missing\.npz"),
        ({"sampling": {"steps": 0}}, r"sampling\.steps"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_at_once(changes, token, model, molecule_set, monkeypatch):
    monkeypatch.setattr(evaluate, "generate", None)
    model.config.data.source, source = "molecules", model.config.data.source
    with pytest.raises(UserError, match=token):
        evaluate_molecules(model, of(molecule_set, **changes))
    model.config.data.source = source
