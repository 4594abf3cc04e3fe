"""Metrics of generated images, from features, and of reconstructions, from pixels.

n, m samples, D dimensions of a feature, K classes, S the side of an image.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import require

SPLITS = 10
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3
_BLOCK = 2048
"""Rows of a distance matrix in memory at a time."""


class InceptionScore:
    """exp( mean_i KL( p(y | x_i) || p(y) ) ), its mean and deviation over splits of the samples (Salimans et al.,
    arXiv 1606.03498). Computed from running float64 sums: the mean KL is mean_i sum_k p log p - sum_k q log q, where q
    is the mean of p."""

    def __init__(self, classes: int, splits: int = SPLITS, device: torch.device | str = "cpu"):
        self.count = torch.zeros(splits, dtype=torch.float64, device=device)
        self.negentropy = torch.zeros(splits, dtype=torch.float64, device=device)
        self.probability = torch.zeros(splits, classes, dtype=torch.float64, device=device)

    def update(self, logits: Tensor, split: Tensor) -> None:
        """logits: [n, K]; split: int64 [n], the split of each sample."""
        split = split.to(self.count.device)
        log_p = logits.to(self.probability).log_softmax(dim=1)
        p = log_p.exp()
        self.count.index_add_(0, split, torch.ones_like(p[:, 0]))
        self.negentropy.index_add_(0, split, (p * log_p).sum(dim=1))
        self.probability.index_add_(0, split, p)

    def all_reduce(self, ranks: Ranks) -> None:
        for tensor in (self.count, self.negentropy, self.probability):
            ranks.sum(tensor)

    def result(self) -> tuple[float, float]:
        """Mean and population deviation over the splits.

        Raises:
            UserError: a split without samples.
        """
        require(
            bool((self.count > 0).all()),
            f"the Inception Score needs {len(self.count)} splits; {int(self.count.sum())} images are too few",
        )
        q = self.probability / self.count[:, None]
        scores = (self.negentropy / self.count - torch.special.xlogy(q, q).sum(dim=1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))


def inception_score(logits: Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """Mean and deviation over `splits` consecutive runs of samples: logits [n, K], shuffled over the classes.

    Raises:
        UserError: fewer samples than splits.
    """
    n = len(logits)
    # Split i starts at floor(i n / splits), as in other tools.
    edges = torch.arange(1, splits) * n // splits
    score = InceptionScore(logits.shape[1], splits, logits.device)
    score.update(logits, torch.bucketize(torch.arange(n), edges, right=True))
    return score.result()


def kid(
    x: Tensor, y: Tensor, subsets: int = KID_SUBSETS, size: int = KID_SUBSET_SIZE, seed: int = 2020
) -> tuple[float, float]:
    """Kernel Inception Distance (Binkowski et al., arXiv 1801.01401): the unbiased estimate of the squared maximum mean
    discrepancy with the kernel (x.y / D + 1)^3, its mean and deviation over random subsets.

    Args:
        x, y: [n, D] and [m, D].
        size: samples of each set in a subset, at most n and m.
        seed: of the random subsets; 2020, torch-fidelity's default, gives the same subsets as torch-fidelity.

    Raises:
        UserError: fewer samples than `size`, or `size` below 2.
    """
    require(
        2 <= size <= min(len(x), len(y)),
        f"KID needs subsets of at least 2 and at most all images, got {size} of {len(x)} and {len(y)}",
    )
    # numpy's legacy generator instead of Philox, for the same number as other tools.
    random = np.random.RandomState(seed)
    per_subset = []
    for _ in range(subsets):
        a, b = (torch.from_numpy(random.choice(len(z), size, replace=False)).to(z.device) for z in (x, y))
        per_subset.append(_mmd(x[a].double(), y[b].double()))
    estimates = torch.stack(per_subset)
    return float(estimates.mean()), float(estimates.std(correction=0))


def _mmd(x: Tensor, y: Tensor) -> Tensor:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        # In place: allocation would cost as much as the arithmetic.
        return (a @ b.T).div_(a.shape[1]).add_(1).pow_(3)

    def mean_off_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    return mean_off_diagonal(kernel(x, x)) + mean_off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()


def precision_recall(generated: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991).

    The manifold of a set is the union of balls around its samples, each with the distance to its k-th nearest neighbour
    as radius. Precision is the share of generated samples in the real manifold, recall the share of real samples in the
    generated manifold.

    Args:
        generated, real: [n, D] and [m, D].

    Raises:
        UserError: fewer samples than `neighbours` + 1.
    """
    require(
        min(len(generated), len(real)) > neighbours,
        f"precision and recall need {neighbours} neighbours: {len(generated)} and {len(real)} images are too few",
    )
    generated, real = generated.double(), real.double()
    return _covered(generated, real, neighbours), _covered(real, generated, neighbours)


def _covered(points: Tensor, centres: Tensor, neighbours: int) -> float:
    """Share of points inside a ball around one of the centres."""
    # Each centre is its own nearest neighbour, at distance 0.
    radii = torch.cat([rows.kthvalue(neighbours + 1).values for rows in _squared_distances(centres, centres)])
    inside = [(rows <= radii).any(dim=1) for rows in _squared_distances(points, centres)]
    return float(torch.cat(inside).double().mean())


def _squared_distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Rows of the matrix of squared distances, one block at a time."""
    for block in x.split(_BLOCK):
        yield block.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1) - 2 * block @ y.T


def psnr(originals: Tensor, copies: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, dB: both uint8 [n, 3, S, S] -> float64 [n]; equal images give inf."""
    return decibels(mean_squared_error(originals, copies))


def mean_squared_error(originals: Tensor, copies: Tensor) -> Tensor:
    """Mean squared error of each image, for pixels in [0, 1]: both uint8 [n, 3, S, S] -> float64 [n]."""
    return _unit(originals).sub(_unit(copies)).square().mean(dim=(1, 2, 3))


def decibels(error: Tensor) -> Tensor:
    """Mean squared error of pixels in [0, 1] -> PSNR, dB."""
    return -10 * torch.log10(error)


def l1(originals: Tensor, copies: Tensor) -> Tensor:
    """Mean absolute error of each image, for pixels in [0, 1]: both uint8 [n, 3, S, S] -> float64 [n]."""
    return _unit(originals).sub(_unit(copies)).abs().mean(dim=(1, 2, 3))


SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
_SSIM_C1, _SSIM_C2 = 0.01**2, 0.03**2


def ssim(originals: Tensor, copies: Tensor) -> Tensor:
    """Structural similarity of each image: both uint8 [n, 3, S, S] -> float64 [n].

    As Wang et al. (2004) define it, for pixels in [0, 1]: local means, variances and covariance (divided by n, not
    n - 1) under an 11 x 11 Gaussian of sigma 1.5, K1 = 0.01, K2 = 0.03, per colour channel, averaged over channels and
    over the positions where the window lies inside the image.

    Raises:
        UserError: images smaller than the window.
    """
    require(
        min(originals.shape[-2:]) >= SSIM_WINDOW,
        f"SSIM needs images of at least {SSIM_WINDOW} pixels, got {list(originals.shape[-2:])}",
    )
    x, y = _unit(originals), _unit(copies)
    offset = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=x.device) - SSIM_WINDOW // 2
    line = torch.exp(-offset.square() / (2 * SSIM_SIGMA**2))
    line = line / line.sum()

    def local_mean(image: Tensor) -> Tensor:
        flat = image.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(flat, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1)).view(*image.shape[:2], -1)

    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x, variance_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _SSIM_C1) / (mean_x**2 + mean_y**2 + _SSIM_C1)
    structure = (2 * covariance + _SSIM_C2) / (variance_x + variance_y + _SSIM_C2)
    return (luminance * structure).mean(dim=(1, 2))


def _unit(images: Tensor) -> Tensor:
    return images.double() / 255
