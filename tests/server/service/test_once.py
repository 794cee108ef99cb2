"""Requests by idempotency key: one effect, the same answer, also after a kill in between."""

import pytest

from lora.errors import DataError
from server.service.once import KEPT, Once
from server.service.registry import Registry


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def act(self) -> dict[str, int]:
        self.count += 1
        return {"count": self.count}


def test_a_key_acts_once_and_answers_the_same(registry: Registry) -> None:
    once, counter = Once(registry), Counter()

    def run(key: str, owner: str = "ada", body: str = "x") -> tuple[dict[str, int], bool]:
        return once.run(key, owner=owner, body=body, act=counter.act, done=lambda: None)

    assert run("k") == ({"count": 1}, False)
    assert run("k") == ({"count": 1}, True)
    assert run("k", owner="eve") == ({"count": 2}, False)
    assert run("k2") == ({"count": 3}, False)
    with pytest.raises(DataError, match="another request"):
        run("k", body="y")
    assert once.forget("ada") == 2
    assert run("k") == ({"count": 4}, False)


def test_a_failed_request_may_be_sent_again(registry: Registry) -> None:
    once, counter = Once(registry), Counter()

    def fails() -> dict[str, int]:
        raise DataError("wrong")

    with pytest.raises(DataError):
        once.run("k", owner="ada", body="x", act=fails, done=lambda: None)
    assert once.run("k", owner="ada", body="other", act=counter.act, done=lambda: None) == ({"count": 1}, False)


def test_after_a_kill_it_is_asked_whether_the_effect_is_there(registry: Registry) -> None:
    once, counter = Once(registry), Counter()

    class Killed(Once):
        def _keep(self, name: str, answer: object) -> None:
            """The process ends here."""

    Killed(registry).run("k", owner="ada", body="x", act=counter.act, done=lambda: None)
    assert once.run("k", owner="ada", body="x", act=counter.act, done=lambda: {"count": 1}) == ({"count": 1}, True)
    Killed(registry).run("k2", owner="ada", body="x", act=lambda: {}, done=lambda: None)
    assert once.run("k2", owner="ada", body="x", act=counter.act, done=lambda: None) == ({"count": 2}, False)


def test_a_key_is_free_again_after_a_day(registry: Registry) -> None:
    now, counter = [1e9], Counter()
    once = Once(registry, clock=lambda: now[0])
    once.run("k", owner="ada", body="x", act=counter.act, done=lambda: None)
    now[0] += KEPT + 1
    assert once.run("k", owner="ada", body="y", act=counter.act, done=lambda: None) == ({"count": 2}, False)
