"""One user as a report shows them: what they rated, what they are recommended and why, and their own adapter."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora.errors import DataError
from strategies.personal.files import save_personalized
from strategies.personal.personalized import Personalized
from strategies.personal.recommenders.protocol import Recommender
from tasks.recommendation.interactions import Floats, Interactions, Ints, Queries
from tasks.recommendation.splits import Split

HISTORY, RECOMMENDED, AMONG = 20, 10, 1000
"""Latest events and best items shown; most-rated items that a recommendation is chosen among."""


@dataclass(frozen=True)
class Sitter:
    """Who is shown, at the time of their first test event (or after their last event)."""

    name: str
    time: int
    history: Ints
    """Rows strictly before that time, oldest first."""
    candidates: Ints
    """Items that the user has not rated before, the most rated ones."""
    queries: Queries
    """The candidates, as questions."""


def sitter(log: Interactions, split: Split, name: str | None) -> Sitter:
    """Return the named user, or the one with most test rows (of equals the first).

    Raises DataError with the nearest name for an unknown user, and where nothing is left to recommend.
    """
    if name is None:
        name = log.user_names[int(np.bincount(log.users[split.test]).argmax())]
    try:
        first = int(log.query(name, [0], time=0).first[0])
    except DataError as error:
        raise DataError(f"comparison.show_user: {error}") from None
    user = log.user_names.index(name)
    tested = split.test[log.users[split.test] == user]
    time = int(log.times[tested].min()) if len(tested) else int(log.times[log.starts[user + 1] - 1]) + 1
    end = int(log.query(name, [0], time=time).end[0])
    history = np.arange(first, end)
    candidates = _unrated(log, split, history)
    if not len(candidates):
        raise DataError(f"comparison.show_user: '{name}' has rated every item; name a user with items left")
    return Sitter(name, time, history, candidates, log.query(name, candidates.tolist(), time=time))


def _unrated(log: Interactions, split: Split, history: Ints) -> Ints:
    counts = np.bincount(log.items[split.train], minlength=len(log.catalogue)).astype(np.int64)
    counts[log.items[history]] = -1
    order = np.argsort(-counts, kind="stable")[:AMONG]
    return np.sort(order[counts[order] >= 0])


def portrait(
    log: Interactions, who: Sitter, *, personal: Personalized, others: Mapping[str, Recommender], everybody: Queries
) -> dict[str, Any]:
    """Return what a report shows, in plain values.

    `recommended` is the best by RecLoRA, then the best by each of `others`, with every arm's probability of a like
    and what the user said later. `weights [matrices, N]` are the gate's for the user and the item recommended first,
    `usage [N]` and `usage_of_all [N]` their means for the user and over `everybody`.
    """
    odds = {"reclora": personal.logits(log, who.queries)}
    odds |= {name: one.logits(log, who.queries) for name, one in others.items()}
    best = who.queries.take(np.array([int(np.argmax(odds["reclora"]))]))
    weights = personal.weights(log, best)[:, 0]
    usage_of_all = personal.weights(log, everybody).double().mean((0, 1))
    return {
        "user": who.name,
        "events": len(who.history),
        "history": [_event(log, int(row)) for row in who.history[-HISTORY:]],
        "recommended": {name: _best(log, who, odds, by=name) for name in odds},
        "overlap": _overlap(odds),
        "matrices": [site.name for site in personal.adapted.sites],
        "weights": [[round(value, 5) for value in row] for row in weights.tolist()],
        "usage": weights.double().mean(0).tolist(),
        "usage_of_all": usage_of_all.tolist(),
    }


def _event(log: Interactions, row: int) -> dict[str, Any]:
    return {
        "title": log.catalogue.titles[int(log.items[row])],
        "rating": float(log.ratings[row]),
        "liked": bool(log.likes[row]),
        "time": int(log.times[row]),
    }


def _best(log: Interactions, who: Sitter, odds: Mapping[str, Floats], *, by: str) -> list[dict[str, Any]]:
    places = np.argsort(-odds[by], kind="stable")[:RECOMMENDED]
    return [
        {
            "title": log.catalogue.titles[int(who.candidates[place])],
            "likes": {name: float(1 / (1 + np.exp(-values[place]))) for name, values in odds.items()},
            "later": _later(log, who, int(who.candidates[place])),
        }
        for place in places
    ]


def _later(log: Interactions, who: Sitter, item: int) -> bool | None:
    """Return whether the user liked the item when they rated it later; None where they never did."""
    user = log.user_names.index(who.name)
    rows = np.arange(log.starts[user], log.starts[user + 1])
    rows = rows[(log.items[rows] == item) & (log.times[rows] >= who.time)]
    return bool(log.likes[rows[0]]) if len(rows) else None


def _overlap(odds: Mapping[str, Floats]) -> dict[str, int]:
    """Return how many of each arm's best items are among RecLoRA's."""
    tops = {name: {*np.argsort(-values, kind="stable")[:RECOMMENDED].tolist()} for name, values in odds.items()}
    return {name: len(top & tops["reclora"]) for name, top in tops.items() if name != "reclora"}


def export_user(personal: Personalized, log: Interactions, who: Sitter, directory: Path) -> Path:
    """Write the user's adapter as a PEFT directory, and what all users' are mixed of below it, in `meta/`.

    Where routing sees the target as well, the adapter is that of the item which is recommended first.
    """
    best = int(np.argmax(personal.logits(log, who.queries)))
    vector = personal.representation(log, who.queries.take(np.array([best])))[0]
    personal.export(vector.to(personal.base.placement.device), directory)
    save_personalized(personal, directory / "meta")
    return directory
