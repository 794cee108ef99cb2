"""Requests that are answered once, however often they are sent: by the key that the caller gave."""

import hashlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import delete

from lora.errors import DataError, RunError, Unavailable
from server.service.registry import Registry
from server.service.tables import OnceRow

KEPT = 86_400.0
"""Seconds for which an answer is kept."""
Answer = dict[str, Any]


class Once:
    """Answers by idempotency key; keys of different users never meet.

    **Guarantee**: of requests with one key, one takes effect and all get its answer; also after a kill between the
    effect and its answer, as long as `done` tells whether it has taken effect.

    | case | answer |
    |---|---|
    | a key that comes again with the same request | the first answer |
    | with another request | DataError |
    | a request that was refused | the key is free again |
    | one that failed for want of room or of the database | the same request may be sent again |
    | after a day | the key is free again |
    """

    def __init__(self, registry: Registry, *, clock: Callable[[], float] = time.time) -> None:
        self.registry, self._clock = registry, clock
        self._lock = threading.Lock()

    def run(
        self, key: str, *, owner: str, body: str, act: Callable[[], Answer], done: Callable[[], Answer | None]
    ) -> tuple[Answer, bool]:
        """Return the answer to a request, and whether it is one that was given before.

        `act` takes effect; `done` returns the answer if it has taken effect already, unknown to this table.
        """
        name, digest = _digest(owner, key), _digest(body)
        with self._lock:
            known = self._claim(name, owner, digest)
            if known is not None and known.answer is not None:
                found: Answer = json.loads(known.answer)
                return found, True
            answer = None if known is None else done()
            again = answer is not None
            if answer is None:
                try:
                    answer = act()
                except (RunError, Unavailable):
                    # It may have taken effect in part: the key stays, so that `done` is asked when it comes again.
                    raise
                except BaseException:
                    self._release(name)
                    raise
            self._keep(name, answer)
            return answer, again

    def _claim(self, name: str, owner: str, digest: str) -> OnceRow | None:
        """Take a key for a request; returns what is there of it already."""
        now = self._clock()
        with self.registry.session() as session:
            session.execute(delete(OnceRow).where(OnceRow.created < now - KEPT))
            row = session.get(OnceRow, name)
            if row is None:
                session.add(OnceRow(key=name, owner=owner, body=digest, answer=None, created=now))
                return None
            if row.body != digest:
                raise DataError("this Idempotency-Key came with another request before; give every request its own")
            return row

    def _keep(self, name: str, answer: Answer) -> None:
        with self.registry.session() as session:
            row = session.get(OnceRow, name)
            if row is not None:
                row.answer = json.dumps(answer)

    def _release(self, name: str) -> None:
        with self.registry.session() as session:
            session.execute(delete(OnceRow).where(OnceRow.key == name))

    def forget(self, owner: str) -> int:
        """Delete all keys of a user; returns how many there were."""
        with self._lock, self.registry.session() as session:
            return int(session.execute(delete(OnceRow).where(OnceRow.owner == owner)).rowcount)  # type: ignore[attr-defined]


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
