"""Rounds of the strategy over made-up replies: what is ordered, what is refused and why, what survives a restart."""

from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from torch import Tensor

from lora.errors import BudgetExceeded, FrameMismatch
from strategies.federated.strategy import FederatedLoRA
from strategies.federated.wire import Declined, Order, Update, refusal
from strategies.flower import number, to_record

NAMES = ["0", "1", "2", "3"]


@pytest.fixture
def strategy(make_strategy: Any) -> FederatedLoRA:
    made: FederatedLoRA = make_strategy()
    return made


def updates_for(strategy: FederatedLoRA, make_update: Any, *, number_: int = 1, **traits: Any) -> dict[str, Any]:
    length = strategy.layout.length(strategy.round_plan(number_).send)
    return {name: make_update(name, length, round=number_, **traits) for name in NAMES}


def mean_of(updates: dict[str, Any], *, without: str = "") -> Tensor:
    return torch.stack([update.vector.double() for name, update in updates.items() if name != without]).mean(0).float()


# -- orders ------------------------------------------------------------------------------------------------------------


def test_orders_say_all_that_a_client_needs(strategy: FederatedLoRA) -> None:
    start = torch.arange(strategy.layout.size, dtype=torch.float32)
    orders = list(strategy.configure_train(3, to_record(start.numpy()), ConfigRecord(), None))  # type: ignore[arg-type]
    assert [strategy.roster[order.metadata.dst_node_id] for order in orders] == NAMES
    read = Order.read(orders[0])
    assert torch.equal(read.vector, start)
    assert (read.round, read.train, read.send) == (3, ("B",), ("B",))
    assert (read.frame, read.layout) == (strategy.frame.digest, strategy.layout.digest)


def test_who_is_asked_depends_on_names_not_on_nodes(make_strategy: Any) -> None:
    found = []
    for shift in (0, 1000):
        strategy = make_strategy(clients=20, sampling="fixed", fraction=0.3)
        strategy.roster = {(node * 7919 + shift) % 10007: name for node, name in strategy.roster.items()}
        record = to_record(torch.zeros(strategy.layout.size).numpy())
        orders = strategy.configure_train(5, record, ConfigRecord(), None)
        found.append([strategy.roster[order.metadata.dst_node_id] for order in orders])
    assert found[0] == found[1]
    assert len(found[0]) == 6


# -- combining ---------------------------------------------------------------------------------------------------------


def test_a_round_is_the_mean_of_its_replies(strategy: FederatedLoRA, make_update: Any, play: Any) -> None:
    updates = updates_for(strategy, make_update, loss=1.0)
    result = play(strategy, 1, torch.ones(strategy.layout.size), updates)
    torch.testing.assert_close(result, mean_of(updates))
    assert list(strategy.outcome.accepted) == NAMES[::-1]
    assert strategy.outcome.refused == []
    assert strategy.outcome.aggregation_error < 1e-6
    for name, norm in strategy.outcome.update_norm.items():
        assert norm == pytest.approx(float((updates[name].vector - 1).norm()), rel=1e-5)


def test_the_order_of_replies_changes_no_bit(make_strategy: Any, make_update: Any) -> None:
    strategy = make_strategy()
    updates = updates_for(strategy, make_update)
    found = []
    for names in (NAMES, NAMES[::-1], ["2", "0", "3", "1"]):
        list(strategy.configure_train(1, to_record(torch.zeros(strategy.layout.size).numpy()), ConfigRecord(), None))
        nodes = {name: node for node, name in strategy.roster.items()}
        orders = [Message(RecordDict(), dst_node_id=nodes[name], message_type="train") for name in names]
        replies = [
            Message(spoiled(updates[n], round=1).content(), reply_to=order)
            for n, order in zip(names, orders, strict=True)
        ]
        found.append(strategy.aggregate_train(1, replies)[0]["vector"].data)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("private", [False, True])
def test_example_counts_weigh_only_where_they_may(
    private: bool, make_strategy: Any, make_update: Any, play: Any
) -> None:
    """A weight by examples would break the sensitivity of a private aggregate."""
    strategy = make_strategy(weights="examples", private=private)
    updates = updates_for(strategy, make_update)
    counted = {
        name: make_update(name, len(u.vector), round=1, examples=1 + 10 * int(name)) for name, u in updates.items()
    }
    result = play(strategy, 1, torch.zeros(strategy.layout.size), counted)
    shares = torch.tensor([1.0, 11.0, 21.0, 31.0]) / 64
    weighted = torch.stack([updates[name].vector for name in NAMES]).T @ shares
    torch.testing.assert_close(result, mean_of(updates) if private else weighted)


def test_a_trained_head_travels_with_b(make_strategy: Any, make_update: Any, play: Any) -> None:
    strategy = make_strategy(head=True)
    updates = updates_for(strategy, make_update)
    result = play(strategy, 1, torch.zeros(strategy.layout.size), updates)
    assert len(result) == strategy.layout.size
    torch.testing.assert_close(result, mean_of(updates))


def test_rolora_alternates_what_moves(make_strategy: Any, make_update: Any, play: Any) -> None:
    strategy = make_strategy(strategy="rolora", head=True)
    vector = torch.randn(strategy.layout.size, generator=torch.Generator().manual_seed(0))
    for number_, moving in enumerate(["B", "A", "B"], start=1):
        still = {"A": "B", "B": "A"}[moving]
        assert strategy.round_plan(number_).train == (moving, "head")
        updates = updates_for(strategy, make_update, number_=number_)
        before, vector = vector, play(strategy, number_, vector, updates)
        torch.testing.assert_close(strategy.layout.select(vector, (moving, "head")), mean_of(updates))
        assert torch.equal(strategy.layout.select(vector, [still]), strategy.layout.select(before, [still]))
        assert strategy.outcome.aggregation_error < 1e-5


def test_plain_averaging_of_both_factors_shows_its_error(make_strategy: Any, make_update: Any, play: Any) -> None:
    strategy = make_strategy(strategy="lora")
    play(strategy, 1, torch.zeros(strategy.layout.size), updates_for(strategy, make_update))
    assert strategy.outcome.aggregation_error > 0.1


# -- refusals ----------------------------------------------------------------------------------------------------------


def spoiled(update: Update, **changes: Any) -> Update:
    return Update(**{**update.__dict__, **changes})


def with_value(update: Update, value: float) -> Update:
    vector = update.vector.clone()
    vector[3] = value
    return spoiled(update, vector=vector)


CASES: dict[str, tuple[Any, str, str]] = {
    "nan": (lambda u: with_value(u, float("nan")), "nan", "NaN or infinite"),
    "infinite": (lambda u: with_value(u, float("inf")), "nan", "NaN or infinite"),
    "too short": (lambda u: spoiled(u, vector=u.vector[1:]), "shape", "expected (22,)"),
    "not flat": (lambda u: spoiled(u, vector=u.vector[None]), "shape", "vector of shape (1, 22)"),
    "another frame": (lambda u: spoiled(u, frame="f" * 64), "digest", "frame ffffffffffff, expected"),
    "an earlier round's": (lambda u: spoiled(u, round=7), "error", "the reply is of round 7, this is round 1"),
    "another's name": (lambda u: spoiled(u, client="3"), "error", "speaks for client 3"),
    "an unknown client": (lambda u: spoiled(u, client="nobody"), "error", "speaks for client nobody"),
    "no examples": (lambda u: spoiled(u, examples=0), "error", "claims 0 examples"),
    "less than none": (lambda u: spoiled(u, examples=-5), "error", "claims -5 examples"),
    "empty": (lambda u: lambda order: Message(RecordDict(), reply_to=order), "error", "not an update"),
    "garbage": (
        lambda u: lambda order: Message(RecordDict({"arrays": ArrayRecord()}), reply_to=order),
        "error",
        "not an update",
    ),
    "foreign code": (lambda u: Error(1, "node is gone"), "error", "node is gone"),
    "no reason": (lambda u: Error(0), "error", ""),
    "crash": (lambda u: lambda order: refusal(KeyError("secret"), order), "error", "KeyError; the client's own log"),
    "declined": (lambda u: lambda order: refusal(Declined("too few examples"), order), "declined", "too few"),
    "budget": (lambda u: lambda order: refusal(BudgetExceeded("8.1 over 8"), order), "budget", "8.1 over 8"),
    "frame": (lambda u: lambda order: refusal(FrameMismatch("other A"), order), "digest", "other A"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_unusable_reply_is_named_and_left_out(
    case: str, strategy: FederatedLoRA, make_update: Any, play: Any
) -> None:
    spoil, reason, detail = CASES[case]
    updates = updates_for(strategy, make_update)
    result = play(strategy, 1, torch.zeros(strategy.layout.size), {**updates, "2": spoil(updates["2"])})
    (refused,) = strategy.outcome.refused
    assert (refused.client, refused.reason) == ("2", reason)
    assert detail in refused.detail
    assert set(strategy.outcome.accepted) == {"0", "1", "3"}
    torch.testing.assert_close(result, mean_of(updates, without="2"))


def test_a_round_without_a_usable_reply_changes_nothing(strategy: FederatedLoRA, play: Any) -> None:
    assert play(strategy, 1, torch.ones(strategy.layout.size), {name: Error(101, "no") for name in NAMES}) is None
    assert [refused.reason for refused in strategy.outcome.refused] == ["declined"] * 4
    assert strategy.aggregate_train(1, []) == (None, None)


def test_a_client_counts_once(strategy: FederatedLoRA, make_update: Any) -> None:
    update = spoiled(updates_for(strategy, make_update)["1"], round=1)
    record = to_record(torch.zeros(strategy.layout.size).numpy())
    orders = list(strategy.configure_train(1, record, ConfigRecord(), None))  # type: ignore[arg-type]
    replies = [Message(update.content(), reply_to=orders[1]) for _ in range(2)]
    arrays, _ = strategy.aggregate_train(1, replies)
    assert [refused.detail for refused in strategy.outcome.refused] == ["a second reply of the same client"]
    assert arrays is not None
    torch.testing.assert_close(torch.tensor(arrays["vector"].numpy()), update.vector)


def test_a_node_that_is_not_in_the_roster_is_unknown(strategy: FederatedLoRA, make_update: Any) -> None:
    order = Message(RecordDict(), dst_node_id=31337, message_type="train")
    strategy.aggregate_train(1, [Message(Error(1, "lost"), reply_to=order)])
    update = updates_for(strategy, make_update)["1"]
    strategy.aggregate_train(1, [Message(Error(1, "lost"), reply_to=order), Message(update.content(), reply_to=order)])
    assert [(refused.client, refused.reason) for refused in strategy.outcome.refused] == [("unknown", "error")] * 2


def test_the_answered_order_tells_who_a_lost_node_is(strategy: FederatedLoRA) -> None:
    """Flower reports a lost node by a message of another node's; only the order's id tells who it was."""
    record = to_record(torch.zeros(strategy.layout.size).numpy())
    orders = list(strategy.configure_train(1, record, ConfigRecord(), None))  # type: ignore[arg-type]
    strategy.asked = {number(order): strategy.roster[order.metadata.dst_node_id] for order in orders}
    reply = Message(Error(1, "lost"), reply_to=orders[2])
    reply.metadata.__dict__["_src_node_id"] = orders[0].metadata.dst_node_id
    assert strategy.roster[reply.metadata.src_node_id] == "0"
    strategy.aggregate_train(1, [reply])
    assert strategy.outcome.refused[0].client == "2"


def test_outcomes_are_of_their_round_alone(strategy: FederatedLoRA, make_update: Any, play: Any) -> None:
    start = torch.zeros(strategy.layout.size)
    updates = updates_for(strategy, make_update)
    play(strategy, 1, start, {**updates, "0": Error(102, "spent")})
    play(strategy, 2, start, updates)
    assert strategy.outcome.refused == []
    assert len(strategy.outcome.accepted) == 4


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aggregator", "options", "keys"),
    [
        ("fedavg", {}, []),
        ("median", {}, []),
        ("fedavgm", {"server_momentum": 0.9, "server_learning_rate": 0.8}, ["momentum"]),
        ("fedadam", {"eta": 0.1, "tau": 1e-3}, ["m", "v"]),
        ("fedyogi", {}, ["m", "v"]),
        ("fedadagrad", {}, ["m", "v"]),
    ],
)
def test_a_restored_strategy_goes_on_bit_for_bit(
    aggregator: str, options: dict[str, float], keys: list[str], *, make_strategy: Any, make_update: Any, play: Any
) -> None:
    def fresh() -> FederatedLoRA:
        made: FederatedLoRA = make_strategy(aggregator=aggregator, aggregator_options=options)
        return made

    def rounds(strategy: FederatedLoRA, vector: Tensor, numbers: range) -> Tensor:
        for number_ in numbers:
            vector = play(strategy, number_, vector, updates_for(strategy, make_update, number_=number_))
        return vector

    start = torch.randn(fresh().layout.size, generator=torch.Generator().manual_seed(0))
    whole = rounds(fresh(), start, range(1, 6))
    first = fresh()
    halfway = rounds(first, start, range(1, 3))
    saved = {key: array.copy() for key, array in first.state().items()}
    assert sorted(saved) == keys
    second = fresh()
    second.restore(saved)
    assert torch.equal(rounds(second, halfway, range(3, 6)), whole)
    if keys:
        assert not torch.equal(rounds(fresh(), halfway, range(3, 6)), whole)


def test_nothing_is_evaluated_or_printed_by_flowers_loop(strategy: FederatedLoRA, capsys: Any) -> None:
    assert list(strategy.configure_evaluate(1, ArrayRecord(), ConfigRecord(), None)) == []  # type: ignore[arg-type]
    assert strategy.aggregate_evaluate(1, []) is None
    strategy.summary()
    assert capsys.readouterr().out == ""


# -- what a deployment adds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregator", ["fedadam", "fedyogi", "fedavgm"])
def test_a_discarded_round_leaves_no_trace_in_the_moments(
    make_strategy: Any, make_update: Any, play: Any, aggregator: str
) -> None:
    options = {"server_momentum": 0.9} if aggregator == "fedavgm" else {}
    kept = make_strategy(aggregator=aggregator, aggregator_options=options, min_clients=3)
    other = make_strategy(aggregator=aggregator, aggregator_options=options, min_clients=3)
    start = torch.zeros(kept.layout.size)
    too_few = updates_for(kept, make_update, number_=1) | {"0": Error(100, "x"), "2": Error(100, "x")}
    for strategy in (kept, other):
        assert play(strategy, 1, start, updates_for(strategy, make_update, number_=1)) is not None
    before = {key: value.copy() for key, value in kept.state().items()}
    assert play(kept, 2, start, too_few) is None
    assert len(kept.outcome.accepted) == 2
    assert before.keys() == kept.state().keys() != set()
    assert all((before[key] == value).all() for key, value in kept.state().items())
    third = [play(strategy, 3, start, updates_for(strategy, make_update, number_=3)) for strategy in (kept, other)]
    assert torch.equal(*third)


def test_a_count_other_than_the_greeting_s_is_refused_by_name(
    strategy: FederatedLoRA, make_update: Any, play: Any
) -> None:
    strategy.sizes = {"0": 5, "1": 5, "2": 7, "3": 5}
    play(strategy, 1, torch.zeros(strategy.layout.size), updates_for(strategy, make_update, examples=5))
    (refused,) = strategy.outcome.refused
    assert (refused.client, refused.reason) == ("2", "error")
    assert refused.detail == "the reply claims 5 examples, the greeting said 7"


def test_an_order_is_valid_no_longer_than_anybody_waits_for_it(make_strategy: Any) -> None:
    strategy = make_strategy(timeout=30.0)
    record = to_record(torch.zeros(strategy.layout.size).numpy())
    assert {order.metadata.ttl for order in strategy.configure_train(1, record, ConfigRecord(), None)} == {35.0}
