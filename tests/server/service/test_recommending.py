"""Recommendations: a batch answers as one by one, never what was rated already, and says whose answer it is."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.errors import DataError, LetheError, Unknown
from server.service.answers import COLD, PLAIN
from server.service.recommending import RecommendAsked, Recommended, Recommending
from strategies.personal.lifelong import LifelongUsers
from strategies.personal.personalized import Personalized
from tasks.recommendation.interactions import Interactions

NAMES = [f"user-{number:03d}" for number in range(12)]
ITEMS = [f"item-{number:03d}" for number in range(30)]


def likes(answer: Recommended | LetheError) -> np.ndarray:
    assert isinstance(answer, Recommended)
    return np.array([each.like for each in answer.items])


@pytest.fixture(scope="module")
def everybody(personal: Personalized, log: Interactions) -> LifelongUsers:
    users = LifelongUsers(personal, log)
    users.start(log)
    return users


ASKED = st.builds(
    RecommendAsked,
    st.sampled_from(NAMES),
    count=st.integers(1, 12),
    items=st.none() | st.lists(st.sampled_from(ITEMS), min_size=1, max_size=4).map(tuple),
    personalized=st.booleans(),
)


@settings(max_examples=15)
@given(asked=st.lists(ASKED, min_size=1, max_size=7))
def test_any_mix_is_answered_as_one_by_one(everybody: LifelongUsers, asked: list[RecommendAsked]) -> None:
    ask = Recommending(everybody, candidates=8)
    for own, answer in zip(asked, ask(asked), strict=True):
        (alone,) = ask([own])
        np.testing.assert_allclose(likes(answer), likes(alone), atol=1e-5)
        assert isinstance(answer, Recommended) and isinstance(alone, Recommended)
        assert answer.provenance == alone.provenance


def test_the_best_of_what_was_not_rated_come_first(everybody: LifelongUsers) -> None:
    rated = {event.item for event in everybody.history("user-004")}
    (answer,) = Recommending(everybody, candidates=100)([RecommendAsked("user-004", count=100)])
    assert isinstance(answer, Recommended)
    assert {each.item for each in answer.items} == {*ITEMS} - rated
    assert (np.diff(likes(answer)) <= 0).all() and np.ptp(likes(answer)) > 1e-3
    names = tuple(each.item for each in answer.items)
    (named,) = Recommending(everybody)([RecommendAsked("user-004", items=names)])
    np.testing.assert_allclose(likes(named), likes(answer), atol=1e-5)


def test_the_recommender_proposes_what_it_likes_best(everybody: LifelongUsers, log: Interactions) -> None:
    (short,) = everybody.shortlist(["user-002"], 5)
    scorer = everybody.personal.asking.scorer
    assert scorer is not None
    own = everybody.histories.log(["user-002"])
    odds = scorer.logits(own, own.query("user-002", list(range(30)), time=2**40))
    odds[own.items] = -np.inf
    assert short.tolist() == np.argsort(-odds, kind="stable")[:5].tolist()
    assert everybody.shortlist([], 5) == []


def test_nobody_is_answered_in_silence(everybody: LifelongUsers) -> None:
    ask, known = Recommending(everybody), RecommendAsked("user-001")
    asked = [replace(known, user="user-0012"), replace(known, user="eve", fallback="cold"), known,
             replace(known, personalized=False), replace(known, items=("item-0",))]  # fmt: skip
    nobody, cold, own, plain, wrong = ask(asked)
    assert isinstance(nobody, Unknown) and "user-001'" not in str(nobody)
    assert isinstance(wrong, DataError) and "item-0" in str(wrong)
    assert isinstance(cold, Recommended) and (cold.provenance.personalized, cold.provenance.reason) == (False, COLD)
    assert isinstance(plain, Recommended) and (plain.provenance.personalized, plain.provenance.reason) == (False, PLAIN)
    assert isinstance(own, Recommended) and own.provenance.version == everybody.version("user-001")
    assert own.provenance.personalized and own.provenance.gate == {"user-001": 1.0}
    assert {each.item for each in plain.items}.isdisjoint(event.item for event in everybody.history("user-001"))


def test_users_with_the_same_candidates_get_their_own_answers(everybody: LifelongUsers) -> None:
    answers = Recommending(everybody)([RecommendAsked(name, items=tuple(ITEMS[:6])) for name in NAMES])
    found = np.stack([likes(answer) for answer in answers])
    distances = np.abs(found[:, None] - found[None]).max(2)
    assert distances[~np.eye(len(NAMES), dtype=bool)].min() > 1e-5
