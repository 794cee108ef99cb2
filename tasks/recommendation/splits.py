"""Two ways to keep the end of time for testing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tasks.recommendation.interactions import Interactions, Ints


@dataclass(frozen=True)
class Split:
    """Rows of the interactions by what they are for; the parts are disjoint and hold every row."""

    name: str
    train: Ints
    validation: Ints
    test: Ints


def per_user(log: Interactions, *, train: float = 0.7, validation: float = 0.1) -> Split:
    """Split every user's events by time: known users, lifelong.

    **Guarantee.** No training event of a user is later than a validation event, and none of these later than a test
    event, of the same user. Training rows of one user can be later than test rows of another.
    """
    counts = np.diff(log.starts)
    place = np.arange(len(log)) - log.starts[log.users]
    ends = [np.floor(share * counts + 0.5 + 1e-9).astype(np.int64)[log.users] for share in (train, train + validation)]
    return _cut("per user", place, *ends)


def global_time(log: Interactions, *, train: float = 0.8, validation: float = 0.1) -> Split:
    """Split all events at two points in time: mostly new users.

    **Guarantee.** Every training event is strictly earlier than every validation event, and these than every test
    event: events of one time are never divided, so the shares hold up to such groups.
    """
    ordered = np.sort(log.times)
    cuts = [ordered[min(len(log) - 1, round(share * len(log)))] for share in (train, train + validation)]
    return _cut("global time", log.times, *cuts)


def _cut(name: str, values: Ints, low: Ints, high: Ints) -> Split:
    masks = (values < low, (values >= low) & (values < high), values >= high)
    return Split(name, *(np.flatnonzero(mask).astype(np.int64) for mask in masks))


SPLITS: Mapping[str, Callable[[Interactions], Split]] = {"per-user": per_user, "global-time": global_time}
