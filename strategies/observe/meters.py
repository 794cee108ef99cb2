"""The metrics of server and node: counts, seconds, bytes, epsilon; never texts, labels or values of an example."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from strategies.federated.wire import REASONS

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600)
"""Upper ends of the buckets, from a checkpoint to a round of a large model."""
STATED = ("delta", "unit", "adjacency", "sampling", "simulated")
"""What every epsilon is shown with."""
MOST_NAMES, LONGEST_NAME, OTHER = 1000, 64, "other"

Record = Mapping[str, Any]


class Names:
    """Label values for names that come from outside: after the first thousand all others are one, "other"."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def __call__(self, name: str) -> str:
        """Return the label value for a name."""
        short = name[:LONGEST_NAME]
        if short not in self._known and len(self._known) >= MOST_NAMES:
            return OTHER
        self._known.add(short)
        return short


def stated(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the labels that say what an epsilon means; facts that nobody gave are empty."""
    labels = {key: facts.get(key, "") for key in STATED}
    return {key: f"{value:g}" if isinstance(value, float) else str(value).lower() for key, value in labels.items()}


class ServerMeters:
    """What the records of a run say, as metrics; `hear` takes one record of `server.records` after the other."""

    def __init__(self, *, run: str, engine: str) -> None:
        self.registry = CollectorRegistry()
        self._client, self._engine, self._stated = Names(), engine, stated({})
        self._info = Info("lethe_server", "The run that this server app plays.", registry=self.registry)
        self._info.info({"run": run, "engine": engine})
        self._progress()
        self._clients()
        self._results()
        self._hearers: dict[str, Callable[[Record], None]] = {
            "begun": self._begun,
            "waiting": self._roster,
            "roster": self._roster,
            "resumed": self._resumed,
            "round": self._finished,
        }
        ProcessCollector(registry=self.registry)

    def hear(self, record: Record) -> None:
        """Take note of a record; kinds that no metric is about are passed over."""
        hearer = self._hearers.get(record["kind"])
        if hearer is not None:
            hearer(record)

    def _progress(self) -> None:
        self.planned = self._gauge("rounds_planned", "Rounds that the run is to have (federation.rounds).")
        self.round = self._gauge("round", "Number of the round that runs; after the last one, its number.")
        self.finished = self._gauge("rounds_finished", "Rounds finished, those before a resume included.")
        self.heard = self._gauge("last_round_timestamp_seconds", "When the last round finished, in Unix time.")
        self.seconds = Histogram(
            "lethe_server_step_seconds",
            "Seconds of a round's step: train (waiting for clients included), aggregate, evaluate, checkpoint.",
            ["step"],
            buckets=SECONDS,
            registry=self.registry,
        )

    def _clients(self) -> None:
        self.online = self._gauge("clients_online", "Clients that have answered the greeting and are connected.")
        self.wanted = self._gauge("clients_wanted", "Clients without which no round is used (federation.min_clients).")
        self.selected = self._gauge("clients_selected", "Clients ordered to train in the last round.")
        self.accepted = self._gauge("clients_accepted", "Clients whose updates the last round used.")
        self.updates = self._counter("updates", "Updates used, by client.", "client")
        self.refused = self._counter("refusals", "Replies not used, or missing.", "client", "reason")
        self.up = self._counter("upload_bytes", "Bytes of the numbers in updates used.")
        self.down = self._counter("download_bytes", "Bytes of the numbers in orders to train.")

    def _results(self) -> None:
        self.accuracy = self._gauge("validation_accuracy_ratio", "Accuracy on the validation split, 0 to 1.")
        self.loss = self._gauge("validation_loss", "Mean loss on the validation split, in nats.")
        self.error = self._gauge("aggregation_error", "Distance of the last mean from the exact mean of products.")
        self.epsilon = self._gauge("epsilon_max", "Largest epsilon that a client has reported.", *STATED)
        self.budget = self._gauge("epsilon_budget", "Epsilon that no client may pass (privacy.epsilon).", *STATED)
        self._epsilon = 0.0

    def _begun(self, record: Record) -> None:
        self.planned.set(record["rounds"])
        self.wanted.set(record["min_clients"])
        if record.get("privacy"):
            self._stated = stated({**record["privacy"], "simulated": self._engine != "deployment"})
            if record["privacy"].get("epsilon_budget") is not None:
                self.budget.labels(**self._stated).set(record["privacy"]["epsilon_budget"])

    def _roster(self, record: Record) -> None:
        self.online.set(record["online"])
        if "round" in record:
            self.round.set(record["round"])

    def _resumed(self, record: Record) -> None:
        self.round.set(record["round"])
        self.finished.set(record["round"])

    def _finished(self, record: Record) -> None:
        self.round.set(record["round"])
        self.finished.set(record["round"])
        self.heard.set(record["time"])
        self._replies(record)
        self.error.set(record["aggregation_error"])
        for gauge, key in ((self.accuracy, "accuracy"), (self.loss, "loss")):
            if record[key] is not None:  # Not every round is evaluated; the last figure stays.
                gauge.set(record[key])
        for step, seconds in record.get("seconds", {}).items():
            self.seconds.labels(step).observe(seconds)
        self._epsilon = max([self._epsilon, *record.get("epsilon", {}).values()])
        if self._epsilon:
            self.epsilon.labels(**self._stated).set(self._epsilon)

    def _replies(self, record: Record) -> None:
        self.selected.set(len(record["selected"]))
        self.accepted.set(len(record["accepted"]))
        for client in record["accepted"]:
            self.updates.labels(self._client(client)).inc()
        for refused in record["refused"]:
            self.refused.labels(self._client(refused["client"]), refused["reason"]).inc()
        self.up.inc(record["bytes_up"])
        self.down.inc(record["bytes_down"])

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"lethe_server_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"lethe_server_{name}", text, labels, registry=self.registry)


class NodeMeters:
    """What a node has done; a process plays one node, or all clients of a simulation."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._client = Names()
        self._info = Info("lethe_node", "The node that this process plays.", registry=self.registry)
        self._refused = self._counter("refusals", "Messages answered with a refusal, by reason.", "reason")
        for reason in REASONS.values():  # A counter that begins at 1 has no increase for Prometheus.
            self._refused.labels(reason)
        self._rounds = self._counter("rounds_trained", "Rounds trained and answered.", "client")
        self._examples = self._gauge("examples", "Examples that the client trains on.", "client")
        self._up = self._counter("upload_bytes", "Bytes of the arrays in answers.")
        self._down = self._counter("download_bytes", "Bytes of the arrays in orders.")
        self._round = self._gauge("round", "Number of the last round that an order was for.")
        self._order = self._gauge("last_order_timestamp_seconds", "When the last message was answered, in Unix time.")
        self._seconds = Histogram(
            "lethe_node_step_seconds",
            "Seconds of handling a message, by its kind: greet, train, evaluate.",
            ["step"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._epsilon = self._gauge(
            "epsilon", "Epsilon spent by a client over all runs of its ledger.", "client", "ledger", *STATED
        )
        ProcessCollector(registry=self.registry)

    def introduce(self, *, node: str, federation: str) -> None:
        """Say who the node is."""
        self._info.info({"node": node, "federation": federation})

    def answered(
        self, step: str, *, seconds: float, up: int, down: int, number: int | None = None, reason: str | None = None
    ) -> None:
        """Count a message that was answered, or refused for a reason."""
        self._seconds.labels(step).observe(seconds)
        self._up.inc(up)
        self._down.inc(down)
        self._order.set(time.time())
        if number is not None:
            self._round.set(number)
        if reason is not None:
            self._refused.labels(reason).inc()

    def trained(self, client: str, *, examples: int) -> None:
        """Count a round that a client has trained."""
        self._rounds.labels(self._client(client)).inc()
        self.holds(client, examples=examples)

    def holds(self, client: str, *, examples: int) -> None:
        """Note how many examples a client holds."""
        self._examples.labels(self._client(client)).set(examples)

    def charged(self, client: str, *, ledger: str, epsilon: float, facts: Mapping[str, Any]) -> None:
        """Note what a client has spent, with what that figure means."""
        self._epsilon.labels(client=self._client(client), ledger=ledger, **stated(facts)).set(epsilon)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"lethe_node_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"lethe_node_{name}", text, labels, registry=self.registry)
