"""What the language model is asked: prompts with their tokens and the recommender's score, the same for every arm."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from strategies.personal.config import BaseScore
from strategies.personal.recommenders.protocol import Recommender
from tasks.models import BaseModel
from tasks.recommendation.answers import tokenized
from tasks.recommendation.interactions import Floats, Interactions, Ints, Queries
from tasks.recommendation.prompts import Phrasing, prompts
from tasks.tokens import Tokens

Chosen = Callable[[Interactions, Queries], Ints]
"""(log, queries) -> rows of each query's short history in time order, `[queries, length]`; -1 fills the front."""

KEPT = 4
"""Sets of questions that stay tokenised."""


@dataclass(frozen=True)
class Asked:
    """Tokens of prompts and the recommender's log odds beside them, `[queries]` (zeros where it is not added)."""

    tokens: Tokens
    offsets: Floats

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: Ints) -> "Asked":
        """Return the given questions."""
        return Asked(self.tokens.take(rows), self.offsets[rows])


class Asking:
    """Writes and tokenises prompts; the last few sets are kept, so that arms that ask alike share them.

    `scorer` is a fitted recommender; its score is added as log odds (`offset`), told in the prompt, or left out. A
    prompt depends on the interactions only through events strictly before its query.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        scorer: Recommender | None = None,
        base_score: BaseScore = "offset",
        phrasing: Phrasing | None = None,
        history: int = 5,
        chosen: Chosen | None = None,
        max_length: int = 256,
    ) -> None:
        self.base, self.scorer, self.phrasing = base, scorer, phrasing or Phrasing(compact=True)
        self.base_score: BaseScore = "none" if scorer is None else base_score
        self.max_length = min(max_length, base.positions or max_length)
        self._chosen: Chosen = chosen or (lambda log, queries: queries.latest(history))
        self._kept: list[tuple[Interactions, Queries, Asked]] = []

    def __call__(self, log: Interactions, queries: Queries, *, scores: Floats | None = None) -> Asked:
        """Return the questions; `scores [queries]` take the place of the scorer's own."""
        if scores is None:
            for known_log, known, asked in self._kept:
                if known_log is log and _same(known, queries):
                    return asked
        asked = self._asked(log, queries, scores)
        if scores is None:
            self._kept = [*self._kept[1 - KEPT :], (log, queries, asked)]
        return asked

    def _asked(self, log: Interactions, queries: Queries, scores: Floats | None) -> Asked:
        nothing = np.zeros(len(queries))
        if scores is None and self.scorer is not None and self.base_score != "none":
            scores = self.scorer.logits(log, queries)
        told = scores if self.base_score == "prompt" else None
        texts = prompts(log, queries, self._chosen(log, queries), phrasing=self.phrasing, scores=told)
        tokens = tokenized(texts, self.base.tokenizer, max_length=self.max_length)
        return Asked(tokens, scores if scores is not None and self.base_score == "offset" else nothing)


def _same(one: Queries, other: Queries) -> bool:
    if one is other:
        return True
    return len(one) == len(other) and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("first", "end", "items", "times")
    )
