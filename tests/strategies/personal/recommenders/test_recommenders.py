"""Every recommender: learns, freezes, answers new users, and knows nothing of the future."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from lora.errors import ModelError
from strategies.personal.recommenders.boosted import Boosted, BoostedSettings
from strategies.personal.recommenders.din import Din, DinSettings
from strategies.personal.recommenders.factors import FactorSettings, FoldedFactors, recent_level
from strategies.personal.recommenders.levels import ItemMean, Popularity
from strategies.personal.recommenders.protocol import Recommender, Representing, ranked_scores
from strategies.personal.recommenders.sasrec import Sasrec, SasrecSettings
from strategies.personal.recommenders.stack import Stack
from tasks.recommendation.builtin import builtin_interactions
from tasks.recommendation.candidates import sampled
from tasks.recommendation.interactions import Interactions, Ints, Queries
from tasks.recommendation.metrics import auc, ranking, ranks
from tasks.recommendation.splits import Split, per_user

LOG = builtin_interactions(users=80, items=90, events=50, seed=5)
SPLIT = per_user(LOG)


def small_din() -> Din:
    return Din(DinSettings(width=16, length=20, attention=16, hidden=(32, 16), rate=3e-3, batch=128, epochs=6))


def small_sasrec() -> Sasrec:
    return Sasrec(SasrecSettings(width=16, block=16, layers=1, rate=5e-3, batch=16, epochs=8))


def small_next() -> Sasrec:
    return Sasrec(SasrecSettings(objective="next", width=16, block=16, layers=1, batch=16, negatives=40, epochs=2))


MAKERS: dict[str, Callable[[], Recommender]] = {
    "item mean": ItemMean,
    "level": recent_level,
    "factors": lambda: FoldedFactors(FactorSettings(factors=4, lengths=(10, 20), ridges=(1.0,), epochs=20)),
    "boosted": lambda: Boosted(BoostedSettings(trees=60, leaves=7, least=20)),
    "din": small_din,
    "sasrec": small_sasrec,
    "sasrec next": small_next,
    "stack": lambda: Stack([ItemMean(), recent_level()]),
    "popularity": Popularity,
}
FITTED: dict[str, Recommender] = {}
PREDICTS = ["item mean", "level", "factors", "boosted", "din", "sasrec", "stack"]
PERSONAL = ["level", "factors", "boosted", "din", "sasrec", "sasrec next", "stack"]
VECTORS = ["level", "factors", "din", "sasrec", "sasrec next"]


def fitted(name: str) -> Recommender:
    """Fit each recommender once for all tests."""
    if name not in FITTED:
        FITTED[name] = MAKERS[name]()
        FITTED[name].fit(LOG, SPLIT, seed=0)
    return FITTED[name]


def held_out_auc(name: str, log: Interactions = LOG, rows: Ints = SPLIT.test) -> float:
    return auc(log.likes[rows], fitted(name).logits(log, log.queries(rows)))


@pytest.mark.parametrize(("name", "least"), [("item mean", 0.58), *((name, 0.64) for name in PREDICTS[1:])])
def test_it_predicts_held_out_likes(name: str, least: float) -> None:
    assert held_out_auc(name) > least


@pytest.mark.parametrize("name", PERSONAL[:-3])
def test_another_users_history_predicts_worse(name: str) -> None:
    queries, labels = LOG.queries(SPLIT.test), LOG.likes[SPLIT.test]
    other = np.random.default_rng(0).permutation(len(queries))
    swapped = fitted(name).logits(LOG, queries.with_history_of(other))
    assert auc(labels, swapped) < held_out_auc(name) - 0.05


def rewritten(now: int) -> tuple[Interactions, Queries]:
    """A log whose events from `now` on are others, and queries of all users at `now`."""
    late = now <= LOG.times
    rng = np.random.default_rng(1)
    items = np.where(late, rng.integers(90, size=len(LOG)), LOG.items)
    ratings = np.where(late, rng.integers(1, 11, size=len(LOG)) / 2, LOG.ratings)
    users = zip(LOG.starts[:-1], LOG.starts[1:], strict=True)
    ends = np.array([start + np.searchsorted(LOG.times[start:end], now) for start, end in users])
    queries = Queries(LOG.starts[:-1], ends, rng.integers(90, size=80), np.full(80, now))
    return replace(LOG, items=items, ratings=ratings), queries


@pytest.mark.parametrize("name", PERSONAL)
def test_the_future_changes_no_score(name: str) -> None:
    now = int(np.quantile(LOG.times, 0.5))
    changed, queries = rewritten(now)
    assert (changed.items != LOG.items).mean() > 0.3
    before, after = (fitted(name).logits(log, queries) for log in (LOG, changed))
    assert (before == after).all()
    assert (before != fitted(name).logits(LOG, queries.without_history())).any()


@pytest.mark.parametrize("name", PERSONAL)
def test_a_log_that_grows_keeps_old_answers_and_serves_a_new_user(name: str) -> None:
    recommender = fitted(name)
    latest = int(LOG.times.max()) + 10
    one = np.ones(6, dtype=np.int64)
    liked = np.array([item for item in range(90) if LOG.catalogue.tags[item] == ("Western",)][:6])
    grown = LOG.grown(80 * one, liked, 5.0 * one, latest + np.arange(6), names=("zoe",))
    old = LOG.query("user-007", [1, 2, 3], time=latest)
    again = grown.query("user-007", [1, 2, 3], time=latest)
    assert (recommender.logits(LOG, old) == recommender.logits(grown, again)).all()
    cold = recommender.logits(grown, grown.query("zoe", range(90), time=latest))
    warm = recommender.logits(grown, grown.query("zoe", range(90), time=latest + 10))
    assert np.isfinite(cold).all() and np.isfinite(warm).all()
    assert (cold != warm).any()
    if name in ("level", "factors", "boosted", "din", "sasrec"):
        assert warm.mean() > cold.mean()  # six likes and no dislike


@pytest.mark.parametrize("name", ["item mean", "level", "factors", "boosted", "din"])
def test_an_item_that_nobody_learned_from_is_scored_among_the_others(name: str) -> None:
    asked = int(np.bincount(LOG.items).argmax())
    known = SPLIT.train[LOG.items[SPLIT.train] != asked]
    one = MAKERS[name]()
    one.fit(LOG, replace(SPLIT, train=known), seed=0)
    rows = SPLIT.test[::20]
    scores = ranked_scores(one, LOG, LOG.queries(rows), np.tile(np.arange(90), (len(rows), 1)))
    assert np.isfinite(scores).all()
    mean = scores.mean(0)
    assert np.quantile(mean, 0.02) < mean[asked] < np.quantile(mean, 0.98)


@pytest.mark.parametrize("name", ["factors", "din", "sasrec", "boosted"])
def test_one_seed_gives_one_model(name: str) -> None:
    again = MAKERS[name]()
    again.fit(LOG, SPLIT, seed=0)
    queries = LOG.queries(SPLIT.test[:50])
    assert (again.logits(LOG, queries) == fitted(name).logits(LOG, queries)).all()


@pytest.mark.parametrize("name", ["item mean", "factors", "din", "sasrec", "popularity"])
def test_test_rows_are_never_read_in_fitting(name: str) -> None:
    ratings = LOG.ratings.copy()
    ratings[SPLIT.test] = 5.5 - ratings[SPLIT.test]
    changed = replace(LOG, ratings=ratings)
    other = MAKERS[name]()
    other.fit(changed, SPLIT, seed=0)
    queries = LOG.queries(SPLIT.validation)
    assert (other.logits(changed, queries) == fitted(name).logits(LOG, queries)).all()


@pytest.mark.parametrize("name", VECTORS)
def test_user_vectors_depend_on_the_history_alone_and_pair_vectors_on_the_target_too(name: str) -> None:
    recommender = fitted(name)
    assert isinstance(recommender, Representing)
    queries = LOG.queries(SPLIT.test[:40])
    elsewhere = replace(queries, items=(queries.items + 1) % 90)
    users = recommender.user_vectors(LOG, queries)
    assert users.shape[0] == 40 and users.ndim == 2 and np.isfinite(users).all()
    assert (users == recommender.user_vectors(LOG, elsewhere)).all()
    pairs = recommender.pair_vectors(LOG, queries)
    assert (pairs != recommender.pair_vectors(LOG, elsewhere)).any(axis=1).all()
    assert not np.allclose(users, recommender.user_vectors(LOG, queries.without_history()))


@pytest.mark.parametrize("name", ["din", "sasrec"])
def test_a_fitted_network_is_frozen_and_in_eval_mode(name: str) -> None:
    network = fitted(name)._network  # type: ignore[attr-defined]
    assert isinstance(network, torch.nn.Module)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("name", MAKERS)
def test_an_unfitted_one_says_so(name: str) -> None:
    with pytest.raises(ModelError, match="has not been fitted"):
        MAKERS[name]().logits(LOG, LOG.queries(SPLIT.test[:2]))


@pytest.mark.parametrize("name", ["factors", "din", "sasrec", "boosted"])
def test_candidates_score_as_if_each_had_been_asked_alone(name: str) -> None:
    queries = LOG.queries(SPLIT.test[:6])
    items = sampled(LOG, SPLIT.test[:6], count=5)
    together = ranked_scores(fitted(name), LOG, queries, items, batch=12)
    for column in range(items.shape[1]):
        alone = fitted(name).logits(LOG, replace(queries, items=items[:, column]))
        assert together[:, column] == pytest.approx(alone, abs=1e-5)


def test_the_next_item_is_found_more_often_than_by_chance() -> None:
    """Items follow one another in a cycle; nothing but the order tells which comes next."""
    users, length, items = 60, 30, 30
    rng = np.random.default_rng(0)
    places = (rng.integers(items, size=users)[:, None] + np.arange(length)) % items
    log = Interactions(
        np.repeat(np.arange(users), length), places.reshape(-1), np.full(users * length, 4.0),
        np.tile(np.arange(length) * 10, users), tuple(map(str, range(users))), LOG.catalogue.take(np.arange(items)),
    )  # fmt: skip
    split = Split("whole", *(np.flatnonzero(log.users % 3 == part) for part in range(3)))
    recommender = Sasrec(
        SasrecSettings(objective="next", width=32, block=16, rate=1e-2, batch=16, negatives=20, epochs=15)
    )
    recommender.fit(log, split, seed=0)
    rows = split.test[log.befores[split.test] > log.starts[log.users[split.test]]][::7]
    others = np.stack([np.delete(np.arange(items), item) for item in log.items[rows]])
    candidates = np.concatenate([log.items[rows][:, None], others], axis=1)
    found = ranking(ranks(ranked_scores(recommender, log, log.queries(rows), candidates)))
    assert found.mrr > 0.8
