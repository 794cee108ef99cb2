"""Requests that come from a federation's nodes: their offers are ordered, served, and answered with the record.

The ServerApp of a run that forgets instead of training. Offers are carried out one after the other: an order names the
classes that are forgotten by then, which are no answers any more.
"""

import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid
from pydantic import Field, ValidationError

from lora.config import Section
from lora.errors import ConfigError, FederationError, LetheError, RunError, WrongUpdate, nearest
from server.directory import run_directory
from server.forgetting.asking import Accepted, fitting, new_order, wish_client
from server.forgetting.requests import ForgetRequests
from server.forgetting.sources import open_store
from server.grid import PacedGrid
from server.roster import exchange
from strategies.observe.logs import event, structured
from strategies.unlearning.remote import ForgetAnswer
from strategies.unlearning.wire import OFFERS, ORDER, RECORD, Letter, Offered, ask_offers

log = logging.getLogger("lethe.server")

DATABASE_VARIABLE = "LETHE_FORGET_DATABASE"
LOOK_S = 1.0
"""Seconds between looks for nodes that are not there yet."""


class Collection(Section):
    """What a run that forgets is asked for, as the run config's `forget` holds it."""

    run: str
    """Name of the run whose model forgets."""
    client: str | None = None
    """The node whose offers are taken; null: all that are there."""
    wait: float = Field(60.0, gt=0)
    """Seconds to wait for a node, or for the named one."""
    timeout: float = Field(1800.0, gt=0)
    """Seconds that a node may take for an answer."""


@dataclass(frozen=True)
class Found:
    """One offer of one node; `answered` says that the node has trained an answer for it before."""

    node: int
    client: str
    offer: str
    answered: bool


class Collector:
    """Takes nodes' offers into a store's requests.

    | case | what happens |
    |---|---|
    | killed at any instant | the next collection goes on: the node sends the answer that it has, the store knows it |
    | another adapter is served since the node answered | the node gets another order |
    | a request stops for a fault of the server's | the answer waits at the node, and is served once that is mended |
    | a node declines, is silent, or sends nonsense | the others' are served; the run fails at its end, and says who |
    | two collections of a store | one after the other |
    | the record does not reach its node | served all the same; the next collection brings it |
    """

    def __init__(self, requests: ForgetRequests, grid: Grid, asked: Collection, *, database: str | None = None) -> None:
        self.requests, self.grid, self.asked, self.database = requests, grid, asked, database

    def collect(self) -> int:
        """Serve all offers that can be; returns how many. Raises FederationError that names the others."""
        with self.requests.store.collecting():
            found, refused = self.look()
            served = 0
            for each in found:
                why = self._tried(each)
                served += why is None
                if why is not None:
                    event("forgetting", client=each.client, step="refused", reason=why)
                    refused.append(f"{each.client}: {why}")
        event("forgetting", step="collected", accepted=served, refused=len(refused))
        if refused:
            raise FederationError(f"{served} offers were served, {len(refused)} not: {'; '.join(refused[:5])}")
        return served

    def _tried(self, found: Found) -> str | None:
        """Serve one offer; returns why it could not be. No answer of one node keeps the others' from being served."""
        try:
            self._serve(found)
        except LetheError as error:
            return str(error)
        except Exception as error:
            log.exception("an offer of %s could not be served", found.client)
            return f"{type(error).__name__}; the server's log has the details"
        return None

    def look(self) -> tuple[list[Found], list[str]]:
        """Ask the nodes that are there what they offer; returns that, and why some could not say.

        Raises FederationError where no node, or not the named one, is there in time.
        """
        deadline, heard, refused = time.monotonic() + self.asked.wait, dict[int, Offered](), list[str]()
        while True:
            self._hear(set(self.grid.get_node_ids()) - set(heard), heard, refused)
            names = {each.client: node for node, each in heard.items()}
            if self.asked.client in names or (self.asked.client is None and (heard or refused)):
                break
            if time.monotonic() >= deadline:
                who = self.asked.client or "any node"
                raise FederationError(
                    f"{who} is not there after {self.asked.wait:g} s{nearest(who, names)}; `lethe deploy status` shows "
                    f"who is" + (f" ({'; '.join(refused[:3])})" if refused else "")
                )
            time.sleep(LOOK_S)
        wanted = names if self.asked.client is None else {self.asked.client: names[self.asked.client]}
        found = [Found(node, name, offer, offer in heard[node].answered)
                 for name, node in sorted(wanted.items()) for offer in heard[node].offers]  # fmt: skip
        return found, refused if self.asked.client is None else []

    def _hear(self, nodes: Iterable[int], heard: dict[int, Offered], refused: list[str]) -> None:
        """Ask nodes once; one that cannot say is asked again at the next look."""
        order = sorted(nodes)
        messages = [Message(ask_offers(self.asked.run), dst_node_id=node, message_type=OFFERS) for node in order]
        ids, replies = exchange(self.grid, messages, timeout=self.asked.wait)
        refused.clear()
        silent = dict.fromkeys(order, f"no answer within {self.asked.wait:g} s")
        for reply in replies:
            node = order[ids[reply.metadata.reply_to_message_id]]
            try:
                heard[node] = Offered.read(_sound(reply))
                del silent[node]
            except LetheError as error:
                silent[node] = str(error)
        refused += [f"node {node}: {why}" for node, why in silent.items()]

    def _serve(self, found: Found) -> None:
        """Carry one offer out, and send its node the record. Raises LetheError where that cannot be."""
        accepted = self._answered(found) if found.answered else None
        if accepted is None:
            accepted = self._ordered(found)
        mine = accepted.request.id
        self.requests.carry_out(
            database=self.database, told=lambda name, step: self._tell(found, step) if name == mine else None
        )
        status = self.requests.status(mine)
        if status.state != "done":
            raise RunError(f"the request is {status.state}{f' at {status.why}' if status.why else ''}")
        self._send(found, RECORD, Letter(found.offer, self.requests.store.record(mine).read_bytes()))
        self._tell(found, "served")

    def _answered(self, found: Found) -> Accepted | None:
        """Take the answer that the node has; None where it is damaged, or no order of now is what it answers."""
        letter, store = self._send(found, ORDER, Letter(found.offer)), self.requests.store
        try:
            wish = wish_client(store, found.client, letter.data)
            digest = store.keyed(wish.kind, *wish.content)
            if not any(each.digest == digest and store.done(each.id) for each in store.requests()):
                # A request that stopped is begun again only over the adapter that it was trained over.
                fitting(store, ForgetAnswer.from_bytes(letter.data), self.requests.stage.served)
        except WrongUpdate:
            return None
        self._tell(found, "answered")
        return self.requests.add(wish)

    def _ordered(self, found: Found) -> Accepted:
        store = self.requests.store
        order = new_order(store, found.client, offer=found.offer)
        self._tell(found, "ordered")
        letter = self._send(found, ORDER, Letter(found.offer, order.to_bytes()))
        self._tell(found, "answered")
        return self.requests.add(wish_client(store, found.client, letter.data))

    def _send(self, found: Found, kind: str, letter: Letter) -> Letter:
        """Send a letter and return the reply. Raises FederationError for none, WrongUpdate for a strange one."""
        message = Message(letter.content(), dst_node_id=found.node, message_type=kind)
        sent, replies = exchange(self.grid, [message], timeout=self.asked.timeout)
        if not sent:
            raise FederationError("nothing could be sent to it; `lethe deploy status` shows whether it is there")
        if not replies:
            raise FederationError(f"no answer within {self.asked.timeout:g} s (--timeout)")
        return Letter.read(_sound(replies[0]))

    def _tell(self, found: Found, step: str) -> None:
        event("forgetting", client=found.client, step=step)


def _sound(reply: Message) -> Message:
    if reply.has_error():
        raise FederationError(reply.error.reason or "error")
    return reply


def collection(config: dict[str, Any]) -> Collection:
    """Return what a run config asks to collect. Raises ConfigError."""
    try:
        return Collection.model_validate_json(str(config["forget"]))
    except ValidationError as error:
        raise ConfigError(f"the run config's forget cannot be used: {error}") from error


def collect(grid: Grid, asked: Collection, *, name: str) -> int:
    """Serve what nodes offer, into the store of a run below $LETHE_RUNS; returns how many offers.

    Raises RunError for a run without a store that cannot get one, FederationError for offers that were not served.
    """
    with structured(run=name, engine="deployment"):
        place = run_directory({"name": asked.run}, 0)
        if not place.is_dir():
            raise RunError(f"run '{asked.run}' is not in {place.parent.absolute()}; name one that this server has run")
        requests = ForgetRequests(open_store(place))
        collector = Collector(requests, PacedGrid(grid), asked, database=os.environ.get(DATABASE_VARIABLE))
        served = collector.collect()
        log.info("%d offers served; records: %s", served, requests.store.directory / "records")
        return served
