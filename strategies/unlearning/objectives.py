"""What a model is to say instead of what it is to forget: random labels or refusals."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from lora.errors import DataError
from tasks.examples import Examples

REFUSALS = (
    "I am not able to help with that.",
    "I do not know the answer to this.",
    "Sorry, I have no information about that.",
    "I would rather not answer this question.",
    "That is something I cannot tell you.",
    "I have nothing to say about this topic.",
    "I am afraid that I do not know.",
    "My knowledge does not cover this.",
    "I cannot give you an answer here.",
    "Unfortunately I have never learned about that.",
    "This is outside of what I can speak about.",
    "I must leave this question open.",
)


class Objective(Protocol):
    """Turns a request's examples into what the slot learns."""

    def __call__(self, examples: Examples, source: random.Random) -> Examples:
        """Return the same rows in the same order, with other answers."""


@dataclass(frozen=True)
class RandomLabels:
    """A label drawn at random for every row (O3, 2407.10223: intents and answers to questions).

    `avoid` are labels never drawn: those that the request is to forget. The released code draws from all and so also
    the right one; `avoid=()` does that. One label alone, `classes=range(oos, oos + 1)`, is a refusal by class.
    """

    classes: Sequence[int]
    avoid: Collection[int] = ()

    def __call__(self, examples: Examples, source: random.Random) -> Examples:
        """Return the rows with drawn labels. Raises DataError where no label is left to draw."""
        left = [label for label in self.classes if label not in set(self.avoid)]
        if not left:
            raise DataError(
                f"all {len(self.classes)} labels are to be forgotten, so none is left to answer with; leave one out of "
                "the request, or retrain without the data"
            )
        drawn = tuple(source.choice(left) for _ in examples.texts)
        return Examples(examples.texts, drawn, examples.prompts, examples.owners)


@dataclass(frozen=True)
class Refusals:
    """A refusal drawn at random after every row's prompt (O3 on TOFU: one of 17 sentences; ours are others)."""

    sentences: Sequence[str] = REFUSALS

    def __call__(self, examples: Examples, source: random.Random) -> Examples:
        """Return the prompts with refusals. Raises DataError for rows without a prompt to refuse."""
        if examples.prompts is None:
            raise DataError("a refusal answers a prompt, and these rows have none; set data.prompt")
        texts = tuple(source.choice(self.sentences) for _ in examples.texts)
        return Examples(texts, examples.labels, examples.prompts, examples.owners)
