"""Orders and answers: what a client trained at home is served here, and answers that do not fit are not."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from client.forgetting import answer_order
from lora.errors import DataError, FrameMismatch, WrongUpdate
from server.forgetting.asking import new_order, wish_classes, wish_client
from server.forgetting.requests import ForgetRequests
from server.forgetting.store import Store
from strategies.unlearning.remote import ForgetAnswer, ForgetOrder
from tasks.models import load_base
from tests.queries import TINY, queries


def answered(store: Store, *, client: str = "clinic", classes: tuple[str, ...] = ("money",)) -> ForgetAnswer:
    """Train at the client, from nothing but the order's bytes."""
    order = ForgetOrder.from_bytes(new_order(store, client).to_bytes())
    return answer_order(order, load_base(TINY, causal=False), queries(3), classes=classes)


def test_a_clients_answer_forgets_here_without_its_rows(store: Store) -> None:
    requests = ForgetRequests(store)
    before = requests.stage.served.asked(queries(3)).accuracy(queries(3))
    data = answered(store).to_bytes()
    assert not any(text.encode() in data for text in queries(3).texts)
    accepted = requests.add(wish_client(store, "clinic", data))
    requests.carry_out()
    record = requests.status(accepted.request.id).record
    assert record is not None and record["asked"]["rows_from"] == "client" and record["asked"]["rows"] == 24
    assert "clinic" not in str(record) and record["asked"]["subject"]
    assert record["done"]["forgets_whole_classes"] == ["money"]
    assert requests.stage.served.asked(queries(3)).accuracy(queries(3)) < before - 0.4
    assert not list((store.directory / "reserved").iterdir())
    verdict = requests.verify(accepted.request.id, subject="clinic")
    assert verdict.good and requests.verify(accepted.request.id, subject="other").broken


def test_a_slot_is_the_same_wherever_it_is_trained(store: Store) -> None:
    answer = answered(store)
    here = store.served()
    order = new_order(store, "clinic")
    gated = answer.gated("x", here)
    assert order.block == gated.block == answer.block
    for name, a in gated.slot.part("A").items():
        assert torch.equal(a, here.frames.block(order.block).matrices[name])


def test_an_open_order_is_given_again_and_orders_have_blocks_of_their_own(store: Store) -> None:
    first, again, other = (new_order(store, name) for name in ("clinic", "clinic", "bank"))
    assert (first.request, first.block) == (again.request, again.block) and first.block != other.block
    requests = ForgetRequests(store)
    requests.add(wish_classes(store, ["alarm"], rows=queries(0)))
    requests.carry_out()
    assert store.manifest.held[0].block not in (first.block, other.block)


def test_answers_that_do_not_fit(store: Store) -> None:
    answer = answered(store)
    wrong: list[tuple[dict[str, Any], str, type[Exception], str]] = [
        ({"request": "abc"}, "clinic", WrongUpdate, "order abc, which is not open"),
        ({}, "bank", WrongUpdate, "another client or block"),
        ({"block": answer.block + 1}, "clinic", WrongUpdate, "another client or block"),
        ({"a": "0" * 64}, "clinic", FrameMismatch, "trained over block"),
        ({"adapter": "0" * 64}, "clinic", WrongUpdate, "make a new order"),
        ({"b": answer.b * torch.nan}, "clinic", WrongUpdate, "'b' is not finite"),
        ({"classes": ("alarm", "music", "weather", "money")}, "clinic", DataError, "all 4 classes"),
        ({"detector": replace(answer.detector, layers=(0,))}, "clinic", WrongUpdate, "reads layers"),
    ]
    for change, client, error, says in wrong:
        with pytest.raises(error, match=says):
            wish_client(store, client, replace(answer, **change).to_bytes())
    assert not store.requests()


def test_an_answer_cannot_name_classes_that_are_not_there(store: Store) -> None:
    with pytest.raises(DataError, match="'sport' is not among"):
        wish_client(store, "clinic", replace(answered(store), classes=("sport",)).to_bytes())


def test_the_same_answer_twice_is_one_request(store: Store) -> None:
    requests, data = ForgetRequests(store), answered(store).to_bytes()
    first = requests.add(wish_client(store, "clinic", data))
    requests.carry_out()
    again = requests.add(wish_client(store, "clinic", data))
    assert not again.new and again.request == first.request
    # A client that has been answered gets another order.
    assert new_order(store, "clinic").block != first.request.block
