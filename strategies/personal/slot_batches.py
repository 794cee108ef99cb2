"""Batches of many users' rows in which little is computed for padding and every group of rows has one owner."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora.errors import DataError
from tasks.tokens import Batch, Tokens, buckets, collate

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class UserEvents:
    """Labelled prompts of one user; `weights [rows]` add up their losses, by default to the mean.

    Raises DataError for no rows, and for weights that do not fit them.
    """

    tokens: Tokens
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) == 0:
            raise DataError("a user without new events cannot be trained; leave the user out")
        if self.weights is not None and len(self.weights) != len(self.tokens):
            raise DataError(f"{len(self.weights)} weights for {len(self.tokens)} events; give one an event, or none")

    def weight(self, row: int) -> float:
        """Return a row's weight."""
        return 1.0 / len(self.tokens) if self.weights is None else float(self.weights[row])


@dataclass(frozen=True)
class SlotBatch:
    """Groups of `len(batch) / len(owners)` neighbouring rows: group i is of user `owners[i]`; `weights [rows]`.

    `every`: group i is of user i for all users, so that nothing has to be gathered or scattered.
    """

    batch: Batch
    owners: Tensor
    weights: Tensor
    every: bool

    def to(self, device: torch.device) -> "SlotBatch":
        """Return the batch on a device."""
        return SlotBatch(self.batch.to(device), self.owners.to(device), self.weights.to(device), self.every)


@dataclass(frozen=True)
class Cost:
    """What a pass costs beside its tokens, in tokens: once a pass, and once for every group of rows in it."""

    each: float
    group: float
    budget: int
    """Most tokens in a pass."""


def divide(events: Sequence[UserEvents], *, pad: int, cost: Cost) -> list[SlotBatch]:
    """Divide the rows of users into batches of groups of one user's rows; rows of like length stand together.

    A user's last group is filled up with rows of weight zero, which add nothing to a gradient.
    """
    ordered = [np.argsort(-each.tokens.lengths, kind="stable") for each in events]
    lengths = [each.tokens.lengths[order] for each, order in zip(events, ordered, strict=True)]
    size = best_group(lengths, overhead=cost.group)
    owners = np.repeat(np.arange(len(events)), [-(-len(order) // size) for order in ordered])
    firsts = np.concatenate([np.arange(0, len(order), size) for order in ordered])
    longest = np.concatenate([own[::size] for own in lengths])
    found = buckets(longest, overhead=cost.each / size, budget=max(1, cost.budget // size))
    batches = []
    for places in map(np.sort, found):
        rows = [
            (events[owners[place]], ordered[owners[place]][firsts[place] : firsts[place] + size]) for place in places
        ]
        batches.append(_batch(rows, owners[places], size=size, pad=pad, users=len(events)))
    return batches


def _batch(groups: Sequence[tuple[UserEvents, Ints]], owners: Ints, *, size: int, pad: int, users: int) -> SlotBatch:
    filled = [row for events, rows in groups for row in _filled(events, rows, size)]
    batch = collate([(tokens, row) for tokens, row, _ in filled], pad=pad)
    weights = torch.tensor([weight for _, _, weight in filled], dtype=torch.float32)
    return SlotBatch(batch, torch.from_numpy(owners), weights, bool(np.array_equal(owners, np.arange(users))))


def _filled(events: UserEvents, rows: Ints, size: int) -> Iterator[tuple[Tokens, int, float]]:
    for row in rows.tolist():
        yield events.tokens, row, events.weight(row)
    for _ in range(size - len(rows)):
        yield events.tokens, int(rows[-1]), 0.0  # the shortest of the group: it widens nothing


def best_group(lengths: Sequence[Ints], *, overhead: float) -> int:
    """Return how many rows of a user should share a matrix product: the least padding and fewest groups.

    `lengths` are each user's rows, longest first; a group of g rows padded to T costs g T + `overhead` tokens.
    """
    counts = np.array([len(own) for own in lengths])
    sizes = sorted({int(-(-most // parts)) for most in np.unique(counts) for parts in range(1, int(most) + 1)})
    table = np.zeros((len(lengths), int(counts.max())))
    for place, own in zip(table, lengths, strict=True):
        place[: len(own)] = own
    costs = [_cost(table, size) + overhead * float((-(-counts // size)).sum()) for size in sizes]
    return sizes[int(np.argmin(costs))]


def _cost(table: NDArray[np.float64], size: int) -> float:
    return float(table[:, ::size].sum()) * size


def units(events: Sequence[UserEvents], *, budget: int) -> list[Ints]:
    """Divide users into units of about `budget` tokens that are trained apart: of like numbers of rows and lengths."""
    counts = np.array([len(each.tokens) for each in events], dtype=np.int64)
    longest = np.array([each.tokens.lengths.max() for each in events], dtype=np.int64)
    order = np.lexsort((longest, counts))
    loads = np.cumsum((counts * longest)[order])
    place = (loads - 1) // max(budget, 1)
    return [order[place == which] for which in np.unique(place)]


def tokens_of(events: Sequence[UserEvents]) -> int:
    """Return the tokens of all rows."""
    return int(sum(each.tokens.lengths.sum() for each in events))
