"""In-process Grids: Flower's interface without Flower's runtime, clients called one by one or trained as a cohort."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from client.app import build as build_client
from client.app import charge, check, run, updates
from client.job import ClientJob, Place, work_for
from client.training import Work
from strategies.federated.wire import TRAIN, Order, refusal
from strategies.flower import number, take_identity

log = logging.getLogger("lethe.simulation")


class SequentialGrid(Grid):
    """Calls the real ClientApp for one message after the other, each client with a Context of its own.

    Fault injection for tests: `tamper` sees every reply before the server does and may replace it, or drop it by
    returning None.
    """

    def __init__(
        self,
        *,
        clients: int,
        run_config: dict[str, Any],
        ledger: Path,
        app: ClientApp | None = None,
        tamper: Callable[[int, Message], Message | None] | None = None,
    ) -> None:
        take_identity()
        self.app = app or build_client(run_config, ledger=ledger)
        self.ledger, self.tamper = ledger, tamper
        self.contexts = {
            index + 1: Context(
                run_id=1,
                node_id=index + 1,
                node_config={"partition-id": index, "num-partitions": clients},
                state=RecordDict(),
                run_config=run_config,
            )
            for index in range(clients)
        }
        self._replies: dict[str, Message] = {}
        self._run: Run | None = None

    def set_run(self, run: Run) -> None:
        """Remember the run; nothing here needs it."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that was set."""
        if self._run is None:
            raise RuntimeError("set_run was not called")
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message, as Flower's deprecated interface asks for."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return every client's node id: its number plus one."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Handle all messages now and keep the replies; returns the messages' ids."""
        batch = list(messages)
        ids = [number(message) for message in batch]
        for message, reply in zip(batch, self.handle(batch), strict=True):
            node = message.metadata.dst_node_id
            kept = reply if self.tamper is None else self.tamper(node - 1, reply)
            if kept is not None:
                self._replies[str(kept.metadata.reply_to_message_id)] = kept
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand out the kept replies, once."""
        return [self._replies.pop(identity) for identity in message_ids if identity in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, then pull: there is nothing to wait for."""
        return self.pull_messages(self.push_messages(messages))

    def handle(self, messages: Sequence[Message]) -> list[Message]:
        """Answer every message through the ClientApp."""
        return [self.app(message, self.contexts[message.metadata.dst_node_id]) for message in messages]


class CohortGrid(SequentialGrid):
    """Trains the clients of a round together, `cohort` at a time, each on its slot of the bank.

    The same checks, charges and cuts as in the ClientApp, by the same functions; whatever is not an order to train
    goes to the ClientApp itself.
    """

    def __init__(
        self, job: ClientJob, *, run_config: dict[str, Any], ledger: Path, cohort: int, **options: Any
    ) -> None:
        super().__init__(clients=job.federation.clients, run_config=run_config, ledger=ledger, **options)
        self.job, self.cohort = job, cohort

    def handle(self, messages: Sequence[Message]) -> list[Message]:
        """Answer orders to train in cohorts, everything else one by one."""
        if any(message.metadata.message_type != TRAIN for message in messages):
            return super().handle(messages)
        replies = []
        for first in range(0, len(messages), self.cohort):
            replies += self._train(messages[first : first + self.cohort])
        return replies

    def _train(self, messages: Sequence[Message]) -> list[Message]:
        order = Order.read(messages[0])
        answers: dict[str, Message] = {}
        works: list[tuple[Message, Work]] = []
        for message in messages:
            try:
                check(self.job, order)
                works.append((message, work_for(self.job, message.metadata.dst_node_id - 1, number=order.round)))
            except Exception as error:
                log.exception("a client could not take part")
                answers[message.metadata.message_id] = refusal(error, message)
        try:
            answers |= self._fit(works, order)
        except Exception as error:
            log.exception("a cohort could not be trained")
            answers |= {message.metadata.message_id: refusal(error, message) for message, _ in works}
        return [answers[message.metadata.message_id] for message in messages]

    def _fit(self, works: Sequence[tuple[Message, Work]], order: Order) -> dict[str, Message]:
        """Charge, train those within their budgets, and answer for all."""
        place = Place(0, self.ledger, simulated=True)
        answers: dict[str, Message] = {}
        epsilons: dict[str, float] = {}
        able = list(works)
        if self.job.privacy.private and works:
            receipt = charge(self.job, [work for _, work in works], place, order)
            epsilons = receipt.charged
            for message, work in works:
                if work.client in receipt.refused:
                    answers[message.metadata.message_id] = refusal(receipt.refused[work.client], message)
            able = [pair for pair in works if pair[1].client in epsilons]
        if not able:
            return answers
        chosen = [work for _, work in able]
        trained = run(self.job, chosen, order)
        for (message, _), update in zip(able, updates(self.job, chosen, trained, order, epsilons), strict=True):
            answers[message.metadata.message_id] = Message(update.content(), reply_to=message)
        return answers
