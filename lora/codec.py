"""The flat codec: everything that trains or travels is one float32 vector with a layout of named parts."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from lora.errors import WrongUpdate

Part = Literal["A", "B", "head"]


@dataclass(frozen=True)
class Entry:
    """One named block of the vector, `shape` row-major."""

    part: Part
    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Numbers in the block."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Order, names and shapes of a flat vector `[size]` (or of a bank of them, `[slots, size]`).

    The entries of one part stand side by side, so that a part is one slice and travels without a copy. A layout that
    breaks this, or names a block twice, is refused with a ValueError.
    """

    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        kinds = [kind for kind, _ in groupby(entry.part for entry in self.entries)]
        if len(kinds) != len(set(kinds)):
            raise ValueError(f"the entries of a part must stand side by side, not {' '.join(kinds)}")
        if len({(entry.part, entry.name) for entry in self.entries}) != len(self.entries):
            raise ValueError("a layout names every block once")

    @cached_property
    def slices(self) -> dict[tuple[Part, str], slice]:
        """Where every block lies."""
        found, start = {}, 0
        for entry in self.entries:
            found[entry.part, entry.name] = slice(start, start + entry.size)
            start += entry.size
        return found

    @cached_property
    def size(self) -> int:
        """Length of the vector."""
        return sum(entry.size for entry in self.entries)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The parts of this layout, in order."""
        return tuple(dict.fromkeys(entry.part for entry in self.entries))

    def span(self, part: Part) -> slice:
        """Return the slice that a part covers; empty for a part that the layout lacks."""
        own = [self.slices[entry.part, entry.name] for entry in self.entries if entry.part == part]
        return slice(own[0].start, own[-1].stop) if own else slice(0, 0)

    def length(self, parts: Iterable[Part]) -> int:
        """Numbers in the given parts."""
        wanted = set(parts)
        return sum(entry.size for entry in self.entries if entry.part in wanted)

    def views(self, flat: Tensor) -> dict[tuple[Part, str], Tensor]:
        """Return every block of `flat [..., size]` as a view `[..., *shape]`."""
        return {key: self.block(key, flat[..., columns]) for key, columns in self.slices.items()}

    def block(self, key: tuple[Part, str], numbers: Tensor) -> Tensor:
        """Return the numbers of one block, `[..., entry size]`, as a view `[..., *shape]`."""
        return numbers.view((*numbers.shape[:-1], *self._shapes[key]))

    @cached_property
    def _shapes(self) -> dict[tuple[Part, str], tuple[int, ...]]:
        return {(entry.part, entry.name): entry.shape for entry in self.entries}

    def select(self, flat: Tensor, parts: Sequence[Part]) -> Tensor:
        """Return the given parts of `flat [..., size]`, concatenated in layout order."""
        spans = [self.span(part) for part in self.parts if part in parts]
        if not spans:
            return flat[..., :0]
        return flat[..., spans[0]] if len(spans) == 1 else torch.cat([flat[..., span] for span in spans], dim=-1)

    def insert(self, flat: Tensor, parts: Sequence[Part], values: Tensor) -> None:
        """Write `values [..., length(parts)]` into those parts of `flat`, in place.

        Raises WrongUpdate if the length differs.
        """
        expected = self.length(parts)
        if values.shape[-1] != expected:
            raise WrongUpdate(f"vector of {values.shape[-1]} numbers, expected {expected} for parts {list(parts)}")
        start = 0
        for part in self.parts:
            if part in parts:
                span = self.span(part)
                stop = start + span.stop - span.start
                flat[..., span] = values[..., start:stop]
                start = stop

    def subset(self, parts: Sequence[Part]) -> "Layout":
        """Return the layout of the given parts alone."""
        return Layout(tuple(entry for entry in self.entries if entry.part in parts))

    @cached_property
    def digest(self) -> str:
        """Fingerprint of names, shapes and order (sha256, hex)."""
        rows = [[entry.part, entry.name, list(entry.shape)] for entry in self.entries]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Turned:
    """A layout's numbers with every B stored as its transpose, `[r, d_out]`: as answering reads it fastest.

    Batches of a few tokens a row are all overhead otherwise: a product with a B that lies the other way takes up to
    three times as long.
    """

    layout: Layout

    def turned(self, flat: Tensor) -> Tensor:
        """Return a copy of `flat [..., size]`, turned."""
        return flat.index_select(-1, self._order.to(flat.device))

    @cached_property
    def _order(self) -> Tensor:
        """Where each number of the turned vector lies in the other."""
        places = torch.arange(self.layout.size)
        blocks = self.layout.views(places)
        return torch.cat(
            [
                (blocks[each.part, each.name].mT if each.part == "B" else blocks[each.part, each.name]).flatten()
                for each in self.layout.entries
            ]
        )

    def views(self, flat: Tensor) -> dict[tuple[Part, str], Tensor]:
        """Return every block of turned `flat [..., size]` as a view `[..., *shape]`, like `Layout.views`."""
        return {key: self.block(key, flat[..., columns]) for key, columns in self.layout.slices.items()}

    def block(self, key: tuple[Part, str], numbers: Tensor) -> Tensor:
        """Return the numbers of one block, like `Layout.block`."""
        if key[0] != "B":
            return self.layout.block(key, numbers)
        return numbers.view((*numbers.shape[:-1], *self._shapes[key])).mT

    @cached_property
    def _shapes(self) -> dict[tuple[Part, str], tuple[int, ...]]:
        return {(each.part, each.name): each.shape[::-1] for each in self.layout.entries}
