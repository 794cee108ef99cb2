"""The replay in order of time: no period knows of a later one, and every arm is what its name says."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from lora.errors import DataError
from strategies.personal.personalized import Personalized
from strategies.personal.replay import (
    ANEW,
    ARMS,
    EVENT,
    NOTHING,
    PERIOD,
    SCORER,
    SLOT,
    Replayed,
    before,
    known_at,
    periods,
    replay,
)
from tasks.recommendation.interactions import Interactions
from tasks.recommendation.metrics import auc


def spread_out(log: Interactions) -> Interactions:
    """Move some users to later years: the built-in world has no newcomers otherwise."""
    moved = log.times + (log.users % 3) * 200 * 86_400
    return replace(log, times=moved)


@pytest.fixture(scope="module")
def model(world: Any) -> Personalized:
    one: Personalized = world.tried()
    return one


def replayed(log: Interactions, model: Personalized, **settings: Any) -> Replayed:
    return replay(log, lambda *_: model, periods(log, count=3), sample=40, early=10, **settings)


def test_periods_cover_the_rest_in_order_and_divide_no_moment(world: Any) -> None:
    log = spread_out(world.log)
    found = periods(log, start=0.4, count=4)
    rows = np.concatenate([each.rows for each in found])
    assert np.array_equal(np.sort(rows), np.flatnonzero(log.times >= found[0].begin))
    for one, other in pairwise(found):
        assert log.times[one.rows].max() < other.begin == one.end <= log.times[other.rows].min()
    sizes = [len(each.rows) for each in found]
    assert max(sizes) - min(sizes) < 0.05 * len(log)
    assert (log.times < found[0].begin).mean() == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize(("start", "count"), [(0, 3), (1, 3), (0.5, 0), (0.5, 5000)])
def test_periods_that_cannot_be_are_named(world: Any, start: float, count: int) -> None:
    with pytest.raises(DataError, match=r"give (a share between 0 and 1|fewer periods)"):
        periods(world.log, start=start, count=count)


def test_a_fit_before_a_moment_sees_nothing_later(world: Any) -> None:
    log = spread_out(world.log)
    moment = periods(log)[2].begin
    split = before(log, moment)
    assert log.times[split.train].max() < log.times[split.validation].min()
    assert log.times[split.validation].max() < moment <= log.times[split.test].min()
    assert len(split.train) + len(split.validation) + len(split.test) == len(log)


def test_who_knows_only_the_past_of_a_moment(world: Any) -> None:
    log = spread_out(world.log)
    moment = int(np.median(log.times))
    queries = log.queries(np.arange(len(log)))
    known = known_at(log, queries, moment)
    for row in range(0, len(log), 37):
        past = [
            event for event in range(queries.first[row], queries.end[row]) if log.times[event] < moment
        ]  # fmt: skip
        assert [*range(known.first[row], known.end[row])] == past


def test_arms_differ_in_what_was_brought_up_to_date(world: Any, model: Personalized) -> None:
    log = spread_out(world.log)
    found = replayed(log, model)
    assert tuple(found.logits) == ARMS
    queries = log.queries(found.rows)
    assert np.allclose(found.logits[EVENT], model.logits(log, queries), atol=1e-6)
    assert np.allclose(found.logits[ANEW], found.logits[EVENT], atol=1e-6), "the same model is fitted each time"
    assert np.allclose(found.logits[SCORER], world.mf.logits(log, queries))
    # At the start of a period nothing is out of date yet; later slots, and later still histories, are.
    first = found.period == 0
    assert np.allclose(found.logits[PERIOD][first], found.logits[SLOT][first])
    assert not np.allclose(found.logits[PERIOD][~first], found.logits[SLOT][~first])
    unknown = (found.newcomer > 0) & (found.seen == 0)
    assert unknown.any()
    for arm in (PERIOD, SLOT, NOTHING):
        assert np.allclose(found.logits[arm][unknown], found.logits[EVENT][unknown], atol=1e-5)
    late = (found.newcomer > 0) & (found.seen > 0)
    for one, other in ((SLOT, EVENT), (NOTHING, SLOT)):
        assert not np.allclose(found.logits[one][late], found.logits[other][late])


@pytest.mark.parametrize("place", [1, 2])
def test_shuffling_the_future_changes_no_earlier_answer(world: Any, model: Personalized, place: int) -> None:
    log = spread_out(world.log)
    moment = periods(log, count=3)[place].begin
    later, rng = np.flatnonzero(log.times >= moment), np.random.default_rng(place)
    ratings, items = log.ratings.copy(), log.items.copy()
    # Items are renamed, not shuffled: a user would come to rate one twice at the same time.
    ratings[later], items[later] = ratings[rng.permutation(later)], rng.permutation(len(log.catalogue))[items[later]]
    one, other = replayed(log, model), replayed(replace(log, ratings=ratings, items=items), model)
    earlier = one.period < place
    for arm in ARMS:
        assert np.array_equal(one.logits[arm][earlier], other.logits[arm][earlier]), arm
        assert not np.array_equal(one.logits[arm][~earlier], other.logits[arm][~earlier]), arm


def test_every_period_is_served_by_a_fit_on_what_came_before(world: Any, model: Personalized) -> None:
    log, seen = spread_out(world.log), []

    def fitted(given: Interactions, split: Any) -> Personalized:
        seen.append(given.times[np.concatenate([split.train, split.validation])].max())
        return model

    times = periods(log, count=3)
    found = replay(log, fitted, times, sample=10, early=0)
    assert [moment < each.begin for moment, each in zip(seen, times, strict=True)] == [True] * 3
    assert seen == sorted(seen) and len(set(seen)) == 3
    assert len(found.fit_s) == len(found.update_s) == 3
    without = replay(log, fitted, times, sample=10, early=0, anew=False)
    assert ANEW not in without.logits and len(without.fit_s) == 1


def test_figures_are_of_the_rows_they_name(world: Any, model: Personalized) -> None:
    log = spread_out(world.log)
    found = replayed(log, model)
    drawn = found.drawn > 0
    labels = log.likes[found.rows]
    assert found.whole(EVENT).auc == pytest.approx(auc(labels[drawn], found.logits[EVENT][drawn]))
    assert [each.rows for each in found.drift(EVENT)] == [40, 40, 40]
    known = found.newcomers(EVENT)
    assert [*known] == ["0", "1", "2-4", "5-9", "10-19", "20+"]
    assert sum(each.rows for each in known.values()) == found.newcomer.sum() > 100
    assert np.array_equal(found.seen == 0, log.queries(found.rows).end == log.queries(found.rows).first)
