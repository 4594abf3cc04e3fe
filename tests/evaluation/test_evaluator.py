"""All scores of an evaluator are those of the whole set, however its images are split over ranks."""

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


def scored(ranks: Ranks) -> dict:
    real, generated = noise(0), noise(1)
    evaluator = Evaluator(FirstPixels(), Reference(moments_of(real).statistics(), samples=FirstPixels()(real).pool))
    batches = (
        NumberedBatch(torch.tensor(batch), generated[batch.start : batch.stop], torch.zeros(len(batch)))
        for batch in ranks.batches(COUNT, 16)
    )
    return evaluator.score(batches, COUNT, ranks)


def distance_on_a_rank() -> float:
    """With uneven shares: the first two thirds, and the rest."""
    torch.distributed.init_process_group("gloo")
    ranks = current_ranks()
    evaluator = Evaluator(FirstPixels(), Reference(moments_of(noise(0)).statistics()))
    share = noise(1).split(100)[ranks.rank]
    return evaluator.distance(moments_of(share), ranks)


def scored_on_a_rank() -> dict:
    torch.distributed.init_process_group("gloo")
    return scored(current_ranks())


def test_scores_are_those_of_all_features_at_once():
    scores = scored(Ranks())
    real, generated = (FirstPixels()(noise(seed)) for seed in (0, 1))
    distance = frechet_distance(moments_of(noise(1)).statistics(), moments_of(noise(0)).statistics())
    assert scores["frechet_distance"] == pytest.approx(distance, rel=1e-12)
    order = SampleOrder(COUNT).positions(torch.arange(COUNT)).argsort()
    score = metrics.inception_score(generated.logits[order])
    assert (scores["inception_score"], scores["inception_score_deviation"]) == pytest.approx(score, rel=1e-12)
    assert (scores["kid"], scores["kid_deviation"]) == metrics.kid(generated.pool[order], real.pool, size=COUNT)
    assert (scores["precision"], scores["recall"]) == metrics.precision_recall(generated.pool, real.pool)
    assert scores["kid_subset"] == COUNT and scores["compared"] == [COUNT, COUNT] and "class_agreement" not in scores


def test_the_number_of_processes_does_not_change_the_scores(ranks):
    alone = scored(Ranks())
    for world in (2, 4):
        for shared in ranks(world, scored_on_a_rank):
            assert shared.keys() == alone.keys()
            assert shared.pop("compared") == [COUNT, COUNT]
            for name, value in shared.items():
                assert abs(alone[name] - value) <= 1e-9 * max(1, abs(value)), name


def test_the_distance_covers_the_images_of_all_processes(ranks):
    expected = frechet_distance(moments_of(noise(1)).statistics(), moments_of(noise(0)).statistics())
    first, second = ranks(2, distance_on_a_rank)
    assert first == second == pytest.approx(expected, rel=1e-9)


def test_positions_are_a_permutation_and_splits_are_even():
    sample_order = SampleOrder(50)
    every = torch.arange(50)
    assert sorted(sample_order.positions(every).tolist()) == every.tolist()
    assert sample_order.splits(every).bincount().tolist() == [5] * metrics.SPLITS
    # Labels cycle through the classes; no split may consist of one class.
    assert all(len((every[sample_order.splits(every) == split] % 10).unique()) > 1 for split in range(metrics.SPLITS))


def test_kept_features_do_not_depend_on_the_order_of_batches():
    sample_order, features = SampleOrder(40), torch.arange(40.0)[:, None]
    gathered = []
    for order in (torch.arange(40), torch.arange(39, -1, -1)):
        kept_features = KeptFeatures(sample_order, limit=15)
        for batch in order.split(7):
            kept_features.update(batch, features[batch])
        gathered.append(kept_features.gather(Ranks()))
    assert torch.equal(gathered[0], gathered[1]) and gathered[0].shape == (15, 1)
    assert sample_order.positions(gathered[0][:, 0].long()).tolist() == list(range(15))
    assert reference.KEPT_SAMPLES >= metrics.KID_SUBSET_SIZE


def test_a_reference_without_single_features_gives_the_frechet_distance_only():
    evaluator = Evaluator(FirstPixels(), Reference(moments_of(noise(0)).statistics()))
    batch = NumberedBatch(torch.arange(5), noise(1)[:5], torch.zeros(5))
    assert evaluator.score([batch], 5, Ranks()).keys() == {"frechet_distance"}
    notes = " ".join(evaluator.notes(5))
    for part in ("5 generated images are too few for 6 features", "no Inception Score", "no KID, precision and recall"):
        assert part in notes


def test_every_count_that_is_too_small_gets_a_warning():
    def starts(count: int, *counts: int) -> list[str]:
        evaluator = Evaluator(FirstPixels(), Reference(moments_of(noise(0)).statistics(), count=count))
        return [note.split(":")[0] for note in evaluator.bias_notes(*counts)]

    assert starts(60, 60, 100) == []
    assert starts(59, 60, 100) == ["59 real images for 6 features"]
    assert starts(0, 6, 6, 60, 59) == [
        "6 generated images are too few for 6 features",
        "59 generated images for 6 features",
    ]
