"""The roster: which node is which client, learned by greeting every new node once."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from lora.errors import FederationError
from strategies.federated.wire import CONFIG, GREET, METRICS, REPORT, WEIGHT

log = logging.getLogger("lethe.server")

PAUSE_S = 0.05
"""Seconds between looks for replies, at least; a Grid over a network takes its own time."""
AGAIN_S = 15.0
"""Seconds after which a node that could not answer the greeting is greeted again."""
PROGRESS_S = 10.0
"""Seconds between lines that say who is waited for."""


@dataclass(frozen=True)
class Member:
    """A client that answered the greeting."""

    client: str
    node: int
    examples: int
    frame: str
    label: str
    """What its operator calls the node."""


@dataclass(frozen=True)
class Greeting:
    """A greeting that has not been answered yet."""

    node: int
    until: float
    """When it is given up, on the monotonic clock."""


def exchange(grid: Grid, messages: Sequence[Message], *, timeout: float) -> tuple[dict[str, int], list[Message]]:
    """Send messages and collect replies until all are there or `timeout` seconds have passed.

    Returns which message (by its place) each id is, and the replies. Replies to anything else, and second replies to
    the same message, are dropped: an update counts once. A message that could not be sent has no id.
    """
    ids = {identity: place for place, identity in enumerate(grid.push_messages(messages)) if identity}
    return ids, collect(grid, ids, timeout=timeout)


def collect(grid: Grid, identities: Iterable[str], *, timeout: float) -> list[Message]:
    """Collect one reply to each message until all are there or `timeout` seconds have passed; looks at least once."""
    waiting, replies = dict.fromkeys(identities), []
    deadline = time.monotonic() + timeout
    while waiting:
        for reply in grid.pull_messages(list(waiting)):
            answered = reply.metadata.reply_to_message_id
            if answered in waiting:
                del waiting[answered]
                replies.append(reply)
        if not waiting or time.monotonic() >= deadline:
            break
        time.sleep(PAUSE_S)
    return replies


class Roster:
    """Clients by node id; `names` is the live view that the strategy reads, `silent` says why a node is not in it."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.names: dict[int, str] = {}
        self.silent: dict[int, str] = {}
        self._former: dict[int, str] = {}
        self._pending: dict[str, Greeting] = {}
        self._again: dict[int, float] = {}

    def refresh(self, grid: Grid, *, timeout: float, patience: float | None = None) -> None:
        """Greet nodes not seen before, and forget nodes that left.

        A greeting may take `timeout` seconds; this call waits for `patience` of them (all, if None), and a later call
        finds what came meanwhile.
        """
        present = set(grid.get_node_ids())
        self.names = {node: name for node, name in self.names.items() if node in present}
        self.silent = {node: reason for node, reason in self.silent.items() if node in present}
        self._again = {node: when for node, when in self._again.items() if node in present}
        self._pending = {key: greeting for key, greeting in self._pending.items() if greeting.node in present}
        # A node whose client answers from another node by now is left alone until that one goes.
        taken = set(self.names.values())
        self._former = {node: name for node, name in self._former.items() if node in present and name in taken}
        asked = {greeting.node for greeting in self._pending.values()}
        resting = {node for node, when in self._again.items() if time.monotonic() < when}
        new = sorted(present - set(self.names) - set(self._former) - asked - resting)
        self._greet(grid, new, timeout=timeout)
        self._listen(grid, timeout=timeout, patience=timeout if patience is None else patience)

    def await_clients(
        self,
        grid: Grid,
        *,
        wanted: int,
        timeout: float,
        settle: bool = True,
        tell: Callable[[int], None] = lambda online: None,
    ) -> None:
        """Wait until `wanted` clients are there; with `settle`, also until no greeting is open.

        `tell` hears now and then how many are there. Raises FederationError when the time is up and fewer are there.
        """
        deadline, told = time.monotonic() + timeout, time.monotonic()
        self.refresh(grid, timeout=timeout, patience=0)
        while len(self.names) < wanted or (settle and self._pending):
            if time.monotonic() >= deadline:
                break
            if time.monotonic() >= told + PROGRESS_S:
                log.info("%s", self._standing(wanted))
                tell(len(self.names))
                told = time.monotonic()
            time.sleep(min(0.5, max(0.0, deadline - time.monotonic())))
            self.refresh(grid, timeout=timeout, patience=0)
        if len(self.names) < wanted:
            reasons = "; ".join(sorted(set(self.silent.values()))[:3])
            raise FederationError(
                f"{len(self.names)} clients are connected, federation.min_clients={wanted} are needed"
                + (f" ({reasons})" if reasons else "")
            )

    def _standing(self, wanted: int) -> str:
        lines = [f"{len(self.names)} clients are here, {wanted} are needed"]
        lines += [f"node {greeting.node} has not answered the greeting yet" for greeting in self._pending.values()]
        lines += [f"node {node}: {reason}" for node, reason in self.silent.items()]
        return "; ".join(lines)

    def _greet(self, grid: Grid, nodes: Sequence[int], *, timeout: float) -> None:
        if not nodes:
            return
        content = RecordDict({CONFIG: ConfigRecord({"hello": True})})
        messages = [Message(content, dst_node_id=node, message_type=GREET) for node in nodes]
        until = time.monotonic() + timeout
        for node, identity in zip(nodes, grid.push_messages(messages), strict=True):
            if identity:
                self._pending[identity] = Greeting(node, until)
            else:
                self._rest(node, "the greeting could not be sent")

    def _listen(self, grid: Grid, *, timeout: float, patience: float) -> None:
        """Hear the answers to open greetings, and give up those whose time is over."""
        for reply in collect(grid, self._pending, timeout=patience):
            node = self._pending.pop(reply.metadata.reply_to_message_id).node
            if reply.has_error():
                self._rest(node, reply.error.reason or "error")
            elif (member := _member(reply, node)) is None:
                self._rest(node, "the answer to the greeting is malformed")
            else:
                self._seat(member)
        over = [key for key, greeting in self._pending.items() if time.monotonic() >= greeting.until]
        for key in over:
            self._rest(self._pending.pop(key).node, f"no answer to the greeting within {timeout:g} s")

    def _rest(self, node: int, reason: str) -> None:
        """Note why a node is not in the roster, and leave it alone for a while."""
        log.warning("node %d takes no part: %s", node, reason)
        self.silent[node] = reason
        self._again[node] = time.monotonic() + AGAIN_S

    def _seat(self, member: Member) -> None:
        """Note a client; one that came back under a new node id takes its old place."""
        earlier = {node: name for node, name in self.names.items() if name == member.client}
        self._former |= earlier
        self.silent |= dict.fromkeys(earlier, f"client {member.client} answers from another node")
        self.names = {node: name for node, name in self.names.items() if node not in earlier}
        self.members[member.client] = member
        self.names[member.node] = member.client
        self.silent.pop(member.node, None)


def _member(reply: Message, node: int) -> Member | None:
    try:
        report: Any = reply.content[REPORT]
        metrics: Any = reply.content[METRICS]
        client = str(report["client"])
        return Member(client, node, int(metrics[WEIGHT]), str(report["frame"]), str(report.get("node") or client))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
