"""Watching the registry: an adapter that another process writes is used here within a second."""

import logging
import threading
import time
from collections.abc import Callable

from sqlalchemy import text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from lora.errors import Unavailable
from server.service.registry import CHANNEL, Registry

log = logging.getLogger("lethe.service")

PAUSE = 0.25
"""Seconds between two looks at the count of changes, or at whether to stop."""


class Watch:
    """A thread that calls `changed` whenever the registry has changed, and after every time it could not be reached.

    PostgreSQL tells by itself (LISTEN/NOTIFY); SQLite's count of changes is looked at every `PAUSE` seconds.
    """

    def __init__(self, registry: Registry, changed: Callable[[], None]) -> None:
        self.registry, self.changed = registry, changed
        self.reached = True
        """Whether the registry answered lately."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lethe-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._listen() if self.registry.postgres else self._poll()
            except (SQLAlchemyError, Unavailable, OSError) as error:
                if self.reached:
                    log.warning("the registry cannot be reached (%s); trying again", type(error).__name__)
                self.reached = False
                self._stop.wait(2 * PAUSE)
            except Exception as error:
                # The driver's own errors come bare where its connection is used directly.
                log.warning("watching the registry failed (%s); trying again", type(error).__name__)
                self.reached = False
                self._stop.wait(2 * PAUSE)

    def _poll(self) -> None:
        seen = self.registry.count()
        self._arrived()
        while not self._stop.wait(PAUSE):
            now = self.registry.count()
            if now != seen:
                seen = now
                self.changed()

    def _listen(self) -> None:
        with self.registry.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(f"LISTEN {CHANNEL}"))
            self._arrived()
            try:
                self._notices(connection)
            finally:
                connection.invalidate()

    def _notices(self, connection: Connection) -> None:
        driver = connection.connection.driver_connection
        asked = time.monotonic()
        while not self._stop.is_set() and driver is not None:
            for _ in driver.notifies(timeout=PAUSE, stop_after=1):
                self.changed()
            if time.monotonic() - asked > 1:
                # A connection that is cut off silently never tells anything again: it is asked.
                connection.execute(text("SELECT 1"))
                asked = time.monotonic()

    def _arrived(self) -> None:
        """Whatever happened before this moment was not heard."""
        self.reached = True
        self.changed()
