"""Who calls: API keys with roles, and how often each may."""

import hashlib
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from sqlalchemy import select

from lora.errors import Busy, ConfigError, DataError, Denied, Unknown
from server.service.registry import Registry
from server.service.tables import LONGEST_NAME, KeyRow

Role = Literal["user", "operator", "auditor"]
ROLES: tuple[Role, ...] = get_args(Role)
PREFIX = "lethe_"
TRUSTED = 1.0
"""Seconds for which a key that was looked up is believed; a revoked one works no longer than that."""
_KEPT = 10_000


class NoKey(Denied):
    """No valid API key came with the request."""


@dataclass(frozen=True)
class Caller:
    """Who asks: the key's id, its role, and for a user's key whose data it opens."""

    key: str
    role: Role
    owner: str | None

    def may_read(self, user: str) -> None:
        """Raise Denied unless this caller may see a user's data."""
        if self.role == "operator" or (self.role == "user" and self.owner == user):
            return
        raise Denied("this key does not open that user's data; ask with the user's own key, or an operator's")

    def must_be(self, *roles: Role) -> None:
        """Raise Denied unless the caller has one of the roles."""
        if self.role not in roles:
            raise Denied(f"this key is of role {self.role}; ask with one of role {' or '.join(roles)}")


@dataclass(frozen=True)
class KeyInfo:
    """What is known of a key; the key itself is not."""

    id: str
    role: Role
    owner: str | None
    label: str
    created: float
    revoked: float | None


class Keys:
    """API keys of 256 random bits, kept as SHA-256 digests: such keys cannot be guessed, so no slow hash is needed."""

    def __init__(self, registry: Registry, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry, self._clock = registry, clock
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[float, Caller]] = OrderedDict()

    def issue(self, role: Role, *, owner: str | None = None, label: str = "") -> str:
        """Make a key and return it, this once. Raises ConfigError for a role that is none, or that lacks its owner."""
        if role not in ROLES:
            raise ConfigError(f"role '{role}' is none; give {', '.join(ROLES)}")
        if (role == "user") != (owner is not None):
            raise ConfigError("a key of role user opens one user's data and names that owner; other keys name nobody")
        if owner is not None:
            check_name(owner, what="owner")
        key = PREFIX + secrets.token_urlsafe(32)
        row = KeyRow(
            id=secrets.token_hex(8), digest=_digest(key), role=role, owner=owner, label=label[:LONGEST_NAME],
            created=time.time(), revoked=None,
        )  # fmt: skip
        with self.registry.session() as session:
            session.add(row)
        return key

    def caller(self, key: str) -> Caller:
        """Return whose key this is. Raises NoKey."""
        return self.caller_of(_digest(key))

    def caller_of(self, digest: str) -> Caller:
        """Return whose key has this digest. Raises NoKey, also for one that was revoked."""
        found = self.remembered(digest)
        return self._asked(digest) if found is None else found

    def remembered(self, digest: str) -> Caller | None:
        """Return who a key belonged to a moment ago, without asking the registry."""
        with self._lock:
            found = self._known.get(digest)
        return found[1] if found is not None and self._clock() - found[0] < TRUSTED else None

    def _asked(self, digest: str) -> Caller:
        now = self._clock()
        with self.registry.session() as session:
            row = session.scalars(select(KeyRow).where(KeyRow.digest == digest)).one_or_none()
        if row is None or row.revoked is not None:
            with self._lock:
                self._known.pop(digest, None)
            raise NoKey("the API key is not valid; send one that was issued here as Authorization: Bearer KEY")
        caller = Caller(row.id, row.role, row.owner)  # type: ignore[arg-type]
        with self._lock:
            self._known[digest] = now, caller
            self._known.move_to_end(digest)
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return caller

    def infos(self) -> list[KeyInfo]:
        """Return all keys, the oldest first."""
        with self.registry.session() as session:
            rows = [*session.scalars(select(KeyRow).order_by(KeyRow.created, KeyRow.id))]
        return [KeyInfo(r.id, r.role, r.owner, r.label, r.created, r.revoked) for r in rows]

    def revoke(self, key_id: str) -> None:
        """Make a key invalid. Raises Unknown."""
        with self.registry.session() as session:
            row = session.get(KeyRow, key_id)
            if row is None:
                raise Unknown(f"there is no key '{key_id}'; the list of keys has their ids")
            row.revoked = time.time()
        with self._lock:
            self._known.clear()


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def digest_of(key: str) -> str:
    """Return what is kept of a key."""
    return _digest(key)


def check_name(name: str, *, what: str) -> None:
    """Raise DataError for a name that is empty, too long, or has characters that cannot be shown or stored.

    Any script is allowed. Names are never parts of paths, but those that look like it are refused all the same.
    """
    if not name.strip() or len(name) > LONGEST_NAME:
        raise DataError(f"{what} of {len(name)} characters; give 1 to {LONGEST_NAME} that are not all blank")
    if not name.isprintable() or any("\ud800" <= letter <= "\udfff" or letter == "\ufffd" for letter in name):
        raise DataError(f"{what} has characters that cannot be printed; leave them out")
    if name in (".", "..") or "/" in name or "\\" in name:
        raise DataError(f"{what} '{name}' looks like a path; leave out slashes and dots alone")


@dataclass
class _Bucket:
    left: float
    since: float


class RateLimits:
    """Token buckets in memory: every key may ask `burst` times at once, and `rate` times a second in the long run.

    So may every address by keys that are not known. Each process counts by itself.
    """

    def __init__(self, *, rate: float = 50.0, burst: int = 200, clock: Callable[[], float] = time.monotonic) -> None:
        if rate <= 0 or burst < 1:
            raise ConfigError(f"rate={rate}, burst={burst}: give a rate above 0 and a burst of at least 1")
        self.rate, self.burst, self._clock = rate, burst, clock
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take_of(self, sender: str) -> None:
        """Count a key that has to be looked up for the address that sends it: guessing costs the registry a query."""
        self.take(f"?{sender}")

    def take(self, key: str) -> None:
        """Count a request. Raises Busy for one too many, with the seconds until the next is allowed."""
        now = self._clock()
        with self._lock:
            bucket = self._buckets.setdefault(key, _Bucket(float(self.burst), now))
            self._buckets.move_to_end(key)
            bucket.left = min(self.burst, bucket.left + self.rate * (now - bucket.since))
            bucket.since = now
            while len(self._buckets) > _KEPT:
                self._buckets.popitem(last=False)
            if bucket.left < 1:
                wait = (1 - bucket.left) / self.rate
                raise TooMany(f"more than {self.rate:g} requests a second; wait {wait:.2g} s", retry_after=wait)
            bucket.left -= 1


class TooMany(Busy):
    """One key (or address, with keys that are not known) asks more often than it may."""
