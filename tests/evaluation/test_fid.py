"""The Frechet distance against scipy, running sums against the definition, files of statistics."""

import re
import zipfile

import numpy as np
import pytest
import scipy.linalg
import torch

from unite_fast.distributed.process_group import Ranks, current_ranks
from unite_fast.errors import UserError
from unite_fast.evaluation.fid import Moments, Reference, Statistics, frechet_distance, load_reference, save_reference

# What issue 6 asks for; measured: 4e-13 at full rank, 3e-8 where a covariance is singular. There scipy's own square
# root of zero eigenvalues, which rounding leaves at 1e-16, is 1e-8.
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
def test_frechet_distance_is_scipys(a, b):
    found = frechet_distance(statistics(a), statistics(b))
    scale = max(found, 1e-3 * float(np.trace(np.cov(a, rowvar=False))))
    assert abs(found - by_scipy(a, b)) <= AGREEMENT * scale
    assert abs(frechet_distance(statistics(b), statistics(a)) - found) <= 1e-9 * scale


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
    found = moments.statistics()
    assert int(moments.count) == 101
    np.testing.assert_allclose(found.mean, x.mean(0, dtype=np.float64), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-11)
    with pytest.raises(UserError, match=mentions("covariance", 2, 0)):
        Moments(6).statistics()


def distances_of_ranks(a: np.ndarray, b: np.ndarray) -> float:
    torch.distributed.init_process_group("gloo")
    return shared_distance(a, b)


def shared_distance(a: np.ndarray, b: np.ndarray) -> float:
    ranks, found = current_ranks(), []
    for x in (a, b):
        moments = Moments(x.shape[1])
        for batch in ranks.batches(len(x), 16):
            moments.update(torch.from_numpy(x[batch.start : batch.stop]))
        moments.all_reduce(ranks)
        found.append(moments.statistics())
    return frechet_distance(*found)


@pytest.mark.parametrize("rank", [None, 6], ids=["full rank", "singular"])
def test_processes_change_nothing(ranks, rank):
    a, b = (samples(333, 24, seed, rank).astype(np.float32) for seed in (0, 1))
    alone = shared_distance(a, b)
    for world in (2, 4):
        for shared in ranks(world, distances_of_ranks, a, b):
            assert abs(shared - alone) <= 1e-9 * alone


def test_every_sample_is_in_one_batch_of_one_process():
    shares = [list(Ranks(rank, 3).batches(50, 8)) for rank in range(3)]
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(50))
    assert {len(batch) for share in shares for batch in share} == {8, 2}
    assert list(Ranks(2, 3).batches(16, 8)) == []


@pytest.fixture
def reference() -> Reference:
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    basis = {"mean": torch.zeros(12), "components": torch.eye(3, 12)}
    about = {"data_sha256": "ab", "unreadable": 1}
    return Reference(statistics(samples(9, 3, 0)), "pixels", 9, about, features, basis)


def test_a_reference_comes_back_from_its_file(reference, tmp_path):
    path = tmp_path / "new" / "ref.npz"
    save_reference(reference, path)
    again = load_reference(path)
    assert torch.equal(again.statistics.mean, reference.statistics.mean)
    assert torch.equal(again.statistics.covariance, reference.statistics.covariance)
    assert torch.equal(again.samples, reference.samples)
    assert all(torch.equal(again.basis[name], value) for name, value in reference.basis.items())
    assert (again.features, again.count, again.provenance) == ("pixels", 9, reference.provenance)
    assert re.fullmatch("[0-9a-f]{64}", again.sha256) and again.path == str(path)
    assert [path.name for path in path.parent.iterdir()] == ["ref.npz"]


def test_a_file_of_others_has_only_mu_and_sigma(tmp_path):
    path = tmp_path / "theirs.npz"
    # Objects cannot be read without unpickling: whatever else there is stays unread.
    np.savez(path, mu=np.zeros(3, np.float32), sigma=np.eye(3, dtype=np.float32), arr_0=np.array([{}], dtype=object))
    found = load_reference(path)
    assert (found.features, found.count, found.samples, dict(found.basis)) == ("", 0, None, {})
    assert found.statistics.mean.dtype == found.statistics.covariance.dtype == torch.float64


def test_files_that_are_no_statistics(tmp_path, mentions):
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
    with zipfile.ZipFile(path, "w") as archive:  # whose compressed bytes are damaged
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
