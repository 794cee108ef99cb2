"""Vectors that route: scaled columns of recommenders, and numbers drawn for every user."""

from typing import Any

import numpy as np
import pytest
import torch

from lora.errors import ModelError
from strategies.personal.representation import Drawn, Recommended, owners


def test_columns_are_standardised_over_the_fitted_queries(world: Any) -> None:
    queries = world.log.queries(world.split.train)
    for routing, width in (("user", 10), ("pair", 20)):
        both = Recommended([world.mf, world.mf], routing)  # type: ignore[arg-type]
        both.fit(world.log, queries)
        vectors = both(world.log, queries)
        assert vectors.shape == (len(queries), width) and vectors.dtype == torch.float32
        moving = vectors.std(0) > 0
        torch.testing.assert_close(vectors.mean(0), torch.zeros(width), atol=0.05, rtol=0)
        torch.testing.assert_close(vectors.std(0)[moving], torch.ones(int(moving.sum())), atol=0.1, rtol=0)


def test_scales_can_be_kept(world: Any) -> None:
    queries = world.log.queries(world.split.train)
    one, other = Recommended([world.mf]), Recommended([world.mf])
    one.fit(world.log, queries)
    other.restore(one.state())
    assert torch.equal(one(world.log, queries), other(world.log, queries))


def test_what_cannot_be_said_is_an_error(world: Any) -> None:
    with pytest.raises(ModelError, match="at least one recommender"):
        Recommended([])
    with pytest.raises(ModelError, match="no scales yet"):
        Recommended([world.mf])(world.log, world.log.queries(world.split.test[:2]))


def test_drawn_numbers_belong_to_a_user_whatever_comes_after(world: Any) -> None:
    drawn = Drawn(width=6)
    rows = np.arange(len(world.log))
    vectors = drawn(world.log, world.log.queries(rows))
    firsts = vectors[torch.from_numpy(world.log.starts[:-1])]
    assert torch.equal(vectors, firsts[torch.from_numpy(world.log.users)])
    assert len(torch.unique(firsts, dim=0)) == len(world.log.user_names)
    assert abs(float(firsts.mean())) < 0.3
    late = int(world.log.times.max()) + 5
    one = np.ones(2, dtype=np.int64)
    grown = world.log.grown(0 * one, one, 4.0 * one, late + one)
    assert torch.equal(drawn(grown, grown.query("user-007", [3], time=late)), firsts[7:8])


def test_owners_are_the_users_of_the_rows(world: Any) -> None:
    rows = world.split.test
    assert np.array_equal(owners(world.log, world.log.queries(rows)), world.log.users[rows])
