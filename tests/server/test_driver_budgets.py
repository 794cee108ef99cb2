"""Budgets in the round driver: a run whose clients have spent theirs ends in order, with an adapter."""

from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Message

from lora.errors import FederationError
from privacy.accounting import Event
from privacy.ledger import Ledger
from server.checkpoint import Checkpoints
from strategies.federated.config import FederationConfig
from strategies.federated.selection import select
from strategies.federated.wire import TRAIN

Make = Callable[..., Any]
PRIVATE = {"privacy": {"epsilon": 8.0, "delta": 1e-4}}


def silent(index: int, reply: Message) -> Message | None:
    """Lose what client 1 answers to orders to train."""
    return None if (index, reply.metadata.message_type) == (1, TRAIN) else reply


def spend(each: Any, *clients: str) -> None:
    """Let clients have spent nearly everything in an earlier run."""
    for name in clients:
        Ledger(each.ledger).charge(name, Event(0.9, 0.6, 8), purpose="earlier", budget=None, delta=1e-4)


def test_a_run_whose_clients_are_all_out_of_budget_stops_and_keeps_its_adapter(federation: Make) -> None:
    each = federation(**PRIVATE, federation={"rounds": 3})
    record = each.driver().records.write
    driver = each.driver()

    def after_first(kind: str, **fields: Any) -> Any:
        if kind == "round" and fields["round"] == 1:
            spend(each, "0", "1", "2", "3")
        return record(kind, **fields)

    driver.records.write = after_first
    summary = driver.run()
    assert (summary["stopped"], summary["rounds"]) == ("budget", 1)
    assert summary["epsilon_max"] <= 8.0
    assert (each.directory / "adapter" / "adapter_model.safetensors").is_file()
    last = each.lines("round")[-1]
    assert [(r["client"], r["reason"]) for r in last["refused"]] == [(name, "budget") for name in "0123"]
    assert last["loss"] == each.lines("round")[0]["loss"]
    assert Checkpoints(each.directory / "checkpoints").latest().round == 1  # type: ignore[union-attr]


def test_clients_that_decline_do_not_turn_spent_budgets_into_an_error(federation: Make) -> None:
    each = federation(seed=51, **PRIVATE)
    vars(each.driver().world)["shares"] = [(), tuple(range(12)), tuple(range(12, 24)), tuple(range(24, 36))]
    spend(each, "1", "2", "3")
    summary = each.run()
    assert (summary["stopped"], summary["rounds"]) == ("budget", 0)
    assert {r["client"]: r["reason"] for r in summary["refused"]} == {
        "0": "declined",
        "1": "budget",
        "2": "budget",
        "3": "budget",
    }


def test_spent_budgets_that_leave_too_few_end_the_run_in_order(federation: Make) -> None:
    """As after a kill: the resumed run charges the repeated round again, and some clients miss its last one."""
    each = federation(**PRIVATE, federation={"min_clients": 3})
    spend(each, "0", "1")
    summary = each.run()
    assert (summary["stopped"], summary["rounds"]) == ("budget", 0)
    assert (each.directory / "adapter").is_dir()


def test_while_enough_clients_have_budget_the_run_goes_on(federation: Make) -> None:
    each = federation(**PRIVATE, federation={"min_clients": 2})
    spend(each, "0", "1")
    summary = each.run()
    assert (summary["stopped"], summary["rounds"]) == (None, 2)
    assert [line["accepted"] for line in each.lines("round")] == [["2", "3"]] * 2


def test_a_round_that_draws_only_spent_clients_is_skipped(federation: Make) -> None:
    options: dict[str, Any] = {"sampling": "poisson", "fraction": 0.3, "rounds": 4}
    config = FederationConfig(clients=4, **options)
    draws = {seed: [select("0123", config, seed=seed, number=number) for number in range(1, 5)] for seed in range(99)}
    seed = next(seed for seed, drawn in draws.items() if drawn[1] == ["0"] and all(drawn))
    each = federation(**PRIVATE, federation=options, seed=seed)
    spend(each, "0")
    summary = each.run()
    assert (summary["stopped"], summary["rounds"]) == (None, 4)
    first, skipped, *_ = each.lines("round")
    assert (skipped["selected"], skipped["accepted"], skipped["loss"]) == (["0"], [], first["loss"])


def test_other_reasons_beside_spent_budgets_are_still_an_error(federation: Make) -> None:
    each = federation(silent, **PRIVATE, federation={"min_clients": 4})
    spend(each, "0")
    with pytest.raises(FederationError, match=r"0: budget.*1: missing"):
        each.run()
