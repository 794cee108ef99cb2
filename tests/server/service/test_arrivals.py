"""Answers that arrive on an event loop: all of a request's, in order, and nobody waits for ever."""

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

import pytest

from lora.errors import Busy, DataError
from server.service.arrivals import all_told, told


def futures(count: int) -> "list[Future[Any]]":
    return [Future() for _ in range(count)]


def test_answers_come_in_the_order_of_the_questions() -> None:
    asked = futures(64)

    async def ask() -> list[Any]:
        for place, future in reversed([*enumerate(asked)]):
            threading.Timer(0.0005 * (place % 7), future.set_result, [place]).start()
        return await all_told(asked)

    assert asyncio.run(ask()) == [*range(64)]
    assert asyncio.run(all_told(asked)) == [*range(64)], "answers that are there already are waited for by nobody"
    assert asyncio.run(all_told([])) == []


def test_many_requests_share_a_loop_and_none_is_lost() -> None:
    rows = [futures(3) for _ in range(200)]

    def answer(shift: int) -> None:
        for number, row in enumerate(rows):
            row[shift].set_result((number, shift))

    async def ask() -> list[list[Any]]:
        waiting = [asyncio.create_task(all_told(row)) for row in rows]
        await asyncio.sleep(0)
        for shift in range(3):
            threading.Thread(target=answer, args=[shift]).start()
        return await asyncio.gather(*waiting)

    found = asyncio.run(asyncio.wait_for(ask(), 30))
    assert found == [[(number, shift) for shift in range(3)] for number in range(200)]


def test_the_first_error_is_raised() -> None:
    one, other = futures(2)
    other.set_exception(DataError("x"))
    one.set_result(1)
    with pytest.raises(DataError, match="x"):
        asyncio.run(all_told([one, other]))


def test_what_takes_too_long_is_given_up() -> None:
    (open_,) = futures(1)
    with pytest.raises(Busy, match=r"within 0\.01 s"):
        asyncio.run(told(open_, patience=0.01))
    assert open_.cancelled(), "the engine need not answer any more"


def test_who_goes_away_is_waited_for_by_nobody() -> None:
    (open_,) = futures(1)

    async def leave() -> None:
        task = asyncio.create_task(told(open_))
        await asyncio.sleep(0.01)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(leave())
    assert open_.cancelled()


def test_an_answer_after_the_end_of_the_loop_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    first, second = futures(2)

    async def half() -> None:
        task = asyncio.create_task(all_told([first, second]))
        await asyncio.sleep(0.01)
        first.set_running_or_notify_cancel()
        task.cancel()

    asyncio.run(half())
    first.set_result(1)
    assert caplog.records == []
