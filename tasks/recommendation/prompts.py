"""What a language model is asked: a short history and a target in words; no user, item or other id.

The answer is one of two words, and its log odds are those of the two tokens (decoders) or of a head (encoders).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tasks.recommendation.interactions import Floats, Interactions, Ints, Queries

ANSWERS = (" No", " Yes")
"""What follows the prompt for labels 0 and 1."""


@dataclass(frozen=True)
class Phrasing:
    """The words around titles, ratings and levels."""

    noun: str = "film"
    tags: bool = True
    """Whether the target's tags are told; those of the history would fill the prompt."""
    level: bool = True
    """Whether it is told how many of the last events were liked: level carries most of the signal, so a comparison of
    personal methods gives it to all of them."""
    recent: int = 20
    compact: bool = False
    """One line an event: level, title, tags, answer and rating, and the target as a line whose answer is left out.
    Every line is then a question with its answer, which is how a small reader learns to answer."""


def prompts(
    log: Interactions,
    queries: Queries,
    short: Ints,
    *,
    phrasing: Phrasing | None = None,
    scores: Floats | None = None,
) -> tuple[str, ...]:
    """Write a prompt for every query from the rows `short [queries, k]` of its history (-1 is none).

    `scores` are a recommender's log odds, told as a percentage. Nothing else of the interactions is read.
    """
    phrasing = phrasing or Phrasing()
    told = [None] * len(queries) if scores is None else [*(100 / (1 + np.exp(-scores)))]
    if phrasing.compact:
        return _compact(log, queries, short, phrasing, told)
    return tuple(
        "\n".join(_lines(log, queries.take(slice(place, place + 1)), rows[rows >= 0], phrasing, told[place]))
        for place, rows in enumerate(short)
    )


def _lines(log: Interactions, query: Queries, rows: Ints, phrasing: Phrasing, score: float | None) -> Iterator[str]:
    catalogue, item = log.catalogue, int(query.items[0])
    if len(rows):
        yield f"Ratings of a viewer, oldest first (out of {log.scale[1]:g}):"
        for row in rows:
            yield f"{catalogue.titles[log.items[row]]}: {log.ratings[row]:g}"
    else:
        yield "A viewer without earlier ratings."
    recent = log.likes[max(int(query.first[0]), int(query.end[0]) - phrasing.recent) : int(query.end[0])]
    if phrasing.level and len(recent):
        yield f"Of the last {len(recent)} {phrasing.noun}s the viewer liked {int(recent.sum())}."
    if score is not None:
        yield f"A recommender gives {score:.0f} percent."
    tags = _tags(catalogue.tags[item]) if phrasing.tags else ""
    yield f"Will the viewer like the {phrasing.noun} {catalogue.titles[item]}{tags}? Answer Yes or No."
    yield "Answer:"


def _compact(
    log: Interactions, queries: Queries, short: Ints, phrasing: Phrasing, told: Sequence[float | None]
) -> tuple[str, ...]:
    used = np.unique(short[short >= 0])
    known = dict(zip(used.tolist(), events(log, used, phrasing=phrasing), strict=True))
    asked = _questions(log, queries, phrasing, told)
    return tuple(
        "\n".join([*(known[row] for row in rows if row >= 0), question])
        for rows, question in zip(short.tolist(), asked, strict=True)
    )


def events(log: Interactions, rows: Ints, *, phrasing: Phrasing) -> list[str]:
    """Write rows as compact lines: the question as it stood when the event happened, the answer and the
    rating in steps from 1 to 10 (half stars)."""
    asked = _questions(log, log.queries(rows), phrasing, [None] * len(rows))
    return [
        f"{question}{ANSWERS[int(like)]} {step}"
        for question, like, step in zip(asked, log.likes[rows], log.levels[rows] + 1, strict=True)
    ]


def _questions(log: Interactions, queries: Queries, phrasing: Phrasing, told: Sequence[float | None]) -> Iterator[str]:
    sums = np.concatenate([[0], np.cumsum(log.likes)])
    first = np.maximum(queries.first, queries.end - phrasing.recent)
    liked, count = sums[queries.end] - sums[first], queries.end - first
    for place, item in enumerate(queries.items.tolist()):
        # Nearly all questions have a whole stretch of recent events behind them; what goes without saying is not said.
        known = f"{liked[place]} " if count[place] == phrasing.recent else f"{liked[place]}/{count[place]} "
        level = known if phrasing.level else ""
        score = "" if told[place] is None else f"{told[place]:.0f}% "
        tags = " " + " ".join(log.catalogue.tags[item]) if phrasing.tags and log.catalogue.tags[item] else ""
        yield f"{level}{score}{log.catalogue.titles[item]}{tags}:"


def _tags(tags: Sequence[str]) -> str:
    return f" ({', '.join(tags)})" if tags else ""
