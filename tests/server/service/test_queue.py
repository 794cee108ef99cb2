"""Waiting work: in turns, bounded, and never lost."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.errors import Busy, ServiceError
from server.service.queue import FairQueue, Work


def filled(owners: str, *, most: int = 100, most_of_one: int = 100) -> FairQueue[int]:
    queue: FairQueue[int] = FairQueue(most=most, most_of_one=most_of_one)
    for number, owner in enumerate(owners):
        queue.put(Work(owner, number))
    return queue


@given(st.text("abcd", max_size=30), st.integers(1, 40))
def test_all_of_it_comes_in_turns_and_an_owners_in_order(owners: str, count: int) -> None:
    queue, taken = filled(owners), []
    while batch := queue.take(count, wait=0, idle=False):
        taken += batch
    assert sorted(work.asked for work in taken) == list(range(len(owners)))
    for owner in set(owners):
        own = [work.asked for work in taken if work.owner == owner]
        assert own == sorted(own)
    # Guarantee: the oldest piece of each of k waiting owners is among the first k.
    kinds = set(owners)
    assert {work.owner for work in taken[: len(kinds)]} == kinds


def test_a_burst_of_one_does_not_delay_the_others() -> None:
    taken = filled("aaaaaaaab").take(2, wait=0, idle=False)
    assert [work.owner for work in taken] == ["a", "b"]


def test_a_full_queue_is_busy_and_says_when_to_come_back() -> None:
    queue = filled("abc", most=3)
    with pytest.raises(Busy, match="3 requests are waiting") as caught:
        queue.put(Work("d", 9), retry_after=7)
    assert caught.value.retry_after == 7 and len(queue) == 3


def test_one_who_waits_for_too_much_is_busy_alone() -> None:
    queue = filled("aa", most_of_one=2)
    with pytest.raises(Busy, match="2 requests of this user"):
        queue.put(Work("a", 9))
    queue.put(Work("b", 9))
    assert len(queue) == 3


def test_a_batch_closes_when_it_is_full_and_else_when_the_oldest_has_waited() -> None:
    queue = filled("ab")
    began = time.perf_counter()
    assert len(queue.take(2, wait=30)) == 2 and time.perf_counter() - began < 10
    queue.put(Work("a", 1))
    threading.Timer(0.05, lambda: queue.put(Work("b", 2))).start()
    assert len(queue.take(2, wait=30)) == 2
    queue.put(Work("a", 3))
    began = time.perf_counter()
    assert len(queue.take(2, wait=0.05)) == 1 and 0.03 < time.perf_counter() - began < 10


def test_what_is_removed_or_closed_comes_back_to_the_caller() -> None:
    queue = filled("aba")
    assert [work.asked for work in queue.remove("a")] == [0, 2]
    assert queue.remove("nobody") == [] and len(queue) == 1
    assert [work.asked for work in queue.close()] == [1]
    assert queue.take(1, wait=0) == []
    with pytest.raises(ServiceError, match="stopping"):
        queue.put(Work("a", 1))


def test_an_answer_comes_once() -> None:
    work = Work("a", 1)
    assert work.tell("first") and work.over
    assert not work.tell("second") and work.answer.result() == "first"
