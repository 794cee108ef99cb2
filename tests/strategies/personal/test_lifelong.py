"""Users for life: nobody forgotten, nobody mixed with another, refused events without effect, and no trace left."""

import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.errors import DataError, ModelError, RunError
from strategies.personal import lifelong
from strategies.personal.events import Event, EventRefused, Row
from strategies.personal.histories import Histories, State
from strategies.personal.lifelong import LifelongUsers
from strategies.personal.own_steps import OwnSteps
from strategies.personal.personalized import Personalized
from strategies.personal.recommenders.boosted import Boosted
from strategies.personal.recommenders.stack import Stack
from strategies.personal.slot_optimizer import SlotSteps
from strategies.personal.slots import UserSlots
from tasks.recommendation.builtin import builtin_interactions
from tasks.recommendation.interactions import Interactions

OWN = OwnSteps(steps=SlotSteps(steps=2, optimizer="sgd", rate=0.5), recent=4)
ASKED = np.arange(6)


@pytest.fixture(scope="module")
def personal(world: Any) -> Personalized:
    one: Personalized = world.tried()
    return one


def terms(world: Any) -> Interactions:
    log: Interactions = world.log
    return log


def events_of(log: Interactions, *users: int, count: int = 8) -> list[Event]:
    """The first events of some users, in order of time over all."""
    rows = np.concatenate([np.arange(log.starts[user], log.starts[user + 1])[:count] for user in users])
    rows = rows[np.argsort(log.times[rows], kind="stable")]
    return [
        Event(log.user_names[log.users[row]], log.catalogue.names[log.items[row]], log.ratings[row], log.times[row])
        for row in rows
    ]


def answers(users: LifelongUsers, *names: str | None) -> Any:
    return users.logits(names, np.tile(ASKED, (len(names), 1)))


def state(users: LifelongUsers) -> dict[str, Any]:
    """Everything that can be seen of every user, to the bit."""
    return {
        name: (users.version(name), users.slot(name).tolist(), users.history(name), answers(users, name).tolist())
        for name in users.names()
    }


# --- What a slot is --------------------------------------------------------------------------------------------------


def test_a_slot_answers_as_the_model_does_for_that_history(world: Any, personal: Personalized) -> None:
    log, users = world.log, LifelongUsers(personal, world.log)
    users.start(log)
    names = log.user_names[:5]
    # Far in the future, so that every event is in the history.
    asked = [log.query(name, ASKED.tolist(), time=2**40) for name in names]
    exact = np.stack([personal.logits(log, each) for each in asked])
    assert np.allclose(answers(users, *names), exact, atol=1e-5)
    assert np.ptp(exact, axis=0).max() > 1e-2


def test_the_gate_that_is_shown_is_the_one_that_mixed(world: Any, personal: Personalized) -> None:
    log, users = world.log, LifelongUsers(personal, world.log)
    users.observe_many(events_of(log, 0, 1))
    meta = personal.parts.meta
    for name in (*log.user_names[:2], None):
        gate = users.gate(name)
        torch.testing.assert_close(gate.sum(1), torch.ones(len(gate)))
        blocks = meta.blocks(gate[:, None].to(personal.base.placement.device))
        mixed = torch.cat([blocks[e.part, e.name].flatten(1) for e in meta.layout.entries], dim=1)[0].cpu()
        torch.testing.assert_close(mixed, users.cold if name is None else users.slot(name))
    assert float((users.gate(log.user_names[0]) - users.gate(log.user_names[1])).abs().max()) > 0
    with pytest.raises(DataError):
        users.gate("nobody of that name")


@pytest.mark.parametrize("own", [None, OWN], ids=["mixture", "own steps"])
def test_event_by_event_ends_where_all_at_once_does(world: Any, personal: Personalized, own: OwnSteps | None) -> None:
    events = events_of(world.log, 2, 5, 9)
    slowly, quickly = (LifelongUsers(personal, world.log, own=own) for _ in range(2))
    for event in events:
        slowly.observe(event.user, event.item, event.rating, event.time)
    quickly.observe_many(events)
    names = quickly.names()
    assert slowly.names() == names and len(names) == 3
    for name in names:
        assert torch.allclose(slowly.slot(name), quickly.slot(name), atol=1e-6)
        assert slowly.history(name) == quickly.history(name)
    assert np.allclose(answers(slowly, *names), answers(quickly, *names), atol=1e-6)


def test_own_steps_lower_the_loss_of_the_events_they_learn_from(world: Any, personal: Personalized) -> None:
    events = events_of(world.log, 4, count=20)
    plain, own = LifelongUsers(personal, world.log), LifelongUsers(personal, world.log, own=OWN)
    name = events[0].user
    for users in (plain, own):
        users.observe_many(events)
    assert not torch.equal(plain.slot(name), own.slot(name))
    log = plain.histories.log([name])
    rows = np.arange(len(log))[-OWN.recent :]
    losses = []
    for users in (plain, own):
        slots = users.slot(name).expand(len(rows), -1)
        odds = personal.logits_of_slots(log, log.queries(rows), slots)
        losses.append(float(np.logaddexp(0, np.where(log.likes[rows], -odds, odds)).mean()))
    assert losses[1] < losses[0] - 1e-4


def test_own_steps_that_diverge_leave_the_mixture(world: Any, personal: Personalized) -> None:
    wild = OwnSteps(steps=SlotSteps(steps=3, optimizer="sgd", rate=1e38), recent=4)
    plain, own = LifelongUsers(personal, world.log), LifelongUsers(personal, world.log, own=wild)
    for users in (plain, own):
        users.observe_many(events_of(world.log, 4))
    name = plain.names()[0]
    assert torch.equal(plain.slot(name), own.slot(name))


# --- Cold start ------------------------------------------------------------------------------------------------------


def test_nobody_gets_the_gates_answer_to_an_empty_history(world: Any, personal: Personalized) -> None:
    log, users = world.log, LifelongUsers(personal, world.log)
    users.start(log)
    empty = log.query(log.user_names[3], ASKED.tolist(), time=0).without_history()
    assert np.allclose(answers(users, None)[0], personal.logits(log, empty), atol=1e-5)
    vector = personal.representation(log, empty.take(slice(0, 1)))
    assert torch.allclose(users.cold, personal.adapter_of(vector)[0], atol=1e-6)
    together = answers(users, log.user_names[0], None, log.user_names[1], None)
    assert np.allclose(together[1], answers(users, None)[0], atol=1e-6)
    assert np.array_equal(together[1], together[3])
    assert not np.allclose(together[0], together[1])


def test_a_user_is_served_from_the_first_event_on(world: Any, personal: Personalized) -> None:
    users, first = LifelongUsers(personal, world.log), events_of(world.log, 7, count=1)[0]
    assert first.user not in users
    with pytest.raises(DataError, match="is not known; observe an event"):
        answers(users, first.user)
    observed = users.observe(first.user, first.item, first.rating, first.time)
    assert observed.new == (first.user,) and observed.versions == {first.user: users.version(first.user)}
    assert first.user in users and len(users) == 1
    assert not torch.allclose(users.slot(first.user), users.cold)
    assert not np.allclose(answers(users, first.user), answers(users, None))


# --- Nobody forgotten, nobody mixed ----------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_a_stream_moves_only_whom_it_names(world: Any, personal: Personalized, data: st.DataObject) -> None:
    """Interleaved streams: everybody who had an event answers, with the version last written, and the rest stay."""
    queues = {f"u{number}": events_of(world.log, number, count=6) for number in range(4)}
    users = LifelongUsers(personal, world.log, own=data.draw(st.sampled_from([None, OWN])))
    seen: dict[str, int] = {}
    before: dict[str, Any] = {}
    for _ in range(data.draw(st.integers(1, 6))):
        left = [name for name, queue in queues.items() if queue]
        chosen = data.draw(st.lists(st.sampled_from(left), min_size=1, max_size=3)) if left else []
        batch = [queues[name].pop(0) for name in chosen if queues[name]]
        observed = users.observe_many(batch)
        after, touched = state(users), {event.user for event in batch}
        assert set(observed.versions) == touched
        assert {name: kept for name, kept in after.items() if name not in touched} == {
            name: kept for name, kept in before.items() if name not in touched
        }
        for event in batch:
            seen[event.user] = seen.get(event.user, 0) + 1
        assert {name: len(history) for name, (_, _, history, _) in after.items()} == seen
        for name, version in observed.versions.items():
            assert after[name][0] == version > before.get(name, (0,))[0]
        before = after


def test_events_of_the_terms_are_not_known(world: Any, personal: Personalized) -> None:
    """`terms` may hold the future: its events, shuffled among items and ratings, change nothing."""
    log, rng = world.log, np.random.default_rng(0)
    other = replace(log, items=rng.permutation(log.items), ratings=rng.permutation(log.ratings))
    found = []
    for each in (log, other):
        users = LifelongUsers(personal, each)
        users.observe_many(events_of(log, 2, 3))
        found.append(state(users))
    assert found[0] == found[1] and len(found[0]) == 2


def test_many_users_are_updated_in_chunks(world: Any, personal: Personalized, monkeypatch: Any) -> None:
    whole = LifelongUsers(personal, world.log)
    whole.start(world.log)
    monkeypatch.setattr(lifelong, "CHUNK", 7)
    parts = LifelongUsers(personal, world.log)
    parts.start(world.log)
    assert parts.names() == whole.names() == sorted(world.log.user_names)
    for name in parts.names():
        assert torch.allclose(parts.slot(name), whole.slot(name), atol=1e-6)


# --- What is refused -------------------------------------------------------------------------------------------------

WRONG: Sequence[tuple[dict[str, Any], str, str]] = [
    ({"item": "item-00x"}, "item", r"unknown item 'item-00x'; did you mean 'item-0\d\d'\?; new items need"),
    ({"rating": 5.5}, "rating", r"rating 5.5 is out of range; give 0.5 to 5 \(ratings.lowest"),
    ({"rating": float("nan")}, "rating", "rating nan is out of range"),
    ({"time": -1}, "backwards", "time -1 of user 'user-002' is before the last event, at .*; send events in order"),
    ({"time": 1.5}, "time", "time 1.5 is none; give whole seconds"),
    ({"time": 2**63}, "time", "is none; give whole seconds"),
    ({"user": " "}, "user", "user ' ' is no name"),
]


@pytest.mark.parametrize(("change", "reason", "message"), WRONG)
def test_a_wrong_event_is_refused_and_changes_nothing(
    world: Any, personal: Personalized, change: dict[str, Any], reason: str, message: str
) -> None:
    users = LifelongUsers(personal, world.log)
    first = events_of(world.log, 2, 3)
    users.observe_many(first[:-1])
    good = replace(first[-1], user="somebody new")
    before = state(users)
    wrong = replace(next(event for event in first[:-1][::-1] if event.user == "user-002"), **change)
    with pytest.raises(EventRefused, match=f"event 2 of 2: .*{message}") as refused:
        users.observe_many([good, wrong])
    assert refused.value.reason == reason and refused.value.event is wrong
    assert state(users) == before and "somebody new" not in users


def test_an_event_that_comes_twice_is_a_duplicate_and_no_step_back(world: Any, personal: Personalized) -> None:
    users, events = LifelongUsers(personal, world.log), events_of(world.log, 2)
    users.observe_many(events)
    before = state(users)
    for again in (events[0], events[-1]):
        with pytest.raises(EventRefused, match="already; leave it out") as refused:
            users.observe(again.user, again.item, again.rating, again.time)
        assert refused.value.reason == "duplicate"
    new = replace(events[-1], user="new")
    with pytest.raises(EventRefused, match="event 2 of 2: user 'new' rated"):
        users.observe_many([new, new])
    assert state(users) == before
    users.observe(events[-1].user, events[-1].item, 1.0, events[-1].time + 1)
    assert len(users.history(events[-1].user)) == len(events) + 1


def test_wrong_questions_are_named(world: Any, personal: Personalized) -> None:
    users = LifelongUsers(personal, world.log)
    users.start(world.log)
    with pytest.raises(DataError, match=r"user 'user-00x' is not known; did you mean 'user-0\d\d'\?"):
        answers(users, "user-001", "user-00x")
    with pytest.raises(DataError, match="item 60 is not in the catalogue of 60"):
        users.logits(["user-001"], np.array([[3, 60]]))
    with pytest.raises(DataError, match="a row of items for every user"):
        users.logits(["user-001"], np.array([3]))
    for ask in (users.version, users.slot, users.history, users.forget):
        with pytest.raises(DataError, match="user 'x' is not known"):
            ask("x")
    assert users.logits([], np.empty((0, 3), dtype=np.int64)).shape == (0, 3)


def test_models_that_cannot_keep_users_apart_are_refused(world: Any) -> None:
    with pytest.raises(ModelError, match="routing: user and frame: shared"):
        LifelongUsers(world.tried(routing="pair"), world.log)
    counting = world.tried()
    counting.asking.scorer = Stack([world.mf, Boosted()])
    with pytest.raises(ModelError, match="counts what all users did"):
        LifelongUsers(counting, world.log)


# --- On disk ---------------------------------------------------------------------------------------------------------


def traces(directory: Path, *needles: bytes) -> list[str]:
    """Files that hold any of the bytes."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return [path.name for path in files if any(needle in path.read_bytes() for needle in needles)]


def test_forgetting_leaves_no_trace(world: Any, personal: Personalized, tmp_path: Path) -> None:
    users = LifelongUsers(personal, world.log, own=OWN, directory=tmp_path)
    users.start(world.log)
    # A time like no other, as SQLite writes it, and a name that is no other's start.
    moment = 2**41 + 0x1234567
    users.observe("quentin-the-forgotten", "item-003", 4.5, moment)
    slot = users.slot("quentin-the-forgotten").numpy()
    needles = (b"quentin-the-forgotten", moment.to_bytes(6, "big"), slot[np.flatnonzero(slot)[:8]].tobytes())
    for needle in needles:
        assert traces(tmp_path, needle), "the search would find nothing anyhow"
    users.observe("user-001", "item-004", 1.5, moment + 2**30)
    users.forget("quentin-the-forgotten")
    assert traces(tmp_path, *needles) == []
    assert "quentin-the-forgotten" not in users
    with pytest.raises(DataError, match="not known"):
        answers(users, "quentin-the-forgotten")
    users.close()
    assert traces(tmp_path, *needles) == []
    assert personal.asking._kept == [] or all(
        "quentin-the-forgotten" not in kept[0].user_names for kept in personal.asking._kept
    )


@pytest.mark.parametrize("killed", [False, True], ids=["", "killed before the file is tidied"])
def test_no_copy_of_an_event_stays_behind_moved_pages(tmp_path: Path, monkeypatch: Any, killed: bool) -> None:
    """Many users in turn, so that pages are split and merged: SQLite leaves copies there that a delete passes by."""
    rng, log = random.Random(0), builtin_interactions(users=1, items=20, events=5)
    histories, times = Histories(log, kind="k", directory=tmp_path), dict[str, list[int]]()
    moments = (2**44 + number * 2**33 + rng.getrandbits(32) for number in range(5000))
    for _ in range(10):
        rows = [Row(f"person-{rng.randrange(200):05}", rng.randrange(20), 3.5, next(moments)) for _ in range(500)]
        histories.add(rows)
        for row in rows:
            times.setdefault(row.user, []).append(row.time)
    gone = rng.sample(sorted(times), 60)
    needles = [*(time.to_bytes(6, "big") for name in gone for time in times[name]), *(name.encode() for name in gone)]
    assert all(traces(tmp_path, needle) for needle in needles[::50])
    with monkeypatch.context() as patch:
        if killed:
            patch.setattr(Histories, "_tidy", lambda _: None)
        histories.erase(gone)
    histories.close()
    kept = Histories(log, kind="k", directory=tmp_path)
    assert traces(tmp_path, *needles) == []
    assert len(kept) == len(times) - 60
    assert len(kept.log(kept.names())) == sum(len(found) for name, found in times.items() if name not in gone)
    kept.close()


def test_threads_that_look_up_users_are_in_nobodys_way(tmp_path: Path) -> None:
    """Whoever asks while a user is erased holds a statement open, beside which the file cannot be written anew."""
    histories = Histories(builtin_interactions(users=1, items=20, events=5), kind="k", directory=tmp_path)
    names = [f"person-{number}" for number in range(30)]
    histories.add([Row(name, 1, 3.5, number) for number, name in enumerate(names)])
    stop, wrong = threading.Event(), list[str]()

    def look() -> None:
        while not stop.is_set():
            for name in names:
                found = name in histories, histories.events(name), len(histories.log([names[-1]]))
                if found[0] != (found[1] > 0) and name in histories:
                    wrong.append(name)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for name in names[:-1]:
            histories.erase([name])
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert wrong == [] and histories.names() == names[-1:]
    histories.close()


def test_forgetting_moves_nobody_else_and_lets_one_come_back(world: Any, personal: Personalized) -> None:
    users = LifelongUsers(personal, world.log)
    users.start(world.log)
    before, history = state(users), users.history("user-004")
    users.forget("user-004", "user-005")
    after = state(users)
    assert after == {name: kept for name, kept in before.items() if name not in ("user-004", "user-005")}
    first = history[0]
    users.observe(first.user, first.item, first.rating, first.time)
    assert users.history("user-004") == [first]
    assert users.version("user-004") > before["user-004"][0]


def test_users_outlive_the_process(world: Any, personal: Personalized, tmp_path: Path) -> None:
    users = LifelongUsers(personal, world.log, directory=tmp_path)
    users.start(world.log)
    before = state(users)
    users.close()
    again = LifelongUsers(personal, world.log, directory=tmp_path)
    assert state(again) == before
    with pytest.raises(RunError, match="is open in another process"):
        LifelongUsers(personal, world.log, directory=tmp_path)
    again.close()
    shorter = replace(world.log, scale=(0.5, 4.5), ratings=np.minimum(world.log.ratings, 4.5))
    with pytest.raises(RunError, match="another catalogue or scale"):
        LifelongUsers(personal, shorter, directory=tmp_path)
    LifelongUsers(personal, world.log, directory=tmp_path).close()


@pytest.mark.parametrize("when", ["before the slots", "after the slots"])
def test_a_kill_between_event_and_slot_is_made_good(
    world: Any, personal: Personalized, tmp_path: Path, monkeypatch: Any, when: str
) -> None:
    events = events_of(world.log, 2, 3)
    whole = LifelongUsers(personal, world.log)
    whole.observe_many(events)
    users = LifelongUsers(personal, world.log, directory=tmp_path)
    users.observe_many(events[:5])

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        owner, name = (UserSlots, "write") if when == "before the slots" else (Histories, "move")
        patch.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            users.observe_many(events[5:])
    assert users.histories.among(State.PENDING)
    users.close()
    again = LifelongUsers(personal, world.log, directory=tmp_path)
    assert not again.histories.among(State.PENDING)
    for name in whole.names():
        assert again.history(name) == whole.history(name)
        assert torch.allclose(again.slot(name), whole.slot(name), atol=1e-6)
    again.close()


@pytest.mark.parametrize("when", ["before the slots", "after the slots"])
def test_a_kill_while_forgetting_is_made_good(
    world: Any, personal: Personalized, tmp_path: Path, monkeypatch: Any, when: str
) -> None:
    users = LifelongUsers(personal, world.log, directory=tmp_path)
    users.observe_many(events_of(world.log, 2, 3))

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        owner, name = (UserSlots, "remove") if when == "before the slots" else (Histories, "erase")
        patch.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            users.forget("user-002")
    assert "user-002" not in users and users.names() == ["user-003"]
    users.close()
    again = LifelongUsers(personal, world.log, directory=tmp_path)
    assert again.names() == ["user-003"] and "user-002" not in again.slots
    assert traces(tmp_path, b"user-002") == []
    again.close()


def test_another_model_mixes_everybody_anew(world: Any, tmp_path: Path) -> None:
    one, two = world.tried(), world.tried()
    with torch.no_grad():
        two.parts.meta.b.mul_(-1)
    users = LifelongUsers(one, world.log, directory=tmp_path)
    users.start(world.log)
    before = {name: users.slot(name) for name in users.names()}
    users.close()
    again = LifelongUsers(two, world.log, directory=tmp_path)
    for name, slot in before.items():
        assert torch.allclose(again.slot(name), -slot, atol=1e-6)
    again.close()
