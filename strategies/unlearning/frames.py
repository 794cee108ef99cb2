"""Frames of unlearning slots: rows of one orthonormal frame given out in blocks, or O3's soft penalty.

O3 (Gao et al., 2407.10223) keeps the adapters of successive requests apart by a penalty on the overlap of their A's.
Here the A's of requests are disjoint blocks of the rows of one orthonormal frame, so that `A_i A_j^T = 0` holds by
construction, without training and without a weight to tune. The penalty is kept for the faithful variant.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lora.errors import ModelError
from lora.frame import Array, Frame, Site, Stream

WhenFull = Literal["share", "refuse"]


def halved_sum(terms: Array) -> Array:
    """Sum `[n, ...]` over the first axis by halves: the same rounding on every platform."""
    while len(terms) > 1:
        half = len(terms) // 2
        folded = terms[:half] + terms[half : 2 * half]
        terms = np.concatenate([folded, terms[2 * half :]])
    whole: Array = terms[0]
    return whole


@dataclass
class _Rows:
    """The orthonormal rows of one site that were needed so far, `[rows, d_in]`, and where new ones are drawn."""

    site: Site
    stream: Stream
    rows: Array

    def up_to(self, count: int) -> Array:
        """Return the first `count` rows, drawing those that are missing."""
        while len(self.rows) < count:
            fresh = halved_sum(self.stream.uniform(12, self.site.d_in))
            self.rows = np.vstack([self.rows, orthonormal(fresh, self.rows)])
        return self.rows[:count]


def orthonormal(row: Array, earlier: Array) -> Array:
    """Return `row [d]` less its part in the span of orthonormal rows `earlier [m, d]`, at length one.

    Gram-Schmidt, done twice ("twice is enough": Giraud et al., 2005), by exactly rounded operations in a fixed order.
    """
    for _ in range(2 if len(earlier) else 0):
        shares = halved_sum((earlier * row).T)
        row = row - halved_sum(earlier * shares[:, None])
    unit: Array = row / np.sqrt(halved_sum(row * row))
    return unit


@dataclass
class OrthogonalFrames:
    """One orthonormal frame a site, given out in blocks of `rank` rows: block j is the A `[rank, d_in]` of a request.

    Blocks depend on the seed and the sites only, never on the data, on which of them are in use, or on the platform.
    With `beside`, the frame of the users' slots, the blocks are orthogonal to its rows as well: what users learn reads
    other directions of the input than what requests forget. `blocks` of them fit (the narrowest site decides).
    """

    sites: Sequence[Site]
    rank: int
    seed: int = 0
    beside: Frame | None = None
    _drawn: dict[str, _Rows] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._drawn = {site.name: self._start(site) for site in self.sites}
        narrow = min(self.sites, key=lambda site: site.d_in)
        if self.blocks < 1:
            taken = f", {self.taken} of them the users'" if self.taken else ""
            raise ModelError(
                f"unlearning.rank={self.rank}: no block of so many orthogonal rows fits the width {narrow.d_in} of "
                f"'{narrow.name}'{taken}; give at most {narrow.d_in - self.taken}"
            )

    @property
    def taken(self) -> int:
        """Rows of every site that the users' frame spans."""
        return 0 if self.beside is None else self.beside.rank

    @property
    def blocks(self) -> int:
        """Requests that can have a block of their own."""
        return (min(site.d_in for site in self.sites) - self.taken) // self.rank

    def block(self, index: int) -> Frame:
        """Return block `index` of every site. Raises ModelError for a block that does not fit."""
        if not 0 <= index < self.blocks:
            raise ModelError(
                f"block {index} of the orthogonal frame does not exist: {self.blocks} blocks of unlearning.rank="
                f"{self.rank} rows fit; give 0 to {self.blocks - 1}, or lower unlearning.rank"
            )
        start = self.taken + index * self.rank
        whole = {name: drawn.up_to(start + self.rank) for name, drawn in self._drawn.items()}
        return Frame({name: torch.from_numpy(r[start:].astype(np.float32)) for name, r in whole.items()}, self.rank)

    def _start(self, site: Site) -> _Rows:
        rows: Array = np.zeros((0, site.d_in))
        if self.beside is not None:
            for row in self.beside.matrices[site.name].double().cpu().numpy():
                rows = np.vstack([rows, orthonormal(row, rows)])
        return _Rows(site, Stream(self.seed, f"unlearning/{site.name}"), rows)


def next_block(used: Sequence[int], *, blocks: int, when_full: WhenFull = "share") -> int:
    """Return the block of a new request, given those of the present requests.

    A free block, the lowest, while there is one. When all are used: `share` returns the block with the fewest requests
    (of equals the lowest), so that requests can go on for ever; each keeps its own B and gate, and only those that
    share a block overlap. `refuse` raises ModelError.
    """
    count = Counter(used)
    chosen = min(range(blocks), key=lambda block: (count[block], block))
    if count[chosen] and when_full == "refuse":
        raise ModelError(
            f"all {blocks} orthogonal blocks are used by {len(used)} requests; lower unlearning.rank, adapt wider "
            "matrices only, or set unlearning.when_full=share"
        )
    return chosen


Matrices = Mapping[str, Tensor]
"""A `[r, d_in]` of every site."""


def overlaps(frames: Sequence[Matrices]) -> Tensor:
    """Return the largest `|A_i A_j^T|_F` over the sites for all pairs, `[requests, requests]`; the diagonal is 0."""
    table = torch.zeros(len(frames), len(frames), dtype=torch.float64)
    for i, one in enumerate(frames):
        for j, other in enumerate(frames[:i]):
            largest = max(float((one[name].double() @ other[name].double().T).norm()) for name in one)
            table[i, j] = table[j, i] = largest
    return table


def overlap_penalty(current: Matrices, earlier: Sequence[Matrices], *, layers: int) -> Tensor:
    """Return O3's soft penalty: the sum over all earlier requests and all sites of `|A_prev A^T|_F^2`, over `layers`.

    As the released code, not the paper's formula, which has the immediate predecessor alone.
    """
    terms = [(before[name] @ a.T).square().sum() for before in earlier for name, a in current.items()]
    return torch.stack(terms).sum() / layers if terms else torch.zeros(())


def overlap_gradient(current: Matrices, earlier: Sequence[Matrices], *, layers: int) -> dict[str, Tensor]:
    """Return the gradient of `overlap_penalty` at every A: `2 A P / layers`, where P sums `A_prev^T A_prev`."""
    return {
        name: sum((2 / layers * (a @ before[name].T) @ before[name] for before in earlier), torch.zeros_like(a))
        for name, a in current.items()
    }
