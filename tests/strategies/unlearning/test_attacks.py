"""Attacks on what is known to leak, and on what is known not to."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from lora.errors import DataError
from strategies.unlearning.attacks import (
    RelearningConfig,
    lira_membership,
    loss_membership,
    membership_auc,
    nearest_prototype,
    probe,
    relearn,
)
from strategies.unlearning.classifier import fit
from strategies.unlearning.config import FitConfig
from strategies.unlearning.measures import Answers

RNG = np.random.default_rng(0)


def answers(confidence: Any) -> Answers:
    """Return answers of two classes with the given log odds of the right one."""
    odds = torch.from_numpy(np.asarray(confidence, dtype=np.float64)).float()
    return Answers(np.zeros(len(odds), dtype=np.int64), torch.stack([odds, torch.zeros_like(odds)], dim=1))


def test_a_known_leak_is_found_and_none_is_not() -> None:
    members, others = RNG.normal(3, 1, 4000), RNG.normal(0, 1, 4000)
    assert loss_membership(answers(members), answers(others)) == pytest.approx(0.983, abs=0.01)
    assert loss_membership(answers(others), answers(RNG.normal(0, 1, 4000))) == pytest.approx(0.5, abs=0.02)


def test_the_auc_is_that_of_pairs() -> None:
    members, others = RNG.normal(0.5, 1, 40), RNG.normal(0, 1, 30)
    assert membership_auc(members, others) == pytest.approx(np.mean(members[:, None] > others[None]))


def test_a_model_that_learned_its_rows_by_heart_leaks_them(toy: Any) -> None:
    student = toy.classifier.fresh(1)
    rows, unseen = toy.splits.train.take(range(40)), toy.splits.test.take(range(80))
    before = loss_membership(Answers.of(student, rows), Answers.of(student, unseen))
    fit(student, rows, FitConfig(epochs=40, batch=20, rate=3e-3, head_rate=3e-3), seed=0)
    assert 0.35 < before < 0.65
    assert loss_membership(Answers.of(student, rows), Answers.of(student, unseen)) > 0.75


def test_lira_sees_what_the_loss_cannot_where_rows_differ_in_difficulty() -> None:
    hard = RNG.normal(0, 5, 2000)
    shadows = [answers(hard + RNG.normal(0, 0.3, 2000)) for _ in range(4)]
    pairs = [(each, each) for each in shadows]
    members, others = answers(hard + 1.0), answers(hard)
    assert loss_membership(members, others) < 0.6
    assert lira_membership(members, others, without=pairs) > 0.95


@pytest.mark.parametrize("count", [2, 9])
def test_lira_is_that_of_the_formula(count: int) -> None:
    confidence = RNG.normal(0, 1, (count, 2, 50))
    pairs = [(answers(one), answers(two)) for one, two in confidence]
    members, others = RNG.normal(0.5, 1, 50), RNG.normal(0, 1, 50)
    mean, spread = confidence.mean(0), confidence.std(0, ddof=1)
    if count < 8:
        spread = np.sqrt((spread**2).mean(1, keepdims=True))
    scores = (np.stack([members, others]) - mean) / spread
    expected = roc_auc_score(np.repeat([1, 0], 50), scores.ravel())
    assert lira_membership(answers(members), answers(others), without=pairs) == pytest.approx(expected, abs=1e-3)


def test_too_little_to_compare_is_refused() -> None:
    with pytest.raises(DataError, match="two or more"):
        lira_membership(answers([1.0]), answers([0.0]), without=[(answers([1.0]), answers([0.0]))])
    with pytest.raises(DataError, match="never were"):
        membership_auc(np.array([1.0]), np.array([]))


class Cut:
    """A classifier that hides classes behind its head and keeps their features: superficial forgetting."""

    def __init__(self, inner: Any, *classes: int) -> None:
        self.inner, self.hidden = inner, list(classes)

    def features(self, rows: Any) -> torch.Tensor:
        return self.inner.features(rows)  # type: ignore[no-any-return]

    def logits(self, rows: Any) -> torch.Tensor:
        logits = self.inner.logits(rows)
        logits[:, self.hidden] = -1e9
        return logits  # type: ignore[no-any-return]


def of_classes(rows: Any, *classes: int) -> Any:
    return rows.take(np.flatnonzero(np.isin(rows.labels, classes)))


def test_probes_recover_what_only_the_head_hides(toy: Any) -> None:
    hidden = Cut(toy.classifier, 8, 9)
    train, test = (of_classes(rows, 8, 9) for rows in (toy.splits.train, toy.splits.test))
    assert Answers.of(hidden, test).accuracy([8, 9]) == 0.0
    assert probe(hidden, train, test) > 0.85 and nearest_prototype(hidden, train, test) > 0.8
    with pytest.raises(DataError, match="two or more"):
        probe(hidden, of_classes(train, 8), test)


def test_the_nearest_prototype_is_the_nearest_mean(toy: Any) -> None:
    train, test = (of_classes(rows, 3, 8) for rows in (toy.splits.train, toy.splits.test))
    features, asked = (toy.classifier.features(rows).numpy() for rows in (train, test))
    means = np.stack([features[train.labels == label].mean(0) for label in (3, 8)])
    guess = np.array([3, 8])[((asked[:, None] - means[None]) ** 2).sum(2).argmin(1)]
    assert nearest_prototype(toy.classifier, train, test) == pytest.approx(np.mean(guess == test.labels))


def test_relearning_counts_the_steps_to_the_target(toy: Any) -> None:
    rows, unseen = (of_classes(part, 8, 9) for part in (toy.splits.train, toy.splits.test))
    settings = RelearningConfig(rate=3e-3, batch=32, steps=60, every=4)
    known = relearn(toy.classifier, rows, unseen, target=0.7, config=settings, seed=0)
    assert known.steps == 0 and len(known.curve) == 1
    weights = toy.classifier.fresh(2).logits(toy.splits.test)
    fresh = relearn(toy.classifier.fresh(2), rows, unseen, target=0.7, config=settings, seed=0)
    assert fresh.steps is not None and 0 < fresh.steps <= 60
    assert fresh.curve[0][1] < 0.7 <= fresh.curve[-1][1] and [step for step, _ in fresh.curve[:2]] == [0, 4]
    assert torch.equal(weights, toy.classifier.fresh(2).logits(toy.splits.test))
    short = settings.model_copy(update={"steps": 6})
    never = relearn(toy.classifier.fresh(2), rows, unseen, target=1.1, config=short, seed=0)
    assert never.steps is None and [step for step, _ in never.curve] == [0, 4, 6]
