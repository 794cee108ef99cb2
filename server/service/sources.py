"""Sources of slots that live in this process's own bank, and several sources as one."""

from collections.abc import Callable, Sequence

import torch

from lora.errors import LetheError
from server.service.warm import Kept, Source
from strategies.personal.slots import UserSlots


class BankSource:
    """The slots of a `UserSlots`: every gather reads a steady copy, whatever is written meanwhile."""

    def __init__(self, slots: UserSlots) -> None:
        self.slots, self.layout = slots, slots.layout

    def kept(self, names: Sequence[str]) -> Kept:
        """Return copies of the slots of those names that are there."""
        with self.slots.rows.steady():
            found = {name: place for name in names if (place := self.slots.rows.find(name)) is not None}
            values = self.slots.rows.read([row for row, _ in found.values()])
            return Kept(tuple(found), values, tuple(version for _, version in found.values()))

    def versions(self, names: Sequence[str]) -> dict[str, int]:
        """Return the versions of those names that are there."""
        return {name: place[1] for name in names if (place := self.slots.rows.find(name)) is not None}

    def listen(self, listener: Callable[[Sequence[str]], None]) -> None:
        """Have every name told that is written or removed."""
        self.slots.rows.listen(listener)


class Sources:
    """Several sources of one layout, the first that has a name being the one that answers for it."""

    def __init__(self, *sources: Source) -> None:
        self.sources, self.layout = sources, sources[0].layout

    def kept(self, names: Sequence[str]) -> Kept:
        """Return copies of the slots of those names that are in any source."""
        found: list[Kept] = []
        faults: dict[str, LetheError] = {}
        left = [*names]
        for source in self.sources:
            found.append(source.kept(left))
            faults |= found[-1].faults
            there = {*found[-1].names}
            left = [name for name in left if name not in there]
        names = tuple(name for each in found for name in each.names)
        versions = tuple(version for each in found for version in each.versions)
        return Kept(names, torch.cat([each.values for each in found]), versions, faults)

    def versions(self, names: Sequence[str]) -> dict[str, int]:
        """Return the versions of those names that are in any source."""
        merged: dict[str, int] = {}
        for source in reversed(self.sources):
            merged |= source.versions(names)
        return merged

    def listen(self, listener: Callable[[Sequence[str]], None]) -> None:
        """Have every name told that any source replaces or removes."""
        for source in self.sources:
            source.listen(listener)
