"""The Frechet distance against scipy, running sums against their definition, and reference files."""

import json
import re
import zipfile

import numpy as np
import pytest
import scipy.linalg
import torch

from unite_fast.distributed.process_group import Ranks, current_ranks
from unite_fast.errors import UserError
from unite_fast.evaluation.fid import Moments, Reference, Statistics, frechet_distance, load_reference, save_reference

# Measured: 4e-13 at full rank, 3e-8 where a covariance is singular. There scipy's own square root of zero eigenvalues,
# which rounding leaves at 1e-16, is 1e-8.
AGREEMENT = 1e-6


def statistics(samples: np.ndarray) -> Statistics:
    moments = Moments(samples.shape[1])
    moments.update(torch.from_numpy(samples))
    return moments.statistics()


def samples(n: int, d: int, seed: int, rank: int | None = None) -> np.ndarray:
    random = np.random.default_rng(seed)
    factors = random.standard_normal((n, rank or d))
    return factors @ random.standard_normal((rank or d, d)) + random.standard_normal(d)


def by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    offset = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(offset + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root).real)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (samples(500, 40, 0), samples(400, 40, 1)),
        (samples(300, 200, 2), samples(300, 200, 3)),
        (samples(500, 40, 4, rank=7), samples(400, 40, 5)),
        (samples(500, 40, 6, rank=7), samples(400, 40, 7, rank=9)),
        (samples(25, 40, 8), samples(30, 40, 9)),
        (samples(500, 40, 10), samples(500, 40, 10) * 1.001),
    ],
    ids=["random", "wide", "one singular", "both singular", "fewer samples than dimensions", "nearly equal"],
)
def test_frechet_distance_equals_scipys(a, b):
    distance = frechet_distance(statistics(a), statistics(b))
    scale = max(distance, 1e-3 * float(np.trace(np.cov(a, rowvar=False))))
    assert abs(distance - by_scipy(a, b)) <= AGREEMENT * scale
    assert abs(frechet_distance(statistics(b), statistics(a)) - distance) <= 1e-9 * scale


def test_known_distances():
    def diagonal(mean, deviations):
        return Statistics(torch.tensor(mean).double(), torch.tensor(deviations).double().square().diag())

    # For commuting covariances: the squared distance of the means and of the deviations.
    assert frechet_distance(diagonal([0, 0], [1, 2]), diagonal([3, 0], [2, 4])) == pytest.approx(9 + 1 + 4, rel=1e-14)
    assert frechet_distance(diagonal([0, 0], [1, 0]), diagonal([0, 0], [0, 1])) == pytest.approx(2, rel=1e-14)
    assert frechet_distance(diagonal([1, 2], [0, 0]), diagonal([1, 2], [0, 0])) == 0
    one = statistics(samples(300, 30, 0, rank=5))
    assert abs(frechet_distance(one, one)) < 1e-10 * float(one.covariance.trace())


def test_distances_of_different_features_are_refused(mentions):
    with pytest.raises(UserError, match=mentions(3, 4, "dimensions")):
        frechet_distance(statistics(samples(9, 3, 0)), statistics(samples(9, 4, 0)))


def test_moments_are_mean_and_covariance(mentions):
    x = samples(101, 6, 0).astype(np.float32)
    moments = Moments(6)
    for part in np.array_split(x, 7):
        moments.update(torch.from_numpy(part))
    result = moments.statistics()
    assert int(moments.count) == 101
    np.testing.assert_allclose(result.mean, x.mean(0, dtype=np.float64), rtol=1e-13)
    np.testing.assert_allclose(result.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-11)
    with pytest.raises(UserError, match=mentions("covariance", 2, 0)):
        Moments(6).statistics()


def distance_on_a_rank(a: np.ndarray, b: np.ndarray) -> float:
    torch.distributed.init_process_group("gloo")
    return shared_distance(a, b)


def shared_distance(a: np.ndarray, b: np.ndarray, size: int = 16) -> float:
    ranks, pair = current_ranks(), []
    for x in (a, b):
        moments = Moments(x.shape[1])
        for batch in ranks.batches(len(x), size):
            moments.update(torch.from_numpy(x[batch.start : batch.stop]))
        moments.all_reduce(ranks)
        pair.append(moments.statistics())
    return frechet_distance(*pair)


@pytest.mark.parametrize("rank", [None, 6], ids=["full rank", "singular"])
def test_the_number_of_processes_does_not_change_the_distance(ranks, rank):
    a, b = (samples(333, 24, seed, rank).astype(np.float32) for seed in (0, 1))
    alone = shared_distance(a, b)
    for world in (2, 4):
        for shared in ranks(world, distance_on_a_rank, a, b):
            assert abs(shared - alone) <= 1e-9 * alone


@pytest.mark.parametrize("rank", [None, 6], ids=["full rank", "singular"])
def test_the_batch_does_not_change_the_distance(rank):
    a, b = (samples(333, 24, seed, rank).astype(np.float32) for seed in (0, 1))
    whole = shared_distance(a, b, 333)
    for size in (1, 7, 64):
        assert abs(shared_distance(a, b, size) - whole) <= 1e-9 * whole


def test_every_sample_is_in_one_batch_of_one_process():
    shares = [list(Ranks(rank, 3).batches(50, 8)) for rank in range(3)]
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(50))
    assert {len(batch) for share in shares for batch in share} == {8, 2}
    assert list(Ranks(2, 3).batches(16, 8)) == []


@pytest.fixture
def reference() -> Reference:
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    basis = {"mean": torch.zeros(12), "components": torch.eye(3, 12)}
    provenance = {"data_sha256": "ab", "unreadable": 1}
    return Reference(statistics(samples(9, 3, 0)), "pixels", 9, provenance, features, basis)


def test_save_and_load_a_reference(reference, tmp_path):
    path = tmp_path / "new" / "ref.npz"
    save_reference(reference, path)
    loaded = load_reference(path)
    assert torch.equal(loaded.statistics.mean, reference.statistics.mean)
    assert torch.equal(loaded.statistics.covariance, reference.statistics.covariance)
    assert torch.equal(loaded.samples, reference.samples)
    assert all(torch.equal(loaded.basis[name], value) for name, value in reference.basis.items())
    assert (loaded.features, loaded.count, loaded.provenance) == ("pixels", 9, reference.provenance)
    assert re.fullmatch("[0-9a-f]{64}", loaded.sha256) and loaded.path == str(path)
    assert [path.name for path in path.parent.iterdir()] == ["ref.npz"]


def test_a_foreign_file_has_only_mu_and_sigma(tmp_path):
    path = tmp_path / "foreign.npz"
    # Reading an object array would unpickle it, so other arrays must stay unread.
    np.savez(path, mu=np.zeros(3, np.float32), sigma=np.eye(3, dtype=np.float32), arr_0=np.array([{}], dtype=object))
    reference = load_reference(path)
    assert (reference.features, reference.count, reference.samples, dict(reference.basis)) == ("", 0, None, {})
    assert reference.statistics.mean.dtype == reference.statistics.covariance.dtype == torch.float64


def test_invalid_files(tmp_path, mentions):
    path = tmp_path / "x.npz"
    with pytest.raises(UserError, match=mentions(path, "unite-fast stats DATA x.npz")):
        load_reference(path)
    with pytest.raises(UserError, match=mentions(tmp_path, "unite-fast stats")):
        load_reference(tmp_path)
    for content in (b"", b"PK\x03\x04 torn", b"text"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=mentions(path, ".npz", "unite-fast stats")) as caught:
            load_reference(path)
        assert "pickle" not in str(caught.value)
    with zipfile.ZipFile(path, "w") as archive:  # with damaged compressed bytes
        for name in ("mu.npy", "sigma.npy"):
            archive.writestr(name, b"\xff" * 50)
            archive.getinfo(name).compress_type = zipfile.ZIP_DEFLATED
    with pytest.raises(UserError, match=mentions(path, ".npz", "unite-fast stats")):
        load_reference(path)
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(UserError, match=mentions(path, "mu", "sigma")):
        load_reference(path)
    np.savez(path, mu=np.zeros(3), sigma=np.zeros((3, 4)))
    with pytest.raises(UserError, match=mentions(path, "[3]", "[3, 4]", "[D]", "[D, D]")):
        load_reference(path)
    np.savez(path, mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
    with pytest.raises(UserError, match=mentions(path, "finite")):
        load_reference(path)
    np.savez(path, mu=np.array([{}, {}], dtype=object), sigma=np.eye(2))
    with pytest.raises(UserError, match=mentions(path, ".npz", "unite-fast stats")):
        load_reference(path)


META = {"features": "pixels", "count": 9, "about": {}}


@pytest.mark.parametrize(
    "change",
    [
        {"mu": np.zeros((2, 1))},
        {"mu": np.zeros(0), "sigma": np.zeros((0, 0))},
        {"mu": np.array([0, np.inf])},
        {"mu": np.array([0, 1])},
        {"mu": np.array([True, False])},
        {"mu": np.array(["a", "b"])},
        {"sigma": np.array([[1.0, 0.5], [-0.5, 1.0]])},
        {"sigma": np.diag([1.0, -1.0])},
        {"samples": np.zeros((5, 3), np.float32)},
        {"samples": np.zeros(2, np.float32)},
        {"samples": np.full((5, 2), np.nan, np.float32)},
        {"basis/mean": np.zeros(12, np.float32)},
        {"basis/mean": np.zeros(12, np.float32), "basis/components": np.zeros((3, 12), np.float32)},
        {"basis/mean": np.zeros(13, np.float32), "basis/components": np.zeros((2, 13), np.float32)},
        {"basis/mean": np.zeros(12, np.float32), "basis/components": np.full((2, 12), np.inf, np.float32)},
        {"basis/other": np.zeros(12, np.float32)},
        *(
            {"meta": META | change}
            for change in (
                {"features": 3},
                {"features": "x\x1b[2J"},
                {"count": -1},
                {"count": "1_0"},
                {"count": 1.5},
                {"about": []},
                {"about": {"unreadable": [[1]]}},
            )
        ),
        {"meta": "NaN"},
        {"meta": []},
    ],
)
def test_arrays_and_entries_that_no_statistics_have_are_refused(tmp_path, change, mentions):
    path = tmp_path / "x.npz"
    meta = np.frombuffer(json.dumps(change.pop("meta", META)).encode(), np.uint8)
    good = {"mu": np.zeros(2), "sigma": np.eye(2), "meta_json": meta}
    np.savez(path, **good | change)
    with pytest.raises(UserError, match=mentions(path)) as refusal:
        load_reference(path)
    assert str(refusal.value).isprintable()


def test_what_a_file_says_of_its_origin_does_not_hide_the_origin(tmp_path):
    about = {"path": "elsewhere", "sha256": "0", "images": 7, "features": "inception", "data": "a folder"}
    meta = np.frombuffer(json.dumps(META | {"about": about}).encode(), np.uint8)
    np.savez(tmp_path / "x.npz", mu=np.zeros(2), sigma=np.eye(2), meta_json=meta)
    info = load_reference(tmp_path / "x.npz").info()
    assert info["path"] == str(tmp_path / "x.npz") and info["images"] == 9 and info["features"] == "pixels"
    assert info["data"] == "a folder" and len(info["sha256"]) == 64
