"""The roster: which node is which client, learned by greeting every new node once."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from lora.errors import FederationError
from strategies.federated.wire import CONFIG, GREET, METRICS, REPORT, WEIGHT


@dataclass(frozen=True)
class Member:
    """A client that answered the greeting."""

    client: str
    node: int
    examples: int
    frame: str


def exchange(grid: Grid, messages: Sequence[Message], *, timeout: float) -> tuple[dict[str, int], list[Message]]:
    """Send messages and collect replies until all are there or `timeout` seconds have passed.

    Returns which message (by its place) each id is, and the replies. Replies to anything else, and second replies to
    the same message, are dropped: an update counts once.
    """
    ids = {identity: place for place, identity in enumerate(grid.push_messages(messages))}
    waiting, replies = dict.fromkeys(ids), []
    deadline = time.monotonic() + timeout
    while waiting:
        for reply in grid.pull_messages(list(waiting)):
            answered = reply.metadata.reply_to_message_id
            if answered in waiting:
                del waiting[answered]
                replies.append(reply)
        if not waiting or time.monotonic() >= deadline:
            break
        time.sleep(0.05)
    return ids, replies


class Roster:
    """Clients by node id; `names` is the live view that the strategy reads, `silent` says why a node is not in it."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.names: dict[int, str] = {}
        self.silent: dict[int, str] = {}
        self._former: dict[int, str] = {}

    def refresh(self, grid: Grid, *, timeout: float) -> None:
        """Greet nodes not seen before, and forget nodes that left."""
        present = set(grid.get_node_ids())
        self.names = {node: name for node, name in self.names.items() if node in present}
        self.silent = {node: reason for node, reason in self.silent.items() if node in present}
        # A node whose client answers from another node by now is left alone until that one goes.
        taken = set(self.names.values())
        self._former = {node: name for node, name in self._former.items() if node in present and name in taken}
        new = sorted(present - set(self.names) - set(self._former))
        if new:
            self._greet(grid, new, timeout=timeout)

    def await_clients(self, grid: Grid, *, wanted: int, timeout: float) -> None:
        """Wait until `wanted` clients are there. Raises FederationError when the time is up."""
        deadline = time.monotonic() + timeout
        self.refresh(grid, timeout=timeout)
        while len(self.names) < wanted:
            if time.monotonic() >= deadline:
                reasons = "; ".join(sorted(set(self.silent.values()))[:3])
                raise FederationError(
                    f"{len(self.names)} clients are connected, federation.min_clients={wanted} are needed"
                    + (f" ({reasons})" if reasons else "")
                )
            time.sleep(0.5)
            self.refresh(grid, timeout=timeout)

    def _greet(self, grid: Grid, nodes: Sequence[int], *, timeout: float) -> None:
        content = RecordDict({CONFIG: ConfigRecord({"hello": True})})
        messages = [Message(content, dst_node_id=node, message_type=GREET) for node in nodes]
        ids, replies = exchange(grid, messages, timeout=timeout)
        self.silent |= dict.fromkeys(nodes, f"no answer to the greeting within {timeout:g} s")
        for reply in replies:
            node = messages[ids[reply.metadata.reply_to_message_id]].metadata.dst_node_id
            if reply.has_error():
                self.silent[node] = reply.error.reason or "error"
            elif (member := _member(reply, node)) is None:
                self.silent[node] = "the answer to the greeting is malformed"
            else:
                self._seat(member)

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
        return Member(str(report["client"]), node, int(metrics[WEIGHT]), str(report["frame"]))
    except (KeyError, TypeError, ValueError):
        return None
