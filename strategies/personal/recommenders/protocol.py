"""What every recommender offers, and the ways to question one."""

from typing import Protocol, runtime_checkable

import numpy as np

from lora.errors import ModelError
from tasks.recommendation.interactions import Floats, Interactions, Ints, Queries
from tasks.recommendation.splits import Split


class Recommender(Protocol):
    """Scores queries; fitted once, frozen afterwards.

    `fit` learns weights from training rows only and may look at validation rows to stop or to choose; test rows are
    never read. Scores depend on the interactions only through rows that are strictly earlier than the query, so the
    same frozen recommender goes on serving a log that grows (`Interactions.grown`). An item of the catalogue that no
    training row has is scored as one of which nothing is known, somewhere among the others.
    """

    name: str

    def fit(self, log: Interactions, split: Split, *, seed: int) -> None:
        """Learn from the training rows of the split."""
        ...

    def logits(self, log: Interactions, queries: Queries) -> Floats:
        """Return the log odds of a like for every query, `[queries]`."""
        ...


@runtime_checkable
class Representing(Protocol):
    """A recommender that also has vectors to route adapters by; they carry no gradient."""

    def user_vectors(self, log: Interactions, queries: Queries) -> Floats:
        """Return a vector of the history alone, `[queries, d]`: the same for every target, so it can be kept."""
        ...

    def pair_vectors(self, log: Interactions, queries: Queries) -> Floats:
        """Return a vector of history and target, `[queries, d']`."""
        ...


def ranked_scores(
    recommender: Recommender, log: Interactions, queries: Queries, candidates: Ints, *, batch: int = 20_000
) -> Floats:
    """Score `candidates [queries, c]` in place of the queries' own items; `[queries, c]`."""
    step = max(1, batch // candidates.shape[1])
    parts = [
        recommender.logits(log, queries.take(slice(i, i + step)).about(candidates[i : i + step]))
        for i in range(0, len(queries), step)
    ]
    return np.concatenate(parts).reshape(candidates.shape) if parts else np.empty(candidates.shape)


def unfitted(name: str) -> ModelError:
    """Return the error for a question to a recommender that has learned nothing yet."""
    return ModelError(f"recommender {name} has not been fitted; call fit(log, split, seed=...) first")
