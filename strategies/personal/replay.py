"""Time-ordered replay: what users' histories, slots and a model's training are worth when time goes on.

A model is fitted on everything before a moment and then serves the periods after it. The arms ask the same questions
and differ in what was brought up to date since.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch

from lora.errors import DataError
from strategies.personal.fitting import few
from strategies.personal.lifelong import LifelongUsers
from strategies.personal.personalized import Personalized
from tasks.recommendation.interactions import Floats, Interactions, Ints, Queries
from tasks.recommendation.metrics import Likes, likes
from tasks.recommendation.splits import Split

Fitted = Callable[[Interactions, Split], Personalized]
"""Fits recommender and personalised model from scratch on the training rows of a split; its test rows are the rest."""

EVENT, PERIOD, SLOT, NOTHING, ANEW, SCORER = (
    "updated by event",
    "slots updated by period",
    "slots frozen",
    "all frozen",
    "trained anew",
    "recommender alone",
)
"""The arms. Updated by event: history, score and slot know every earlier event. Slots by period, slots frozen: the
same prompts and scores, but slots of the last period's end, or of the start (for those who came later: the cold one).
All frozen: prompts and scores also know nothing since the start. Trained anew: as updated by event, of a model that
was fitted from scratch on everything before the period. Recommender alone: the scorer's own log odds, up to date."""
ARMS = (EVENT, PERIOD, SLOT, NOTHING, ANEW, SCORER)

SEEN = (0, 1, 2, 5, 10, 20)
"""Edges of the newcomers' curve: events seen before the one that is asked about."""


@dataclass(frozen=True)
class Period:
    """Rows of one stretch of time, `begin <= time < end`, in seconds."""

    begin: int
    end: int
    rows: Ints


def periods(log: Interactions, *, start: float = 0.5, count: int = 6) -> list[Period]:
    """Cut the time after the first `start` of all events into periods of about equally many events.

    Equal counts, since a calendar month of a small log may hold five events or five thousand, and its figures would be
    as uneven. Events of one time are never divided. Raises DataError where a period would be empty.
    """
    if not 0 < start < 1 or count < 1:
        raise DataError(f"start={start}, count={count}: give a share between 0 and 1, and 1 period or more")
    ordered = np.sort(log.times)
    places = np.rint(np.linspace(start, 1, count + 1)[:-1] * len(log)).astype(np.int64)
    cuts = [*ordered[np.minimum(places, len(log) - 1)].tolist(), int(ordered[-1]) + 1]
    if len(set(cuts)) < len(cuts) or cuts[0] == ordered[0]:
        raise DataError(f"{count} periods after {start:.0%} of {len(log)} events leave one empty; give fewer periods")
    return [
        Period(begin, end, np.flatnonzero((log.times >= begin) & (log.times < end))) for begin, end in pairwise(cuts)
    ]


def before(log: Interactions, moment: int, *, validation: float = 0.1) -> Split:
    """Return the rows before a moment: the last share by time for validation, and all later rows for testing."""
    past = np.flatnonzero(log.times < moment)
    cut = np.quantile(log.times[past], 1 - validation)
    held = log.times[past] >= cut
    return Split(f"before {moment}", past[~held], past[held], np.flatnonzero(log.times >= moment))


@dataclass
class Replayed:
    """Log odds of every arm for `rows` of the log, which are in order of `period`; `[rows]` each."""

    log: Interactions
    rows: Ints
    period: Ints
    drawn: Ints
    """1 where a row is of its period's uniform sample, 0 where only the newcomers' curve asks about it."""
    seen: Ints
    """Events of the user before the row."""
    newcomer: Ints
    """1 where the user had no event at the start."""
    logits: dict[str, Floats] = field(default_factory=dict)
    fit_s: list[float] = field(default_factory=list)
    """Seconds of every fit by the replay's clock, the first at the start."""
    update_s: list[float] = field(default_factory=list)
    """Seconds of bringing all users of a period up to date, and how many."""
    updated: list[int] = field(default_factory=list)

    def drift(self, arm: str) -> list[Likes]:
        """Measure an arm in every period."""
        return [self.measured(arm, (self.period == number) & (self.drawn > 0)) for number in range(self.periods)]

    def whole(self, arm: str) -> Likes:
        """Measure an arm over the samples of all periods."""
        return self.measured(arm, self.drawn > 0)

    def newcomers(self, arm: str) -> dict[str, Likes]:
        """Measure an arm on users who came after the start, by events seen before."""
        edges = [*SEEN, np.inf]
        found = {}
        for low, high in pairwise(edges):
            last = "+" if high == np.inf else "" if high == low + 1 else f"-{high - 1:.0f}"
            found[f"{low:.0f}{last}"] = self.measured(
                arm, (self.newcomer > 0) & (self.seen >= low) & (self.seen < high)
            )
        return found

    @property
    def periods(self) -> int:
        """Number of periods."""
        return int(self.period.max()) + 1

    def measured(self, arm: str, chosen: np.typing.NDArray[np.bool_]) -> Likes:
        """Measure an arm on some rows; NaN where there are not both likes and dislikes."""
        labels = self.log.likes[self.rows[chosen]]
        if len(np.unique(labels)) < 2:
            return Likes(float("nan"), float("nan"), float("nan"), int(chosen.sum()))
        return likes(labels, self.logits[arm][chosen])


def replay(
    log: Interactions,
    fitted: Fitted,
    times: Sequence[Period],
    *,
    sample: int = 600,
    early: int = 100,
    anew: bool = True,
    seed: int = 0,
    clock: Callable[[], float] = time.process_time,
) -> Replayed:
    """Serve every period by every arm; nothing later than an event is known when it is asked about.

    `sample` rows of every period are asked about, drawn at random, and of newcomers' events in each stretch of `SEEN`
    up to `early` more in each period. Without `anew`, that arm is left out. `clock` tells seconds: of the CPU, unless
    the model computes elsewhere.
    """
    found = _asked(log, times, sample=sample, early=early, seed=seed)
    scores: dict[str, list[Floats]] = {}
    model = _timed_fit(found, fitted, times[0].begin, clock)
    users = LifelongUsers(model, log)
    users.start(log.taken(np.flatnonzero(log.times < times[0].begin)))
    frozen, latest = _copied(users), model
    for number, period in enumerate(times):
        queries = log.queries(found.rows[found.period == number])
        names = [log.user_names[user] for user in log.users[found.rows[found.period == number]]]
        if number and anew:
            latest = _timed_fit(found, fitted, period.begin, clock)
        current = _copied(users)
        each = {
            EVENT: model.logits(log, queries),
            PERIOD: model.logits_of_slots(log, queries, _slots(users, current, names)),
            SLOT: model.logits_of_slots(log, queries, _slots(users, frozen, names)),
            NOTHING: model.logits(log, known_at(log, queries, times[0].begin)),
        }
        if anew:
            each[ANEW] = each[EVENT] if latest is model else latest.logits(log, queries)
        if model.asking.scorer is not None:
            each[SCORER] = model.asking.scorer.logits(log, queries)
        for arm, odds in each.items():
            scores.setdefault(arm, []).append(odds)
        _observe(found, users, log.taken(period.rows), clock)
    found.logits = {arm: np.concatenate(parts) for arm, parts in scores.items()}
    return found


def known_at(log: Interactions, queries: Queries, moment: int) -> Queries:
    """Ask the same of somebody who knows only what was before a moment."""
    early = np.concatenate([[0], np.cumsum(log.times < moment)])
    # Rows of a user are in order of time, so the early ones of a history are its first.
    return replace(queries, end=queries.first + early[queries.end] - early[queries.first])


def _asked(log: Interactions, times: Sequence[Period], *, sample: int, early: int, seed: int) -> Replayed:
    first = np.full(len(log.user_names), np.iinfo(np.int64).max)
    np.minimum.at(first, log.users, log.times)
    rows, number, drawn = [], [], []
    for place, period in enumerate(times):
        uniform = few(period.rows, sample, seed=seed)
        coming = period.rows[first[log.users[period.rows]] >= times[0].begin]
        known = log.befores[coming] - log.starts[log.users[coming]]
        stretch = np.searchsorted(SEEN, known, side="right")
        extra = [few(coming[stretch == each], early, seed=seed) for each in range(1, len(SEEN) + 1)]
        chosen = np.unique(np.concatenate([uniform, *extra]))
        rows.append(chosen)
        number.append(np.full(len(chosen), place))
        drawn.append(np.isin(chosen, uniform).astype(np.int64))
    whole = np.concatenate(rows)
    return Replayed(
        log, whole, np.concatenate(number), np.concatenate(drawn),
        log.befores[whole] - log.starts[log.users[whole]],
        (first[log.users[whole]] >= times[0].begin).astype(np.int64),
    )  # fmt: skip


def _timed_fit(found: Replayed, fitted: Fitted, moment: int, clock: Callable[[], float]) -> Personalized:
    begun = clock()
    model = fitted(found.log, before(found.log, moment))
    found.fit_s.append(clock() - begun)
    return model


def _observe(found: Replayed, users: LifelongUsers, events: Interactions, clock: Callable[[], float]) -> None:
    begun = clock()
    observed = users.start(events)
    found.update_s.append(clock() - begun)
    found.updated.append(len(observed.versions))


def _copied(users: LifelongUsers) -> dict[str, torch.Tensor]:
    names = users.names()
    return dict(zip(names, users.slots.read(names).values, strict=True))


def _slots(users: LifelongUsers, known: dict[str, torch.Tensor], names: Sequence[str]) -> torch.Tensor:
    return torch.stack([known.get(name, users.cold) for name in names])
