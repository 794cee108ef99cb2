"""What can be said of a user and an item by counting: how often they like, and are liked."""

import numpy as np
from numpy.typing import NDArray

from strategies.personal.recommenders.protocol import unfitted
from tasks.recommendation.interactions import Floats, Interactions, Ints, Queries
from tasks.recommendation.metrics import log_loss
from tasks.recommendation.splits import Split

PRIOR = 5.0
"""Events' worth of the average that a short history is mixed with."""

RECENT = 20
"""Events that a user's recent level is taken from; levels drift along the history."""
LEVEL_FEATURES = 3


def cumulated(values: Floats) -> Floats:
    """Return sums over all rows before each row, with a row more for the end."""
    return np.concatenate([np.zeros((1, *values.shape[1:])), np.cumsum(values, axis=0, dtype=np.float64)])


def rates(log: Interactions, queries: Queries, *, mean: float, last: int | None = None) -> Floats:
    """Return the smoothed share of likes in the (last part of the) histories, `[queries]`."""
    sums = cumulated(log.likes.astype(np.float64))
    first = queries.first if last is None else np.maximum(queries.first, queries.end - last)
    return (sums[queries.end] - sums[first] + PRIOR * mean) / (queries.end - first + PRIOR)


def level_features(log: Interactions, queries: Queries, *, mean: float) -> NDArray[np.float32]:
    """Return running and recent share of likes above the mean, and how much is known, `[queries, LEVEL_FEATURES]`."""
    sums = cumulated(log.likes.astype(np.float64) - mean)
    recent = np.maximum(queries.first, queries.end - RECENT)
    shares = [(sums[queries.end] - sums[first]) / (queries.end - first + PRIOR) for first in (queries.first, recent)]
    known = np.log1p(queries.end - queries.first) / 5
    return np.stack([2 * shares[0], 2 * shares[1], known], axis=1).astype(np.float32)


def log_odds(share: Floats) -> Floats:
    """Return the logit of a probability strictly between 0 and 1."""
    return np.log(share) - np.log1p(-share)


class ItemMean:
    """The share of training users who liked an item, mixed with the overall share; knows nothing of the user."""

    name = "item mean"

    def __init__(self) -> None:
        self._logits: Floats | None = None

    def fit(self, log: Interactions, split: Split, *, seed: int = 0) -> None:
        """Count likes in the training rows; validation chooses how much a rare item is drawn to the mean."""
        rows, items = split.train, len(log.catalogue)
        mean = float(log.likes[rows].mean())
        count = np.bincount(log.items[rows], minlength=items)
        likes = np.bincount(log.items[rows], weights=log.likes[rows], minlength=items)
        tables = [log_odds((likes + prior * mean) / (count + prior)) for prior in (1.0, 2.0, 5.0, 10.0, 20.0)]
        held = split.validation
        self._logits = min(tables, key=lambda table: log_loss(log.likes[held], table[log.items[held]]))

    def logits(self, log: Interactions, queries: Queries) -> Floats:
        """Return the item's log odds, whoever asks."""
        if self._logits is None:
            raise unfitted(self.name)
        return self._logits[queries.items]


class Popularity:
    """How many training rows an item has: the baseline of rankings. Its scores are no probabilities."""

    name = "popularity"

    def __init__(self) -> None:
        self._counts: Floats | None = None

    def fit(self, log: Interactions, split: Split, *, seed: int = 0) -> None:
        """Count the training rows of every item."""
        self._counts = np.bincount(log.items[split.train], minlength=len(log.catalogue)).astype(np.float64)

    def logits(self, log: Interactions, queries: Queries) -> Floats:
        """Return the item's count."""
        if self._counts is None:
            raise unfitted(self.name)
        return self._counts[queries.items]


class ItemClock:
    """Likes of every item by all users before a moment: what a service could have counted by then."""

    def __init__(self, log: Interactions) -> None:
        order = np.lexsort((log.times, log.items))
        self._moments = np.unique(log.times)
        self._span = len(self._moments) + 1
        self._keys = log.items[order] * self._span + np.searchsorted(self._moments, log.times[order])
        self._likes = cumulated(log.likes[order].astype(np.float64))

    def before(self, items: Ints, times: Ints) -> tuple[Floats, Floats]:
        """Return likes and events of `items` strictly before `times`."""
        first = np.searchsorted(self._keys, items * self._span)
        end = np.searchsorted(self._keys, items * self._span + np.searchsorted(self._moments, times))
        return self._likes[end] - self._likes[first], (end - first).astype(np.float64)
