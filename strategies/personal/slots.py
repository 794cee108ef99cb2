"""Users' slots: one row of a bank for every user, found by name, versioned and durable."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora.bank import Bank
from lora.codec import Layout
from lora.errors import DataError, WrongUpdate, nearest
from lora.gate import Gate
from lora.model import AdaptedModel
from strategies.personal.rows import NamedRows


@dataclass(frozen=True)
class ReadSlots:
    """Slots as they were at one instant: copies `values [users, size]`, and the version of each, `versions [users]`."""

    values: Tensor
    versions: tuple[int, ...]


class UserSlots:
    """A bank with one slot (flat B vector `[size]`, float32) for every user.

    **Guarantee**: writing or removing a user leaves every other user's slot as it was, bit for bit, and a kill at any
    instant leaves the old or the new state of every slot (`NamedRows`).

    | case | what happens |
    |---|---|
    | a user that is not known | DataError with the nearest name; never an answer of the base model |
    | a user that is added twice | DataError; nothing is added |
    | a user named twice in one write | DataError; nothing is written |
    | a vector of another length, NaN or infinity | WrongUpdate; nothing is written |
    | a slot that was written since it was read | DataError if `versions` are given; nothing is written |
    """

    def __init__(self, layout: Layout, *, frame: str, directory: Path | None = None) -> None:
        """Open or make the slots in `directory`, or some in memory only. `frame` is the frame's digest.

        Raises RunError for a directory that is in use, damaged, or of another layout or frame.
        """
        self.layout = layout
        self.rows = NamedRows(layout.size, kind=f"slots {layout.digest[:16]} {frame[:16]}", directory=directory)

    @classmethod
    def of(cls, adapted: AdaptedModel, directory: Path | None = None) -> "UserSlots":
        """Open or make the slots of a model's B's."""
        return cls(Layout(adapted.entries("B")), frame=adapted.frame.digest, directory=directory)

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, user: object) -> bool:
        return user in self.rows

    def names(self) -> tuple[str, ...]:
        """Return all users in alphabetical order."""
        return tuple(self.rows.names())

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot's numbers."""
        return 4 * self.layout.size

    @property
    def bank(self) -> Bank:
        """The bank that `gate` points into. Not to be written to; see `gate` for how long it holds."""
        return Bank(self.layout, self.rows.numbers.data)

    def version(self, user: str) -> int:
        """Return the version of a user's slot: it grows with every write. Raises DataError for an unknown user."""
        return self._found([user])[0][1]

    def gate(self, users: Sequence[str]) -> Gate:
        """Return the gate by which row i of a batch is answered by `users[i]`, over `bank`.

        Gate and bank hold until the next write or removal, which may reuse a row: threads that write while others
        answer use `read`. Raises DataError for an unknown user.
        """
        return Gate.rows(torch.tensor([row for row, _ in self._found(users)], dtype=torch.int64))

    def read(self, users: Sequence[str]) -> ReadSlots:
        """Return copies of some users' slots, and their versions. Raises DataError for an unknown user."""
        with self.rows.steady():
            found = self._found(users)
            return ReadSlots(self.rows.read([row for row, _ in found]), tuple(version for _, version in found))

    def add(self, users: Sequence[str], start: Tensor) -> int:
        """Add new users with a start vector `[size]` (the same for all) or one each `[users, size]`.

        Returns the version. Raises DataError for users that are known already, WrongUpdate for a wrong vector.
        """
        with self.rows.steady():
            known = [user for user in users if user in self.rows]
            if known:
                raise DataError(f"user '{known[0]}' has a slot already; write to it, or remove the user first")
            return self._write(users, start.expand(len(users), -1) if start.dim() == 1 else start)

    def write(self, users: Sequence[str], values: Tensor, *, versions: Sequence[int] | None = None) -> int:
        """Overwrite the slots of known users by `values [users, size]`; returns the new version, 0 for no users.

        With `versions`, as `read` gave them, a slot that was written meanwhile is refused. Raises DataError for an
        unknown or outdated user, WrongUpdate for a wrong vector; nothing is written then.
        """
        with self.rows.steady():
            found = self._found(users)
            expected = [version for _, version in found] if versions is None else versions
            for user, (_, now), then in zip(users, found, expected, strict=True):
                if now != then:
                    raise DataError(f"the slot of user '{user}' is at version {now}, not {then}; read it again")
            return self._write(users, values)

    def remove(self, users: Sequence[str]) -> None:
        """Remove users and overwrite their numbers. Raises DataError for an unknown user; nothing is removed then."""
        with self.rows.steady():
            self._found(users)
            self.rows.remove(users)

    def close(self) -> None:
        """Close the files; the slots are of no use afterwards."""
        self.rows.close()

    def _found(self, users: Sequence[str]) -> list[tuple[int, int]]:
        found = [(user, self.rows.find(user)) for user in users]
        for user, place in found:
            if place is None:
                hint = nearest(user, self.rows.near(user)) if len(self) else ""
                # Where nothing is near, all names would be listed: there may be very many.
                hint = hint if "did you mean" in hint else ""
                raise DataError(f"user '{user}' has no slot{hint}; add the user with a start vector first")
        return [place for _, place in found if place is not None]

    def _write(self, users: Sequence[str], values: Tensor) -> int:
        if not users:
            return 0
        if len(set(users)) != len(users):
            twice = next(user for user in users if list(users).count(user) > 1)
            raise DataError(f"user '{twice}' is named twice in one write; name every user once")
        if tuple(values.shape) != (len(users), self.layout.size):
            raise WrongUpdate(
                f"slots of shape {tuple(values.shape)}, expected {(len(users), self.layout.size)}: one row a user"
            )
        wrong = (~values.isfinite().all(1)).nonzero().flatten().tolist()
        if wrong:
            raise WrongUpdate(f"the vector of user '{users[wrong[0]]}' is not finite; its slot stays as it was")
        return self.rows.replace(users, values.detach().to("cpu", torch.float32))
