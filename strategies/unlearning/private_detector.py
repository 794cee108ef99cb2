"""A detector whose every number is noised: class means, and a histogram of how near the rows are to them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora.errors import DataError
from privacy.accounting import Event
from privacy.randomness import Randomness
from strategies.unlearning.audit import drawn
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.class_statistics import ClassStatistics
from strategies.unlearning.detector import TERMS, Detector, Detectors, request_features
from strategies.unlearning.encoder import SharedEncoder
from strategies.unlearning.weight import MirroredCdf
from tasks.tokens import Tokens

BINS = 48
FARTHEST = 1.2
"""Cosine distances are counted up to here, in equal bins; what is farther is counted with the farthest."""


@dataclass(frozen=True)
class PrivateStatistics:
    """How much noise a private detector gets, and what its threshold covers."""

    noise_multiplier: float
    """Of both releases: standard deviation over sensitivity."""
    coverage: float
    least: int = 5
    """Fewest rows, by the noised count, behind a class mean."""

    def event(self, *, layers: int) -> Event:
        """Return what a detector of so many layers costs; charge it before `fit_private_detector`."""
        return Event(rate=1.0, noise_multiplier=self.noise_multiplier, steps=2 * layers)


def fit_private_detector(
    encoder: SharedEncoder,
    request: AuditedRequest,
    tokens: Tokens,
    *,
    classes: tuple[int, ...],
    settings: PrivateStatistics,
    randomness: Randomness,
) -> Detector:
    """Make a detector of all rows of a request: cosine distance to the nearest noised class mean.

    `classes` are those that the request names; without any, all rows are one class. There is no covariance: its noise
    would drown it (a domain of CLINC150 has 1,500 rows and 73,920 covariances).

    **Guarantee**: everything in the detector is computed from the outputs of two Gaussian mechanisms a layer, of the
    given noise multiplier, for adding or removing one row: counts and sums of unit features by class (sensitivity
    sqrt(2): one count, one unit vector), and a histogram of distances to the means that the first one gave
    (sensitivity 1). Public are how many rows there are, and the classes, which the request names.

    | case | what happens |
    |---|---|
    | noise leaves a class fewer than `least` rows | the class is left out; where all are, all rows are one class |
    | noise leaves a count of the histogram below zero | it counts as zero |
    | a row of a class that is not named | DataError |
    | a NaN in a row's features | the row counts as a zero vector |
    """
    audit = request.audit
    audit.declare("model", [*encoder.adapted.base.parameters(), *encoder.adapted.base.buffers()])
    audit.declare("model", encoder.adapted.frame.matrices.values())
    audit.declare("slots", (encoder.factors or {}).values())
    with audit.watching():
        features = request_features(encoder, request, tokens, request.used).nan_to_num(0.0)
        with audit.reading(()) as made:
            member = _members(tokens, classes)
            made.append(member)
        layers = range(len(encoder.layers))
        found = [_layer(features[:, place], member, settings=settings, randomness=randomness) for place in layers]
        detector = _joined(tuple(encoder.layers), found)
    audit.check()
    return detector


@dataclass(frozen=True)
class _Layer:
    """Noised statistics of one layer, and the distance that covers, its mean and its spread by the noised histogram."""

    statistics: ClassStatistics
    threshold: float
    mean: float
    spread: float


def _members(tokens: Tokens, classes: tuple[int, ...]) -> Tensor:
    """Return which named class every row is of, `[n, classes]`, zeros and ones."""
    labels = torch.zeros(len(tokens), dtype=torch.long) if tokens.labels is None else torch.tensor(tokens.labels)
    if not classes:
        return torch.ones(len(tokens), 1).double()
    member = (labels[:, None] == torch.tensor(sorted(classes))).double()
    if bool((member.sum(1) == 0).any()):
        raise DataError("a row is of a class that the request does not name; leave it out")
    return member


def _layer(features: Tensor, member: Tensor, *, settings: PrivateStatistics, randomness: Randomness) -> _Layer:
    def noise(*shape: int, sensitivity: float) -> Tensor:
        deviation = settings.noise_multiplier * sensitivity
        return drawn(lambda: randomness.gaussian(torch.Size(shape).numel()).view(shape)).double() * deviation

    sums = class_sums(features, member)
    sums = sums + noise(*sums.shape, sensitivity=2**0.5)
    statistics = _statistics(sums[:, 0], sums[:, 1:], least=settings.least)
    counts = (distance_counts(features, statistics) + noise(BINS, sensitivity=1.0)).clamp(min=0.0)
    return _measured(statistics, counts, coverage=settings.coverage)


def class_sums(features: Tensor, member: Tensor) -> Tensor:
    """Return counts and sums of unit features `[n, d]` by class, `[classes, 1 + d]`; `member [n, classes]`."""
    return torch.cat([member.sum(0)[:, None], member.T @ features.double()], dim=1)


def distance_counts(features: Tensor, statistics: ClassStatistics) -> Tensor:
    """Return how many of features `[n, d]` are how far from the nearest class mean, `[BINS]`."""
    asked = Detectors([Detector((statistics,), (0,), _weights(1), MirroredCdf(0.0, 0.0, 1.0), 0.0)])
    near = asked.distances(features.float()[:, None])[:, 0]
    return torch.histc(near.clamp(0.0, FARTHEST), bins=BINS, min=0.0, max=FARTHEST)


def _statistics(count: Tensor, total: Tensor, *, least: int) -> ClassStatistics:
    """Return the means alone: plain cosine."""
    enough = count >= least
    if not bool(enough.any()):
        count, total = count.sum(0, keepdim=True), total.sum(0, keepdim=True)
        enough = torch.ones(1, dtype=torch.bool, device=count.device)
    means = (total[enough] / count[enough, None].clamp(min=least)).float()
    nothing = means.new_zeros
    return ClassStatistics(nothing(0, means.shape[1]), nothing(0), nothing(()) + 1.0, means, means.square().sum(1))


def _weights(layers: int) -> Tensor:
    weights = torch.zeros(layers, len(TERMS)).double()
    weights[:, TERMS.index("cosine")] = 1.0
    return weights


def _measured(statistics: ClassStatistics, counts: Tensor, *, coverage: float) -> _Layer:
    edges = FARTHEST / BINS * torch.arange(1, BINS + 1, dtype=torch.double)
    middles, whole = edges - FARTHEST / BINS / 2, counts.sum().clamp(min=1e-9)
    within = counts.cumsum(0)
    place = int((within >= coverage * whole).nonzero()[0]) if float(counts.sum()) > 0 else 0
    before = float(within[place - 1]) if place else 0.0
    part = min(1.0, max(0.0, (coverage * float(whole) - before) / max(float(counts[place]), 1e-9)))
    mean = float((counts * middles).sum() / whole)
    spread = float(((counts * (middles - mean).square()).sum() / whole).sqrt())
    return _Layer(statistics, float(edges[place]) - FARTHEST / BINS * (1 - part), mean, spread)


def _joined(layers: tuple[int, ...], found: list[_Layer]) -> Detector:
    """Put layers into one detector; its distance is the sum over layers, and so are threshold and mean."""
    mean, threshold = sum(each.mean for each in found), sum(each.threshold for each in found)
    spread = max(sum(each.spread for each in found), 1e-6)
    weight = MirroredCdf(mean, mean, spread)
    return Detector(tuple(each.statistics for each in found), layers, _weights(len(layers)), weight, threshold)
