"""The rows of one request to forget: the only data that unlearning may read."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lora.errors import DataError
from strategies.unlearning.audit import Audit
from tasks.examples import Examples
from tasks.learner import Task
from tasks.tokens import Batch, Ids, Tokens, collate

HELD_BACK = 0.2
"""Share of a request that is drawn before training and only used for thresholds (O3's code: 0.2)."""


@dataclass(frozen=True)
class AuditedRequest:
    """A request's examples, divided at random into `used` rows and `held_back` ones; the audit counts every read.

    With `whole` all rows are used ones: who is in which part would depend on how many there are, which differential
    privacy has no words for.
    """

    examples: Examples
    audit: Audit = field(default_factory=Audit)
    seed: int = 0
    whole: bool = False

    def __post_init__(self) -> None:
        if len(self.examples) < 2:
            raise DataError(
                f"a request to forget of {len(self.examples)} examples cannot be divided into used and held-back "
                "ones; give at least 2"
            )

    @property
    def used(self) -> Ids:
        """Rows that slots and statistics are made of."""
        return self._divided()[1]

    @property
    def held_back(self) -> Ids:
        """Rows that only thresholds are made of."""
        return self._divided()[0]

    def tokens(self, task: Task, examples: Examples | None = None) -> Tokens:
        """Tokenize the request's rows, or changed ones in the same order."""
        return task.tokenize(self.examples if examples is None else examples)

    def batch(self, tokens: Tokens, rows: Sequence[int] | Ids, *, pad: int) -> Batch:
        """Make a batch of some of the request's rows; the reads are counted."""
        with self.audit.reading(map(int, rows)) as tensors:
            made = collate([(tokens, int(row)) for row in rows], pad=pad)
            tensors += [made.input_ids, made.mask, made.labels]
        return made

    def _divided(self) -> tuple[Ids, Ids]:
        order = list(range(len(self.examples)))
        random.Random(f"request/{self.seed}").shuffle(order)
        cut = 0 if self.whole else max(1, round(HELD_BACK * len(order)))
        return np.sort(np.asarray(order[:cut], dtype=np.int64)), np.sort(np.asarray(order[cut:], dtype=np.int64))
