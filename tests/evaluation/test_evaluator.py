"""All scores of a evaluator: those of the whole, however the images are shared out."""

import pytest
import torch

from unite_fast.distributed.process_group import Ranks, current_ranks
from unite_fast.evaluation import metrics, reference
from unite_fast.evaluation.batches import NumberedBatch
from unite_fast.evaluation.evaluator import Evaluator
from unite_fast.evaluation.features import FeatureBatch
from unite_fast.evaluation.fid import Moments, Reference, frechet_distance
from unite_fast.evaluation.reference import KeptFeatures, SampleOrder

COUNT = 150


class FirstPixels:
    """Six pixels as features, five others as logits."""

    name, title, dimension, classes, source = "first", "FD", 6, 5, {}
    device = torch.device("cpu")

    def __call__(self, images):
        pixels = images.flatten(1).float() / 64
        return FeatureBatch(pixels[:, :6], pixels[:, 6:11])


def noise(seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (COUNT, 3, 2, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def moments_of(images: torch.Tensor) -> Moments:
    moments = Moments(6)
    moments.update(FirstPixels()(images).pool)
    return moments


def judged(ranks: Ranks) -> dict:
    real, generated = noise(0), noise(1)
    evaluator = Evaluator(FirstPixels(), Reference(moments_of(real).statistics(), samples=FirstPixels()(real).pool))
    batches = (
        NumberedBatch(torch.tensor(batch), generated[batch.start : batch.stop], torch.zeros(len(batch)))
        for batch in ranks.batches(COUNT, 16)
    )
    return evaluator.score(batches, COUNT, ranks)


def distances_together() -> float:
    """Of uneven shares: the first two thirds, and the rest."""
    torch.distributed.init_process_group("gloo")
    ranks = current_ranks()
    evaluator = Evaluator(FirstPixels(), Reference(moments_of(noise(0)).statistics()))
    share = noise(1).split(100)[ranks.rank]
    return evaluator.distance(moments_of(share), ranks)


def judged_together() -> dict:
    torch.distributed.init_process_group("gloo")
    return judged(current_ranks())


def test_scores_are_those_of_all_features_at_once():
    found = judged(Ranks())
    real, generated = (FirstPixels()(noise(seed)) for seed in (0, 1))
    distance = frechet_distance(moments_of(noise(1)).statistics(), moments_of(noise(0)).statistics())
    assert found["frechet_distance"] == pytest.approx(distance, rel=1e-12)
    order = SampleOrder(COUNT).positions(torch.arange(COUNT)).argsort()
    score = metrics.inception_score(generated.logits[order])
    assert (found["inception_score"], found["inception_score_deviation"]) == pytest.approx(score, rel=1e-12)
    assert (found["kid"], found["kid_deviation"]) == metrics.kid(generated.pool[order], real.pool, size=COUNT)
    assert (found["precision"], found["recall"]) == metrics.precision_recall(generated.pool, real.pool)
    assert found["kid_subset"] == COUNT and found["compared"] == [COUNT, COUNT] and "class_agreement" not in found


def test_processes_change_nothing(ranks):
    alone = judged(Ranks())
    for world in (2, 4):
        for shared in ranks(world, judged_together):
            assert shared.keys() == alone.keys()
            assert shared.pop("compared") == [COUNT, COUNT]
            for name, value in shared.items():
                assert abs(alone[name] - value) <= 1e-9 * max(1, abs(value)), name


def test_the_distance_is_of_what_all_processes_saw(ranks):
    expected = frechet_distance(moments_of(noise(1)).statistics(), moments_of(noise(0)).statistics())
    first, second = ranks(2, distances_together)
    assert first == second == pytest.approx(expected, rel=1e-9)


def test_positions_are_a_permutation_and_splits_are_even():
    sample_order = SampleOrder(50)
    every = torch.arange(50)
    assert sorted(sample_order.positions(every).tolist()) == every.tolist()
    assert sample_order.splits(every).bincount().tolist() == [5] * metrics.SPLITS
    # Classes come in turn; no split may consist of one class.
    assert all(len((every[sample_order.splits(every) == split] % 10).unique()) > 1 for split in range(metrics.SPLITS))


def test_what_is_kept_does_not_depend_on_the_order_of_batches():
    sample_order, features = SampleOrder(40), torch.arange(40.0)[:, None]
    found = []
    for order in (torch.arange(40), torch.arange(39, -1, -1)):
        kept = KeptFeatures(sample_order, limit=15)
        for batch in order.split(7):
            kept.update(batch, features[batch])
        found.append(kept.gather(Ranks()))
    assert torch.equal(found[0], found[1]) and found[0].shape == (15, 1)
    assert sample_order.positions(found[0][:, 0].long()).tolist() == list(range(15))
    assert reference.KEPT_SAMPLES >= metrics.KID_SUBSET_SIZE


def test_a_reference_of_others_allows_the_frechet_distance_alone():
    evaluator = Evaluator(FirstPixels(), Reference(moments_of(noise(0)).statistics()))
    batch = NumberedBatch(torch.arange(5), noise(1)[:5], torch.zeros(5))
    assert evaluator.score([batch], 5, Ranks()).keys() == {"frechet_distance"}
    notes = " ".join(evaluator.notes(5))
    for part in ("5 generated images are too few for 6 features", "no Inception Score", "no KID, precision and recall"):
        assert part in notes


def test_each_number_of_images_that_is_too_small_gets_a_word():
    def starts(count: int, *counts: int) -> list[str]:
        evaluator = Evaluator(FirstPixels(), Reference(moments_of(noise(0)).statistics(), count=count))
        return [note.split(":")[0] for note in evaluator.bias_notes(*counts)]

    assert starts(60, 60, 100) == []
    assert starts(59, 60, 100) == ["59 real images for 6 features"]
    assert starts(0, 6, 6, 60, 59) == [
        "6 generated images are too few for 6 features",
        "59 generated images for 6 features",
    ]
