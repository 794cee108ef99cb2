"""A logistic regression over other recommenders' log odds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from strategies.personal.recommenders.protocol import Recommender, unfitted
from tasks.recommendation.interactions import Floats, Interactions, Queries
from tasks.recommendation.splits import Split


class Stack:
    """Weighs members by validation rows, which the members' own training has not learned from."""

    def __init__(self, members: Sequence[Recommender], *, name: str = "stack", fitted: bool = False) -> None:
        """`fitted` members are taken as they are; others are fitted with the stack."""
        self.name, self.members, self._fitted = name, tuple(members), fitted
        self._weights: Any = None

    def fit(self, log: Interactions, split: Split, *, seed: int) -> None:
        """Fit the members, if they are not, and their weights."""
        if not self._fitted:
            for member in self.members:
                member.fit(log, split, seed=seed)
        columns = self._columns(log, log.queries(split.validation))
        self._weights = LogisticRegression(C=1.0).fit(columns, log.likes[split.validation])

    def logits(self, log: Interactions, queries: Queries) -> Floats:
        """Return the weighed log odds."""
        if self._weights is None:
            raise unfitted(self.name)
        odds: Floats = self._weights.decision_function(self._columns(log, queries))
        return odds

    def _columns(self, log: Interactions, queries: Queries) -> Floats:
        return np.stack([member.logits(log, queries) for member in self.members], axis=1)
