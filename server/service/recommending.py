"""Recommendations: many users' candidates in one batch, each by their own history and slot."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lora.errors import DataError, LetheError, Unknown
from server.service.answers import COLD, PLAIN, Provenance
from strategies.personal.lifelong import LifelongUsers
from tasks.recommendation.interactions import Ints

Fallback = Literal["none", "cold"]
CANDIDATES = 50
"""Items that the recommender proposes and the language model ranks."""


@dataclass(frozen=True)
class RecommendAsked:
    """The best items for a user, or (`items`) how likely the user is to like each of some."""

    user: str
    count: int = 10
    items: tuple[str, ...] | None = None
    """Names in the catalogue; None for what the user has not rated."""
    personalized: bool = True
    """False asks the cold start, for comparison."""
    fallback: Fallback = "none"
    """What answers a user who is not known: nobody, or the cold start."""


@dataclass(frozen=True)
class Rated:
    """An item and the probability that the user likes it."""

    item: str
    title: str
    like: float


@dataclass(frozen=True)
class Recommended:
    """Items, best first (in the order asked for, where they were named), and whose answer it is."""

    items: tuple[Rated, ...]
    provenance: Provenance


@dataclass(frozen=True)
class _Question:
    """What is asked of the model: as whom, about which items, and what the answer says of itself."""

    user: str | None
    items: Ints
    provenance: Provenance


class Recommending:
    """Answers recommendations in batches; a batch sees all users at one instant.

    | case | answer |
    |---|---|
    | a user who is not known | Unknown, or the cold start where `fallback` is cold |
    | `personalized` is false | the cold start over the items that the user has not rated |
    | an item that is not known | DataError with the nearest name, for this request only |
    """

    def __init__(self, users: LifelongUsers, *, candidates: int = CANDIDATES) -> None:
        self.users, self.candidates = users, candidates
        self.catalogue = users.histories.terms.catalogue

    def __call__(self, asked: Sequence[RecommendAsked]) -> list[Recommended | LetheError]:
        """Return an answer for every request, or why there is none."""
        with self.users.steady():
            questions = self._questions(asked)
            odds = self._odds([each for each in questions if isinstance(each, _Question)])
        told = iter(odds)
        return [
            each if isinstance(each, LetheError) else self._answer(own, each, next(told))
            for own, each in zip(asked, questions, strict=True)
        ]

    def _questions(self, asked: Sequence[RecommendAsked]) -> "list[_Question | LetheError]":
        known = [own.user if self.users.answers(own.user) else None for own in asked]
        short = [place for place, own in enumerate(asked) if own.items is None]
        proposed = self.users.shortlist([known[place] for place in short], self.candidates)
        lists = dict(zip(short, proposed, strict=True))
        return [self._question(own, known[place], lists.get(place)) for place, own in enumerate(asked)]

    def _question(self, own: RecommendAsked, user: str | None, proposed: Ints | None) -> "_Question | LetheError":
        if user is None and own.fallback == "none":
            # No near name is given: it would be somebody else's.
            return Unknown(f"user '{own.user}' is not known; send an event first, or ask with fallback=cold")
        try:
            items = proposed if own.items is None else self._places(own.items)
        except DataError as error:
            return error
        found = np.empty(0, dtype=np.int64) if items is None else items
        if user is None:
            return _Question(None, found, Provenance.cold(COLD))
        if not own.personalized:
            return _Question(None, found, Provenance.cold(PLAIN))
        return _Question(user, found, Provenance.of(user, self.users.version(user)))

    def _places(self, names: Sequence[str]) -> Ints:
        return np.array([self.catalogue.index(name) for name in names], dtype=np.int64)

    def _odds(self, questions: "Sequence[_Question]") -> list[list[float]]:
        """Return log odds of every question's items: questions about equally many items share a batch."""
        found: dict[int, list[float]] = {}
        widths: dict[int, list[int]] = {}
        for place, question in enumerate(questions):
            widths.setdefault(len(question.items), []).append(place)
        for places in widths.values():
            items = np.stack([questions[place].items for place in places])
            odds = self.users.logits([questions[place].user for place in places], items)
            found |= dict(zip(places, odds.tolist(), strict=True))
        return [found[place] for place in range(len(questions))]

    def _answer(self, asked: RecommendAsked, question: "_Question", odds: Sequence[float]) -> Recommended:
        rated = [
            Rated(self.catalogue.names[item], self.catalogue.titles[item], float(1 / (1 + np.exp(-value))))
            for item, value in zip(question.items.tolist(), odds, strict=True)
        ]
        if asked.items is None:
            rated = sorted(rated, key=lambda each: -each.like)[: asked.count]
        return Recommended(tuple(rated), question.provenance)
