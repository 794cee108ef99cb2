"""The ClientApp message by message: what it answers, what it charges, and what never leaves it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

import client.app
from client.job import ClientJob, Place
from lora.errors import DataError, LetheError
from privacy.accounting import Event
from privacy.ledger import Ledger, Receipt
from privacy.mechanism import Mechanism
from privacy.randomness import SecureRandomness
from strategies.federated.wire import (
    BUDGET,
    DECLINED,
    EVALUATE,
    FRAME,
    GREET,
    INTERNAL,
    TRAIN,
    Order,
    Update,
)
from strategies.flower import number, take_identity

Sections = dict[str, Any]
PRIVATE = {"privacy": {"epsilon": 5.0, "delta": 1e-4}}
SECRET = "the patient in bed 4 has measles"


class Node:
    """A client of a small job, its app called as Flower's runtime would."""

    def __init__(self, tree: Sections, ledger: Path, *, index: int = 0) -> None:
        take_identity()
        self.job, self.index, self.ledger = ClientJob.model_validate(tree), index, ledger
        config: dict[str, bool | float | int | str] = {
            "partition-id": index,
            "num-partitions": 3,
            "ledger": str(ledger),
        }
        self.context = Context(run_id=1, node_id=7, node_config=config, state=RecordDict(), run_config={})
        self.context.run_config["job"] = json.dumps(tree)
        self.app: ClientApp = client.app.build()

    def order(self, **changes: Any) -> Order:
        learner = self.job.world.learner
        fields: dict[str, Any] = {
            "round": 1,
            "vector": learner.start(),
            "train": ("B", "head"),
            "send": ("B", "head"),
            "frame": learner.adapted.frame.digest,
            "layout": learner.signature,
        }
        return Order(**{**fields, **changes})

    def ask(self, kind: str = TRAIN, **changes: Any) -> Message:
        content = RecordDict({"config": ConfigRecord({})}) if kind == GREET else self.order(**changes).content()
        message = Message(content, dst_node_id=7, message_type=kind)
        number(message)
        return self.app(message, self.context)

    @property
    def charged(self) -> int:
        return Ledger(self.ledger).position() if self.ledger.exists() else 0


MakeNode = Callable[..., Node]


@pytest.fixture
def node(sections: Callable[..., Sections], tmp_path: Path) -> MakeNode:
    def make(index: int = 0, **changes: Any) -> Node:
        return Node(sections(**changes), tmp_path / "ledger.sqlite", index=index)

    return make


def keys(message: Message) -> dict[str, set[str]]:
    return {name: set(record.keys()) for name, record in message.content.items()}


def scalars(message: Message) -> bool:
    """Whether everything beside the arrays is a single number or word."""
    records = [record for name, record in message.content.items() if name != "arrays"]
    return all(isinstance(value, int | float | str) for record in records for value in record.values())


# --- What leaves the node --------------------------------------------------------------------------------------------


def test_an_open_client_sends_b_and_head_its_count_and_its_mean_loss(node: MakeNode) -> None:
    client_node = node()
    reply = client_node.ask()
    assert keys(reply) == {
        "arrays": {"vector"},
        "metrics": {"num-examples", "loss"},
        "report": {"client", "frame", "round"},
    }
    assert scalars(reply)
    update = Update.read(reply)
    layout = client_node.job.world.learner.layout
    assert update.vector.shape == (layout.length(("B", "head")),)
    assert update.examples == len(client_node.job.world.shares[0])
    assert update.client == "0"
    assert not torch.equal(update.vector, layout.select(client_node.order().vector, ("B", "head")))
    assert client_node.charged == 0


def test_a_private_client_sends_no_loss_and_nothing_per_example(node: MakeNode) -> None:
    client_node = node(**PRIVATE)
    reply = client_node.ask()
    assert keys(reply) == {
        "arrays": {"vector"},
        "metrics": {"num-examples", "epsilon"},
        "report": {"client", "frame", "round"},
    }
    assert scalars(reply)
    update = Update.read(reply)
    assert update.loss is None
    assert update.epsilon == pytest.approx(Ledger(client_node.ledger).epsilon("0", delta=1e-4))
    assert 0 < (update.epsilon or 0.0) < 5.0


@pytest.mark.parametrize(("strategy", "send"), [("lora", ("A", "B", "head")), ("rolora", ("A", "head"))])
def test_only_what_was_ordered_is_sent(node: MakeNode, strategy: str, send: tuple[str, ...]) -> None:
    client_node = node(federation={"strategy": strategy})
    update = Update.read(client_node.ask(train=send, send=send))
    assert len(update.vector) == client_node.job.world.learner.layout.length(send)  # type: ignore[arg-type]


def test_a_greeting_says_who_how_many_and_which_frame(node: MakeNode) -> None:
    client_node = node(index=2)
    reply = client_node.ask(GREET)
    assert keys(reply) == {"metrics": {"num-examples"}, "report": {"client", "node", "frame", "layout"}}
    assert reply.content["metrics"]["num-examples"] == len(client_node.job.world.shares[2])
    assert (reply.content["report"]["client"], reply.content["report"]["node"]) == ("2", "2")
    assert reply.content["report"]["frame"] == client_node.job.world.learner.adapted.frame.digest


@pytest.mark.parametrize("index", [-1, 3])
def test_a_node_outside_the_federation_has_no_examples_and_declines(node: MakeNode, index: int) -> None:
    client_node = node(index=index)
    assert client_node.ask(GREET).content["metrics"]["num-examples"] == 0
    reply = client_node.ask()
    assert (reply.error.code, "0 to 2" in str(reply.error.reason)) == (DECLINED, True)


def test_an_open_client_scores_its_own_examples(node: MakeNode) -> None:
    client_node = node(index=1)
    reply = client_node.ask(EVALUATE, train=(), send=())
    assert keys(reply) == {"metrics": {"num-examples", "accuracy", "loss"}, "report": {"client"}}
    scores = client_node.job.world.learner.score(client_node.order().vector, client_node.job.world.client(1))
    assert reply.content["metrics"]["accuracy"] == pytest.approx(scores.accuracy)
    assert reply.content["metrics"]["loss"] == pytest.approx(scores.loss)


def test_a_private_client_does_not_report_its_accuracy(node: MakeNode) -> None:
    reply = node(**PRIVATE).ask(EVALUATE)
    assert reply.error.code == DECLINED
    assert "evaluate_clients" in str(reply.error.reason)


# --- What goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE, GREET])
@pytest.mark.parametrize("error", [RuntimeError(SECRET), DataError(SECRET), LetheError(SECRET), KeyError(SECRET)])
def test_the_text_of_an_exception_never_leaves(
    node: MakeNode, monkeypatch: pytest.MonkeyPatch, kind: str, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    for name in ("fit_one", "evaluation", "greeting"):
        monkeypatch.setattr(client.app, name, fail)
    reply = node().ask(kind)
    assert reply.error.code == INTERNAL
    assert type(error).__name__ in str(reply.error.reason)
    assert "measles" not in str(reply)


def test_a_node_without_a_partition_id_answers_with_an_error(node: MakeNode) -> None:
    client_node = node()
    del client_node.context.node_config["partition-id"]
    reply = client_node.ask()
    assert (reply.error.code, "ConfigError" in str(reply.error.reason)) == (INTERNAL, True)


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
@pytest.mark.parametrize(("change", "word"), [({"frame": "0" * 64}, "frame"), ({"layout": "0" * 64}, "layout")])
def test_an_order_for_another_frame_or_layout_is_refused_and_costs_nothing(
    node: MakeNode, kind: str, change: dict[str, str], word: str
) -> None:
    client_node = node(**PRIVATE)
    reply = client_node.ask(kind, **change)
    assert reply.error.code == FRAME
    assert word in str(reply.error.reason)
    assert client_node.charged == 0


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("count", [0, 1])
def test_a_client_with_too_few_examples_declines(node: MakeNode, count: int, private: bool) -> None:
    client_node = node(seed=40 + count, **(PRIVATE if private else {}))
    vars(client_node.job.world)["shares"] = [tuple(range(count)), tuple(range(20)), tuple(range(20))]
    reply = client_node.ask()
    assert reply.error.code == DECLINED
    assert f"holds {count} examples" in str(reply.error.reason)
    assert "training.min_examples=2" in str(reply.error.reason)
    assert client_node.charged == 0


def test_a_client_with_one_example_takes_part_where_that_is_allowed(node: MakeNode) -> None:
    client_node = node(seed=43, training={"min_examples": 1}, privacy={"noise_multiplier": 1.0})
    vars(client_node.job.world)["shares"] = [(3,), tuple(range(20)), tuple(range(20))]
    update = Update.read(client_node.ask())
    assert update.examples == 1
    assert bool(update.vector.isfinite().all())


# --- The ledger ------------------------------------------------------------------------------------------------------


def test_a_step_over_the_budget_is_refused_with_nothing_charged_drawn_or_trained(
    node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    client_node = node(**PRIVATE)
    Ledger(client_node.ledger).charge("0", Event(0.9, 0.8, 5), purpose="earlier", budget=None, delta=1e-4)
    before = Ledger(client_node.ledger).rows()
    touched: list[str] = []
    monkeypatch.setattr(client.app, "run", lambda *_, **__: touched.append("run"))
    monkeypatch.setattr(SecureRandomness, "gaussian", lambda *_, **__: touched.append("noise"))
    monkeypatch.setattr(SecureRandomness, "lot", lambda *_, **__: touched.append("lot"))
    reply = client_node.ask()
    assert reply.error.code == BUDGET
    assert "budget 5" in str(reply.error.reason)
    assert not touched
    assert Ledger(client_node.ledger).rows() == before


def test_the_charge_is_on_disk_before_anything_is_drawn(node: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    client_node = node(**PRIVATE, training={"steps": 3})
    charged_when: list[tuple[str, int]] = []
    lot, noise = SecureRandomness.lot, Mechanism.noise

    def spy_lot(self: SecureRandomness, population: int, *, rate: float) -> Any:
        charged_when.append(("lot", client_node.charged))
        return lot(self, population, rate=rate)

    def spy_noise(self: Mechanism, size: int, randomness: Any) -> Any:
        charged_when.append(("noise", sum(row.steps for row in Ledger(client_node.ledger).rows("0"))))
        return noise(self, size, randomness)

    monkeypatch.setattr(SecureRandomness, "lot", spy_lot)
    monkeypatch.setattr(Mechanism, "noise", spy_noise)
    assert not client_node.ask().has_error()
    assert sorted(charged_when) == [("lot", 1)] * 3 + [("noise", 3)] * 3


def test_what_is_charged_is_what_runs(node: MakeNode) -> None:
    client_node = node(**PRIVATE)
    client_node.ask(round=1)
    client_node.ask(round=2)
    rows = Ledger(client_node.ledger).rows()
    population = len(client_node.job.world.shares[0])
    assert [row.purpose for row in rows] == ["round 1", "round 2"]
    for row in rows:
        assert (row.client, row.steps, row.sampling, row.unit) == ("0", 2, "poisson", "example")
        assert row.rate == pytest.approx(6 / population)
    # Noise is calibrated so that all rounds of the run cost the whole budget, and no more.
    assert Ledger(client_node.ledger).epsilon("0", delta=1e-4) == pytest.approx(5.0, rel=2e-3)
    third = client_node.ask(round=3)
    assert third.error.code == BUDGET


def test_a_training_that_crashes_after_the_charge_stays_charged(
    node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    client_node = node(**PRIVATE)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError(SECRET)

    monkeypatch.setattr(client.app, "run", fail)
    reply = client_node.ask()
    assert (reply.error.code, "measles" in str(reply.error.reason)) == (INTERNAL, False)
    assert client_node.charged == 1


def test_a_ledger_that_cannot_be_written_stops_the_client(node: MakeNode, tmp_path: Path) -> None:
    client_node = node(**PRIVATE)
    client_node.ledger.write_bytes(b"this is no database, and it is long enough to be read as one " * 20)
    reply = client_node.ask()
    assert (reply.error.code, "PrivacyError" in str(reply.error.reason)) == (INTERNAL, True)


def test_an_open_job_opens_no_ledger(node: MakeNode) -> None:
    client_node = node()
    client_node.ask()
    assert not client_node.ledger.exists()
    order = client_node.order()
    assert client.app.charge(client_node.job, [], Place(0, client_node.ledger), order) == Receipt()
