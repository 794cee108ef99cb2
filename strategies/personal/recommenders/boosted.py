"""Gradient boosting on features counted by hand: the strongest single reference that knows no text."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier

from strategies.personal.recommenders.levels import PRIOR, ItemClock, cumulated, rates
from strategies.personal.recommenders.protocol import unfitted
from tasks.recommendation.interactions import Floats, Interactions, Queries
from tasks.recommendation.splits import Split

MOST_TAGS = 32
"""Tags that get a feature of their own; the most frequent in the catalogue."""


@dataclass(frozen=True)
class BoostedSettings:
    """Size of the forest."""

    rate: float = 0.03
    trees: int = 400
    leaves: int = 31
    least: int = 100
    """Training rows in a leaf, at least."""
    patience: int = 20


class Boosted:
    """The forest and the features it sees.

    Item means are running means over all users' events strictly earlier in time, whatever part of the split those lie
    in: what a service in operation would have counted. All else is fitted to training rows.
    """

    name = "boosted features"

    def __init__(self, settings: BoostedSettings | None = None) -> None:
        self.settings = settings or BoostedSettings()
        self._forest: Any = None
        self._mean = 0.5

    def fit(self, log: Interactions, split: Split, *, seed: int) -> None:
        """Grow trees on training rows until validation gains nothing more."""
        settings, self._mean = self.settings, float(log.likes[split.train].mean())
        forest = HistGradientBoostingClassifier(
            learning_rate=settings.rate,
            max_iter=settings.trees,
            max_leaf_nodes=settings.leaves,
            min_samples_leaf=settings.least,
            early_stopping=True,
            n_iter_no_change=settings.patience,
            random_state=seed,
        )
        table = features(log, log.queries(np.concatenate([split.train, split.validation])), mean=self._mean)
        train, held = table[: len(split.train)], table[len(split.train) :]
        forest.fit(train, log.likes[split.train], X_val=held, y_val=log.likes[split.validation])
        self._forest = forest

    def logits(self, log: Interactions, queries: Queries) -> Floats:
        """Return the forest's log odds."""
        if self._forest is None:
            raise unfitted(self.name)
        odds: Floats = self._forest.decision_function(features(log, queries, mean=self._mean))
        return odds


def features(log: Interactions, queries: Queries, *, mean: float) -> Floats:
    """Return what is known of user, item and both at the time of each query, `[queries, features]`.

    The user's share of likes in all, over the last 10 and 20, and last rating and mean rating; the item's share of
    likes and count so far; the user's share of likes among items with the target's tags; year; tags.
    """
    count = (queries.end - queries.first).astype(np.float64)
    liked, seen = ItemClock(log).before(queries.items, queries.times)
    level = rates(log, queries, mean=mean)
    stars = cumulated(log.ratings)
    with np.errstate(invalid="ignore"):
        average = (stars[queries.end] - stars[queries.first]) / count
    last = np.where(count > 0, log.ratings[np.maximum(queries.end - 1, 0)], np.nan)
    tags = _tags(log)
    columns = [
        level,
        *(rates(log, queries, mean=mean, last=length) for length in (10, 20)),
        last,
        average,
        count,
        (liked + PRIOR * mean) / (seen + PRIOR),
        seen,
        _affinity(log, queries, tags, level) - level,
        log.catalogue.years[queries.items],
    ]
    return np.concatenate([np.stack(columns, axis=1), tags[queries.items]], axis=1)


def _tags(log: Interactions) -> Floats:
    counts = Counter(tag for tags in log.catalogue.tags for tag in tags)
    frequent = sorted(counts, key=lambda tag: (-counts[tag], tag))[:MOST_TAGS]
    column = {tag: place for place, tag in enumerate(frequent)}
    table = np.zeros((len(log.catalogue), len(frequent)))
    for item, tags in enumerate(log.catalogue.tags):
        table[item, [column[tag] for tag in tags if tag in column]] = 1.0
    return table


def _affinity(log: Interactions, queries: Queries, tags: Floats, level: Floats) -> Floats:
    """Return the smoothed share of likes among earlier items, averaged over the target's tags; NaN without tags."""
    wanted = tags[queries.items]
    shares = np.zeros(len(queries))
    for tag in range(tags.shape[1]):
        has = tags[log.items, tag]
        events, likes = cumulated(has), cumulated(has * log.likes)
        asked = np.flatnonzero(wanted[:, tag])
        first, end = queries.first[asked], queries.end[asked]
        shares[asked] += (likes[end] - likes[first] + PRIOR * level[asked]) / (events[end] - events[first] + PRIOR)
    with np.errstate(invalid="ignore"):
        return np.asarray(shares / wanted.sum(axis=1), dtype=np.float64)
