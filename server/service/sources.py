"""Sources of slots that live in this process's own bank."""

from collections.abc import Callable, Sequence

import torch

from server.service.warm import Kept
from strategies.personal.slots import UserSlots


class BankSource:
    """The slots of a `UserSlots`: every gather reads a steady copy, whatever is written meanwhile."""

    def __init__(self, slots: UserSlots) -> None:
        self.slots, self.layout = slots, slots.layout

    def kept(self, names: Sequence[str]) -> Kept:
        """Return copies of the slots of those names that are there."""
        with self.slots.rows.steady() as data:
            found = {name: place for name in names if (place := self.slots.rows.find(name)) is not None}
            rows = torch.tensor([row for row, _ in found.values()], dtype=torch.int64)
            return Kept(tuple(found), data.index_select(0, rows), tuple(version for _, version in found.values()))

    def versions(self, names: Sequence[str]) -> dict[str, int]:
        """Return the versions of those names that are there."""
        return {name: place[1] for name in names if (place := self.slots.rows.find(name)) is not None}

    def listen(self, listener: Callable[[Sequence[str]], None]) -> None:
        """Have every name told that is written or removed."""
        self.slots.rows.listen(listener)
