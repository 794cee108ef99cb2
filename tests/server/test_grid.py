"""The paced Grid: everything is handed on, and replies are looked for neither too often nor too seldom."""

import time
from collections.abc import Iterable

import httpx
import pytest
from flwr.app import Message, RecordDict

from server.grid import PacedGrid
from simulation.grid import SequentialGrid
from strategies.flower import number, take_identity


class Slow(SequentialGrid):
    """Answers a message at the `after`-th look; node 9 cannot be reached."""

    def __init__(self, *, after: int) -> None:
        take_identity()
        self.after, self.looks = after, list[float]()
        self.sent: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return [1, 2]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids: list[str | None] = []
        for message in messages:
            ids.append(None if message.metadata.dst_node_id == 9 else number(message))
            self.sent |= {identity: message for identity in ids[-1:] if identity}
        return ids  # type: ignore[return-value]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.looks.append(time.monotonic())
        ready = len(self.looks) >= self.after
        return [Message(RecordDict(), reply_to=self.sent[each]) for each in message_ids] if ready else []


def http_error(code: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "https://superlink/v1/runtime/pull-messages")
    return httpx.HTTPStatusError(str(code), request=request, response=httpx.Response(code, request=request))


def orders(*nodes: int) -> list[Message]:
    return [Message(RecordDict(), dst_node_id=node, message_type="train") for node in nodes]


def test_looks_come_at_least_a_pause_apart() -> None:
    inner = Slow(after=4)
    replies = PacedGrid(inner, pause=0.05).send_and_receive(orders(1, 2), timeout=10)
    assert len(replies) == 2
    gaps = [later - sooner for sooner, later in zip(inner.looks, inner.looks[1:], strict=False)]
    assert len(gaps) == 3 and min(gaps) >= 0.045


def test_a_message_that_cannot_be_sent_is_not_waited_for() -> None:
    inner = Slow(after=1)
    grid = PacedGrid(inner, pause=0.01)
    assert [bool(identity) for identity in grid.push_messages(orders(1, 9))] == [True, False]
    assert len(grid.send_and_receive(orders(9, 2), timeout=10)) == 1


@pytest.mark.parametrize("fault", [http_error(500), http_error(503), httpx.ReadTimeout("slow")])
def test_a_superlink_that_cannot_answer_now_is_asked_again(fault: Exception) -> None:
    class Locked(Slow):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            if not self.looks:
                self.looks.append(0.0)
                raise fault
            return super().pull_messages(message_ids)

    assert len(PacedGrid(Locked(after=1), pause=0.01).send_and_receive(orders(1, 2), timeout=10)) == 2


def test_a_refusal_is_not_asked_again() -> None:
    class Barred(Slow):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            raise http_error(403)

    with pytest.raises(httpx.HTTPStatusError):
        PacedGrid(Barred(after=1), pause=0.01).send_and_receive(orders(1), timeout=10)


def test_waiting_ends_with_the_time() -> None:
    began = time.monotonic()
    assert PacedGrid(Slow(after=10**6), pause=0.01).send_and_receive(orders(1), timeout=0.1) == []
    assert 0.1 <= time.monotonic() - began < 5


def test_nothing_to_look_for_is_no_look() -> None:
    inner = Slow(after=1)
    assert list(PacedGrid(inner).pull_messages([])) == []
    assert inner.looks == []
    assert list(PacedGrid(inner).get_node_ids()) == [1, 2]
