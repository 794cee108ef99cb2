"""Users divided among replicas: which part a user belongs to, who holds a part, and whom a request is about."""

import fcntl
import hashlib
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from lora.errors import Busy, RunError

USER_HEADER = "lethe-user"
"""Says whom a request is about, percent-encoded, where the path does not."""
CONSOLE, PART = "\0console", "\0part "
"""Whom requests to the console are about, and those that ask for a part by number; no user has such a name."""
LOCKS = "parts"
_PAUSE = 0.2


@dataclass(frozen=True)
class Part:
    """One of the parts into which users are divided by their names, for ever in the same way."""

    number: int = 0
    of: int = 1

    def has(self, user: str) -> bool:
        """Return whether a user belongs here."""
        return part_of(user, self.of) == self.number

    def check(self, user: str) -> None:
        """Raise Busy for a user of another part, whose replica is starting or was not asked."""
        if not self.has(user):
            raise Busy(
                f"user '{user}' is with another replica; ask again in a second, with the header Lethe-User: NAME "
                "where the address does not say whom it is about"
            )

    @property
    def folder(self) -> str:
        """Name of the folder that has the users of this part."""
        return "users" if self.of == 1 else f"users-{self.number}-of-{self.of}"


WHOLE = Part()


def part_of(user: str, of: int) -> int:
    """Return the number of a user's part."""
    return int.from_bytes(_digest(user)[:8], "big") % of


def check_division(folder: Path, of: int) -> None:
    """Raise RunError where users are kept in `folder` that were divided otherwise."""
    own = {Part(number, of).folder for number in range(of)}
    other = sorted(path.name for path in folder.glob("users*") if path.is_dir() and path.name not in own)
    if other:
        count = other[0].rpartition("-")[2] if "-" in other[0] else "1"
        raise RunError(
            f"{folder} keeps users divided among {count} replicas ({other[0]}), not {of}; serve with --replicas "
            f"{count}, or name another data directory"
        )


class Held:
    """A part that this process holds until it ends, or lets go of it by `close`."""

    def __init__(self, part: Part, handle: int) -> None:
        self.part, self._handle = part, handle

    def close(self) -> None:
        """Let another process have it."""
        os.close(self._handle)


def hold(folder: Path, of: int, *, patience: float = 60.0) -> Held:
    """Take a part that no process holds; its lock goes with the process, however that ends.

    Raises RunError where all are held for as long as `patience` seconds.
    """
    locks = folder / LOCKS
    locks.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + patience
    while True:
        for number in range(of):
            handle = os.open(locks / f"{number}-of-{of}.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return Held(Part(number, of), handle)
            except OSError:
                os.close(handle)
        if time.monotonic() > end:
            raise RunError(f"all {of} parts of {folder} are held by other replicas; have no more replicas than parts")
        time.sleep(_PAUSE)


def about(scope: Mapping[str, Any]) -> str | None:
    """Return the user (or adapter) that an HTTP request is about, by header or path; None where neither says so."""
    for name, value in scope.get("headers", ()):
        if name == USER_HEADER.encode():
            return unquote(value.decode("latin-1")) or None
    parts = str(scope.get("path", "")).split("/")
    if parts[1:2] == ["console"]:
        # A browser's session is in the memory of one process.
        return CONSOLE
    if parts[1:] in (["metrics"], ["readyz"]):
        asked = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("part")
        return None if asked is None else f"{PART}{asked[0]}"
    if parts[1:2] == ["v1"] and parts[2:3] in (["users"], ["adapters"]) and len(parts) > 3 and parts[3]:
        return parts[3]
    return None


def order(key: str | None, replicas: Mapping[str, Part]) -> list[list[str]]:
    """Return names of replicas in the order in which they are asked, those of one list alike.

    `key` is whom a request is about. Divided users are with one replica alone; while that is starting, any other says
    so. Where every replica can answer, each user has an order of their own, so that their slot is warm in the first; a
    replica that comes or goes moves no other's users.
    """
    everywhere = sorted(replicas)
    if key is None or not everywhere:
        return [random.sample(everywhere, min(2, len(everywhere)))]
    if any(part.of > 1 for part in replicas.values()):
        here = [name for name in everywhere if _holds(replicas[name], key)]
        return [here or [random.choice(everywhere)]]
    return [[name] for name in sorted(everywhere, key=lambda name: _digest(f"{key}\0{name}"))]


def _holds(part: Part, key: str) -> bool:
    return key == f"{PART}{part.number}" if key.startswith(PART) else part.has(key)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
