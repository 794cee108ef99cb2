"""The two Grids: Flower's interface, and a cohort that answers exactly as its clients would one by one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.run import Run

import client.app
import simulation.grid
from client.job import ClientJob
from privacy.accounting import Event
from privacy.ledger import Ledger
from simulation.grid import CohortGrid, SequentialGrid
from strategies.federated.wire import BUDGET, DECLINED, EVALUATE, FRAME, GREET, INTERNAL, TRAIN, Order, Update

Sections = dict[str, Any]
Make = Callable[..., Sections]
PRIVATE = {"privacy": {"epsilon": 5.0, "delta": 1e-4, "test_seed": 3}}


def sequential(tree: Sections, ledger: Path, **options: Any) -> SequentialGrid:
    clients = ClientJob.model_validate(tree).federation.clients
    return SequentialGrid(clients=clients, run_config={"job": json.dumps(tree)}, ledger=ledger, **options)


def cohort(tree: Sections, ledger: Path, *, size: int = 32, **options: Any) -> CohortGrid:
    job = ClientJob.model_validate(tree)
    return CohortGrid(job, run_config={"job": json.dumps(tree)}, ledger=ledger, cohort=size, **options)


def order(tree: Sections, **changes: Any) -> Order:
    learner = ClientJob.model_validate(tree).world.learner
    fields: dict[str, Any] = {
        "round": 1,
        "vector": learner.start(),
        "train": ("B", "head"),
        "send": ("B", "head"),
        "frame": learner.adapted.frame.digest,
        "layout": learner.signature,
    }
    return Order(**{**fields, **changes})


def ask(
    grid: SequentialGrid, content: RecordDict, *, kind: str = TRAIN, nodes: tuple[int, ...] = (1, 2, 3)
) -> dict[int, Message]:
    """Return every node's reply, matched by the message that it answers."""
    messages = [Message(content, dst_node_id=node, message_type=kind) for node in nodes]
    ids = dict(zip(grid.push_messages(messages), nodes, strict=True))
    return {ids[reply.metadata.reply_to_message_id]: reply for reply in grid.pull_messages(list(ids))}


def assert_same(left: dict[int, Message], right: dict[int, Message]) -> None:
    assert left.keys() == right.keys()
    for node, reply in left.items():
        other = right[node]
        assert reply.has_error() == other.has_error()
        if reply.has_error():
            assert (reply.error.code, reply.error.reason) == (other.error.code, other.error.reason)
            continue
        one, two = Update.read(reply), Update.read(other)
        torch.testing.assert_close(one.vector, two.vector, rtol=1e-5, atol=1e-5)
        assert (one.client, one.frame, one.examples) == (two.client, two.frame, two.examples)
        assert (one.loss or 0.0) == pytest.approx(two.loss or 0.0, rel=1e-5)
        assert one.epsilon == two.epsilon
        keys = [{name: set(record) for name, record in each.content.items()} for each in (reply, other)]
        assert keys[0] == keys[1]


# --- Flower's interface ----------------------------------------------------------------------------------------------


def test_nodes_are_clients_by_number_plus_one_with_contexts_of_their_own(sections: Make, tmp_path: Path) -> None:
    grid = sequential(sections(), tmp_path / "ledger")
    assert list(grid.get_node_ids()) == [1, 2, 3]
    assert [grid.contexts[node].node_config["partition-id"] for node in (1, 2, 3)] == [0, 1, 2]
    assert len({id(context.state) for context in grid.contexts.values()}) == 3


def test_a_run_is_what_was_set(sections: Make, tmp_path: Path) -> None:
    grid = sequential(sections(), tmp_path / "ledger")
    with pytest.raises(RuntimeError, match="set_run"):
        _ = grid.run
    run = Run.create_empty(5)
    grid.set_run(run)
    assert grid.run is run


def test_replies_are_handed_out_once_and_only_to_who_asks(sections: Make, tmp_path: Path) -> None:
    grid = sequential(sections(), tmp_path / "ledger")
    content = RecordDict({"config": ConfigRecord({})})
    messages = [grid.create_message(content, GREET, node, "") for node in (1, 2)]
    first, second = grid.push_messages(messages)
    assert list(grid.pull_messages(["unknown"])) == []
    (reply,) = grid.pull_messages([first])
    assert (reply.metadata.reply_to_message_id, reply.metadata.src_node_id) == (first, 1)
    assert list(grid.pull_messages([first])) == []
    assert len(list(grid.pull_messages([first, second]))) == 1
    assert list(grid.send_and_receive([])) == []
    assert len(list(grid.send_and_receive([grid.create_message(content, GREET, 3, "")], timeout=1))) == 1


def test_a_tampered_reply_is_what_the_server_gets(sections: Make, tmp_path: Path) -> None:
    seen: list[tuple[int, str]] = []

    def tamper(index: int, reply: Message) -> Message | None:
        seen.append((index, reply.metadata.message_type))
        return None if index == 1 else reply

    grid = sequential(sections(), tmp_path / "ledger", tamper=tamper)
    replies = ask(grid, RecordDict({"config": ConfigRecord({})}), kind=GREET)
    assert sorted(replies) == [1, 3]
    assert seen == [(0, GREET), (1, GREET), (2, GREET)]


# --- The cohort answers as its clients would -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 32])
@pytest.mark.parametrize("changes", [{}, PRIVATE], ids=["open", "private"])
def test_a_cohort_answers_as_its_clients_do(sections: Make, tmp_path: Path, changes: Sections, size: int) -> None:
    tree = sections(**changes)
    content = order(tree).content()
    one = ask(sequential(tree, tmp_path / "one"), content)
    many = ask(cohort(tree, tmp_path / "many", size=size), content, nodes=(3, 1, 2))
    assert_same(one, many)
    assert not any(reply.has_error() for reply in one.values())
    if changes:
        kept = [
            sorted((row.client, row.event, row.purpose) for row in Ledger(tmp_path / name).rows())
            for name in ("one", "many")
        ]
        assert kept[0] == kept[1]
        assert len(kept[0]) == 3


def test_a_cohort_refuses_and_declines_as_its_clients_do(sections: Make, tmp_path: Path) -> None:
    tree = sections(**PRIVATE, seed=60, federation={"clients": 4})
    job = ClientJob.model_validate(tree)
    vars(job.world)["shares"] = [(0,), tuple(range(14)), tuple(range(14, 28)), tuple(range(28, 42))]
    answers = []
    for make in (sequential, cohort):
        ledger = tmp_path / make.__name__
        Ledger(ledger).charge("2", Event(0.9, 0.6, 8), purpose="earlier", budget=None, delta=1e-4)
        answers.append(ask(make(tree, ledger), order(tree).content(), nodes=(1, 2, 3, 4)))
        assert sorted(row.client for row in Ledger(ledger).rows()) == ["1", "2", "3"]
    assert_same(*answers)
    assert [answers[1][node].error.code for node in (1, 3)] == [DECLINED, BUDGET]


@pytest.mark.parametrize("changes", [{"frame": "0" * 64}, {"layout": "0" * 64}])
def test_a_cohort_checks_the_order(sections: Make, tmp_path: Path, changes: Sections) -> None:
    tree = sections(**PRIVATE)
    content = order(tree, **changes).content()
    one, many = (ask(make(tree, tmp_path / "ledger"), content) for make in (sequential, cohort))
    assert_same(one, many)
    assert {reply.error.code for reply in many.values()} == {FRAME}
    assert not (tmp_path / "ledger").exists()


@pytest.mark.parametrize("kind", [GREET, EVALUATE])
def test_what_is_no_order_to_train_goes_to_the_clients(sections: Make, tmp_path: Path, kind: str) -> None:
    tree = sections()
    content = order(tree, train=(), send=()).content()
    one, many = (ask(make(tree, tmp_path / "ledger"), content, kind=kind) for make in (sequential, cohort))
    for node in (1, 2, 3):
        records = [{key: dict(record) for key, record in each[node].content.items()} for each in (one, many)]
        assert records[0] == records[1]


def test_clients_do_not_change_the_order_that_they_share(sections: Make, tmp_path: Path) -> None:
    tree = sections()
    for make in (sequential, cohort):
        content = order(tree).content()
        before = bytes(content["arrays"]["vector"].data)  # type: ignore[union-attr]
        ask(make(tree, tmp_path / "ledger"), content)
        assert bytes(content["arrays"]["vector"].data) == before  # type: ignore[union-attr]


def test_a_cohort_that_crashes_stays_charged_and_says_nothing_of_the_data(
    sections: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("row 17 reads: the patient has measles")

    tree = sections(**PRIVATE)
    monkeypatch.setattr(simulation.grid, "run", fail)
    replies = ask(cohort(tree, tmp_path / "ledger"), order(tree).content())
    assert {reply.error.code for reply in replies.values()} == {INTERNAL}
    assert not any("measles" in str(reply.error.reason) for reply in replies.values())
    assert len(Ledger(tmp_path / "ledger").rows()) == 3


def test_a_cohort_is_charged_before_anything_is_drawn(
    sections: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    charged: list[int] = []
    run = client.app.run

    def spy(*args: Any, **kwargs: Any) -> Any:
        charged.append(Ledger(tmp_path / "ledger").position())
        return run(*args, **kwargs)

    tree = sections(**PRIVATE)
    monkeypatch.setattr(simulation.grid, "run", spy)
    ask(cohort(tree, tmp_path / "ledger", size=2), order(tree).content())
    assert charged == [2, 3]
