"""What a detector knows of the forgotten examples: class means and a shrunk covariance, and nothing of any one of them.

O3's released code keeps the features of all forgotten examples, as a bank for its cosine. Here the bank is replaced by
the means of classes (the request's labels, or clusters), and both distances are taken in the space that the covariance
within classes whitens: linear discriminant analysis without the other classes.
"""

from dataclasses import dataclass, replace

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from lora.errors import DataError
from privacy.randomness import Randomness
from strategies.unlearning.audit import derived, drawn

ROWS_A_DIRECTION = 10
"""Examples for each direction of the covariance that is kept: fewer would estimate noise, or single examples."""


@dataclass(frozen=True)
class Shape:
    """How statistics are taken: shrinkage of the covariance, directions kept, classes without labels, least members."""

    shrinkage: float = 0.8
    """Share of the mean variance that replaces the covariance; 1 is plain Euclid and plain cosine."""
    directions: int = 64
    """Most directions of the covariance that are kept; the rest has one variance."""
    classes: int = 15
    """Clusters that stand for classes where a request has no labels."""
    least: int = 5
    """Fewest examples behind a mean: the mean of one example would be a copy of it."""
    noise_multiplier: float = 0.0
    """Standard deviation of Gaussian noise on the statistics, in units of what one example can change; 0: none."""


@dataclass(frozen=True)
class ClassStatistics:
    """Means mu_k of unit features and the precision `P = base I - V^T diag(gains) V` within classes.

    Stored are `directions` V `[q, d]`, `gains` `[q]`, `base` `[]`, `pulled` P mu_k `[classes, d]`, and `norms`
    mu_k^T P mu_k `[classes]`, float32. P^-1 is the covariance shrunk towards its mean variance, with its smallest
    variances replaced by their mean (probabilistic PCA).
    """

    directions: Tensor
    gains: Tensor
    base: Tensor
    pulled: Tensor
    norms: Tensor

    @property
    def numbers(self) -> int:
        """Numbers kept."""
        return sum(t.numel() for t in (self.directions, self.gains, self.base, self.pulled, self.norms))

    def to(self, device: torch.device) -> "ClassStatistics":
        """Return the same on a device."""
        whole = (self.directions, self.gains, self.base, self.pulled, self.norms)
        return ClassStatistics(*(tensor.to(device) for tensor in whole))


def class_statistics(
    features: Tensor, labels: Tensor | None, *, shape: Shape, randomness: Randomness | None = None
) -> ClassStatistics:
    """Take the statistics of unit features `[n, d]` with class labels `[n]` (None: k-means finds the classes).

    Classes with fewer than `shape.least` rows are put together. Raises DataError for fewer than `shape.least` rows, and
    for noise without a source of it.

    **Guarantee** (with noise): counts, sums and the second moment, from which everything kept is computed, are the
    output of one Gaussian mechanism with the given noise multiplier for adding or removing one example, whose
    sensitivity is sqrt(3) (one count, one unit vector, one outer product of a unit vector with itself). Labels must be
    given, since clusters are not noised. Not covered, and so public: how many rows there are, which classes have enough
    of them, and what a detector adds (scales and thresholds).
    """
    if len(features) < shape.least:
        raise DataError(
            f"a detector of {len(features)} examples would keep copies of them: a mean stands for at least "
            f"{shape.least}; give more examples, or forget them without a gate"
        )
    features = features.double()
    classes = _classes(features, labels, shape)
    count, total, second = _moments(features, classes)
    if shape.noise_multiplier:
        if randomness is None or labels is None:
            raise DataError("noised statistics need labels and a source of noise; give both or noise_multiplier=0")
        count, total, second = _noised(count, total, second, scale=shape.noise_multiplier, randomness=randomness)
    kept = int(min(shape.directions, len(features) // ROWS_A_DIRECTION, features.shape[1] - 1))
    return _summarised(count, total, second, shrinkage=shape.shrinkage, kept=kept)


def _classes(features: Tensor, labels: Tensor | None, shape: Shape) -> Tensor:
    """Return the class of every row, 0 to k - 1, each with at least `least` rows."""
    if labels is None:
        wanted = max(1, min(shape.classes, len(features) // (2 * shape.least)))
        found = KMeans(wanted, n_init=3, random_state=0).fit_predict(features.cpu().numpy())
        labels = derived(found).long()
    _, classes, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    small = counts < shape.least
    if small.any():
        # The small ones become one class; where that is too small still, it joins the largest.
        joint = int(counts.argmax()) if counts[small].sum() < shape.least and not small.all() else -1
        classes = torch.where(small[classes], torch.full_like(classes, joint), classes)
        _, classes = torch.unique(classes, return_inverse=True)
    members: Tensor = classes
    return members


def _moments(features: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return counts `[k]`, sums `[k, d]` and the second moment `[d, d]`, a sum."""
    member = torch.nn.functional.one_hot(classes).to(features.dtype)
    return member.sum(0), member.T @ features, features.T @ features


def _noised(
    count: Tensor, total: Tensor, second: Tensor, *, scale: float, randomness: Randomness
) -> tuple[Tensor, Tensor, Tensor]:
    width, classes = total.shape[1], len(count)
    size = classes + total.numel() + second.numel()
    noise = drawn(lambda: randomness.gaussian(size)).to(count) * (scale * 3**0.5)
    one, two = classes, classes + total.numel()
    return count + noise[:one], total + noise[one:two].view_as(total), second + noise[two:].view(width, width)


def _summarised(count: Tensor, total: Tensor, second: Tensor, *, shrinkage: float, kept: int) -> ClassStatistics:
    count = count.clamp(min=1.0)
    means = total / count[:, None]
    within = (second - total.T @ means) / count.sum()
    variances, directions = torch.linalg.eigh((within + within.T) / 2)
    variances, directions = variances.flip(0).clamp(min=0.0), directions.flip(1)
    # Noise, or identical rows, can leave no variance at all.
    middle = variances.mean().clamp(min=1e-6)
    top = (1 - shrinkage) * variances[:kept] + shrinkage * middle
    rest = ((1 - shrinkage) * variances[kept:].mean() + shrinkage * middle).clamp(min=1e-9)
    base, gains, kept_directions = 1 / rest, 1 / rest - 1 / top, directions[:, :kept].T
    pulled = base * means - (means @ kept_directions.T * gains) @ kept_directions
    found = (kept_directions, gains, base, pulled, (pulled * means).sum(1))
    return ClassStatistics(*(tensor.float().contiguous() for tensor in found))


@dataclass(frozen=True)
class StackedStatistics:
    """The statistics of many requests at one layer, asked at once: one matrix product for all of them.

    `matrix` `[requests * (q + classes), d]`; requests with fewer directions or classes are filled up.
    """

    matrix: Tensor
    gains: Tensor
    base: Tensor
    norms: Tensor

    @classmethod
    def of(cls, statistics: list[ClassStatistics]) -> "StackedStatistics":
        """Stack the statistics of `requests` requests."""
        q = max(len(each.gains) for each in statistics)
        k = max(len(each.norms) for each in statistics)
        filled = [_filled(each, q=q, k=k) for each in statistics]
        return cls(
            torch.cat([torch.cat([each.directions, each.pulled]) for each in filled]),
            torch.stack([each.gains for each in filled]),
            torch.stack([each.base for each in filled]),
            torch.stack([each.norms for each in filled]),
        )

    def distances(self, features: Tensor) -> Tensor:
        """Return for unit features `[rows, d]` Mahalanobis and cosine distance to the nearest class of every request.

        The result is `[rows, requests, 2]`: min_k (z - mu_k)^T P (z - mu_k), and 1 - max_k cos of z and mu_k after
        whitening. Both rise with distance.
        """
        features = features.to(self.matrix.device)
        requests, q = self.gains.shape
        shared = (features @ self.matrix.T).view(len(features), requests, -1)
        spread, pull = shared[..., :q], shared[..., q:]
        square = features.square().sum(1, keepdim=True) * self.base - (spread.square() * self.gains).sum(2)
        square = square.clamp(min=1e-12)
        mahalanobis = (square[..., None] - 2 * pull + self.norms).amin(2)
        # A class that only fills up has an infinite norm: infinitely far, and at a cosine of 0, the least of all.
        present = self.norms.isfinite()
        cosine = pull * (square[..., None] * self.norms.clamp(min=1e-12)).rsqrt()
        cosine = cosine.masked_fill(~present, -1.0).amax(2)
        return torch.stack([mahalanobis, 1 - cosine], dim=2)


def _filled(statistics: ClassStatistics, *, q: int, k: int) -> ClassStatistics:
    """Add directions of no gain and classes at infinity."""
    (more_q, more_k), width = (q - len(statistics.gains), k - len(statistics.norms)), statistics.pulled.shape[1]
    zeros = statistics.directions.new_zeros
    return replace(
        statistics,
        directions=torch.cat([statistics.directions, zeros(more_q, width)]),
        gains=torch.cat([statistics.gains, zeros(more_q)]),
        pulled=torch.cat([statistics.pulled, zeros(more_k, width)]),
        norms=torch.cat([statistics.norms, zeros(more_k) + torch.inf]),
    )
