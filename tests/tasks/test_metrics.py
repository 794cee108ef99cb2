"""Macro-F1 against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from tasks.metrics import macro_f1

pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40)


@given(pairs)
def test_macro_f1_is_scikit_learns(rows: list[tuple[int, int]]) -> None:
    truth, guess = np.array(rows, dtype=np.int64).T
    assert macro_f1(truth, guess) == pytest.approx(f1_score(truth, guess, average="macro", zero_division=0))


def test_all_right_is_one_and_all_wrong_is_zero() -> None:
    truth = np.array([0, 1, 2, 2])
    assert macro_f1(truth, truth) == 1.0
    assert macro_f1(truth, truth + 1) < 1.0
    assert macro_f1(truth, truth + 10) == 0.0
