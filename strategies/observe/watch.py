"""Where metrics and logs meet server and node: one listener for a run's records, one call for a handled message."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from flwr.app import Message

from privacy.ledger import Charge, Receipt
from strategies.federated.wire import CONFIG, GREET, INTERNAL, METRICS, REASONS, REPORT, WEIGHT
from strategies.observe.exporter import Address, exported
from strategies.observe.logs import event, events, structured
from strategies.observe.meters import NodeMeters, ServerMeters
from strategies.unlearning.wire import OFFERS, ORDER, RECORD

_STEPS = {GREET: "greet", OFFERS: "offers", ORDER: "forget", RECORD: "forgotten"}
_ANNOUNCED = ("online", "wanted", "rounds", "round", "accuracy", "loss", "bytes_up", "bytes_down", "aggregation_error")


class RunWatch:
    """Hears all records of a run: metrics keep the figures, the log gets an event of each."""

    def __init__(self, meters: ServerMeters) -> None:
        self.meters = meters
        self._privacy: dict[str, Any] = {}

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Take note of one record."""
        self.meters.hear(record)
        if record["kind"] == "begun":
            self._privacy = record["privacy"] or {}
        event(record["kind"], **_summed(record, self._privacy))
        for refused in record.get("refused", ()):
            event(
                "refused",
                level=logging.WARNING,
                round=record["round"],
                client=refused["client"],
                reason=refused["reason"],
            )


@contextmanager
def watched_run(*, run: str, engine: str) -> Iterator[RunWatch]:
    """Watch a run while the block plays it, as LETHE_METRICS, LETHE_LOG and LETHE_LOG_FILE ask for it."""
    meters = ServerMeters(run=run, engine=engine)
    with structured(run=run, engine=engine), exported(meters.registry, Address.given()) as address:
        if address is not None:
            event("metrics", address=f"{address.host}:{address.port}")
        try:
            yield RunWatch(meters)
        except Exception:
            events.exception("failed")
            raise


@cache
def node_meters() -> NodeMeters:
    """Return the meters of this process, whoever's messages it handles."""
    return NodeMeters()


@contextmanager
def watched_node(
    *,
    node: str,
    federation: str,
    port: int | None = None,
    form: str | None = None,
    file: Path | None = None,
) -> Iterator[Address | None]:
    """Serve the node's metrics and structure its logs while the block runs; yields where the metrics are.

    The environment (LETHE_METRICS, LETHE_LOG, LETHE_LOG_FILE) wins over what is given here.
    """
    node_meters().introduce(node=node, federation=federation)
    with (
        structured(form=form, file=file, node=node, federation=federation),
        exported(node_meters().registry, Address.given(port)) as address,
    ):
        event("node", address="none" if address is None else f"{address.host}:{address.port}")
        yield address


def answered(message: Message, reply: Message, *, seconds: float) -> None:
    """Take note of a handled message; whatever it holds, nothing is raised, and only counts are kept."""
    kind = message.metadata.message_type
    step, number = _STEPS.get(kind, kind), _number(message, CONFIG, "round")
    reason = REASONS.get(reply.error.code, REASONS[INTERNAL]) if reply.has_error() else None
    up, down = _payload(reply), _payload(message)
    node_meters().answered(step, seconds=seconds, up=up, down=down, number=number, reason=reason)
    facts: dict[str, Any] = {"step": step, "seconds": round(seconds, 4), "bytes_up": up, "bytes_down": down}
    if number is not None:
        facts["round"] = number
    if reason is not None:
        event("refused", level=logging.WARNING, reason=reason, **facts)
        return
    _note(step, reply, facts)
    event("answered", **facts)


def charged(ledger: Path, charges: Sequence[Charge], receipt: Receipt) -> None:
    """Take note of what was committed to a ledger, and of what it refused."""
    for charge in charges:
        facts = {key: getattr(charge, key) for key in ("delta", "unit", "adjacency", "sampling", "simulated")}
        if charge.client in receipt.charged:
            epsilon = receipt.charged[charge.client]
            node_meters().charged(charge.client, ledger=str(ledger), epsilon=epsilon, facts=facts)
            event("charged", client=charge.client, epsilon=epsilon, epsilon_budget=charge.budget, **facts)


def _note(step: str, reply: Message, facts: dict[str, Any]) -> None:
    """Note who answered and how many examples it holds, where the answer says so."""
    client, examples = _entry(reply, REPORT, "client"), _number(reply, METRICS, WEIGHT)
    if not isinstance(client, str) or examples is None:
        return
    facts |= {"client": client, "examples": examples}
    if step == "train":
        node_meters().trained(client, examples=examples)
    else:
        node_meters().holds(client, examples=examples)


def _summed(record: Mapping[str, Any], privacy: Mapping[str, Any]) -> Any:
    """Return the fields of a record that a log line holds: counts in place of lists, sums in place of parts."""
    facts = {key: record[key] for key in _ANNOUNCED if key in record}
    facts |= {key: len(record[key]) for key in ("selected", "accepted", "refused") if key in record}
    if record.get("seconds"):
        facts["seconds"] = round(sum(record["seconds"].values()), 4)
    if record.get("epsilon"):
        facts["epsilon"] = max(record["epsilon"].values())
    if "epsilon" in facts or record["kind"] == "begun":
        facts |= privacy
    return facts


def _payload(message: Message) -> int:
    if not message.has_content():
        return 0
    records = message.content.array_records.values()
    return sum(len(array.data) for arrays in records for array in arrays.values())


def _entry(message: Message, record: str, key: str) -> object:
    if not message.has_content() or record not in message.content:
        return None
    found: Any = message.content[record]
    return found.get(key) if hasattr(found, "get") else None


def _number(message: Message, record: str, key: str) -> int | None:
    found = _entry(message, record, key)
    return found if isinstance(found, int) else None
