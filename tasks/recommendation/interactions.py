"""Interactions in one fixed order, and queries whose histories end strictly before them.

Rows are sorted by user, then time. What a user did strictly before an event is therefore one range of rows, and a
history is two numbers: no list of its own that could hold the target or the future.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lora.errors import DataError, nearest

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

LEVELS = 10
"""Steps that a rating is told apart in: every half star of a scale from 0.5 to 5."""

_YEAR = re.compile(r"\((\d{4})\)\s*$")


@dataclass(frozen=True)
class Items:
    """The catalogue: names are for look-up only and appear in no prompt."""

    names: tuple[str, ...]
    titles: tuple[str, ...]
    tags: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """What a language model reads of every item: title, then tags."""
        return tuple(
            f"{title}. Genres: {', '.join(tags)}" if tags else title
            for title, tags in zip(self.titles, self.tags, strict=True)
        )

    @cached_property
    def years(self) -> Floats:
        """Year at the end of every title in brackets; NaN where there is none."""
        found = (_YEAR.search(title) for title in self.titles)
        return np.array([float(match[1]) if match else np.nan for match in found])

    def take(self, indices: Ints) -> "Items":
        """Return the items at `indices`, in that order."""
        return Items(
            names=tuple(self.names[i] for i in indices),
            titles=tuple(self.titles[i] for i in indices),
            tags=tuple(self.tags[i] for i in indices),
        )

    def index(self, name: str) -> int:
        """Return the index of an item; raise DataError with the nearest name for an unknown one."""
        return _index(self.names, name, "item")


@dataclass(frozen=True)
class Queries:
    """What is asked: would the user whose history is rows `first` to `end` (exclusive) like `items` at `times`?"""

    first: Ints
    end: Ints
    items: Ints
    times: Ints

    def __len__(self) -> int:
        return len(self.items)

    def take(self, indices: Ints | slice) -> "Queries":
        """Return the queries at `indices`."""
        return Queries(self.first[indices], self.end[indices], self.items[indices], self.times[indices])

    def about(self, candidates: Ints) -> "Queries":
        """Ask the same of other items, `candidates [queries, c]`; row by row, `queries * c` in all."""
        width = candidates.shape[1]
        whole = self.take(np.repeat(np.arange(len(self)), width))
        return replace(whole, items=candidates.reshape(-1))

    def with_history_of(self, other: Ints) -> "Queries":
        """Ask the same on behalf of the users of queries `other`, with their histories."""
        return replace(self, first=self.first[other], end=self.end[other])

    def without_history(self) -> "Queries":
        """Ask the same for a user of whom nothing is known."""
        return replace(self, end=self.first)

    def latest(self, length: int) -> Ints:
        """Return the last `length` rows of every history, oldest first, `[queries, length]`; -1 fills the front."""
        rows = self.end[:, None] + np.arange(-length, 0)
        return np.where(rows >= self.first[:, None], rows, -1)


@dataclass(frozen=True)
class Interactions:
    """Who rated what when; rows are sorted by user, then time, then as they were given."""

    users: Ints
    items: Ints
    ratings: Floats
    times: Ints
    """Seconds since 1970."""
    user_names: tuple[str, ...]
    catalogue: Items
    like_from: float = 4.0
    scale: tuple[float, float] = (0.5, 5.0)

    def __post_init__(self) -> None:
        later = np.diff(self.times) >= 0
        if not ((np.diff(self.users) > 0) | ((np.diff(self.users) == 0) & later)).all():
            raise ValueError("rows are not sorted by user, then time; use Interactions.arranged")
        for name, indices, count in (
            ("user", self.users, len(self.user_names)),
            ("item", self.items, len(self.catalogue)),
        ):
            if len(indices) and not 0 <= indices.min() <= indices.max() < count:
                raise ValueError(f"{name} indices run from 0 to {count - 1}, not to {indices.max()}; name new users")

    def __len__(self) -> int:
        return len(self.items)

    @classmethod
    def arranged(  # noqa: PLR0917 (columns, as in the fields)
        cls,
        users: Ints,
        items: Ints,
        ratings: Floats,
        times: Ints,
        user_names: tuple[str, ...],
        catalogue: Items,
        *,
        like_from: float = 4.0,
        scale: tuple[float, float] = (0.5, 5.0),
    ) -> "Interactions":
        """Sort rows that come in any order."""
        order = np.lexsort((times, users))
        columns = (users[order], items[order], ratings[order], times[order])
        return cls(*columns, user_names, catalogue, like_from=like_from, scale=scale)

    @cached_property
    def likes(self) -> NDArray[np.bool_]:
        """Label of every row."""
        return self.ratings >= self.like_from

    @cached_property
    def levels(self) -> Ints:
        """Ratings on LEVELS even steps of their scale, from 0."""
        low, high = self.scale
        return np.rint((self.ratings - low) / (high - low) * (LEVELS - 1)).astype(np.int64)

    @cached_property
    def starts(self) -> Ints:
        """First row of every user and, at the end, the number of rows, `[users + 1]`."""
        return np.searchsorted(self.users, np.arange(len(self.user_names) + 1)).astype(np.int64)

    @cached_property
    def befores(self) -> Ints:
        """First row with the same user and the same time: where the history of each row ends."""
        new = np.ones(len(self), dtype=bool)
        new[1:] = (np.diff(self.users) != 0) | (np.diff(self.times) != 0)
        return np.maximum.accumulate(np.where(new, np.arange(len(self)), 0))

    def queries(self, rows: Ints) -> Queries:
        """Ask about rows as they were when they happened: only strictly earlier events of the user are known."""
        return Queries(
            first=self.starts[self.users[rows]], end=self.befores[rows], items=self.items[rows], times=self.times[rows]
        )

    def query(self, user: str, items: Sequence[int], *, time: int) -> Queries:
        """Ask about `items` for a user at a time; raise DataError for an unknown user or item.

        A known user without earlier events gets an empty history: the cold start that every recommender answers.
        """
        index = _index(self.user_names, user, "user")
        unknown = [item for item in items if not 0 <= item < len(self.catalogue)]
        if unknown:
            raise DataError(f"item {unknown[0]} is not in the catalogue of {len(self.catalogue)}; look it up by name")
        first, past = self.starts[index], self.starts[index + 1]
        end = first + np.searchsorted(self.times[first:past], time, side="left")
        whole = np.ones(len(items), dtype=np.int64)
        return Queries(first * whole, end * whole, np.asarray(items, dtype=np.int64), time * whole)

    def taken(self, rows: Ints) -> "Interactions":
        """Return the interactions of some rows, with the same users and catalogue."""
        rows = np.sort(rows)
        return replace(
            self,
            users=self.users[rows],
            items=self.items[rows],
            ratings=self.ratings[rows],
            times=self.times[rows],
        )

    def among(self, users: Callable[[str], bool]) -> "Interactions":
        """Return the interactions of some users, told by name, who are numbered anew; the catalogue stays.

        Raises DataError where nothing is left.
        """
        kept = np.array([users(name) for name in self.user_names], dtype=bool)
        rows = np.flatnonzero(kept[self.users])
        if not len(rows):
            raise DataError(f"none of the {len(self.user_names)} users is left; leave out fewer")
        names = tuple(name for name, one in zip(self.user_names, kept, strict=True) if one)
        place = np.cumsum(kept) - 1
        whole = self.taken(rows)
        return replace(whole, users=place[whole.users], user_names=names)

    def grown(
        self, users: Ints, items: Ints, ratings: Floats, times: Ints, *, names: Sequence[str] = ()
    ) -> "Interactions":
        """Add events, also of new users `names`, whose indices follow those of the known ones; rows shift."""
        return Interactions.arranged(
            np.concatenate([self.users, users]),
            np.concatenate([self.items, items]),
            np.concatenate([self.ratings, ratings]),
            np.concatenate([self.times, times]),
            self.user_names + tuple(names),
            self.catalogue,
            like_from=self.like_from,
            scale=self.scale,
        )

    def core(self, least: int) -> "Interactions":
        """Keep users and items with at least `least` interactions each, repeated until nothing changes.

        Users and items are numbered anew. All events count, also those that a split keeps for testing: a slight
        look-ahead, which is usual and the same for every recommender. Raises DataError where nothing is left.
        """
        kept = np.arange(len(self))
        while True:
            users, items = self.users[kept], self.items[kept]
            enough = (
                (np.bincount(users)[users] >= least) & (np.bincount(items)[items] >= least) if len(kept) else kept > 0
            )
            if enough.all():
                break
            kept = kept[enough]
        if not len(kept):
            raise DataError(
                f"no users and items with {least} interactions each are left of {len(self)}; lower ratings.core"
            )
        return self._renumbered(kept)

    def _renumbered(self, rows: Ints) -> "Interactions":
        users, user_of = np.unique(self.users[rows], return_inverse=True)
        items, item_of = np.unique(self.items[rows], return_inverse=True)
        return Interactions(
            user_of.astype(np.int64),
            item_of.astype(np.int64),
            self.ratings[rows],
            self.times[rows],
            tuple(self.user_names[user] for user in users),
            self.catalogue.take(items),
            like_from=self.like_from,
            scale=self.scale,
        )


def _index(names: Sequence[str], name: str, kind: str) -> int:
    try:
        return names.index(name)
    except ValueError:
        close = nearest(name, names) if len(names) <= 20_000 else ""
        close = close if "mean" in close else f"; there are {len(names)}"
        raise DataError(f"unknown {kind} '{name}'{close}") from None
