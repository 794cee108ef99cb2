"""What the item that came next is ranked among."""

import numpy as np

from lora.errors import DataError
from tasks.recommendation.interactions import Interactions, Ints


def sampled(log: Interactions, rows: Ints, *, count: int = 100, seed: int = 0) -> Ints:
    """Return the item of every row and `count` items that its user never rates, `[rows, 1 + count]`.

    Negatives are uniform and without repetition. Knowing that an item will never be rated is look-ahead; it is the
    usual protocol, and favours whoever prefers popular items. Raises DataError where a user has rated too much.
    """
    rng = np.random.default_rng(seed)
    found = np.empty((len(rows), 1 + count), dtype=np.int64)
    for place, row in enumerate(rows):
        free = _free(log, int(log.users[row]))
        if len(free) < count:
            raise DataError(
                f"{count} negatives are asked for; user {log.users[row]} has only {len(free)} unrated items"
            )
        found[place, 0] = log.items[row]
        found[place, 1:] = rng.choice(free, size=count, replace=False)
    return found


def full(log: Interactions, row: int) -> Ints:
    """Return the item of a row and every item that its user has not rated before, `[1, candidates]`."""
    known = log.queries(np.array([row]))
    free = np.ones(len(log.catalogue), dtype=bool)
    free[log.items[known.first[0] : known.end[0]]] = False
    free[log.items[row]] = False
    return np.concatenate([log.items[row : row + 1], np.flatnonzero(free)])[None]


def _free(log: Interactions, user: int) -> Ints:
    free = np.ones(len(log.catalogue), dtype=bool)
    free[log.items[log.starts[user] : log.starts[user + 1]]] = False
    return np.flatnonzero(free).astype(np.int64)
