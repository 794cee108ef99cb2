"""A stream of requests: one after another, each measured to the end of the stream."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from pydantic import Field

from lora.config import Section
from lora.errors import DataError
from strategies.unlearning.class_request import ClassRequest, Method, Outcome
from strategies.unlearning.classifier import Classifier
from strategies.unlearning.config import BudgetConfig
from strategies.unlearning.measures import Answers, Standing, standing
from strategies.unlearning.prototypes import Prototypes
from tasks.encoders import Rows, labels_of
from tasks.tokens import Ids


class SampleConfig(Section):
    """What a service still holds when requests come."""

    forget: int = Field(20, ge=1)
    """Rows of every class that is to be forgotten; a few (4) is the few-shot setting."""
    replay: int = Field(10, ge=1)
    """Rows of every class that stays."""
    missing: tuple[int, ...] = ()
    """Classes that stay and of which no row is left."""
    seed: int = Field(0, ge=0)
    """Draws the rows."""


def sampled(rows: Rows, per_class: int, *, classes: Collection[int], seed: int) -> Ids:
    """Return places of up to `per_class` rows of every class, ascending.

    A class's rows are drawn apart from the others', and fewer of them are the first of more.
    """
    labels = labels_of(rows)
    chosen = [
        np.random.default_rng((seed, label)).permutation(np.flatnonzero(labels == label))[:per_class]
        for label in sorted(classes)
    ]
    return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *chosen]))


def requests(
    rows: Rows,
    sequence: Sequence[Collection[int]],
    config: SampleConfig,
    *,
    classes: int,
    prototypes: Prototypes | None = None,
) -> Iterator[ClassRequest]:
    """Yield the requests in order; rows and prototypes of classes that were forgotten are in no later one.

    Raises DataError for a class that is asked for twice, and where nothing would remain.
    """
    gone: set[int] = set()
    for number, named in enumerate(sequence, start=1):
        again = gone & set(named)
        if again:
            raise DataError(f"request {number} names class {min(again)}, which an earlier one has forgotten")
        earlier = tuple(sorted(gone))
        gone |= set(named)
        staying = set(range(classes)) - gone - set(config.missing)
        if not staying:
            raise DataError(f"request {number} leaves no class; to forget everything, delete the classifier")
        forget = sampled(rows, config.forget, classes=named, seed=config.seed)
        retain = sampled(rows, config.replay, classes=staying, seed=config.seed)
        yield ClassRequest(tuple(sorted(named)), rows.take(forget), rows.take(retain), prototypes, earlier)
        prototypes = None if prototypes is None else prototypes.without(named)


@dataclass(frozen=True)
class Line:
    """Accuracy on one request's rows at one time: request i measured after request t, both from 1."""

    time: int
    request: int
    seen: float
    """On the rows that were used to forget it."""
    unseen: float
    """On rows that no training has seen."""


@dataclass(frozen=True)
class Moment:
    """The stream after one request."""

    time: int
    standing: Standing
    lines: tuple[Line, ...]
    outcome: Outcome[Classifier]


@dataclass(frozen=True)
class Report:
    """A stream that has ended: one moment a request."""

    method: str
    moments: tuple[Moment, ...]

    @property
    def lines(self) -> tuple[Line, ...]:
        """Return the table request x time."""
        return tuple(line for moment in self.moments for line in moment.lines)

    def at_end(self) -> tuple[Line, ...]:
        """Return every request as it stands after the last."""
        return self.moments[-1].lines

    @property
    def worst_forget_accuracy(self) -> float:
        """Return the highest accuracy on any request's rows, seen or unseen, at the end of the stream."""
        return max(max(line.seen, line.unseen) for line in self.at_end())

    @property
    def worst_utility_loss(self) -> float:
        """Return the most percentage points that the remaining classes had lost after any request."""
        return max(moment.standing.utility_loss for moment in self.moments)

    @property
    def mean_h(self) -> float:
        """Return the mean H of the requests."""
        return float(np.mean([moment.standing.h for moment in self.moments]))


def run(
    classifier: Classifier,
    method: Method,
    asked: Sequence[ClassRequest],
    *,
    unseen: Rows,
    budget: BudgetConfig,
    seed: int,
    missing: Collection[int] = (),
    before: Answers | None = None,
    on_moment: Callable[[Moment], None] | None = None,
) -> Report:
    """Answer all requests in order with one method and measure every one of them after each.

    Each starts from the classifier that the one before has left. `unseen` are rows of all classes that nothing was
    trained on: test rows for a report, validation rows to choose settings; `before` is what the given classifier
    answers to them, where that is known.
    """
    unseen = classifier.encoder.prepared(unseen)
    before = before or Answers.of(classifier, unseen)
    moments: list[Moment] = []
    for number, request in enumerate(asked, start=1):
        outcome = method.forget(classifier, request, budget, seed=seed + number)
        classifier = outcome.model
        after = Answers.of(classifier, unseen)
        earlier = {label for old in asked[: number - 1] for label in old.classes}
        stands = standing(
            before, after, forgotten=request.classes, earlier=earlier, missing=missing, classes=classifier.classes
        )
        lines = tuple(_line(classifier, after, number, i, old) for i, old in enumerate(asked[:number], start=1))
        # Models of earlier moments are let go: a stream of many requests would keep one copy for each.
        moments.append(Moment(number, stands, lines, outcome))
        if on_moment is not None:
            on_moment(moments[-1])
        if number > 1:
            moments[-2] = replace(moments[-2], outcome=replace(moments[-2].outcome, model=classifier))
    return Report(method.name, tuple(moments))


def _line(model: Classifier, after: Answers, time: int, number: int, request: ClassRequest) -> Line:
    seen = Answers.of(model, request.forget).accuracy(request.classes)
    return Line(time, number, seen, after.accuracy(request.classes))
