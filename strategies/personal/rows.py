"""Named rows of float32 numbers, versioned and durable: what slots, routing rows and optimizer states are kept in.

Numbers lie in one memory-mapped file, names and versions in a small SQLite index beside it. A write fills rows that
nobody owns and then changes owners in one transaction, which is the instant at which it happens.
"""

import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lora.errors import RunError

INDEX, NUMBERS = "index.sqlite", "rows.f32"
FIRST = 64
"""Rows that a new file has room for; the room doubles from there."""
Listener = Callable[[Sequence[str]], None]
"""Called with the names that were replaced or removed."""


class Numbers(Protocol):
    """Rows `data [room, width]`, float32."""

    data: Tensor

    def grow(self, room: int) -> None:
        """Make room for so many rows; the new ones are zero."""

    def read(self, rows: Sequence[int]) -> Tensor:
        """Return copies of some rows, `[n, width]`."""
        ...

    def write(self, rows: Sequence[int], values: Tensor) -> None:
        """Overwrite some rows, durably where the numbers are durable at all."""

    def close(self) -> None:
        """Let go of what is held."""


class MemoryNumbers:
    """Rows in memory: gone with the process."""

    def __init__(self, width: int) -> None:
        self.data = torch.zeros(0, width)

    def grow(self, room: int) -> None:
        """Copy everything into a larger block."""
        larger = torch.zeros(room, self.data.shape[1])
        larger[: len(self.data)] = self.data
        self.data = larger

    def read(self, rows: Sequence[int]) -> Tensor:
        """Return copies of some rows."""
        return self.data.index_select(0, torch.tensor(rows, dtype=torch.int64))

    def write(self, rows: Sequence[int], values: Tensor) -> None:
        """Overwrite some rows."""
        self.data[torch.tensor(rows, dtype=torch.int64)] = values

    def close(self) -> None:
        """Do nothing."""


class FileNumbers:
    """Rows in a file that is mapped into memory: only what is read is loaded, and room that is not used takes no disk.

    The map is for reading. Writes go through the file, so that a full disk is an error and not a signal that kills.
    """

    def __init__(self, path: Path, width: int) -> None:
        self.path, self.width = path, width
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._stride = 4 * width
        self.data = self._mapped()

    def grow(self, room: int) -> None:
        """Lengthen the file (with a hole) and map it anew; what was mapped before stays valid."""
        os.ftruncate(self._file, room * self._stride)
        self.data = self._mapped()

    def read(self, rows: Sequence[int]) -> Tensor:
        """Return copies of some rows; those that memory has not come from the disk side by side, not in turn."""
        for row in rows:
            os.posix_fadvise(self._file, row * self._stride, self._stride, os.POSIX_FADV_WILLNEED)
        return self.data.index_select(0, torch.tensor(rows, dtype=torch.int64))

    def write(self, rows: Sequence[int], values: Tensor) -> None:
        """Overwrite some rows and wait for the disk."""
        found = values.to(torch.float32).contiguous().numpy()
        for row, value in zip(rows, found, strict=True):
            data, start = memoryview(value).cast("B"), row * self._stride
            while data:
                written = os.pwrite(self._file, data, start)
                data, start = data[written:], start + written
        os.fdatasync(self._file)

    def close(self) -> None:
        """Close the file; tensors that are still mapped stay valid."""
        os.close(self._file)

    def _mapped(self) -> Tensor:
        room = os.fstat(self._file).st_size // self._stride
        if room == 0:
            return torch.zeros(0, self.width)
        return torch.from_file(str(self.path), shared=True, size=room * self.width).view(room, self.width)


_SCHEMA = """
CREATE TABLE about (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE owned (name TEXT PRIMARY KEY, row INTEGER NOT NULL, version INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE spare (row INTEGER PRIMARY KEY, dirty INTEGER NOT NULL);
CREATE INDEX dirty_rows ON spare (row) WHERE dirty;
"""


class NamedRows:
    """Rows by name, `[width]` float32 each, with a version that grows with every write.

    **Guarantee**: after a kill at any instant every write and every removal has happened for all of its names or for
    none; and when `replace` or `remove` returns (or after the next opening), no file holds a number of what was
    replaced or removed, nor the name of what was removed.

    One process opens a directory at a time; its threads may share the object. Versions count the writes of the whole
    store, so that a name and a version mean one value for ever, also for a name that was removed and came back.
    """

    def __init__(self, width: int, *, kind: str, directory: Path | None = None) -> None:
        """Open or make the store in `directory`, or one in memory. `kind` says what the numbers mean.

        Raises RunError for a directory that is in use, damaged, or of another width or kind.
        """
        self.width, self.directory = width, directory
        self._lock = threading.RLock()
        self._listeners: list[Listener] = []
        self._held = _hold(directory)
        try:
            path = ":memory:" if directory is None else str(directory / INDEX)
            self._index = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._open(kind)
            self.numbers: Numbers = (
                MemoryNumbers(width) if directory is None else FileNumbers(directory / NUMBERS, width)
            )
            self._recover()
        except sqlite3.Error as error:
            self._release()
            raise RunError(f"{directory}: the index is damaged or cannot be written ({error}); restore it") from error
        except BaseException:
            self._release()
            raise

    def __len__(self) -> int:
        return int(self._one("SELECT count(*) FROM owned"))

    def __contains__(self, name: object) -> bool:
        return bool(self._one("SELECT count(*) FROM owned WHERE name = ?", name))

    def names(self) -> Iterator[str]:
        """Yield all names in order."""
        with self._lock:
            yield from [name for (name,) in self._index.execute("SELECT name FROM owned ORDER BY name")]

    def find(self, name: str) -> tuple[int, int] | None:
        """Return a name's row and version; None for a name that is not there."""
        with self._lock:
            found = self._index.execute("SELECT row, version FROM owned WHERE name = ?", (name,)).fetchone()
        return None if found is None else (int(found[0]), int(found[1]))

    def near(self, name: str, *, count: int = 200) -> list[str]:
        """Return the names next to a name in the alphabet, where a misspelled one mostly has its right spelling."""
        with self._lock:
            after = self._index.execute("SELECT name FROM owned WHERE name >= ? ORDER BY name LIMIT ?", (name, count))
            found = after.fetchall()
            before = "SELECT name FROM owned WHERE name < ? ORDER BY name DESC LIMIT ?"
            return [each for (each,) in found + self._index.execute(before, (name, count)).fetchall()]

    @contextmanager
    def steady(self) -> Iterator[Tensor]:
        """Keep rows where they are, whatever other threads do, and return all numbers `[room, width]`."""
        with self._lock:
            yield self.numbers.data

    def read(self, rows: Sequence[int]) -> Tensor:
        """Return copies of some rows, `[n, width]`, by the places that `find` gave; `steady` keeps them there."""
        with self._lock:
            return self.numbers.read(rows)

    def replace(self, names: Sequence[str], values: Tensor) -> int:
        """Make `values [names, width]` the rows of some names, known or new; returns the version.

        Raises RunError if the disk is full; then nothing has changed.
        """
        with self._lock:
            try:
                rows = self._reserve(len(names))
                self.numbers.write(rows, values)
                version = self._own(names, rows)
            except OSError as error:
                raise self._full(error.strerror) from error
            except sqlite3.OperationalError as error:
                raise self._full(str(error)) from error
            self._tell(names)
            self._clear()
            return version

    def remove(self, names: Sequence[str]) -> None:
        """Remove names and overwrite what they had with zeros; names that are not there are passed over."""
        with self._lock:
            try:
                with self._transaction():
                    own = [(name,) for name in names]
                    self._index.executemany("INSERT INTO spare SELECT row, 1 FROM owned WHERE name = ?", own)
                    self._index.executemany("DELETE FROM owned WHERE name = ?", own)
                    self._index.execute("INSERT OR REPLACE INTO about VALUES ('stale', 1)")
            except sqlite3.OperationalError as error:
                raise self._full(str(error)) from error
            self._tell(names)
            self._clear()

    def listen(self, listener: Listener) -> None:
        """Have names told that are replaced or removed, before the call that does it returns: their copies are old."""
        with self._lock:
            self._listeners.append(listener)

    def _tell(self, names: Sequence[str]) -> None:
        for listener in self._listeners:
            listener(names)

    def close(self) -> None:
        """Close the files; the object is of no use afterwards."""
        with self._lock:
            self._index.close()
            self.numbers.close()
            self._release()

    def _open(self, kind: str) -> None:
        """Set the index up, or check that it is of this kind and width."""
        # What is deleted is overwritten: a removed name must not linger in free pages of the index.
        self._index.execute("PRAGMA secure_delete = ON")
        self._index.execute("PRAGMA synchronous = FULL")
        about = {"kind": kind, "width": self.width, "version": 0, "rows": 0}
        with self._transaction():
            if not self._one("SELECT count(*) FROM sqlite_master"):
                for statement in _SCHEMA.strip().split(";\n"):
                    self._index.execute(statement)
                self._index.executemany("INSERT INTO about VALUES (?, ?)", list(about.items()))
        for key in ("kind", "width"):
            found = self._one("SELECT value FROM about WHERE key = ?", key)
            if found != about[key]:
                raise RunError(
                    f"{self.directory} holds rows of {key} {found}, not {about[key]}; they belong to another model, "
                    "adapter.rank, adapter.targets or frame: use that one, or another directory"
                )

    def _recover(self) -> None:
        """Clear rows that a killed write or removal left behind. Raises RunError if numbers are missing."""
        rows, room = self._one("SELECT value FROM about WHERE key = 'rows'"), len(self.numbers.data)
        if self._one("SELECT coalesce(max(row), -1) FROM owned") >= room:
            raise RunError(f"{self.directory}: {NUMBERS} has room for {room} rows, the index names more; restore both")
        if rows > room:
            self.numbers.grow(max(FIRST, rows))
        self._clean()

    def _reserve(self, count: int) -> list[int]:
        """Return rows that nobody owns, marked dirty before they are written to."""
        with self._transaction():
            free = [row for (row,) in self._index.execute("SELECT row FROM spare LIMIT ?", (count,))]
            used = self._one("SELECT value FROM about WHERE key = 'rows'")
            fresh = list(range(used, used + count - len(free)))
            if used + len(fresh) > len(self.numbers.data):
                self.numbers.grow(max(FIRST, 2 * len(self.numbers.data), used + len(fresh)))
            rows = free + fresh
            self._index.execute("UPDATE about SET value = ? WHERE key = 'rows'", (used + len(fresh),))
            self._index.executemany("INSERT OR REPLACE INTO spare VALUES (?, 1)", [(row,) for row in rows])
        return rows

    def _own(self, names: Sequence[str], rows: Sequence[int]) -> int:
        """Give rows to names in one transaction, and mark those that they had as dirty."""
        with self._transaction():
            version = int(self._one("SELECT value FROM about WHERE key = 'version'")) + 1
            self._index.execute("UPDATE about SET value = ? WHERE key = 'version'", (version,))
            self._index.executemany("DELETE FROM spare WHERE row = ?", [(row,) for row in rows])
            self._index.executemany(
                "INSERT INTO spare SELECT row, 1 FROM owned WHERE name = ?", [(name,) for name in names]
            )
            self._index.executemany(
                "INSERT OR REPLACE INTO owned VALUES (?, ?, ?)",
                [(name, row, version) for name, row in zip(names, rows, strict=True)],
            )
        return version

    def _clear(self) -> None:
        """Clean up after a write or removal that has happened. Raises RunError if old numbers may still be there."""
        try:
            self._clean()
        except (OSError, sqlite3.OperationalError) as error:
            raise RunError(
                f"{self.directory}: the write has happened, but what it replaced could not be overwritten ({error}); "
                "open the directory again"
            ) from error

    def _clean(self) -> None:
        """Overwrite rows that nobody owns any more with zeros, and names that were removed."""
        while dirty := [row for (row,) in self._index.execute("SELECT row FROM spare WHERE dirty LIMIT 256")]:
            inside = [row for row in dirty if row < len(self.numbers.data)]
            self.numbers.write(inside, torch.zeros(1, self.width).expand(len(inside), -1))
            with self._transaction():
                self._index.executemany("UPDATE spare SET dirty = 0 WHERE row = ?", [(row,) for row in dirty])
        if self._one("SELECT value FROM about WHERE key = 'stale'"):
            # secure_delete overwrites a row where it stands, but not the copies that stay in a page when its rows move
            # to another one: only a new index has none.
            if self.directory is not None:
                self._index.execute("VACUUM")
            self._index.execute("UPDATE about SET value = 0 WHERE key = 'stale'")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._index.execute("BEGIN IMMEDIATE")
            yield
            self._index.execute("COMMIT")
        except BaseException:
            # Without room SQLite has rolled back by itself, or is still inside after a COMMIT that failed.
            if self._index.in_transaction:
                self._index.execute("ROLLBACK")
            raise

    def _one(self, query: str, *arguments: object) -> Any:
        with self._lock:
            found = self._index.execute(query, arguments).fetchone()
        return found[0] if found else 0

    def _full(self, why: str | None) -> RunError:
        return RunError(f"{self.directory}: rows cannot be written ({why}); nothing has changed: make room, try again")

    def _release(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None


def _hold(directory: Path | None) -> int | None:
    """Lock a directory for this process. Raises RunError if it is in use or cannot be made."""
    if directory is None:
        return None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise RunError(f"{directory}: no rows can be kept there ({error.strerror}); name another directory") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(held)
        raise RunError(f"{directory} is open in another process, or twice in this one; close it there") from error
    return held
