"""A node's offers: what may be offered, what is answered, what is charged, what is kept and what is deleted."""

import hashlib
import json
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Context, Message, RecordDict

import client.offers
from client.app import build
from client.node import NodeSettings
from client.offers import Offer, Offers
from lora.errors import BudgetExceeded, ConfigError, DataError, RunError
from lora.files import write_bytes
from privacy.ledger import Ledger
from strategies.federated.wire import DECLINED, Declined
from strategies.flower import number, take_identity
from strategies.unlearning.config import ForgettingConfig
from strategies.unlearning.remote import ForgetAnswer, ForgetOrder
from strategies.unlearning.signature import canonical
from strategies.unlearning.wire import OFFERS, ORDER, RECORD, Letter, Offered, ask_offers
from tasks.exported import ExportedClassifier
from tasks.models import load_base, weights_digest
from tests.queries import LABELS, TINY, export_classifier, queries, write_queries

KEY = Ed25519PrivateKey.generate()
PUBLIC = KEY.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
SHORT = ForgettingConfig(rank=2, epochs=1, least_steps=0, batch=24, private_steps=4)


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> ForgetOrder:
    place = export_classifier(tmp_path_factory.mktemp("offers") / "adapter")
    classifier = ExportedClassifier.read(place, max_length=64)
    digest = weights_digest(load_base(TINY, causal=False).model)
    return ForgetOrder("order", 1, digest, "tiny-bert", "a" * 64, classifier, classifier.rank, SHORT, PUBLIC)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_queries(tmp_path / "rows.jsonl", queries(3))


def offers(tmp_path: Path, **settings: Any) -> Offers:
    return Offers(NodeSettings(name="clinic", partition=0, state=tmp_path / "state", device="cpu", **settings))


def offered(tmp_path: Path, rows: Path, **terms: Any) -> tuple[Offers, Offer]:
    made = offers(tmp_path)
    return made, made.make("first", rows, classes=("money",), **terms)


def record_of(answer: bytes, *, key: Ed25519PrivateKey = KEY) -> bytes:
    record = {"done": {"trained": {"answer": hashlib.sha256(answer).hexdigest()}}}
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
    signature = key.sign(canonical(record)).hex()
    return json.dumps({"record": record, "public_key": public, "signature": signature}).encode()


def test_rows_are_kept_for_their_owner_alone(tmp_path: Path, rows: Path) -> None:
    made, offer = offered(tmp_path, rows)
    assert (offer.rows, offer.classes, offer.epsilon, made.state(offer)) == (24, ("money",), None, "open")
    (kept,) = made.directory.rglob("rows.json")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600 and stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    assert made.all("first") == [offer] and made.all("second") == []
    made.withdraw(offer.id[:4])
    assert [path.name for path in made.directory.iterdir()] == [".lock"]
    with pytest.raises(RunError, match="there is no offer"):
        made.find(offer.id)


def test_what_cannot_be_offered(tmp_path: Path, rows: Path) -> None:
    made = offers(tmp_path, policy={"max_epsilon": 4.0, "max_delta": 1e-6})
    with pytest.raises(ConfigError, match=r"sends nothing without privacy \(its policy\); add --private"):
        made.make("first", rows)
    with pytest.raises(ConfigError, match="--private 8: node 'clinic' allows an epsilon of 4 at most"):
        made.make("first", rows, epsilon=8.0)
    with pytest.raises(ConfigError, match="--delta 1e-05: node 'clinic' allows a delta of 1e-06 at most"):
        made.make("first", rows, epsilon=4.0, delta=1e-5)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"epsilon": 0.0}, "--private 0: "),
        ({"epsilon": float("inf")}, "--private inf: "),
        ({"epsilon": 4.0, "delta": 0.0}, "--delta 0: "),
        ({"epsilon": 4.0, "answers": 0}, "--answers 0: "),
        ({"epsilon": 4.0}, "--private needs --class"),
    ]
    for terms, says in wrong:
        with pytest.raises(ConfigError, match=says):
            made.make("first", rows, **terms)
    with pytest.raises(DataError, match="rows are of class 'money', which --class does not name"):
        made.make("first", rows, classes=("music",), epsilon=4.0)
    few = write_queries(tmp_path / "few.jsonl", queries(3).take(range(7)))
    with pytest.raises(DataError, match="7 rows is too small"):
        made.make("first", few, classes=("money",), epsilon=4.0)
    assert not made.directory.exists()
    assert made.make("first", rows, classes=("money",), epsilon=4.0).delta == 1e-6


def test_the_same_order_gives_the_same_answer_and_another_adapter_another(
    tmp_path: Path, rows: Path, order: ForgetOrder
) -> None:
    made, offer = offered(tmp_path, rows)
    with pytest.raises(Declined, match="has no answer yet"):
        made.answer(Letter(offer.id), client="0")
    first = made.answer(Letter(offer.id, order.to_bytes()), client="0")
    assert made.state(offer) == "answered"
    assert not any(text.encode() in first for text in queries(3).texts)
    assert made.answer(Letter(offer.id), client="0") == first
    assert made.answer(Letter(offer.id, order.to_bytes()), client="0") == first
    other = made.answer(Letter(offer.id, replace(order, adapter="b" * 64).to_bytes()), client="0")
    assert ForgetAnswer.from_bytes(other).adapter == "b" * 64


def test_a_private_answer_is_charged_once_however_often_it_is_asked_for(
    tmp_path: Path, rows: Path, order: ForgetOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, offer = offered(tmp_path, rows, epsilon=8.0)
    charged: list[float] = []
    with monkeypatch.context() as patched:
        patched.setattr(
            "strategies.observe.watch.charged", lambda path, charges, told: charged.append(told.charged["0"])
        )
        answers = {made.answer(Letter(offer.id, order.to_bytes()), client="0") for _ in range(2)}
    assert len(answers) == len(charged) == 1
    assert charged[0] == pytest.approx(Ledger(made.settings.ledger).epsilon("0", delta=offer.delta))
    slot, statistics = Ledger(made.settings.ledger).rows()
    # The name under which training is charged too: what both cost adds up.
    assert slot.client == statistics.client == "0" and slot.purpose == "forget request order: slot"
    assert 7 < (ForgetAnswer.from_bytes(answers.pop()).epsilon or 0) <= 8
    # Whatever else the coordinator orders, an offer of one answer is charged for one.
    for change in ({"adapter": "b" * 64}, {"request": "other"}, {"block": 2}):
        with pytest.raises(Declined, match="allows 1 private answers, and as many were begun"):
            made.answer(Letter(offer.id, replace(order, **change).to_bytes()), client="0")
    assert len(Ledger(made.settings.ledger).rows()) == 2
    more = made.make("first", rows, classes=("money",), epsilon=2.0, answers=2)
    for adapter in ("b" * 64, "c" * 64):
        made.answer(Letter(more.id, replace(order, adapter=adapter).to_bytes()), client="0")
    assert len(Ledger(made.settings.ledger).rows()) == 6


def test_an_answer_that_a_kill_lost_counts(
    tmp_path: Path, rows: Path, order: ForgetOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, offer = offered(tmp_path, rows, epsilon=8.0)

    def killed(path: Path, data: bytes, *, mode: int = 0o644) -> None:
        if path.name == "answer.safetensors":
            raise KeyboardInterrupt
        write_bytes(path, data, mode=mode)

    with monkeypatch.context() as patched:
        patched.setattr(client.offers, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            made.answer(Letter(offer.id, order.to_bytes()), client="0")
    assert made.state(offer) == "open" and len(Ledger(made.settings.ledger).rows()) == 2
    with pytest.raises(Declined, match="allows 1 private answers, and as many were begun"):
        made.answer(Letter(offer.id, order.to_bytes()), client="0")


def test_policy_and_budget_hold_when_the_order_comes(tmp_path: Path, rows: Path, order: ForgetOrder) -> None:
    made, offer = offered(tmp_path, rows)
    strict = offers(tmp_path, policy={"require_privacy": True})
    with pytest.raises(Declined, match="sends nothing without privacy"):
        strict.answer(Letter(offer.id, order.to_bytes()), client="0")
    poor = offers(tmp_path, policy={"max_epsilon": 5.0})
    costly = poor.make("first", rows, classes=("money",), epsilon=5.0)
    poor.answer(Letter(costly.id, order.to_bytes()), client="0")
    again = poor.make("first", rows, classes=("money",), epsilon=5.0)
    with pytest.raises(BudgetExceeded):
        poor.answer(Letter(again.id, order.to_bytes()), client="0")
    # Neither of its two events was charged.
    assert "BudgetExceeded" in str(poor.find(again.id).problem) and len(Ledger(poor.settings.ledger).rows()) == 2
    assert made.state(again) == "open"


def test_a_record_closes_its_own_offer_and_no_other(tmp_path: Path, rows: Path, order: ForgetOrder) -> None:
    made, offer = offered(tmp_path, rows)
    data = made.answer(Letter(offer.id, order.to_bytes()), client="0")
    forged = record_of(data, key=Ed25519PrivateKey.generate())
    changed = record_of(data).replace(b'"done"', b'"undone"')
    for wrong in (
        b"",
        b"{}",
        b"no json",
        record_of(b"another answer"),
        forged,
        changed,
        b" " * 2**20 + record_of(data),
    ):
        with pytest.raises(Declined, match="the record is not about the answer"):
            made.close(Letter(offer.id, wrong))
    assert made.state(offer) == "answered"
    for _ in range(2):
        made.close(Letter(offer.id, record_of(data)))
    place = made.directory / offer.id
    assert made.state(offer) == "done"
    assert sorted(path.name for path in place.iterdir()) == ["offer.json", "record.json"]
    assert not any(b"send cash" in path.read_bytes() for path in made.directory.rglob("*") if path.is_file())


def test_a_kill_while_the_record_is_taken_leaves_no_rows_and_nothing_to_order(
    tmp_path: Path, rows: Path, order: ForgetOrder
) -> None:
    made, offer = offered(tmp_path, rows)
    data = made.answer(Letter(offer.id, order.to_bytes()), client="0")
    place = made.directory / offer.id
    (place / "record.json").write_bytes(record_of(data))
    with pytest.raises(Declined, match="is done"):
        made.answer(Letter(offer.id, order.to_bytes()), client="0")
    assert sorted(path.name for path in place.iterdir()) == ["offer.json", "record.json"]


def test_what_a_kill_left_of_making_or_withdrawing_is_swept(tmp_path: Path, rows: Path) -> None:
    made, offer = offered(tmp_path, rows)
    shutil.copytree(made.directory / offer.id, made.directory / ".aaaa")
    made.make("first", rows)
    assert not (made.directory / ".aaaa").exists() and len(made.all()) == 2


def test_a_damaged_offer_keeps_no_other_from_being_answered(tmp_path: Path, rows: Path, order: ForgetOrder) -> None:
    made, offer = offered(tmp_path, rows)
    other = made.make("first", rows)
    (made.directory / offer.id / "offer.json").write_text('{"colour": "red"}')
    assert [each.id for each in made.all()] == [other.id]
    data = made.answer(Letter(other.id, order.to_bytes()), client="0")
    (made.directory / other.id / "answer.safetensors").write_bytes(data[:-9])
    assert ForgetAnswer.from_bytes(made.answer(Letter(other.id, order.to_bytes()), client="0")).rows == 24
    made.withdraw(offer.id)
    assert [path.name for path in made.directory.glob("[!.]*")] == [other.id]


class Node:
    """A node's app, called as the executor would."""

    def __init__(self, made: Offers) -> None:
        take_identity()
        self.app = build(settings=made.settings)
        self.context = Context(run_id=5, node_id=7, node_config={}, state=RecordDict(), run_config={})

    def ask(self, content: RecordDict, kind: str) -> Message:
        message = Message(content, dst_node_id=7, message_type=kind)
        number(message)
        return self.app(message, self.context)


def test_the_app_offers_answers_and_closes(tmp_path: Path, rows: Path, order: ForgetOrder) -> None:
    made, offer = offered(tmp_path, rows)
    node = Node(made)
    assert Offered.read(node.ask(ask_offers("first"), OFFERS)) == Offered("clinic", (offer.id,))
    assert Offered.read(node.ask(ask_offers("other"), OFFERS)) == Offered("clinic")
    answer = Letter.read(node.ask(Letter(offer.id, order.to_bytes()).content(), ORDER))
    assert Offered.read(node.ask(ask_offers("first"), OFFERS)) == Offered("clinic", (offer.id,), (offer.id,))
    node.ask(Letter(offer.id, record_of(answer.data)).content(), RECORD)
    assert Offered.read(node.ask(ask_offers("first"), OFFERS)) == Offered("clinic")


def test_no_word_of_a_row_and_not_even_its_label_leaves_in_a_refusal(tmp_path: Path, order: ForgetOrder) -> None:
    secret = tmp_path / "secret.jsonl"
    lines = [json.dumps({"text": f"bed {place} has measles", "label": "measles"}) for place in range(9)]
    secret.write_text("\n".join(lines))
    made = offers(tmp_path)
    offer, private = made.make("first", secret), made.make("first", secret, classes=("measles",), epsilon=8.0)
    reply = Node(made).ask(Letter(offer.id, order.to_bytes()).content(), ORDER)
    assert reply.error.code == DECLINED and str(reply.error.reason).startswith(
        f"offer {offer.id} could not be answered"
    )
    assert f"label 'measles' is not among the {len(LABELS)} of the order" in str(made.find(offer.id).problem)
    # What is public of a private offer is checked first, by the order's own words: no row is read before.
    (made.directory / private.id / "rows.json").write_text("damaged")
    reply = Node(made).ask(Letter(private.id, order.to_bytes()).content(), ORDER)
    assert "is of class 'measles', which is not among the 4 of the order" in str(reply.error.reason)
    other = replace(order, base="0" * 64)
    reply = Node(made).ask(Letter(offer.id, other.to_bytes()).content(), ORDER)
    assert reply.error.code == DECLINED and "the order is for 000000000000" in str(reply.error.reason)
    declined = Node(made).ask(Letter("nobody", order.to_bytes()).content(), ORDER)
    assert declined.error.code == DECLINED and "offers no 'nobody'" in str(declined.error.reason)


def test_an_order_names_no_directory_of_the_node(tmp_path: Path, rows: Path, order: ForgetOrder) -> None:
    made, offer = offered(tmp_path, rows)
    with pytest.raises(Declined, match="opens no file because an order names it"):
        made.answer(Letter(offer.id, replace(order, reference=str(tmp_path)).to_bytes()), client="0")
    with pytest.raises(Declined, match="cannot load tiny-bert in float99"):
        made.answer(Letter(offer.id, replace(order, dtype="float99").to_bytes()), client="0")
