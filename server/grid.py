"""A Grid that asks the SuperLink for replies no more often than it must, and no less often than pays."""

import logging
import time
from collections.abc import Iterable, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from strategies.flower_runtime import passing, quicken

log = logging.getLogger("lethe.server")

POLL_S = 0.2
"""Seconds between looks for replies; Flower's own Grid waits for 3, which a round of small adapters would notice."""


class PacedGrid(Grid):
    """Hands everything on to another Grid; looks for replies come at least `pause` seconds one after the other."""

    def __init__(self, inner: Grid, *, pause: float = POLL_S) -> None:
        quicken()
        self.inner, self.pause = inner, pause
        self._last = float("-inf")

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self.inner.set_run(run)

    @property
    def run(self) -> Run:
        """The run."""
        return self.inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message, as Flower's deprecated interface asks for."""
        return self.inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes that are online."""
        return self.inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; returns an id for each, empty for one that could not be sent."""
        return [identity or "" for identity in self.inner.push_messages(list(messages))]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there by now; none while the SuperLink cannot say, which the round's time bounds.

        SQLite under load answers "database is locked" after five seconds, which Flower would let end the whole run.
        """
        wanted = list(message_ids)
        if not wanted:
            return []
        time.sleep(max(0.0, self._last + self.pause - time.monotonic()))
        self._last = time.monotonic()
        try:
            return list(self.inner.pull_messages(wanted))
        except Exception as error:
            if not passing(error):
                raise
            log.warning("the SuperLink did not hand out replies (%s); asked again", type(error).__name__)
            return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Sequence[Message]:
        """Send messages and wait for their replies, for `timeout` seconds at most."""
        waiting = {identity for identity in self.push_messages(messages) if identity}
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting:
            found = list(self.pull_messages(waiting))
            replies += found
            waiting -= {reply.metadata.reply_to_message_id for reply in found}
            if time.monotonic() >= deadline:
                break
        return replies
