"""The short history: nearest in meaning, in time order, never later than the target."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.errors import DataError
from strategies.personal import retriever as module
from strategies.personal.recommenders.din import Din, DinSettings
from strategies.personal.retriever import SemanticRetriever
from tasks.recommendation.builtin import builtin_interactions
from tasks.recommendation.metrics import auc
from tasks.recommendation.splits import per_user

LOG = builtin_interactions(users=20, items=60, events=40, seed=4)
VECTORS = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)


@given(st.integers(0, len(LOG) - 1), st.integers(1, 12))
def test_it_takes_the_nearest_of_what_was_earlier(row: int, count: int) -> None:
    query = LOG.queries(np.array([row]))
    found = SemanticRetriever(VECTORS).similar(LOG, query, count)[0]
    rows = found[found >= 0]
    history = np.flatnonzero((LOG.users == LOG.users[row]) & (LOG.times < LOG.times[row]))
    assert len(rows) == min(count, len(history)) and set(rows) <= set(history)
    assert rows.tolist() == sorted(rows) and (np.diff(LOG.times[rows]) >= 0).all()
    unit = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    near = dict(zip(history, unit[LOG.items[history]] @ unit[LOG.items[row]], strict=True))
    left = set(history) - set(rows)
    assert not left or not len(rows) or max(near[r] for r in left) <= min(near[r] for r in rows) + 1e-6


def test_long_and_short_come_together() -> None:
    queries = LOG.queries(np.arange(30, 40))
    both = SemanticRetriever(VECTORS, long=12, short=3)(LOG, queries)
    assert (both.long == queries.latest(12)).all()
    assert both.short.shape == (10, 3)


def test_of_equally_near_events_the_latest_is_taken() -> None:
    row = int(LOG.starts[3]) + 30
    same = SemanticRetriever(np.ones((60, 4), dtype=np.float32))
    query = LOG.queries(np.array([row]))
    assert (same.similar(LOG, query, 5) == query.latest(5)).all()


def test_large_catalogues_are_not_tabulated_and_answer_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    queries = LOG.queries(np.arange(100, 160))
    table = SemanticRetriever(VECTORS).similar(LOG, queries, 5)
    monkeypatch.setattr(module, "TABLE", 10)
    assert (SemanticRetriever(VECTORS).similar(LOG, queries, 5) == table).all()


def test_embeddings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="finite rows"):
        SemanticRetriever(np.full((60, 4), np.nan, dtype=np.float32))
    with pytest.raises(DataError, match="59 item embeddings for a catalogue of 60"):
        SemanticRetriever(VECTORS[:59]).similar(LOG, LOG.queries(np.arange(2)), 3)


def test_din_over_retrieved_history_learns() -> None:
    log = builtin_interactions(users=80, items=90, events=50, seed=5)
    split = per_user(log)
    genres = sorted({tags[0] for tags in log.catalogue.tags})
    vectors = np.eye(len(genres), dtype=np.float32)[[genres.index(tags[0]) for tags in log.catalogue.tags]]
    retriever = SemanticRetriever(vectors, long=10)
    sim = Din(
        DinSettings(width=16, attention=16, hidden=(32, 16), rate=3e-3, batch=128, epochs=6),
        chosen=retriever.retrieved,
        name="SIM",
    )
    sim.fit(log, split, seed=0)
    assert sim.name == "SIM"
    assert auc(log.likes[split.test], sim.logits(log, log.queries(split.test))) > 0.64
