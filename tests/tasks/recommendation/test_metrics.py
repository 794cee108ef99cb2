"""Metrics against scikit-learn; intervals against what they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, ndcg_score, roc_auc_score
from sklearn.metrics import log_loss as reference_log_loss

from lora.errors import DataError
from tasks.recommendation.metrics import accuracy, auc, likes, log_loss, paired_bootstrap, ranking, ranks

ROWS = st.lists(st.tuples(st.booleans(), st.integers(-3, 3), st.integers(1, 4)), min_size=2, max_size=60).filter(
    lambda rows: len({row[0] for row in rows}) == 2
)


@given(ROWS)
def test_auc_is_scikit_learns_with_ties_and_weights(rows: list[tuple[bool, int, int]]) -> None:
    labels, scores, weights = (np.array(column) for column in zip(*rows, strict=True))
    assert auc(labels, scores.astype(float)) == pytest.approx(roc_auc_score(labels, scores))
    weighted = roc_auc_score(labels, scores, sample_weight=weights)
    assert auc(labels, scores.astype(float), weights=weights.astype(float)) == pytest.approx(weighted)


@given(ROWS)
def test_log_loss_and_accuracy_are_scikit_learns(rows: list[tuple[bool, int, int]]) -> None:
    labels, scores, _ = (np.array(column) for column in zip(*rows, strict=True))
    logits = scores + 0.25
    found = likes(labels, logits)
    share = 1 / (1 + np.exp(-logits))
    assert found.log_loss == log_loss(labels, logits) == pytest.approx(reference_log_loss(labels, share, labels=[0, 1]))
    assert found.accuracy == accuracy(labels, logits) == pytest.approx(accuracy_score(labels, share > 0.5))


def test_log_loss_of_sure_mistakes_is_finite() -> None:
    assert log_loss(np.array([True]), np.array([-1000.0])) == pytest.approx(1000.0)


def test_auc_without_likes_is_an_error() -> None:
    with pytest.raises(DataError, match="there are 0 likes in 3 rows"):
        auc(np.zeros(3, dtype=bool), np.arange(3.0))


@given(st.integers(0, 10_000), st.integers(2, 40))
def test_ndcg_is_scikit_learns_and_the_others_follow_from_the_rank(seed: int, candidates: int) -> None:
    scores = np.random.default_rng(seed).normal(size=(7, candidates))
    truth = np.zeros_like(scores)
    truth[:, 0] = 1
    found = ranking(ranks(scores))
    assert found.ndcg10 == pytest.approx(ndcg_score(truth, scores, k=10))
    places = (np.argsort(-scores, axis=1) == 0).argmax(axis=1) + 1
    assert found.hit10 == pytest.approx((places <= 10).mean())
    assert found.mrr == pytest.approx((1 / places).mean())


def test_equal_scores_rank_in_the_middle() -> None:
    assert ranks(np.zeros((1, 101))).tolist() == [51.0]


def clustered(*, users: int, rows: int, gain: float, seed: int) -> tuple[np.ndarray, ...]:
    """Rows of users whose level the model `one` knows `gain` better than `other`."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(users), rows)
    level = rng.normal(0, 1.5, users)[owner]
    labels = rng.random(len(owner)) < 1 / (1 + np.exp(-level))
    other = level + rng.normal(0, 3, users)[owner]
    return labels, other + gain * level, other, owner


def test_the_interval_holds_the_difference_and_grows_when_rows_go_together() -> None:
    labels, one, other, owner = clustered(users=40, rows=25, gain=1.0, seed=0)
    by_user = paired_bootstrap(labels, one, other, users=owner)
    by_row = paired_bootstrap(labels, one, other, users=np.arange(len(owner)))
    assert by_user.low < by_user.value < by_user.high
    assert by_user.high - by_user.low > 2 * (by_row.high - by_row.low)
    assert by_user.value == pytest.approx(roc_auc_score(labels, one) - roc_auc_score(labels, other))


def test_a_model_beside_itself_differs_by_nothing() -> None:
    labels, one, _, owner = clustered(users=10, rows=10, gain=1.0, seed=1)
    same = paired_bootstrap(labels, one, one, users=owner, measure="log_loss", draws=20)
    assert (same.value, same.low, same.high) == (0, 0, 0)
