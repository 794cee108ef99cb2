"""What every user did, event by event: durable, and deleted without a trace.

One SQLite file. Every user has a state beside the events, by which the next opening finds work that a kill cut off.
"""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from lora.errors import DataError, RunError, nearest
from strategies.personal.events import Row
from tasks.recommendation.interactions import Interactions

EVENTS = "events.sqlite"


class State(IntEnum):
    """Where a user stands."""

    SETTLED = 0
    """The slot is of all events."""
    PENDING = 1
    """There are events that the slot does not know of."""
    LEAVING = 2
    """To be forgotten; answers no more."""


_SCHEMA = """
CREATE TABLE about (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE people (person INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, state INTEGER NOT NULL);
CREATE INDEX unsettled ON people (state) WHERE state != 0;
CREATE TABLE events (
    person INTEGER NOT NULL, place INTEGER NOT NULL, time INTEGER NOT NULL, item INTEGER NOT NULL, rating REAL NOT NULL,
    PRIMARY KEY (person, place)
) WITHOUT ROWID;
CREATE UNIQUE INDEX once ON events (person, item, time)
"""


class Histories:
    """Users' events in order of time (of equal times, as they came), and every user's state.

    **Guarantee**: events are added all or none, after a kill at any instant; and when `erase` returns, the file holds
    neither the name nor an event of who was erased; after a kill meanwhile, when it is opened again.

    One process opens a directory at a time, which is for the owner to see to (`UserSlots` locks its directory). Its
    threads may share the object: each question and each write is by itself.
    """

    def __init__(self, terms: Interactions, *, kind: str, directory: Path | None = None) -> None:
        """Open or make the file, or one in memory. `terms` gives catalogue, scale and what counts as a like.

        Raises RunError for a file of another kind, such as another catalogue's, or a damaged one.
        """
        self.terms, self.directory = terms, directory
        self._lock = threading.RLock()
        """Held from a statement's start to its end: the file cannot be written anew beside one that is open."""
        try:
            if directory is not None:
                directory.mkdir(parents=True, exist_ok=True)
            path = ":memory:" if directory is None else str(directory / EVENTS)
            self._file = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._open(kind)
        except (OSError, sqlite3.Error) as error:
            raise RunError(f"{directory}: no events can be kept there ({error}); name another directory") from error

    def _open(self, kind: str) -> None:
        # What is deleted is overwritten, and nothing of it stays in a journal.
        for pragma in ("secure_delete = ON", "synchronous = FULL", "journal_mode = DELETE", "temp_store = MEMORY"):
            self._file.execute(f"PRAGMA {pragma}")
        with self._transaction():
            if not self._one("SELECT count(*) FROM sqlite_master"):
                for statement in _SCHEMA.strip().split(";\n"):
                    self._file.execute(statement)
                self.note("kind", kind)
        if self.noted("kind") != kind:
            found = f"{self.directory} holds events of another catalogue or scale of ratings"
            raise RunError(f"{found}; use the one that it was made with, or another directory")
        self._tidy()

    def __len__(self) -> int:
        return int(self._one("SELECT count(*) FROM people WHERE state != ?", State.LEAVING))

    def __contains__(self, user: object) -> bool:
        return bool(self._one("SELECT count(*) FROM people WHERE name = ? AND state != ?", user, State.LEAVING))

    def names(self) -> list[str]:
        """Return all users in alphabetical order."""
        return self._names("SELECT name FROM people WHERE state != ? ORDER BY name", State.LEAVING)

    def among(self, state: State) -> list[str]:
        """Return the users in a state, those known longest first."""
        return self._names("SELECT name FROM people WHERE state = ? ORDER BY person", state)

    def check(self, users: Sequence[str]) -> None:
        """Raise DataError, with the nearest name, for the first user that is not known."""
        for user in users:
            if user not in self:
                close = nearest(user, self._near(user))
                close = close if "did you mean" in close else ""
                raise DataError(f"user '{user}' is not known{close}; observe an event of the user first")

    def last(self, user: str) -> int | None:
        """Return the time of a user's last event; None for one who is not known."""
        found: int | None = self._one(
            "SELECT time FROM events JOIN people USING (person) WHERE name = ? ORDER BY place DESC LIMIT 1", user
        )
        return found

    def events(self, user: str) -> int:
        """Return how many events of a user there are; 0 for one who is not known."""
        query = "SELECT count(*) FROM events JOIN people USING (person) WHERE name = ? AND state != ?"
        return int(self._one(query, user, State.LEAVING))

    def has(self, row: Row) -> bool:
        """Return whether the user rated the item at that very time."""
        query = "SELECT count(*) FROM events JOIN people USING (person) WHERE name = ? AND item = ? AND time = ?"
        return bool(self._one(query, row.user, row.item, row.time))

    def add(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """Add checked events, whose users are then pending; returns the users that were not known before."""
        own: dict[str, list[Row]] = {}
        for row in rows:
            own.setdefault(row.user, []).append(row)
        with self._transaction():
            new = tuple(user for user in own if user not in self)
            self._file.executemany("INSERT INTO people (name, state) VALUES (?, 1)", [(user,) for user in new])
            for user, added in own.items():
                self._append(user, added)
        return new

    def _append(self, user: str, rows: Sequence[Row]) -> None:
        person = self._one("SELECT person FROM people WHERE name = ?", user)
        count = self._one("SELECT coalesce(max(place), -1) + 1 FROM events WHERE person = ?", person)
        values = [(person, count + place, row.time, row.item, row.rating) for place, row in enumerate(rows)]
        self._file.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", values)
        self._file.execute("UPDATE people SET state = ? WHERE person = ?", (State.PENDING, person))

    def log(self, users: Sequence[str]) -> Interactions:
        """Return the interactions of some users alone; user i is `users[i]`. Raises DataError for an unknown user."""
        self.check(users)
        query = "SELECT item, rating, time FROM events JOIN people USING (person) WHERE name = ? ORDER BY place"
        with self._lock:
            rows = [self._file.execute(query, (user,)).fetchall() for user in users]
        found = [np.array(each, dtype=object).reshape(-1, 3) for each in rows]
        whole = np.concatenate([*found, np.empty((0, 3), dtype=object)])
        return Interactions(
            np.repeat(np.arange(len(users)), [len(each) for each in found]).astype(np.int64),
            whole[:, 0].astype(np.int64),
            whole[:, 1].astype(np.float64),
            whole[:, 2].astype(np.int64),
            tuple(users),
            self.terms.catalogue,
            like_from=self.terms.like_from,
            scale=self.terms.scale,
        )

    def move(self, users: Sequence[str], state: State) -> None:
        """Put users into a state."""
        with self._transaction():
            self._file.executemany("UPDATE people SET state = ? WHERE name = ?", [(state, user) for user in users])

    def unsettle(self) -> None:
        """Make all users pending."""
        with self._transaction():
            self._file.execute("UPDATE people SET state = ? WHERE state = ?", (State.PENDING, State.SETTLED))

    def erase(self, users: Sequence[str]) -> None:
        """Delete users and their events, and write the file anew without them: seconds for a million events, so forget
        many at once."""
        own = [(user,) for user in users]
        with self._transaction():
            self._file.executemany("DELETE FROM events WHERE person = (SELECT person FROM people WHERE name = ?)", own)
            self._file.executemany("DELETE FROM people WHERE name = ?", own)
            self.note("stale", "yes")
        self._tidy()

    def _tidy(self) -> None:
        """Write the file anew after a removal. SQLite's secure_delete overwrites a deleted row where it stands, but not
        the copies that stay in a page when its rows are moved to another one."""
        with self._lock:
            if self.noted("stale") == "yes":
                if self.directory is not None:
                    self._file.execute("VACUUM")
                self.note("stale", "no")

    def note(self, key: str, value: str) -> None:
        """Keep a word about the whole."""
        with self._lock:
            self._file.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (key, value))

    def noted(self, key: str) -> str | None:
        """Return what was kept."""
        found: str | None = self._one("SELECT value FROM about WHERE key = ?", key)
        return found

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _near(self, user: str, *, count: int = 200) -> list[str]:
        after = "SELECT name FROM people WHERE name >= ? AND state != 2 ORDER BY name LIMIT ?"
        before = "SELECT name FROM people WHERE name < ? AND state != 2 ORDER BY name DESC LIMIT ?"
        return self._names(after, user, count) + self._names(before, user, count)

    def _names(self, query: str, *arguments: object) -> list[str]:
        with self._lock:
            return [name for (name,) in self._file.execute(query, arguments)]

    def _one(self, query: str, *arguments: object) -> Any:
        with self._lock, closing(self._file.execute(query, arguments)) as rows:
            found = rows.fetchone()
        return None if found is None else found[0]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            try:
                self._file.execute("BEGIN IMMEDIATE")
                yield
                self._file.execute("COMMIT")
            except BaseException as error:
                # Without room SQLite has rolled back by itself, or is still inside after a COMMIT that failed.
                if self._file.in_transaction:
                    self._file.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise RunError(
                        f"{self.directory}: events cannot be written ({error}); nothing has changed: make room, try "
                        "again"
                    ) from error
                raise
