"""Histories hold what was strictly earlier, whatever the order in which rows came."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.errors import DataError
from tasks.recommendation.builtin import builtin_interactions
from tasks.recommendation.interactions import Interactions, Items
from tasks.recommendation.metrics import auc
from tasks.recommendation.splits import SPLITS, global_time, per_user

Event = tuple[int, int, float, int]
EVENTS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.sampled_from([0.5, 2.0, 4.0, 5.0]), st.integers(0, 8)),
    min_size=1,
    max_size=40,
)
ITEMS = Items(tuple("abcdef"), tuple(f"Title {name} (199{i})" for i, name in enumerate("abcdef")), ((),) * 6)


def arranged(events: list[Event]) -> Interactions:
    users, items, ratings, times = (np.array(column) for column in zip(*events, strict=True))
    return Interactions.arranged(users, items, ratings.astype(float), times, tuple("wxyz"), ITEMS)


def histories(log: Interactions, *, length: int = 40) -> list[list[int]]:
    queries = log.queries(np.arange(len(log)))
    return [list(range(first, end)) for first, end in zip(queries.first, queries.end, strict=True)]


@given(EVENTS)
def test_a_history_is_exactly_the_strictly_earlier_events_of_the_user(events: list[Event]) -> None:
    log = arranged(events)
    for row, history in enumerate(histories(log)):
        expected = np.flatnonzero((log.users == log.users[row]) & (log.times < log.times[row]))
        assert history == expected.tolist()
        assert row not in history


@given(EVENTS, st.integers(1, 6))
def test_the_latest_rows_are_the_end_of_the_history_in_time_order(events: list[Event], length: int) -> None:
    log = arranged(events)
    for rows, history in zip(log.queries(np.arange(len(log))).latest(length), histories(log), strict=True):
        kept = rows[rows >= 0].tolist()
        assert kept == history[-length:]
        assert (np.diff(log.times[kept]) >= 0).all()
        assert rows.tolist() == [-1] * (length - len(kept)) + kept


@given(EVENTS, st.integers(0, 8), st.randoms())
def test_changing_the_future_changes_no_history(events: list[Event], now: int, random: object) -> None:
    """Events from `now` on get other items and ratings, and come in another order: earlier queries see the same."""
    past = [event for event in events if event[3] < now]
    future = [event for event in events if event[3] >= now]
    changed = [(user, (item + 1) % 6, 5.5 - rating, time) for user, item, rating, time in reversed(future)]
    for user, name in enumerate("wxyz"):
        seen = []
        for whole in (past + future, changed + past, past):
            if not whole:
                continue
            log = arranged(whole)
            query = log.query(name, [0], time=now)
            rows = np.arange(query.first[0], query.end[0])
            seen.append((log.items[rows].tolist(), log.ratings[rows].tolist()))
        assert all(each == seen[0] for each in seen), user


@given(EVENTS)
def test_rows_that_are_not_sorted_are_refused_or_sorted(events: list[Event]) -> None:
    log = arranged(events)
    assert sorted(zip(log.users, log.times, strict=True)) == list(zip(log.users, log.times, strict=True))
    if len(log) > 1 and (log.users[0], log.times[0]) != (log.users[-1], log.times[-1]):
        columns = (log.users[::-1], log.items[::-1], log.ratings[::-1], log.times[::-1])
        with pytest.raises(ValueError, match="not sorted"):
            Interactions(*columns, log.user_names, log.catalogue)


@given(EVENTS, EVENTS)
def test_a_log_that_grows_equals_one_that_was_whole(events: list[Event], more: list[Event]) -> None:
    users, items, ratings, times = (np.array(column) for column in zip(*more, strict=True))
    grown = arranged(events).grown(users, items, ratings.astype(float), times)
    whole = arranged(events + more)
    for name in ("users", "items", "ratings", "times"):
        assert getattr(grown, name).tolist() == getattr(whole, name).tolist()


@given(EVENTS, st.sets(st.sampled_from("wxyz")))
def test_some_users_alone_are_what_they_would_be_without_the_others(events: list[Event], kept: set[str]) -> None:
    log, left = arranged(events), [event for event in events if "wxyz"[event[0]] in kept]
    if not left:
        with pytest.raises(DataError, match="none of the 4 users is left"):
            log.among(kept.__contains__)
        return
    names = sorted(kept)
    users, items, ratings, times = (np.array(column) for column in zip(*left, strict=True))
    place = np.array([names.index("wxyz"[user]) for user in users])
    alone = Interactions.arranged(place, items, ratings.astype(float), times, tuple(names), ITEMS)
    some = log.among(kept.__contains__)
    assert some.user_names == alone.user_names and some.catalogue == alone.catalogue
    for name in ("users", "items", "ratings", "times"):
        assert np.array_equal(getattr(some, name), getattr(alone, name))


@given(EVENTS, st.integers(1, 4))
def test_the_core_is_the_largest_part_with_enough_events_each(events: list[Event], least: int) -> None:
    log = arranged(events)
    left = list(zip(log.users.tolist(), log.items.tolist(), strict=True))
    while True:
        kept = [
            (user, item)
            for user, item in left
            if sum(u == user for u, _ in left) >= least and sum(i == item for _, i in left) >= least
        ]
        if kept == left:
            break
        left = kept
    if not left:
        with pytest.raises(DataError, match=f"no users and items with {least} interactions"):
            log.core(least)
        return
    core = log.core(least)
    names = [(core.user_names[u], core.catalogue.names[i]) for u, i in zip(core.users, core.items, strict=True)]
    assert names == [("wxyz"[user], "abcdef"[item]) for user, item in left]


@given(EVENTS, st.sampled_from(sorted(SPLITS)))
def test_splits_are_disjoint_and_hold_every_row(events: list[Event], name: str) -> None:
    log = arranged(events)
    split = SPLITS[name](log)
    rows = np.concatenate([split.train, split.validation, split.test])
    assert sorted(rows.tolist()) == list(range(len(log)))


@given(EVENTS)
def test_per_user_no_training_event_is_later_than_a_test_event(events: list[Event]) -> None:
    log = arranged(events)
    split = per_user(log)
    for user in np.unique(log.users):
        ends = [log.times[part[log.users[part] == user]] for part in (split.train, split.validation, split.test)]
        ordered = [time for part in ends for time in sorted(part.tolist())]
        assert ordered == sorted(ordered)


@given(EVENTS)
def test_global_time_divides_no_moment(events: list[Event]) -> None:
    log = arranged(events)
    parts = [set(log.times[part].tolist()) for part in vars(global_time(log)).values() if not isinstance(part, str)]
    for early, late in ((0, 1), (0, 2), (1, 2)):
        assert not parts[early] or not parts[late] or max(parts[early]) < min(parts[late])


def test_shares_are_those_that_were_asked_for() -> None:
    log = builtin_interactions(seed=1)
    split = per_user(log)
    assert [len(part) / len(log) for part in (split.train, split.validation, split.test)] == pytest.approx(
        [0.7, 0.1, 0.2], abs=0.01
    )


def test_events_of_users_without_a_name_are_refused() -> None:
    log = builtin_interactions(users=3, items=20, events=10, seed=0)
    one = np.array([3])
    with pytest.raises(ValueError, match="user indices run from 0 to 2, not to 3"):
        log.grown(one, one, 4.0 * one, one)
    assert len(log.grown(one, one, 4.0 * one, one, names=("new",))) == len(log) + 1


def test_unknown_users_and_items_are_named() -> None:
    log = builtin_interactions(seed=0)
    with pytest.raises(DataError, match="unknown user 'usr-003'; did you mean 'user-003'"):
        log.query("usr-003", [0], time=0)
    with pytest.raises(DataError, match="unknown item 'itm-003'; did you mean 'item-003'"):
        log.catalogue.index("itm-003")
    with pytest.raises(DataError, match="item 150 is not in the catalogue of 150"):
        log.query("user-000", [3, 150], time=0)


def test_a_user_without_earlier_events_has_an_empty_history() -> None:
    query = builtin_interactions(seed=0).query("user-000", [1, 2], time=0)
    assert (query.first == query.end).all()
    assert (query.latest(3) == -1).all()


def test_the_built_in_world_can_be_learned() -> None:
    """What made the likes predicts them: items' means over others, and a user's own share."""
    log = builtin_interactions(seed=3)
    means = np.bincount(log.items, weights=log.likes) / np.maximum(np.bincount(log.items), 1)
    own = np.bincount(log.users, weights=log.likes) / np.bincount(log.users)
    assert auc(log.likes, means[log.items]) > 0.55
    assert auc(log.likes, own[log.users]) > 0.55
    assert len(np.unique(log.catalogue.texts)) > 100
    assert log.ratings.min() >= 0.5 and log.ratings.max() <= 5.0
    same = builtin_interactions(seed=3)
    assert (same.items == log.items).all() and (same.ratings == log.ratings).all()
