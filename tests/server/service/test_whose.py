"""Whose adapter answers: names that two have, that change hands, and users who come back while they are forgotten."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lora.errors import DataError, Denied, Unavailable, Unknown
from server.service.adapters import NewAdapter
from server.service.forgetting import Deletions, Evidence
from server.service.generation import WriteAsked
from server.service.registry import Registry
from server.service.service import Service, Writer
from strategies.personal.events import Event
from tests.server.service.conftest import Decoder, Encoder, drawn
from tests.server.service.site import Site


def given(site: Site, name: str, owner: str | None, *, seed: int = 1) -> None:
    """Write an adapter for texts."""
    learner = site.service.learner
    assert learner is not None
    slot = drawn(learner.layout, 1, seed=seed)[0]
    site.service.adapters.write(NewAdapter(name, slot, learner.layout, "tiny-bert", 2, owner))


@pytest.mark.parametrize("who", ["operator", "user-002"])
def test_another_users_adapter_of_the_users_own_name_is_not_theirs(site: Site, who: str) -> None:
    given(site, "user-002", "eve")
    answer = site.ask("POST", "/v1/users/user-002/predictions", json={"texts": ["a"]}, who=who)
    assert answer.status_code == 404
    cold = site.post("/v1/users/user-002/predictions", {"texts": ["a"], "fallback": "cold"}, who=who)["texts"][0]
    assert not cold["whose"]["personalized"]


def test_an_adapter_of_the_users_name_that_nobody_owns_goes_with_the_user(site: Site) -> None:
    given(site, "ana", None)
    given(site, "hers", "ana")
    path = "/v1/users/ana/predictions"
    assert site.post(path, {"texts": ["a"]})["texts"][0]["whose"]["personalized"]
    done = site.ask("DELETE", "/v1/users/ana").json()
    assert done["state"] == "done" and done["evidence"]["adapters"] == 2
    assert site.ask("POST", path, json={"texts": ["a"]}).status_code == 404
    assert site.ask("DELETE", "/v1/users/ana").status_code == 404


def test_a_name_is_taken_by_one_of_two_who_ask_at_once(
    site: Site, in_threads: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, people = site.service, site.service.users
    assert people is not None
    operator = service.keys.caller(site.key("operator"))
    archive = service.take(operator, "user-001", model="base")
    begun, go, refused = threading.Event(), threading.Event(), threading.Event()
    observe = people.observe_many

    def slowly(events: Sequence[Event]) -> Any:
        begun.set()
        assert go.wait(30)
        return observe(events)

    def bring() -> None:
        with pytest.raises(DataError, match="a user is named 'bob'"):
            service.bring(operator, "bob", archive, owner="eve", model="base")
        refused.set()

    monkeypatch.setattr(people, "observe_many", slowly)
    item = people.histories.terms.catalogue.names[0]
    in_threads(lambda: service.observe(operator, "bob", [Event("bob", item, 4.0, 10**9)]))
    assert begun.wait(30)
    in_threads(bring)
    assert not refused.wait(0.2)
    go.set()
    assert refused.wait(30) and "bob" in people


def test_a_name_that_changes_hands_after_it_was_looked_at_answers_nobody_else(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = site.service
    archive = service.take(service.keys.caller(site.key("operator")), "user-001", model="base")
    operator, eve = (service.keys.caller(site.key(who)) for who in ("operator", "eve"))
    service.bring(operator, "note", archive, owner="eve", model="base")
    submit = service.engines["writing"].submit

    def late(owner: str, asked: Any) -> Any:
        monkeypatch.undo()
        service.drop(operator, "note")
        service.bring(operator, "note", archive, owner="bob", model="base")
        return submit(owner, asked)

    assert service.complete(eve, WriteAsked("note", "12/20", 2)).result(30)
    monkeypatch.setattr(service.engines["writing"], "submit", late)
    with pytest.raises(Unknown):
        service.complete(eve, WriteAsked("note", "12/20", 2))


def test_a_text_that_another_process_is_writing_ends_when_its_adapter_is_gone(
    decoder: Decoder, registry_url: str | None, tmp_path: Path
) -> None:
    def opened() -> Service:
        return Service(Registry(registry_url, tmp_path), writer=Writer(decoder.base, decoder.adapted))

    here, there = opened(), opened()
    try:
        layout = decoder.slots.layout
        here.adapters.write(NewAdapter("ana", drawn(layout, 1)[0], layout, "tiny-llama", 2, None))
        operator = there.keys.caller(there.keys.issue("operator"))
        started = threading.Event()

        def slowly(_: object) -> None:
            started.set()
            time.sleep(0.05)

        future = there.complete(operator, WriteAsked("ana", "12/20", 200, listener=slowly))
        assert started.wait(30) and not future.done()
        here.forget(operator, "ana")
        with pytest.raises(Unknown, match="forgotten"):
            future.result(10)
    finally:
        here.close()
        there.close()


@pytest.fixture
def returning(tmp_path: Path) -> Iterator[Callable[[int], Deletions]]:
    """Deletions of a user who comes back so many times, three events each."""
    registry = Registry(None, tmp_path)

    def made(times: int) -> Deletions:
        left = [times]

        def erase(user: str) -> Evidence:
            return {"events": 3, "slot": True}

        def look(user: str) -> Evidence:
            left[0] -= 1
            return {"left": {"events": 3 if left[0] >= 0 else 0, "slot": left[0] >= 0, "requests_ended": 5}}

        return Deletions(registry, [erase, look], knows=lambda user: True)

    yield made
    registry.close()


def test_who_comes_back_meanwhile_is_forgotten_again(returning: Callable[[int], Deletions]) -> None:
    done = returning(2).ask("ana", asked_by=None)
    assert done.state == "done"
    assert done.evidence == {"events": 9, "slot": True, "left": {"events": 0, "slot": False, "requests_ended": 5}}


def test_who_comes_back_all_the_time_is_not_said_to_be_forgotten(returning: Callable[[int], Deletions]) -> None:
    deletions = returning(3)
    with pytest.raises(Denied, match="'ana' comes back all the time; stop what sends their events"):
        deletions.ask("ana", asked_by=None)
    (failed,) = deletions.all()
    assert failed.state == "failed" and failed.evidence["left"]["events"] == 3 and failed.finished is None
    assert deletions.resume() == 1 and deletions.get(failed.id).state == "done"


def test_what_was_deleted_before_an_eraser_failed_is_told(tmp_path: Path) -> None:
    def fails(user: str) -> Evidence:
        raise Unavailable("the disk is away")

    registry = Registry(None, tmp_path)
    deletions = Deletions(registry, [lambda user: {"events": 3}, fails], knows=lambda user: True)
    with pytest.raises(Unavailable):
        deletions.ask("ana", asked_by=None)
    assert deletions.all()[0].evidence == {"events": 3, "error": "Unavailable"}
    registry.close()


def test_texts_by_adapters_that_come_and_go_are_those_of_their_user(
    text_encoder: Encoder, tmp_path: Path, in_threads: Callable[..., None]
) -> None:
    """Slots are lent in place: with room for two of six, and writing all the while, nobody gets another's numbers."""
    from server.service.texts import TextAsked
    from server.service.warm import Warm

    layout = text_encoder.learner.layout
    service = Service(Registry(None, tmp_path), learner=text_encoder.learner, warm=Warm(2))
    try:
        operator = service.keys.caller(service.keys.issue("operator"))
        names = [f"user-{number}" for number in range(6)]

        def write(name: str) -> None:
            slot = drawn(layout, 1, seed=names.index(name))[0]
            service.adapters.write(NewAdapter(name, slot, layout, "tiny-bert", 2, name))

        def ask(name: str) -> Any:
            (future,) = service.texts(operator, name, [TextAsked(name, "wake me up")])
            return future.result(30)

        for name in names:
            write(name)
        own = {name: ask(name).values for name in names}
        assert len({tuple(shares) for shares in own.values()}) == 6
        stop, gone, wrong = threading.Event(), set[str](), list[str]()

        def look(first: int) -> None:
            turn = first
            while not stop.is_set():
                turn += 1
                name = names[turn % 6]
                over = name in gone
                try:
                    answer = ask(name)
                except (Unknown, Unavailable):
                    # Forgotten, or at the end.
                    continue
                if over or max(abs(a - b) for a, b in zip(answer.values, own[name], strict=True)) > 1e-5:
                    wrong.append(name)

        in_threads(*(lambda first=first: look(first) for first in range(4)))
        for _ in range(10):
            for name in names[3:]:
                write(name)
        for name in names[:3]:
            service.forget(operator, name)
            gone.add(name)
        stop.wait(0.3)
        stop.set()
        assert wrong == []
    finally:
        service.close()
