"""Slots lent out of warm memory: what a pass reads of them is copied block by block, when the model comes to it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora.codec import Layout, Part, Turned
from lora.errors import LetheError
from lora.model import Blocks

Key = tuple[Part, str]


@dataclass(frozen=True, eq=False)
class Lent:
    """Slots by place: place i is row `rows[i]` of `data [rows, size]`, or `extra[i] [size]` where memory has it not.

    Copies have the precision of where they are put. Nobody writes to these rows while they are lent.
    """

    data: Tensor
    rows: Tensor
    versions: Sequence[int | LetheError]
    """The version at each place (0: the base model), or why there is none."""
    extra: Mapping[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Tensor) -> "Lent":
        """Lend `values [places, size]` themselves."""
        return cls(values, torch.arange(len(values), device=values.device), (1,) * len(values))

    def part(self, places: slice | Sequence[int]) -> "Lent":
        """Return some of the places, counted anew."""
        chosen = [*range(*places.indices(len(self.rows)))] if isinstance(places, slice) else [*places]
        own = torch.tensor(chosen, dtype=torch.int64, device=self.rows.device)
        extra = {new: self.extra[old] for new, old in enumerate(chosen) if old in self.extra}
        return Lent(self.data, self.rows[own], [self.versions[old] for old in chosen], extra)

    def copy(self, columns: slice, out: Tensor) -> None:
        """Copy some columns of all places into `out [places, columns]`."""
        if self.data.dtype == out.dtype:
            torch.index_select(self.data[:, columns], 0, self.rows, out=out)
        else:
            out.copy_(self.data[:, columns].index_select(0, self.rows))
        for place, value in self.extra.items():
            out[place].copy_(value[columns])

    def one(self, place: int) -> Tensor:
        """Return a place's slot `[size]`, float32; memory itself where it can be."""
        return self.extra[place] if place in self.extra else self.data[int(self.rows[place])].float()


class Desk:
    """Where the blocks of a pass lie while the model reads them; it is kept, since fresh memory costs more than a copy.

    Sites whose blocks are equally large take the same place, one after the other: a block that was copied just before
    its product is still in the processor's cache. On a GPU all blocks are copied at once instead. A and B get the
    base's precision `dtype`, a head stays float32.
    """

    def __init__(self, layout: Turned, *, dtype: torch.dtype = torch.float32) -> None:
        self.layout, self.dtype = layout, dtype
        self._places: dict[object, Tensor] = {}

    def blocks(self, lent: Lent, *, alone: bool = False) -> Blocks:
        """Return the blocks of what is lent, one a place, or those of the first place for all rows (`alone`).

        They are for one pass that reads them site by site, while the slots are lent.
        """
        if alone:
            return self.layout.views(lent.one(0))
        if lent.data.device.type == "cpu":
            return Laid(self, lent)
        whole = torch.empty(len(lent.rows), self.layout.layout.size, device=lent.data.device)
        lent.copy(slice(None), whole)
        found = self.layout.views(whole)
        if self.dtype == whole.dtype:
            return found
        return {
            key: found[key] if key[0] == "head" else own for key, own in self.layout.views(whole.to(self.dtype)).items()
        }

    def place(self, key: Key, rows: int, width: int) -> Tensor:
        """Return a kept place for a block, `[rows, width]`."""
        # A head's parts are read together, and so are A and B of a site.
        kind = key if key[0] == "head" else (key[0], width)
        found = self._places.get(kind)
        if found is None or len(found) < rows:
            dtype = torch.float32 if key[0] == "head" else self.dtype
            found = self._places[kind] = torch.empty(rows, width, dtype=dtype)
        return found[:rows]


class Laid(Mapping[Key, Tensor]):
    """Blocks that are copied when they are asked for: the next of the same kind and size overwrites one."""

    def __init__(self, desk: Desk, lent: Lent) -> None:
        self._desk, self._lent, self._layout = desk, lent, desk.layout

    def __getitem__(self, key: Key) -> Tensor:
        """Copy a block, `[places, *shape]`."""
        columns = self._layout.layout.slices[key]
        place = self._desk.place(key, len(self._lent.rows), columns.stop - columns.start)
        self._lent.copy(columns, place)
        return self._layout.block(key, place)

    def __contains__(self, key: object) -> bool:
        return key in self._layout.layout.slices

    def __iter__(self) -> Iterator[Key]:
        return iter(self._layout.layout.slices)

    def __len__(self) -> int:
        return len(self._layout.layout.slices)


class Columns:
    """Copies of slots, `rows` of them, block by block: `[rows, width]` each lies in one piece, and is read in one.

    They have the base's precision `dtype`.
    """

    def __init__(
        self,
        layout: Layout | Turned,
        *,
        rows: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._layout, self.rows = layout, rows
        whole = layout.layout if isinstance(layout, Turned) else layout
        self._columns = whole.slices
        self._blocks = {
            key: torch.zeros(rows, each.stop - each.start, device=device, dtype=dtype)
            for key, each in whole.slices.items()
        }
        self._views: dict[tuple[int, int], Blocks] = {}

    def write(self, first: int, lent: Lent) -> None:
        """Copy what is lent to the rows from `first` on."""
        for key, block in self._blocks.items():
            lent.copy(self._columns[key], block[first : first + len(lent.rows)])

    def select(self, rows: Sequence[int], *, of: int) -> None:
        """Make some of the first `of` rows the first ones, in that order, and overwrite the others with zeros."""
        for block in self._blocks.values():
            block[: len(rows)] = block[torch.tensor(rows, dtype=torch.int64, device=block.device)]
            block[len(rows) : of] = 0

    def views(self, rows: slice) -> Blocks:
        """Return the blocks of some rows; a step is too short to cut them anew."""
        key = rows.start, rows.stop
        if key not in self._views:
            self._views[key] = {each: self._layout.block(each, block[rows]) for each, block in self._blocks.items()}
        return self._views[key]
