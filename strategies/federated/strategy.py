"""Federated fine-tuning of low-rank factors as a Flower strategy: FFA-LoRA, plain LoRA averaging, RoLoRA."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from lora.codec import Layout
from lora.errors import LetheError, WrongUpdate
from lora.frame import Frame
from lora.plan import FactorPlan, RoundPlan
from strategies.federated.aggregation import aggregate, aggregation_error, build_aggregator
from strategies.federated.config import FederationConfig
from strategies.federated.selection import natural, select
from strategies.federated.wire import REASONS, TRAIN, Order, Update, read_vector
from strategies.flower import Vector, remember, remembered, to_record

GRACE_S = 5.0
"""Seconds beyond federation.timeout for which an order is valid: clocks differ."""


@dataclass(frozen=True)
class Refused:
    """A reply that was not used, and why: missing, error, nan, shape, digest, declined or budget."""

    client: str
    reason: str
    detail: str


@dataclass
class Outcome:
    """What a round's replies came to."""

    accepted: dict[str, Update] = field(default_factory=dict)
    refused: list[Refused] = field(default_factory=list)
    aggregation_error: float = 0.0
    update_norm: dict[str, float] = field(default_factory=dict)


class FederatedLoRA(Strategy):
    """One round after another of `plan` over the factors of `layout`, combined by one of Flower's aggregators.

    The strategy is a plug-in of Lethe's round driver and of Flower's own loop alike. It needs to know which node is
    which client (`roster`, node id to name), because draws and sums go by client names: they are the same on every
    engine, whatever ids the nodes have and in whatever order they answer.
    """

    def __init__(
        self,
        config: FederationConfig,
        *,
        plan: FactorPlan,
        layout: Layout,
        frame: Frame,
        seed: int,
        private: bool,
        roster: dict[int, str],
        signature: str | None = None,
    ) -> None:
        self.config, self.plan, self.layout, self.frame = config, plan, layout, frame
        self.seed, self.private, self.roster = seed, private, roster
        self.signature = signature or layout.digest
        self.aggregator = build_aggregator(config)
        self.start_vector = torch.zeros(layout.size)
        self.asked: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        """Examples that each client said it holds when it was greeted; empty: nobody was asked."""
        self.outcome = Outcome()

    def round_plan(self, number: int) -> RoundPlan:
        """Return what trains and travels in a round."""
        return self.plan.at(number, head="head" in self.layout.parts)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Order the selected clients to train from `arrays`."""
        self.start_vector = read_vector_of(arrays)
        nodes = {name: node for node, name in self.roster.items()}
        plan = self.round_plan(server_round)
        content = Order(
            round=server_round,
            vector=self.start_vector,
            train=plan.train,
            send=plan.send,
            frame=self.frame.digest,
            layout=self.signature,
        ).content()
        names = select(list(nodes), self.config, seed=self.seed, number=server_round)
        # An order that nobody waits for any more is not delivered: it would spend privacy for nothing.
        ttl = self.config.timeout + GRACE_S
        return [Message(content, dst_node_id=nodes[name], message_type=TRAIN, ttl=ttl) for name in names]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, combine the usable ones, and keep what became of each in `outcome`."""
        plan = self.round_plan(server_round)
        self.outcome = Outcome()
        usable = [pair for reply in replies if (pair := self._checked(reply, server_round, plan)) is not None]
        usable.sort(key=lambda pair: natural(pair[1].client))
        if len(usable) < max(1, self.config.min_clients):
            # A discarded round leaves no trace: an aggregator with moments would otherwise move them.
            return None, None
        start = self.layout.select(self.start_vector, plan.send)
        combined = aggregate(self.aggregator, usable, start=start, number=server_round, uniform=self._uniform)
        result = self.start_vector.clone()
        self.layout.insert(result, plan.send, combined)
        self._note([update for _, update in usable], result, plan)
        return to_record(result.numpy()), MetricRecord({"num-examples": sum(u.examples for _, u in usable)})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: the server evaluates, and clients only after the last round (see the round driver)."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing, see `configure_evaluate`."""
        return None

    def summary(self) -> None:
        """Print nothing: the run's own report says it better."""

    def state(self) -> dict[str, Vector]:
        """Return what has to survive a restart."""
        return remembered(self.aggregator)

    def restore(self, state: dict[str, Vector]) -> None:
        """Take back what `state` returned."""
        remember(self.aggregator, state)

    @property
    def _uniform(self) -> bool:
        """Weights inside a private aggregate are uniform: a weight by examples would break the sensitivity."""
        return self.private or self.config.weights == "uniform"

    def _checked(self, reply: Message, number: int, plan: RoundPlan) -> tuple[Message, Update] | None:
        # The id of the answered order tells who answers: a lost node's error comes in another node's name.
        known = self.asked.get(reply.metadata.reply_to_message_id)
        client = known or self.roster.get(reply.metadata.src_node_id, "unknown")
        try:
            if reply.has_error():
                reason = REASONS.get(reply.error.code, "error")
                self.outcome.refused.append(Refused(client, reason, reply.error.reason or ""))
                return None
            update = Update.read(reply)
            self._check(update, client, number, plan)
        except _Unusable as error:
            self.outcome.refused.append(Refused(client, error.reason, str(error)))
            return None
        except WrongUpdate as error:
            self.outcome.refused.append(Refused(client, "error", str(error)))
            return None
        self.outcome.accepted[client] = update
        return reply, update

    def _check(self, update: Update, client: str, number: int, plan: RoundPlan) -> None:
        if client in self.outcome.accepted:
            raise _Unusable("error", "a second reply of the same client")
        if update.client != client:
            raise _Unusable("error", f"the reply speaks for client {update.client}")
        if update.round != number:
            raise _Unusable("error", f"the reply is of round {update.round}, this is round {number}")
        if update.frame != self.frame.digest:
            raise _Unusable("digest", f"frame {update.frame[:12]}, expected {self.frame.digest[:12]}")
        expected = self.layout.length(plan.send)
        if update.vector.shape != (expected,):
            raise _Unusable("shape", f"vector of shape {tuple(update.vector.shape)}, expected ({expected},)")
        if not bool(torch.isfinite(update.vector).all()):
            raise _Unusable("nan", "the vector holds NaN or infinite numbers")
        if update.examples < 1:
            raise _Unusable("error", f"the reply claims {update.examples} examples")
        greeted = self.sizes.get(client, update.examples)
        if update.examples != greeted:
            raise _Unusable("error", f"the reply claims {update.examples} examples, the greeting said {greeted}")

    def _note(self, updates: Sequence[Update], result: Tensor, plan: RoundPlan) -> None:
        start = self.layout.select(self.start_vector, plan.send)
        for update in updates:
            self.outcome.update_norm[update.client] = float((update.vector - start).norm())
        vectors = [self._whole(update.vector, plan) for update in updates]
        weights = [1.0 if self._uniform else float(update.examples) for update in updates]
        mean = result if self.config.aggregator == "fedavg" else _mean(vectors, weights)
        self.outcome.aggregation_error = aggregation_error(
            vectors, mean, weights=weights, layout=self.layout, frame=self.frame
        )

    def _whole(self, sent: Tensor, plan: RoundPlan) -> Tensor:
        """Return a client's vector `[layout.size]`: what it sent itself, where that is everything."""
        if sent.numel() == self.layout.size:
            return sent
        whole = self.start_vector.clone()
        self.layout.insert(whole, plan.send, sent)
        return whole


class _Unusable(LetheError):
    """A reply that arrived whole but cannot be aggregated."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def read_vector_of(arrays: ArrayRecord) -> Tensor:
    """Return the flat vector of an array record, as a copy."""
    return read_vector(Message(RecordDict({"arrays": arrays}), dst_node_id=1, message_type=TRAIN))


def _mean(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    whole = math.fsum(weights)
    return torch.stack([vector * (weight / whole) for vector, weight in zip(vectors, weights, strict=True)]).sum(0)
