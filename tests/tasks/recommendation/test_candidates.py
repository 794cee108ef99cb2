"""Candidates: the item that came, and items that were not taken."""

import numpy as np
import pytest

from lora.errors import DataError
from tasks.recommendation.builtin import builtin_interactions
from tasks.recommendation.candidates import full, sampled

LOG = builtin_interactions(users=6, items=60, events=20, seed=0)


def test_sampled_negatives_are_distinct_and_never_rated_by_the_user() -> None:
    rows = np.arange(0, len(LOG), 7)
    found = sampled(LOG, rows, count=30, seed=1)
    assert (found[:, 0] == LOG.items[rows]).all()
    for row, items in zip(rows, found, strict=True):
        rated = set(LOG.items[LOG.users == LOG.users[row]].tolist())
        assert len(set(items.tolist())) == 31
        assert not rated & set(items[1:].tolist())
    assert (sampled(LOG, rows, count=30, seed=1) == found).all()
    assert (sampled(LOG, rows, count=30, seed=2) != found).any()


def test_too_many_negatives_are_refused() -> None:
    with pytest.raises(DataError, match="50 negatives are asked for; user 0 has only 40"):
        sampled(LOG, np.array([0]), count=50)


def test_full_candidates_leave_out_what_was_rated_before() -> None:
    row = int(LOG.starts[1]) + 10
    items = full(LOG, row)[0].tolist()
    query = LOG.queries(np.array([row]))
    known = set(LOG.items[query.first[0] : query.end[0]].tolist())
    assert items[0] == LOG.items[row]
    assert sorted(items) == sorted(set(range(60)) - known)
