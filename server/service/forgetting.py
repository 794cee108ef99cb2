"""Requests to forget: what the service asks of whoever carries them out, and deletion of a user's own data."""

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import quote

from sqlalchemy import create_engine, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from lora.errors import Denied, LetheError, RunError, Unknown
from server.service.registry import Registry
from server.service.tables import ForgetRow

State = Literal["accepted", "done", "failed"]
Evidence = dict[str, Any]


@dataclass(frozen=True)
class ForgetRequest:
    """A request to forget somebody: `subject` is the SHA-256 of the name, which alone is kept once it is done."""

    id: str
    subject: str
    state: State
    evidence: Evidence
    created: float
    finished: float | None


class Forgetting(Protocol):
    """Whoever carries requests to forget out: at once, or durably over hours."""

    def ask(self, user: str, *, asked_by: str | None) -> ForgetRequest:
        """Accept a request, durably, and return it as it stands. Raises Unknown where there is nothing to forget."""
        ...

    def get(self, request: str) -> ForgetRequest:
        """Return a request as it stands. Raises Unknown."""
        ...

    def all(self, *, subject: str | None = None) -> list[ForgetRequest]:
        """Return all requests, or those about one subject, the latest first."""
        ...

    def resume(self) -> int:
        """Go on with requests that were cut off; returns how many."""
        ...


_TRIES = 3

Eraser = Callable[[str], Evidence]
"""Deletes what one part of the service has of a user, and tells what that was. Called again after a kill."""


class Deletions:
    """Deletes what is kept of a user, at once; what shared weights have learned is for unlearning.

    **Guarantee**: when `ask` returns, neither registry, files nor tables of this process hold anything of the user but
    API keys (buffers are overwritten by the next batch), and no answer that is asked for later here uses the user's
    slot; what was accepted is carried out, after a kill at any instant.

    | case | what happens |
    |---|---|
    | a kill in between | `resume` carries it out: the name is kept until then |
    | several processes of one registry | one after the other; `resume` only for users who are `mine` |
    | an eraser fails | the request says so and stays open; `resume` tries again |
    | events or adapters arrive meanwhile (`left`) | deleted again; after the third time as if an eraser failed |
    | another process answers by an adapter | until it hears of it, within a second; a text being written ends then |
    | nothing is known of the user | Unknown; no request is made |
    """

    def __init__(
        self, registry: Registry, erasers: Sequence[Eraser], *, knows: Callable[[str], bool],
        mine: Callable[[str], bool] = lambda user: True,
    ) -> None:  # fmt: skip
        self.registry, self._erasers, self._knows, self._mine = registry, tuple(erasers), knows, mine
        self._lock = threading.Lock()

    def ask(self, user: str, *, asked_by: str | None) -> ForgetRequest:
        """Forget a user now. Raises Unknown where nothing is known of them."""
        with self._lock, self.registry.alone("forgetting"):
            if not self._knows(user):
                raise Unknown(f"nothing is known of user '{user}'; there is nothing to forget")
            row = ForgetRow(
                id=secrets.token_hex(16), user=user, subject=subject_of(user), asked_by=asked_by, state="accepted",
                evidence="{}", created=time.time(), finished=None,
            )  # fmt: skip
            with self.registry.session() as session:
                session.add(row)
            return self._carry_out(row.id, user)

    def _carry_out(self, request: str, user: str) -> ForgetRequest:
        evidence, found = Evidence(), Evidence()
        try:
            for _ in range(_TRIES):
                for erase in self._erasers:
                    found |= erase(user)
                evidence, found = _added(evidence, found), Evidence()
                if not _left(evidence):
                    break
            else:
                raise Denied(f"user '{user}' comes back all the time; stop what sends their events, and ask again")
        except LetheError as error:
            # What was deleted before the one that failed is told all the same.
            evidence = _added(evidence, found)
            self._note(request, state="failed", evidence=evidence | {"error": type(error).__name__})
            raise
        self._note(request, state="done", evidence=evidence)
        self.registry.scrub()
        return self.get(request)

    def _note(self, request: str, *, state: State, evidence: Evidence) -> None:
        with self.registry.session() as session:
            row = session.get_one(ForgetRow, request)
            row.state, row.evidence = state, json.dumps(evidence)
            if state == "done":
                row.user, row.finished = None, time.time()

    def get(self, request: str) -> ForgetRequest:
        """Return a request. Raises Unknown."""
        with self.registry.session() as session:
            row = session.get(ForgetRow, request)
        if row is None:
            raise Unknown("there is no such forget request; the list of requests has their ids")
        return _told(row)

    def all(self, *, subject: str | None = None) -> list[ForgetRequest]:
        """Return requests, the latest first."""
        asked = select(ForgetRow).order_by(ForgetRow.created.desc(), ForgetRow.id)
        if subject is not None:
            asked = asked.where(ForgetRow.subject == subject)
        with self.registry.session() as session:
            return [_told(row) for row in session.scalars(asked)]

    def resume(self) -> int:
        """Carry out what was accepted and not done."""
        with self._lock, self.registry.alone("forgetting"):
            with self.registry.session() as session:
                open_ones = session.scalars(select(ForgetRow).where(ForgetRow.user.is_not(None)))
                rows = [row for row in open_ones if self._mine(str(row.user))]
            for row in rows:
                self._carry_out(row.id, str(row.user))
            return len(rows)


def _left(evidence: Evidence) -> bool:
    """Whether something was there when it was looked for; what ends by being looked at does not count."""
    left = evidence.get("left", {})
    return any(left.get(kind) for kind in ("events", "slot", "adapters"))


def _added(before: Evidence, found: Evidence) -> Evidence:
    """Add what another round has deleted; what was left is the last round's."""
    added = {key: before.get(key, 0) + value for key, value in found.items() if type(value) is int}
    either = {key: before.get(key, False) or value for key, value in found.items() if type(value) is bool}
    return before | found | added | either


def subject_of(user: str) -> str:
    """Return the digest by which a request is found again by who knows the name."""
    return hashlib.sha256(user.encode()).hexdigest()


def named_in(file: Path) -> Callable[[str], bool]:
    """Return whether a user of a name was asked to be forgotten in a registry's SQLite file, also if that is not done.

    Nothing is written to it. Raises RunError for a file that is no registry.
    """
    engine = create_engine(f"sqlite:///file:{quote(str(file.resolve()))}?mode=ro&uri=true")
    try:
        with Session(engine) as session:
            subjects = set(session.scalars(select(ForgetRow.subject)))
    except DBAPIError as error:
        raise RunError(f"{file}: no registry of a service that can be read ({type(error.orig).__name__})") from error
    finally:
        engine.dispose()
    return lambda name: subject_of(name) in subjects


def _told(row: ForgetRow) -> ForgetRequest:
    state: Any = row.state
    return ForgetRequest(row.id, row.subject, state, json.loads(row.evidence), row.created, row.finished)
