"""Users deleted from their files without the model that serves them, and what proves that they are gone."""

import hashlib
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Self

import numpy as np

from lora.errors import DataError, RunError, nearest
from strategies.personal.histories import EVENTS, Histories, State
from strategies.personal.lifelong import LifelongUsers
from strategies.personal.rows import INDEX, NamedRows
from tasks.recommendation.interactions import Interactions, Items

SLOTS = "slots"
_PIECE = 32
"""Bytes of a slot that are searched for: eight numbers that are not zero."""


class StoredUsers:
    """The directory of `LifelongUsers`, opened to find, delete and search for users; held by one process at a time.

    **Guarantee**: when `forget` returns, no file of the directory holds the user's name, events or slot, and every
    other user's are as they were, bit for bit; a kill meanwhile is made good when the directory is opened the next
    time, here or by `LifelongUsers`.
    """

    _served: LifelongUsers | None

    def __init__(self, directory: Path) -> None:
        """Open a directory. Raises RunError where there are no users, or another process holds it."""
        self.directory, self._served = directory, None
        if not is_users(directory):
            raise RunError(f"{directory} holds no users ({EVENTS} and {SLOTS}/{INDEX}); name the directory they are in")
        width = int(str(_noted(directory / SLOTS / INDEX, "width")))
        self.rows = NamedRows(width, kind=str(_noted(directory / SLOTS / INDEX, "kind")), directory=directory / SLOTS)
        try:
            self.histories = Histories(_no_terms(), kind=str(_noted(directory / EVENTS, "kind")), directory=directory)
            self._finish()
        except BaseException:
            self.rows.close()
            raise

    @classmethod
    def serving(cls, users: LifelongUsers, directory: Path) -> Self:
        """Return the same over users that this process serves; they stay open."""
        one = cls.__new__(cls)
        one.directory, one.rows, one.histories, one._served = directory, users.slots.rows, users.histories, users
        return one

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._served is None:
            self.histories.close()
            self.rows.close()

    def __contains__(self, user: object) -> bool:
        return user in self.histories

    def check(self, user: str) -> None:
        """Raise DataError with the nearest name for a user that is not there."""
        if user not in self:
            close = nearest(user, self.histories.names()[:20_000])
            close = close if "did you mean" in close else f"; there are {len(self.histories)}"
            raise DataError(f"user '{user}' is not known{close}")

    def forget(self, user: str) -> None:
        """Delete a user's slot, history and name, durably; nothing happens for one who is not there."""
        if self._served is not None:
            if user in self:
                self._served.forget(user)
            return
        if user in self:
            self.histories.move([user], State.LEAVING)
        self._finish()

    def events(self, user: str) -> int:
        """Return how many events of a user there are."""
        return self.histories.events(user)

    def pieces(self, user: str) -> list[bytes]:
        """Return what to look for when the user is gone: the name, and a piece of the slot where it has one."""
        found = [user.encode()]
        place = self.rows.find(user)
        if place is not None:
            with self.rows.steady() as data:
                numbers = data[place[0]].numpy()
                kept = numbers[np.flatnonzero(numbers)[: _PIECE // 4]]
                alike = (data[:, np.flatnonzero(numbers)[: _PIECE // 4]].numpy() == kept).all(1).sum()
            # A slot that another user has as well, such as one without events, tells nothing.
            if 4 * len(kept) == _PIECE and alike == 1:
                found.append(kept.tobytes())
        return found

    def others(self, user: str) -> str:
        """Return a digest of every other user's name, version, slot and events: the same before and after."""
        whole = hashlib.sha256()
        for name in self.histories.names():
            if name != user:
                place = self.rows.find(name)
                whole.update(f"{name}\0{place and place[1]}\0".encode())
                if place is not None:
                    with self.rows.steady() as data:
                        whole.update(data[place[0]].numpy().tobytes())
                log = self.histories.log([name])
                for column in (log.items, log.ratings, log.times):
                    whole.update(column.tobytes())
        return whole.hexdigest()

    def holding(self, pieces: list[bytes]) -> list[str]:
        """Return the files below the directory that hold any of the pieces, but for what forgetting itself keeps."""
        found = []
        for path in sorted(self.directory.rglob("*")):
            inside = path.relative_to(self.directory)
            if path.is_file() and "forgetting" not in inside.parts and _holds(path, pieces):
                found.append(str(inside))
        return found

    def _finish(self) -> None:
        """Delete who is leaving."""
        leaving = self.histories.among(State.LEAVING)
        if leaving:
            self.rows.remove(leaving)
            self.histories.erase(leaving)


def is_users(directory: Path) -> bool:
    """Whether `LifelongUsers` keeps its files here."""
    return (directory / EVENTS).is_file() and (directory / SLOTS / INDEX).is_file()


def _holds(path: Path, pieces: list[bytes]) -> bool:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        # A journal that has gone since holds nothing.
        return False
    return any(piece in data for piece in pieces)


def _noted(path: Path, key: str) -> object:
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as file:
            return file.execute("SELECT value FROM about WHERE key = ?", (key,)).fetchone()[0]
    except (sqlite3.Error, TypeError) as error:
        raise RunError(f"{path} is damaged, or not of users ({error}); restore it") from error


def _no_terms() -> Interactions:
    """Return a log without rows: deleting needs neither catalogue nor scale."""
    none = np.zeros(0, dtype=np.int64)
    return Interactions(none, none, none.astype(np.float64), none, (), _AnyItems((), (), ()))


class _AnyItems(Items):
    """A catalogue that has an item at every place, so that events of an unknown one can be read back."""

    def __len__(self) -> int:
        return 2**62
