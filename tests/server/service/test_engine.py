"""The engine: every accepted request gets one answer or error, whatever happens around it."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from lora.errors import Busy, DataError, ServiceError, Unknown
from server.service.engine import Batches, Engine, Limits


class Doubling:
    """Doubles numbers; waits for `gate` first, and notes the batches that it saw."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, asked: Sequence[int]) -> list[object]:
        self.seen.append(list(asked))
        self.entered.set()
        assert self.gate.wait(30)
        if 13 in asked:
            raise RuntimeError("a private text")
        if 14 in asked:
            raise DataError("14 is not known; give another")
        return [Unknown("seven") if number == 7 else 2 * number for number in asked]


@pytest.fixture
def doubling() -> Doubling:
    return Doubling()


@pytest.fixture
def engine(doubling: Doubling) -> Iterator[Engine[int]]:
    engine = Engine(Batches(doubling), Limits(rows=4, wait=0.02, waiting=8, waiting_of_one=6), name="doubling")
    yield engine
    doubling.gate.set()
    engine.close()
    assert not engine.alive


def held(engine: Engine[int], doubling: Doubling) -> "Future[Any]":
    """Keep the thread in a batch of its own."""
    doubling.gate.clear()
    doubling.entered.clear()
    first = engine.submit("first", 0)
    assert doubling.entered.wait(30)
    return first


def test_requests_share_batches_and_errors_are_their_own(engine: Engine[int], doubling: Doubling) -> None:
    held(engine, doubling)
    futures = [engine.submit(f"user-{number}", number) for number in range(5, 11)]
    doubling.gate.set()
    assert [f.result(30) for f in futures if f is not futures[2]] == [10, 12, 16, 18, 20]
    with pytest.raises(Unknown, match="seven"):
        futures[2].result(30)
    assert [len(batch) for batch in doubling.seen] == [1, 4, 2]


def test_a_worker_that_breaks_fails_its_batch_only_and_keeps_what_it_saw_to_itself(engine: Engine[int]) -> None:
    with pytest.raises(ServiceError, match="RuntimeError") as caught:
        engine.submit("a", 13).result(30)
    assert "private" not in str(caught.value)
    with pytest.raises(DataError, match="14 is not known"):
        engine.submit("a", 14).result(30)
    assert engine.submit("a", 4).result(30) == 8 and engine.alive


def test_beyond_the_bound_it_is_busy(engine: Engine[int], doubling: Doubling) -> None:
    held(engine, doubling)
    futures = [engine.submit(number, number) for number in range(20, 28)]
    assert engine.waiting == 8
    with pytest.raises(Busy) as caught:
        engine.submit("late", 1)
    assert caught.value.retry_after >= 1
    doubling.gate.set()
    assert [future.result(30) for future in futures] == [2 * number for number in range(20, 28)]


def test_a_retired_owner_gets_no_answer_any_more_waiting_or_running(engine: Engine[int], doubling: Doubling) -> None:
    running = held(engine, doubling)
    waiting, other = engine.submit("first", 1), engine.submit("second", 2)
    assert engine.retire("first", Unknown("forgotten")) == 2
    for future in (running, waiting):
        with pytest.raises(Unknown, match="forgotten"):
            future.result(0)
    doubling.gate.set()
    assert other.result(30) == 4
    assert 1 not in [number for batch in doubling.seen for number in batch]
    assert engine.submit("first", 5).result(30) == 10


def test_nobody_computes_what_nobody_waits_for(engine: Engine[int], doubling: Doubling) -> None:
    held(engine, doubling)
    gone = engine.submit("a", 3)
    assert gone.cancel()
    doubling.gate.set()
    assert engine.submit("b", 4).result(30) == 8
    assert 3 not in [number for batch in doubling.seen for number in batch]


def test_closing_finishes_what_runs_and_ends_what_waits(engine: Engine[int], doubling: Doubling) -> None:
    running = held(engine, doubling)
    waiting = engine.submit("a", 1)
    threading.Timer(0.05, doubling.gate.set).start()
    engine.close()
    assert running.result(0) == 0
    with pytest.raises(ServiceError, match="stopped"):
        waiting.result(0)
    with pytest.raises(ServiceError, match="stopping"):
        engine.submit("a", 1)


def test_many_threads_get_their_own_answers(engine: Engine[int]) -> None:
    found: dict[int, int] = {}

    def ask(first: int) -> None:
        for number in range(first, first + 50):
            found[number] = engine.submit(first, number).result(30)

    threads = [threading.Thread(target=ask, args=(1000 * place,)) for place in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 300 and all(value == 2 * number for number, value in found.items())


def test_steps_are_observed(engine: Engine[int]) -> None:
    seen: list[tuple[int, float]] = []
    engine.observers.append(lambda rows, seconds: seen.append((rows, seconds)))
    engine.submit("a", 1).result(30)
    engine.submit("a", 2).result(30)
    assert seen and seen[0][0] == 1 and seen[0][1] >= 0
