"""Measures against plain formulas and printed cells of the paper."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from scipy.stats import hmean

from lora.errors import DataError
from strategies.unlearning.measures import Answers, chance, drop, harmonic, standing

LABELS = np.array([0, 0, 1, 1, 2, 2, 3])


def answers(seed: int = 0, scale: float = 1.0) -> Answers:
    source = torch.Generator().manual_seed(seed)
    return Answers(LABELS, scale * torch.randn(len(LABELS), 4, generator=source))


def certain(guesses: list[int]) -> Answers:
    return Answers(LABELS, torch.eye(4)[torch.tensor(guesses)])


@pytest.mark.parametrize(
    ("before", "acc_r", "acc_f", "expected"),
    [(74.65, 74.16, 0, 74.40), (74.65, 62.13, 2.16, 66.91), (73.80, 73.37, 0, 73.59), (75.11, 75.36, 0, 75.23)],
)
def test_h_agrees_with_the_papers_table(before: float, acc_r: float, acc_f: float, expected: float) -> None:
    assert harmonic(acc_r, drop(before, acc_f)) == pytest.approx(expected, abs=0.011)


@given(st.floats(0.01, 1), st.floats(0.01, 1))
def test_h_is_the_harmonic_mean(acc_r: float, fallen: float) -> None:
    assert harmonic(acc_r, fallen) == pytest.approx(float(hmean([acc_r, fallen])))


def test_h_is_zero_where_nothing_was_forgotten() -> None:
    assert harmonic(0.9, 0.0) == 0.0 and harmonic(0.9, -0.1) == 0.0 and harmonic(0.0, 0.9) == 0.0


def test_losses_and_confidence_are_those_of_the_formulas() -> None:
    found = answers()
    logits = found.logits.double().numpy()
    own = np.arange(len(LABELS)), LABELS
    np.testing.assert_allclose(found.losses(), -log_softmax(logits, axis=1)[own])
    p = softmax(logits, axis=1)[own]
    np.testing.assert_allclose(found.confidence(), np.log(p / (1 - p)), rtol=1e-6)


def test_confidence_stays_finite_where_a_probability_rounds_to_one() -> None:
    sure = certain(LABELS.tolist())
    found = Answers(LABELS, 100 * sure.logits).confidence()
    assert np.isfinite(found).all() and (found > 90).all()


def test_a_standing_counts_each_group_of_classes_apart() -> None:
    before = certain([0, 0, 1, 1, 2, 2, 3])
    after = certain([1, 0, 0, 0, 2, 1, 3])
    found = standing(before, after, forgotten=[0], earlier=[1], missing=[3], classes=4)
    assert (found.acc_f, found.acc_o, found.acc_m) == (0.5, 0.0, 1.0)
    assert found.acc_r == pytest.approx(2 / 3)
    assert found.drop == 0.5 and found.h == pytest.approx(float(hmean([2 / 3, 0.5])))
    assert found.utility_loss == pytest.approx(100 / 3)


def test_drop_is_against_the_pre_trained_classifier() -> None:
    before, after = certain([0, 1, 1, 1, 2, 2, 3]), certain([3, 3, 1, 1, 2, 2, 3])
    found = standing(before, after, forgotten=[0], earlier=[], classes=4)
    assert found.acc_f_before == 0.5 and found.drop == 0.5
    assert math.isnan(found.acc_o) and math.isnan(found.acc_m)


def test_nothing_that_remains_is_refused() -> None:
    with pytest.raises(DataError, match="remaining"):
        standing(answers(), answers(), forgotten=[0, 1], earlier=[2, 3], classes=4)


def test_chance_is_a_guess_among_all_classes() -> None:
    assert chance(150) == pytest.approx(1 / 150)
