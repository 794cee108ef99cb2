"""Taste: sums written out, nothing of the future, the same everywhere."""

from typing import Any

import numpy as np
import torch

from strategies.personal.taste import Taste


def test_a_history_is_described_by_its_likes_its_others_its_level_and_its_length(world: Any) -> None:
    log, taste = world.log, Taste(width=8)
    queries = log.queries(world.split.test[:40])
    texts = taste.texts(log.catalogue).astype(np.float64) * np.sqrt(8)
    found = taste(log, queries).double().numpy()
    assert found.shape == (40, taste.inputs)
    for row in range(40):
        past = np.arange(queries.first[row], queries.end[row])
        liked, other = past[log.likes[past]], past[~log.likes[past]]
        means = [texts[log.items[rows]].mean(0) if len(rows) else np.zeros(8) for rows in (liked, other)]
        level = len(liked) / len(past) - 0.5 if len(past) else 0.0
        expected = [*means[0], *means[1], level, len(past) / (len(past) + 20)]
        np.testing.assert_allclose(found[row], expected, atol=1e-6)


def test_texts_have_unit_vectors_that_share_what_their_words_share(world: Any) -> None:
    catalogue = world.log.catalogue
    texts = Taste(width=64).texts(catalogue)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, rtol=1e-6)
    same = np.array([[one == other for other in catalogue.tags] for one in catalogue.tags])
    alike = texts @ texts.T
    off = ~np.eye(len(texts), dtype=bool)
    assert alike[same & off].mean() > alike[~same].mean() + 0.1
    assert not np.array_equal(texts, Taste(width=64, seed=1).texts(catalogue))


def test_what_happens_at_or_after_a_question_changes_nothing(world: Any) -> None:
    log, taste = world.log, Taste(width=8)
    rows = world.split.validation
    before = taste(log, log.queries(rows))
    # Every event at or after its user's first asked time gets another rating.
    first = np.full(len(log.user_names), np.iinfo(np.int64).max)
    np.minimum.at(first, log.users[rows], log.times[rows])
    later = log.times >= first[log.users]
    earliest = np.array([log.times[row] == first[log.users[row]] for row in rows])
    changed = type(log)(
        log.users, log.items, np.where(later, 5.5 - log.ratings, log.ratings), log.times, log.user_names,
        log.catalogue, like_from=log.like_from, scale=log.scale,
    )  # fmt: skip
    after = taste(changed, changed.queries(rows))
    assert torch.equal(before[earliest], after[earliest])
    assert not torch.equal(before, after)


def test_nobody_known_is_zero(world: Any) -> None:
    queries = world.log.queries(world.split.test[:3]).without_history()
    assert not Taste(width=8)(world.log, queries).any()
