"""Adapters: a row of the registry and a file of numbers each, which always agree."""

import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from sqlalchemy import select
from sqlalchemy.orm import Session
from torch import Tensor

from lora.codec import Layout
from lora.errors import DataError, LetheError, ModelError, RunError, Unknown, WrongUpdate
from lora.files import sync
from server.service.registry import Registry
from server.service.tables import AdapterRow
from server.service.warm import Kept, missing

log = logging.getLogger("lethe.service")

READY, QUARANTINED = "ready", "quarantined"
QUARANTINE = "quarantine"
_KEY = "slot"
_TRIES = 5
KNOWN = 100_000
"""Adapters whose rows are remembered."""


@dataclass(frozen=True)
class AdapterInfo:
    """What is known of an adapter without reading its file."""

    name: str
    owner: str | None
    version: int
    base: str
    layout: str
    rank: int
    state: str
    changed: float


@dataclass(frozen=True)
class NewAdapter:
    """An adapter to be written: a flat slot `[size]` of a layout, over a base by name."""

    name: str
    slot: Tensor
    layout: Layout
    base: str
    rank: int
    owner: str | None = None


@dataclass(frozen=True)
class _File:
    name: str
    digest: str


class Adapters:
    """Adapters by name, in `folder/adapters`; several processes may share the folder and the registry.

    **Guarantee**: a row that is committed names a file with that row's digest, after a kill at any instant: files are
    written aside, renamed, and only then named by a row; a file is removed only once no row names it.

    | case | what happens |
    |---|---|
    | a kill between file and row | the next `recover` removes the file |
    | a file that is missing or has another digest | quarantined: set aside, and named in the row's state |
    | a name that is written twice | the later version replaces the earlier, for readers from one gather to the next |
    | versions | count the changes of the registry: a name and a version mean one slot for ever |
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.folder = registry.folder / "adapters"
        (self.folder / QUARANTINE).mkdir(parents=True, exist_ok=True)
        self._listeners: list[Callable[[Sequence[str]], None]] = []
        self._known: dict[str, AdapterInfo | None] = {}
        self._age = 0

    def listen(self, listener: Callable[[Sequence[str]], None]) -> None:
        """Have names told that are written or removed by this process."""
        self._listeners.append(listener)

    def _tell(self, names: Sequence[str]) -> None:
        self.doubt()
        for listener in self._listeners:
            listener(names)

    # --- Reading ---

    def infos(self, *, owner: str | None = None, names: Sequence[str] | None = None) -> list[AdapterInfo]:
        """Return all adapters in the order of their names: one owner's, or those of given names."""
        asked = select(AdapterRow).order_by(AdapterRow.name)
        if owner is not None:
            asked = asked.where(AdapterRow.owner == owner)
        if names is not None:
            asked = asked.where(AdapterRow.name.in_(names))
        with self.registry.session() as session:
            return [_info(row) for row in session.scalars(asked)]

    def known(self, name: str) -> AdapterInfo | None:
        """Return one adapter, or None, as the registry had it since the last change that was heard of (`doubt`)."""
        if name in self._known:
            return self._known[name]
        age = self._age
        found = self.infos(names=[name])
        info = found[0] if found else None
        # What was read before a change that is heard of meanwhile is not kept.
        if age == self._age and len(self._known) < KNOWN:
            self._known[name] = info
        return info

    def remembers(self, name: str) -> bool:
        """Return whether `known` would answer without asking the registry."""
        return name in self._known

    def doubt(self) -> None:
        """Have `known` ask the registry again: it has changed."""
        self._age += 1
        self._known = {}

    def info(self, name: str) -> AdapterInfo:
        """Return one adapter. Raises Unknown."""
        found = self.infos(names=[name])
        if not found:
            raise missing(name)
        return found[0]

    def read(self, name: str) -> tuple[Tensor, AdapterInfo]:
        """Return an adapter's slot. Raises Unknown, or ModelError for one that is quarantined."""
        found = self.rows([name]).get(name)
        if found is None:
            raise missing(name)
        slot = self.slot(found)
        if isinstance(slot, LetheError):
            raise slot
        return slot, _info(found)

    def rows(self, names: Sequence[str]) -> dict[str, AdapterRow]:
        """Return the rows of those names that are there."""
        with self.registry.session() as session:
            found = session.scalars(select(AdapterRow).where(AdapterRow.name.in_(names)))
            return {row.name: row for row in found}

    def slot(self, row: AdapterRow) -> Tensor | LetheError:
        """Return the slot that a row names, or why it has none; a damaged file is quarantined."""
        if row.state == QUARANTINED:
            return _damaged(row.name)
        try:
            data = (self.folder / row.file).read_bytes()
        except FileNotFoundError:
            data = b""
        if hashlib.sha256(data).hexdigest() == row.digest:
            try:
                return load(data)[_KEY]
            except (SafetensorError, KeyError):
                pass
        return self._quarantine(row)

    def _quarantine(self, row: AdapterRow) -> LetheError:
        """Set a damaged file aside, unless the row has moved on meanwhile and another file is meant."""
        with self.registry.session() as session:
            now = session.get(AdapterRow, row.name, with_for_update=True)
            if now is None or now.file != row.file:
                return _Moved(f"'{row.name}' was replaced meanwhile; ask again")
            now.state = QUARANTINED
            self.registry.changed(session)
        log.error("adapter %r: its file %s is missing or damaged; it is quarantined", row.name, row.file)
        file = self.folder / row.file
        if file.exists():
            file.rename(self.folder / QUARANTINE / row.file)
        return _damaged(row.name)

    # --- Writing ---

    def write(self, *new: NewAdapter, replace: bool = True) -> int:
        """Write adapters, all or none; returns their version.

        Raises WrongUpdate for a slot that does not fit its layout or is not finite, DataError for a name that another
        owner has (or anybody, unless `replace`), RunError where the disk is full; then nothing has changed.
        """
        for each in new:
            _check(each)
        with self.registry.hold(alone=False):
            files = self._files(new)
            try:
                with self.registry.session() as session:
                    version = self.registry.changed(session)
                    old = [self._own(session, each, files[each.name], version, replace=replace) for each in new]
            except DataError:
                self._unlink([each.name for each in files.values()])
                raise
            # After any other error the row may be there all the same; `recover` sorts it out.
        self._tell([each.name for each in new])
        self._unlink([file for file in old if file is not None])
        return version

    def _files(self, new: Sequence[NewAdapter]) -> "dict[str, _File]":
        """Write every slot to a file of its own, durably; returns the files by the adapters' names."""
        written: dict[str, _File] = {}
        try:
            for each in new:
                data = save({_KEY: each.slot.detach().to("cpu", torch.float32).contiguous()})
                name = f"{uuid.uuid4().hex}.safetensors"
                self._put(name, data)
                written[each.name] = _File(name, hashlib.sha256(data).hexdigest())
            sync(self.folder)
        except OSError as error:
            self._unlink([each.name for each in written.values()])
            raise RunError(f"adapters cannot be written ({error.strerror}); make room on the disk") from error
        return written

    def _put(self, name: str, data: bytes) -> None:
        aside = self.folder / f".{name}"
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            aside.rename(self.folder / name)
        except OSError:
            aside.unlink(missing_ok=True)
            raise

    def _own(self, session: Session, new: NewAdapter, file: "_File", version: int, *, replace: bool) -> str | None:
        """Let a row name the new file; returns the file that it named before."""
        row = session.get(AdapterRow, new.name)
        if row is not None and (not replace or row.owner != new.owner):
            raise DataError(f"adapter '{new.name}' is there already; delete it first, or choose another name")
        old = None if row is None else row.file
        session.merge(
            AdapterRow(
                name=new.name, owner=new.owner, version=version, file=file.name, digest=file.digest, base=new.base,
                layout=new.layout.digest, rank=new.rank, state=READY, changed=time.time(),
            )
        )  # fmt: skip
        return old

    def remove(self, *names: str) -> None:
        """Remove adapters and their files, all or none. Raises Unknown."""
        with self.registry.hold(alone=False):
            with self.registry.session() as session:
                self.registry.changed(session)
                files = [self._gone(session, name) for name in names]
            self._tell(names)
            self._unlink(files)

    def _gone(self, session: Session, name: str) -> str:
        row = session.get(AdapterRow, name)
        if row is None:
            raise missing(name)
        session.delete(row)
        return row.file

    def _unlink(self, files: Sequence[str]) -> None:
        for file in files:
            (self.folder / file).unlink(missing_ok=True)
            (self.folder / QUARANTINE / file).unlink(missing_ok=True)

    # --- After a kill ---

    def recover(self) -> tuple[int, list[str]]:
        """Remove files that no row names and quarantine damaged ones; returns how many, and the names of these."""
        with self.registry.hold(alone=True), self.registry.session() as session:
            named = {row.file: row for row in session.scalars(select(AdapterRow))}
            strays = [file.name for file in self._found() if file.name not in named]
            self._unlink(strays)
        damaged = [row.name for row in named.values() if row.state == READY and not isinstance(self.slot(row), Tensor)]
        return len(strays), sorted(damaged)

    def _found(self) -> Iterator[Path]:
        for folder in (self.folder, self.folder / QUARANTINE):
            yield from (file for file in folder.iterdir() if file.is_file())


class RegistrySource:
    """The registry's adapters of one layout, as `WarmSlots` asks for them."""

    def __init__(self, adapters: Adapters, layout: Layout) -> None:
        self.adapters, self.layout = adapters, layout

    def kept(self, names: Sequence[str]) -> Kept:
        """Return the slots of those names that are there; why others have none is in `faults`."""
        slots: dict[str, tuple[Tensor, int]] = {}
        faults: dict[str, LetheError] = {}
        left = [*names]
        for _ in range(_TRIES):
            # A file that was replaced after its row was read is not there: the row is read again.
            left = [name for name in self._take(left, slots, faults)]
            if not left:
                break
        values = torch.stack([slot for slot, _ in slots.values()]) if slots else torch.empty(0, self.layout.size)
        return Kept(tuple(slots), values, tuple(version for _, version in slots.values()), faults)

    def _take(
        self, names: Sequence[str], slots: dict[str, tuple[Tensor, int]], faults: dict[str, LetheError]
    ) -> Iterator[str]:
        """Sort names by what there is of them; yields those that moved on meanwhile."""
        for name, row in self.adapters.rows(names).items():
            faults.pop(name, None)
            slot = self.adapters.slot(row) if row.layout == self.layout.digest else _foreign(name)
            if isinstance(slot, Tensor):
                slots[name] = slot, row.version
                continue
            faults[name] = slot
            if isinstance(slot, _Moved):
                yield name

    def versions(self, names: Sequence[str]) -> dict[str, int]:
        """Return the versions of those names that can answer."""
        found = self.adapters.rows(names).values()
        return {row.name: row.version for row in found if row.state == READY and row.layout == self.layout.digest}

    def listen(self, listener: Callable[[Sequence[str]], None]) -> None:
        """Have every name told that this process writes or removes."""
        self.adapters.listen(listener)


class _Moved(Unknown):
    """The row names another file now."""


def _info(row: AdapterRow) -> AdapterInfo:
    return AdapterInfo(row.name, row.owner, row.version, row.base, row.layout, row.rank, row.state, row.changed)


def _check(new: NewAdapter) -> None:
    if tuple(new.slot.shape) != (new.layout.size,):
        raise WrongUpdate(f"adapter '{new.name}' has shape {tuple(new.slot.shape)}, not ({new.layout.size},)")
    if not bool(new.slot.isfinite().all()):
        raise WrongUpdate(f"adapter '{new.name}' is not finite; nothing was written")


def _damaged(name: str) -> ModelError:
    return ModelError(f"the file of adapter '{name}' is damaged and was set aside; import the adapter again")


def _foreign(name: str) -> ModelError:
    return ModelError(f"adapter '{name}' is of another base or rank than the model that is served; import one of it")
