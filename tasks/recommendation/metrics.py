"""How good probabilities and rankings are, and how sure that is when rows of one user go together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora.errors import DataError
from tasks.recommendation.interactions import Floats, Ints

Labels = NDArray[np.bool_]
Weighed = Callable[[Floats], float]
"""Weights of rows -> a figure."""


def auc(labels: Labels, scores: Floats, *, weights: Floats | None = None) -> float:
    """Return the chance that a like scores above a dislike, ties half. Raises DataError where one kind is missing."""
    return weighed_auc(labels, scores)(np.ones(len(labels)) if weights is None else weights)


def weighed_auc(labels: Labels, scores: Floats) -> Weighed:
    """Return the AUC as a function of the rows' weights; scores are sorted once for all of them."""
    values, place = np.unique(scores, return_inverse=True)

    def figure(weights: Floats) -> float:
        good = np.bincount(place, weights=weights * labels, minlength=len(values))
        bad = np.bincount(place, weights=weights * ~labels, minlength=len(values))
        if not (good.sum() > 0 and bad.sum() > 0):
            raise DataError(f"AUC needs likes and dislikes; there are {labels.sum()} likes in {len(labels)} rows")
        below = np.cumsum(bad) - bad / 2
        return float(good @ below / good.sum() / bad.sum())

    return figure


def log_loss(labels: Labels, logits: Floats, *, weights: Floats | None = None) -> float:
    """Return the mean negative log likelihood, nats; from logits, so that nothing is clipped."""
    losses = np.logaddexp(0, np.where(labels, -logits, logits))
    return float(np.average(losses, weights=weights))


def accuracy(labels: Labels, logits: Floats) -> float:
    """Return the share of rows on the right side of probability one half."""
    return float(np.mean((logits > 0) == labels))


@dataclass(frozen=True)
class Likes:
    """How well likes are predicted."""

    auc: float
    log_loss: float
    accuracy: float
    rows: int


def likes(labels: Labels, logits: Floats) -> Likes:
    """Measure logits of liking against labels."""
    return Likes(auc(labels, logits), log_loss(labels, logits), accuracy(labels, logits), len(labels))


@dataclass(frozen=True)
class Ranking:
    """How high the one item that came next stands among its candidates; means over queries."""

    ndcg10: float
    hit10: float
    mrr: float
    queries: int


def ranks(scores: Floats) -> Floats:
    """Return the 1-based rank of column 0 in every row of `scores [queries, candidates]`; ties count half."""
    target = scores[:, :1]
    others = scores[:, 1:]
    above, level = (others > target).sum(axis=1), (others == target).sum(axis=1)
    return np.asarray(1 + above + 0.5 * level, dtype=np.float64)


def ranking(found: Floats, *, top: int = 10) -> Ranking:
    """Measure the ranks of the one right item of each query."""
    inside = found <= top
    gains = np.where(inside, 1 / np.log2(found + 1), 0.0)
    return Ranking(float(gains.mean()), float(inside.mean()), float((1 / found).mean()), len(found))


@dataclass(frozen=True)
class Interval:
    """A difference and the interval that holds it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


Measure = Callable[[Labels, Floats], Weighed]
"""(labels, logits) -> the figure for given weights."""


def _weighed_log_loss(labels: Labels, logits: Floats) -> Weighed:
    return lambda weights: log_loss(labels, logits, weights=weights)


MEASURES: Mapping[str, Measure] = {"auc": weighed_auc, "log_loss": _weighed_log_loss}


def paired_bootstrap(
    labels: Labels,
    one: Floats,
    other: Floats,
    *,
    users: Ints,
    measure: str = "auc",
    draws: int = 300,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return measure(one) - measure(other) with the interval from redrawing whole users, the same for both.

    Rows of one user go together, so redrawing rows would claim far too much certainty. Logits are `[rows]`, or
    `[runs, rows]` for the mean over runs, such as seeds; the interval is then of that mean, runs as they were.
    """
    difference = _mean_difference(MEASURES[measure], labels, one, other)
    _, owner = np.unique(users, return_inverse=True)
    count = int(owner.max()) + 1
    rng = np.random.default_rng(seed)
    differences = []
    for _ in range(draws):
        weights = np.bincount(rng.integers(count, size=count), minlength=count)[owner].astype(np.float64)
        if np.unique(labels[weights > 0]).size == 2:
            differences.append(difference(weights))
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return Interval(difference(np.ones(len(labels))), float(low), float(high))


def _mean_difference(measure: Measure, labels: Labels, one: Floats, other: Floats) -> Weighed:
    sides = [[measure(labels, run) for run in np.atleast_2d(logits)] for logits in (one, other)]

    def figure(weights: Floats) -> float:
        first, second = (float(np.mean([run(weights) for run in runs])) for runs in sides)
        return first - second

    return figure
