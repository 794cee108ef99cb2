"""The list of adapters: users' own, which follow from events, and those that were brought."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from server.service.adapters import READY, AdapterInfo
from server.service.identity import Caller
from server.service.service import Service
from server.service.sources import BankSource

PAGE = 50
"""Rows of a page."""


@dataclass(frozen=True)
class AdapterShown:
    """An adapter as the list shows it."""

    name: str
    owner: str | None
    version: int
    base: str
    rank: int
    size: int | None
    """Bytes of its numbers, as kept; None where the file is gone."""
    digest: str
    """SHA-256 of what is kept."""
    kind: str
    exports: bool
    state: str = READY


@dataclass(frozen=True)
class Shelf:
    """A page of the list, and how many adapters there are."""

    adapters: tuple[AdapterShown, ...]
    count: int


def shelf(service: Service, caller: Caller, *, first: int = 0) -> Shelf:
    """Return the adapters that the caller may know of, users' own first: `PAGE` of them from `first` on."""
    own = _users(service, caller)
    brought = [info for info in service.infos(caller) if not _follows(service, info)]
    names = own[first : first + PAGE]
    start = max(0, first - len(own))
    infos = brought[start : start + PAGE - len(names)]
    shown = [*_slots(service, caller, names), *_brought(service, caller, infos)]
    return Shelf(tuple(shown), len(own) + len(brought))


def _users(service: Service, caller: Caller) -> list[str]:
    """Return the users whose slots the caller may know of."""
    if service.users is None:
        return []
    if caller.role == "user":
        return [name for name in (caller.owner,) if name is not None and name in service.users]
    return service.users.names()


def _follows(service: Service, info: AdapterInfo) -> bool:
    people = service.users
    return people is not None and info.name in people and info.layout == people.slots.layout.digest


def named(base: str) -> str:
    """Return a base model's name; of one that is a folder here, only the end of its path."""
    path = PurePath(base)
    return "/".join(path.parts[-2:]) if path.is_absolute() else base


def _slots(service: Service, caller: Caller, names: Sequence[str]) -> list[AdapterShown]:
    people = service.users
    if people is None or not names:
        return []
    adapted, served = people.personal.adapted, service.writer and service.served[service.writer.name]
    exports = bool(served and served.layout.digest == people.slots.layout.digest) and caller.role != "auditor"
    kept = BankSource(people.slots).kept(names)
    return [
        AdapterShown(
            name, name, version, named(people.personal.base.reference), adapted.frame.rank, people.slots.slot_bytes,
            hashlib.sha256(slot.numpy().tobytes()).hexdigest(), "follows from events", exports,
        )
        for name, slot, version in zip(kept.names, kept.values, kept.versions, strict=True)
    ]  # fmt: skip


def _brought(service: Service, caller: Caller, infos: Sequence[AdapterInfo]) -> list[AdapterShown]:
    rows = service.adapters.rows([info.name for info in infos])
    layouts = {served.layout.digest for served in service.served.values()}
    found = []
    for info in infos:
        row = rows.get(info.name)
        file = None if row is None else service.adapters.folder / row.file
        size = file.stat().st_size if file is not None and file.is_file() else None
        exports = info.layout in layouts and info.state == READY and caller.role != "auditor"
        found.append(
            AdapterShown(info.name, info.owner, info.version, named(info.base), info.rank, size,
                         "" if row is None else row.digest, "imported", exports, info.state)
        )  # fmt: skip
    return found
