"""MovieLens latest-small, per user: the baselines reach what was measured of them elsewhere, with other code."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from strategies.personal.recommenders.boosted import Boosted
from strategies.personal.recommenders.factors import FoldedFactors, recent_level
from strategies.personal.recommenders.levels import ItemMean, Popularity
from strategies.personal.recommenders.protocol import Recommender, ranked_scores
from tasks.recommendation.candidates import sampled
from tasks.recommendation.config import RatingsConfig
from tasks.recommendation.files import load_interactions
from tasks.recommendation.interactions import Interactions
from tasks.recommendation.metrics import likes, ranking, ranks
from tasks.recommendation.splits import Split, per_user

DATA = Path(__file__).parents[4].parent / "shared" / "data" / "movielens_latest_small"
pytestmark = [pytest.mark.data, pytest.mark.skipif(not DATA.exists(), reason="no shared data")]

REFERENCES: dict[str, tuple[Callable[[], Recommender], float, float]] = {
    "item mean": (ItemMean, 0.6782, 0.6429),
    "item + recent level": (recent_level, 0.7874, 0.5540),
    "factors": (FoldedFactors, 0.7936, 0.5467),
    "boosted": (Boosted, 0.7980, 0.5422),
}


@cache
def movielens() -> tuple[Interactions, Split]:
    log = load_interactions(RatingsConfig(path=str(DATA)))
    return log, per_user(log)


@pytest.mark.parametrize("name", REFERENCES)
def test_a_baseline_is_as_strong_as_its_reference(name: str) -> None:
    make, auc, loss = REFERENCES[name]
    log, split = movielens()
    recommender = make()
    recommender.fit(log, split, seed=0)
    found = likes(log.likes[split.test], recommender.logits(log, log.queries(split.test)))
    assert found.auc == pytest.approx(auc, abs=0.003)
    assert found.log_loss == pytest.approx(loss, abs=0.003)


def test_popularity_ranks_as_its_reference() -> None:
    log, split = movielens()
    rows = np.random.default_rng(0).choice(split.test, size=3000, replace=False)
    popularity = Popularity()
    popularity.fit(log, split, seed=0)
    scores = ranked_scores(popularity, log, log.queries(rows), sampled(log, rows))
    assert ranking(ranks(scores)).ndcg10 == pytest.approx(0.1906, abs=0.012)
