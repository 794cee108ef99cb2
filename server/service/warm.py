"""Warm slots: those of users who were asked for lately, in memory beside the model; the others stay where they are."""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lora.codec import Layout, Turned
from lora.errors import ConfigError, LetheError, Unknown
from server.service.lent import Lent


@dataclass(frozen=True)
class Kept:
    """Slots as a source has them: `values [found, size]`, `versions [found]`, for the names that it found, in order."""

    names: tuple[str, ...]
    values: Tensor
    versions: tuple[int, ...]
    faults: "dict[str, LetheError]" = field(default_factory=dict)
    """Why a name has no slot, where there is more to say than that it is not there."""


@dataclass(frozen=True)
class Warm:
    """How many slots are kept in memory, in what numbers, and whose are there to stay."""

    rows: int = 4096
    dtype: torch.dtype = torch.float32
    pinned: tuple[str, ...] = ()


class Source(Protocol):
    """Where all slots are kept: a memory-mapped bank, or a folder of files with a registry."""

    layout: Layout

    def kept(self, names: Sequence[str]) -> Kept:
        """Return copies of the slots of those names that are there; a name that is not is left out."""
        ...

    def versions(self, names: Sequence[str]) -> dict[str, int]:
        """Return the versions of those names that are there."""
        ...

    def listen(self, listener: Callable[[Sequence[str]], None]) -> None:
        """Have every name told that is replaced or removed here, before the call that does it returns."""
        ...


@dataclass
class _Entry:
    row: int
    version: int
    checked: int


@dataclass(eq=False)
class _Read:
    """A fetch on its way: the names whose copies will still be of use."""

    epoch: int
    names: set[str]


@dataclass
class Traffic:
    """What came from memory and what had to be fetched."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class WarmSlots:
    """A source's slots with the latest used ones in memory: `rows` of them, float32 or bfloat16, on the model's device.

    **Guarantee**: `gather` returns for every name the slot and the version that the source had at some instant between
    the call and its return, never another name's.

    | case | answer |
    |---|---|
    | None in place of a name | zeros, or what `answer_blank` was given; version 0: the base model |
    | a name that the source lacks | Unknown, in its place; the other rows are gathered |
    | a name that was written or removed meanwhile | the new slot at the next gather |
    | more names in a batch than rows | those beyond come from the source, none is evicted twice |
    | a name that is written or removed while it is lent | the pass reads the old numbers, overwritten when it ends |
    | `doubt` (another process may have written) | every version is compared with the source's at its next use |
    | a pinned name | stays until unpinned or removed |
    """

    def __init__(
        self,
        source: Source,
        *,
        rows: int = 4096,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        if rows < 1:
            raise ConfigError(f"warm rows {rows}: at least 1 is needed")
        self.source, self.rows, self.layout = source, rows, source.layout
        self.data = torch.zeros(rows, self.layout.size, dtype=dtype, device=device)
        self.traffic = Traffic()
        self.turned = Turned(self.layout)
        """How the numbers lie in what `gather` fills: `turned.views` has their blocks."""
        self._blank = torch.zeros(self.layout.size, device=device)
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._free: list[int] = [*range(rows - 1, -1, -1)]
        self._pinned: set[str] = set()
        self._reads: list[_Read] = []
        self._used: Counter[int] = Counter()
        self._dropped: set[int] = set()
        self._epoch = 0
        source.listen(self.drop)

    def __len__(self) -> int:
        return len(self._entries)

    def answer_blank(self, values: Tensor) -> None:
        """Have `values [size]` answer where no adapter is asked for."""
        self._blank = self.turned.turned(values).to(self.data.device)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def buffer(self, rows: int) -> Tensor:
        """Return a buffer for `gather`, `[rows, size]`, float32."""
        return torch.zeros(rows, self.layout.size, device=self.data.device)

    def gather(self, names: Sequence[str | None], out: Tensor) -> list[int | LetheError]:
        """Fill `out [>= names, size]` with a slot for every name, turned; returns versions, or why a row has none."""
        with self.lent(names) as lent:
            lent.copy(slice(None), out[: len(names)])
        return [*lent.versions]

    @contextmanager
    def lent(self, names: Sequence[str | None]) -> Iterator[Lent]:
        """Lend the slots of all names, turned, for the block: meanwhile nobody writes to the rows they are in."""
        lent, rows = self._lend(names)
        try:
            yield lent
        finally:
            self._take_back(rows)

    def _lend(self, names: Sequence[str | None]) -> tuple[Lent, list[int]]:
        distinct = [*dict.fromkeys(name for name in names if name is not None)]
        self._check(distinct)
        fetched: dict[str, tuple[Tensor, int] | LetheError] = {}
        first = True
        while True:
            with self._lock:
                wanted = [name for name in distinct if name not in self._entries and name not in fetched]
                if first:
                    self.traffic.hits += len(distinct) - len(wanted)
                    self.traffic.misses += len(wanted)
                if not wanted:
                    return self._found(names, fetched)
                read = _Read(self._epoch, set(wanted))
                self._reads.append(read)
            first = False
            fetched |= self._fetch(wanted, read, keep=set(distinct))

    def pin(self, name: str) -> None:
        """Keep a name in memory. Raises Unknown for one that is not there, ConfigError where every row is pinned."""
        self._reserve(name)
        (version,) = self.gather([name], self.buffer(1))
        if isinstance(version, LetheError):
            self.unpin(name)
            raise version

    def hold(self, names: Sequence[str]) -> None:
        """Pin names that may not be there yet, fetching those that are. Raises ConfigError where rows run out."""
        there = self.source.versions(names)
        for name in names:
            if name in there:
                self.pin(name)
            else:
                self._reserve(name)

    def _reserve(self, name: str) -> None:
        with self._lock:
            if len(self._pinned | {name}) > max(1, self.rows - 1):
                raise ConfigError(f"{len(self._pinned)} of {self.rows} warm rows are pinned; unpin one, or have more")
            self._pinned.add(name)

    def unpin(self, name: str) -> None:
        """Let a name be evicted again."""
        with self._lock:
            self._pinned.discard(name)

    def drop(self, names: Sequence[str]) -> None:
        """Forget copies: their rows are overwritten with zeros."""
        with self._lock:
            for read in self._reads:
                read.names.difference_update(names)
            for name in names:
                entry = self._entries.pop(name, None)
                if entry is None:
                    continue
                if self._used[entry.row]:
                    self._dropped.add(entry.row)
                else:
                    self._clear(entry.row)

    def _clear(self, row: int) -> None:
        self.data[row].zero_()
        self._free.append(row)

    def _take_back(self, rows: Sequence[int]) -> None:
        with self._lock:
            self._used.subtract(rows)
            for row in {*rows}:
                if not self._used[row]:
                    del self._used[row]
                    if row in self._dropped:
                        self._dropped.remove(row)
                        self._clear(row)

    def doubt(self) -> None:
        """Compare every version with the source's before it is used again."""
        with self._lock:
            self._epoch += 1

    def _check(self, names: Sequence[str]) -> None:
        """Ask the source for the versions of what is in doubt."""
        with self._lock:
            epoch = self._epoch
            doubted = [name for name in names if name in self._entries and self._entries[name].checked != epoch]
        if not doubted:
            return
        versions = self.source.versions(doubted)
        self.drop([name for name in doubted if self._version(name) != versions.get(name)])
        with self._lock:
            for name in doubted:
                if name in self._entries:
                    self._entries[name].checked = epoch

    def _version(self, name: str) -> int | None:
        entry = self._entries.get(name)
        return None if entry is None else entry.version

    def _fetch(
        self, names: Sequence[str], read: "_Read", *, keep: set[str]
    ) -> dict[str, tuple[Tensor, int] | LetheError]:
        """Ask the source, and keep what was not written to meanwhile: such a copy serves this batch only."""
        try:
            found = self.source.kept(names)
        except BaseException:
            with self._lock:
                self._reads.remove(read)
            raise
        fetched: dict[str, tuple[Tensor, int] | LetheError] = {}
        for name in names:
            fetched[name] = found.faults.get(name) or missing(name)
        values = self.turned.turned(found.values).to(self.data.device)
        with self._lock:
            self._reads.remove(read)
            for name, value, version in zip(found.names, values, found.versions, strict=True):
                fetched[name] = value, version
                row = self._room(keep) if name in read.names and name not in self._entries else None
                if row is not None:
                    self.data[row].copy_(value)
                    self._entries[name] = _Entry(row, version, read.epoch)
        return fetched

    def _room(self, keep: set[str]) -> int | None:
        if self._free:
            return self._free.pop()
        for name, entry in self._entries.items():
            if name not in self._pinned and name not in keep and not self._used[entry.row]:
                del self._entries[name]
                self.traffic.evictions += 1
                return entry.row
        return None

    def _found(
        self, names: Sequence[str | None], fetched: Mapping[str, tuple[Tensor, int] | LetheError]
    ) -> tuple[Lent, list[int]]:
        """Return what is lent, and the rows that are in use for it."""
        rows, versions, extra = [0] * len(names), list[int | LetheError](), dict[int, Tensor]()
        used: list[int] = []
        for place, name in enumerate(names):
            entry = None if name is None else self._entries.get(name)
            if name is not None and entry is not None:
                self._entries.move_to_end(name)
                rows[place] = entry.row
                used.append(entry.row)
                versions.append(entry.version)
            else:
                version, extra[place] = self._elsewhere(None if name is None else fetched[name])
                versions.append(version)
        self._used.update(used)
        return Lent(self.data, torch.tensor(rows, dtype=torch.int64, device=self.data.device), versions, extra), used

    def _elsewhere(self, found: tuple[Tensor, int] | LetheError | None) -> tuple[int | LetheError, Tensor]:
        """Return version and slot of what was fetched and not kept, or of the base model."""
        if isinstance(found, tuple):
            return found[1], found[0]
        return 0 if found is None else found, self._blank


def missing(name: str) -> Unknown:
    """Return the error for a name without a slot; it names no other name, which may be somebody else's."""
    return Unknown(f"'{name}' has no adapter here; import one under that name, or observe events of that user first")
