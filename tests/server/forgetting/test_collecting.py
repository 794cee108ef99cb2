"""What nodes offer is ordered, served and answered with the record; killed anywhere, it goes on and is done once."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import save

import client.forgetting
import client.offers
from client.app import build as build_client
from client.node import NodeSettings
from client.offers import Offers
from lora.errors import ConfigError, FederationError, RunError
from server.app import build
from server.forgetting.asking import wish_classes
from server.forgetting.collecting import Collection, Collector, Found
from server.forgetting.requests import ForgetRequests
from server.forgetting.signing import read_record
from server.forgetting.store import Store
from simulation.grid import SequentialGrid
from strategies.unlearning import remote
from strategies.unlearning.wire import OFFERS, ORDER, RECORD, Letter
from tests.queries import LABELS, queries, write_queries


class Nodes(SequentialGrid):
    """Nodes with settings of their own."""

    def __init__(self, *offers: Offers) -> None:
        super().__init__(clients=len(offers), run_config={}, ledger=Path("unused"))
        self.apps: dict[int, ClientApp] = {
            node: build_client(settings=each.settings) for node, each in enumerate(offers, start=1)
        }
        self.seen: list[tuple[int, str]] = []

    def handle(self, messages: Sequence[Message]) -> list[Message]:
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.seen.append((node, message.metadata.message_type))
            replies.append(self.apps[node](message, self.contexts[node]))
        return replies

    @property
    def kinds(self) -> list[str]:
        return [kind for _, kind in self.seen if kind != OFFERS]


@pytest.fixture
def node(tmp_path: Path) -> Callable[..., Offers]:
    def make(name: str, *labels: int, run: str = "first", classes: bool = True, **settings: Any) -> Offers:
        place = tmp_path / "nodes" / name
        place.mkdir(parents=True)
        made = Offers(NodeSettings(name=name, partition=0, state=place / "state", device="cpu", **settings))
        for label in labels:
            rows = write_queries(place / f"{label}.jsonl", queries(label))
            made.make(run, rows, classes=(LABELS[label],) if classes else ())
        return made

    return make


def collector(store: Store, grid: SequentialGrid, **asked: Any) -> Collector:
    return Collector(ForgetRequests(store), grid, Collection(run="first", wait=0.1, timeout=0.1, **asked))


def accuracy(store: Store, label: int) -> float:
    rows = queries(label)
    return float(ForgetRequests(store).stage.served.asked(rows).accuracy(rows))


def states(offers: Offers) -> list[str]:
    return [offers.state(each) for each in offers.all()]


def test_offers_of_two_nodes_are_served_and_answered_with_the_record(store: Store, node: Callable[..., Offers]) -> None:
    clinic, bank, other = node("clinic", 3), node("bank", 0), node("other", 1, run="second")
    before = accuracy(store, 3)
    grid = Nodes(clinic, bank, other)
    assert collector(store, grid).collect() == 2
    assert accuracy(store, 3) < before - 0.4 and set(store.manifest.forgotten) == {"money", "alarm"}
    assert (states(clinic), states(bank), states(other)) == (["done"], ["done"], ["open"])
    # The bank's order came after the clinic's, or before it; either way the later one knew what was forgotten.
    assert grid.kinds == [ORDER, RECORD, ORDER, RECORD]
    for offers in (clinic, bank):
        (path,) = offers.directory.rglob("record.json")
        record = read_record(path, public=store.about.public_key)
        assert record["asked"]["rows_from"] == "client" and record["asked"]["rows"] == 24
    texts = [text.encode() for label in (0, 3) for text in queries(label).texts]
    held = [path.read_bytes() for path in store.directory.rglob("*") if path.is_file()]
    assert not any(text in data for text in texts for data in held)
    assert collector(store, grid).collect() == 0


def test_only_the_named_node_is_asked_for_its_offers(store: Store, node: Callable[..., Offers]) -> None:
    clinic, bank = node("clinic", 3), node("bank", 0)
    assert collector(store, Nodes(clinic, bank), client="bank").collect() == 1
    assert (states(clinic), states(bank)) == (["open"], ["done"])
    with pytest.raises(FederationError, match=r"clinics is not there after 0\.1 s.*did you mean 'clinic'"):
        collector(store, Nodes(clinic, bank), client="clinics").collect()


def test_one_node_s_offers_follow_each_other(store: Store, node: Callable[..., Offers]) -> None:
    clinic = node("clinic", 3, 0)
    assert collector(store, Nodes(clinic)).collect() == 2
    assert states(clinic) == ["done", "done"] and len(store.requests()) == 2
    assert len({each.block for each in store.manifest.held}) == 2


@pytest.mark.parametrize("lost", [ORDER, RECORD])
def test_a_reply_that_is_lost_is_not_forgotten_twice(
    store: Store, node: Callable[..., Offers], lost: str, trained: list[str]
) -> None:
    """A SuperLink or a server app that dies leaves the same: the node did its part, and nobody heard of it."""
    clinic = node("clinic", 3)
    grid = Nodes(clinic)
    grid.tamper = lambda _, reply: None if grid.seen[-1][1] == lost else reply
    with pytest.raises(FederationError, match=r"0 offers were served, 1 not: clinic: no answer within 0\.1 s"):
        collector(store, grid).collect()
    # The record was taken, though its receipt was lost; an answer waits at the node.
    assert states(clinic) == (["answered"] if lost == ORDER else ["done"])
    grid.tamper = None
    assert collector(store, grid).collect() == (1 if lost == ORDER else 0)
    assert states(clinic) == ["done"] and len(store.requests()) == len(store.manifest.held) == len(trained) == 1


def test_killed_after_the_answer_was_served_and_before_its_record_was_sent(
    store: Store, node: Callable[..., Offers]
) -> None:
    clinic = node("clinic", 3)
    grid = Nodes(clinic)

    class Killed(BaseException):
        """Not an error that anything handles."""

    class Dying(Collector):
        def _send(self, found: Found, kind: str, letter: Letter) -> Letter:
            if kind == RECORD:
                raise Killed
            return super()._send(found, kind, letter)

    killed = Dying(ForgetRequests(store), grid, Collection(run="first", wait=0.1, timeout=0.1))
    with pytest.raises(Killed):
        killed.collect()
    assert states(clinic) == ["answered"] and len(store.manifest.held) == 1
    assert collector(store, grid).collect() == 1
    assert states(clinic) == ["done"] and len(store.requests()) == len(store.manifest.held) == 1


def test_an_answer_over_an_adapter_that_was_replaced_is_ordered_again(
    of_run: Store, node: Callable[..., Offers]
) -> None:
    clinic = node("clinic", 3)
    grid = Nodes(clinic)
    grid.tamper = lambda _, reply: None if grid.seen[-1][1] == ORDER else reply
    with pytest.raises(FederationError):
        collector(of_run, grid).collect()
    requests = ForgetRequests(of_run)
    requests.add(wish_classes(of_run, ["alarm"], method="gs-lora"))
    requests.carry_out()
    grid.tamper, grid.seen[:] = None, []
    assert collector(of_run, grid).collect() == 1
    # First what the node had, then an order over what is served now.
    assert grid.kinds == [ORDER, ORDER, RECORD] and set(of_run.manifest.forgotten) == {"alarm", "money"}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Orders that nodes have trained answers to."""
    found, answer_order = list[str](), client.forgetting.answer_order

    def counted(order: Any, *rest: Any, **more: Any) -> Any:
        found.append(order.request)
        return answer_order(order, *rest, **more)

    monkeypatch.setattr(client.offers, "answer_order", counted)
    return found


def test_offers_of_one_node_have_orders_of_their_own(
    store: Store, node: Callable[..., Offers], trained: list[str]
) -> None:
    clinic = node("clinic", 3, 0)
    grid, lost = Nodes(clinic), list[str]()

    def lose(_: int, reply: Message) -> Message | None:
        if grid.seen[-1][1] == ORDER and not lost:
            lost.append(ORDER)
            return None
        return reply

    grid.tamper = lose
    with pytest.raises(FederationError, match="1 offers were served, 1 not"):
        collector(store, grid).collect()
    assert collector(store, grid).collect() == 1
    assert states(clinic) == ["done", "done"] and len(trained) == len(set(trained)) == 2
    assert sorted(each.block or 0 for each in store.manifest.held) == [0, 1]


def test_a_fault_of_the_server_costs_the_node_nothing_more(
    store: Store, node: Callable[..., Offers], trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clinic = node("clinic", 3)

    def full(*_: Any, **__: Any) -> Any:
        raise RunError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("server.forgetting.evidence.measured", full)
        for _ in range(2):
            with pytest.raises(FederationError, match="the request is stopped at measure before: No space left"):
                collector(store, Nodes(clinic)).collect()
    assert collector(store, Nodes(clinic)).collect() == 1
    assert states(clinic) == ["done"] and len(trained) == len(store.requests()) == 1


def of_rows(answer: bytes, rows: float) -> bytes:
    tensors, about = remote._opened("answer", answer)
    kept = {key: value for key, value in about.items() if key not in ("version", "kind")}
    return remote._sealed("answer", tensors, kept | {"rows": rows})


@pytest.mark.parametrize(
    "spoiled",
    [
        lambda data: save({"b": torch.ones(3, dtype=torch.bfloat16)}, {"lethe-forgetting": "{}", "sha256": ""}),
        lambda data: of_rows(data, float("inf")),
        lambda data: of_rows(data, float("nan")),
        lambda data: save({}, {"lethe-forgetting": "[" * 100_000, "sha256": ""}),
        lambda data: b"",
        lambda data: data[:100],
    ],
)
def test_no_answer_of_one_node_keeps_the_others_from_being_served(
    store: Store, node: Callable[..., Offers], spoiled: Callable[[bytes], bytes]
) -> None:
    bad, bank = node("a-bad", 3), node("bank", 0)
    grid = Nodes(bad, bank)

    def spoil(index: int, reply: Message) -> Message:
        if grid.seen[-1] != (1, ORDER):
            return reply
        letter = Letter.read(reply)
        return Message(Letter(letter.offer, spoiled(letter.data)).content(), reply_to=_replied(grid, reply))

    grid.tamper = spoil
    with pytest.raises(FederationError, match="1 offers were served, 1 not: a-bad: "):
        collector(store, grid).collect()
    assert states(bank) == ["done"] and len(store.requests()) == 1


def test_one_node_s_refusal_does_not_keep_the_others_out(store: Store, node: Callable[..., Offers]) -> None:
    refusing, bank = node("clinic", 3, classes=False), node("bank", 0)
    strict = refusing.settings.model_copy(
        update={"policy": refusing.settings.policy.model_copy(update={"require_privacy": True})}
    )
    with pytest.raises(
        FederationError, match="1 offers were served, 1 not: clinic: node 'clinic' sends nothing without"
    ):
        collector(store, Nodes(Offers(strict), bank)).collect()
    assert states(bank) == ["done"] and states(refusing) == ["open"]


def test_a_node_that_answers_nonsense_is_named(store: Store, node: Callable[..., Offers]) -> None:
    clinic, bank = node("clinic", 3), node("bank", 0)
    grid = Nodes(clinic, bank)

    def nonsense(index: int, reply: Message) -> Message:
        return Message(Error(0, "no such app"), reply_to=_replied(grid, reply)) if index == 0 else reply

    grid.tamper = nonsense
    with pytest.raises(FederationError, match="1 offers were served, 1 not: node 1: no such app"):
        collector(store, grid).collect()


def _replied(grid: Nodes, reply: Message) -> Message:
    """Return a message that the same reply could be to."""
    asked = Message(RecordDict(), dst_node_id=1, message_type=OFFERS)
    asked.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    return asked


def test_the_server_app_forgets_instead_of_training(
    make_run: Callable[..., Path], node: Callable[..., Offers], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    monkeypatch.setenv("LETHE_RUNS", str(run.parent))
    monkeypatch.setattr("server.grid.POLL_S", 0.0)
    clinic = node("clinic", 3, run=run.name)

    def played(**asked: Any) -> None:
        config: dict[str, Any] = {
            "name": "forget-001",
            "forget": json.dumps({"run": run.name, "wait": 1.0, "timeout": 60.0} | asked),
        }
        build()(Nodes(clinic), Context(run_id=3, node_id=0, node_config={}, state=RecordDict(), run_config=config))

    played()
    assert states(clinic) == ["done"] and Store(run / "forgetting").manifest.forgotten == ("money",)
    assert not (run.parent / "forget-001").exists()
    with pytest.raises(RunError, match="run 'nowhere' is not in"):
        played(run="nowhere")
    with pytest.raises(ConfigError, match="the run config's forget cannot be used"):
        played(colour="red")
