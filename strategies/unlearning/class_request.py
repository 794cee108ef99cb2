"""A request to forget classes, and what became of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from lora.errors import DataError
from strategies.unlearning.classifier import Answering, Classifier, passes
from strategies.unlearning.config import BudgetConfig
from strategies.unlearning.prototypes import Prototypes
from tasks.encoders import Rows, labels_of

Model = TypeVar("Model", bound=Answering)
Trace = Sequence[Mapping[str, float]]
"""Figures of every pass over the replay sample, means over its steps."""


@dataclass(frozen=True)
class ClassRequest:
    """Classes to forget, rows of them, and a small sample of what stays.

    Raises DataError for no class, for rows that contradict the classes, and for an empty set.
    """

    classes: tuple[int, ...]
    forget: Rows
    retain: Rows
    prototypes: Prototypes | None = None
    """Class means of the original model, for GS-LoRA++."""
    earlier: tuple[int, ...] = ()
    """Classes that earlier requests have forgotten: their indices, nothing else is left of them."""

    def __post_init__(self) -> None:
        if not self.classes:
            raise DataError("a request names no class; name at least one")
        if len(self.forget) == 0:
            raise DataError(f"no row of the classes {list(self.classes)} is given; a request needs some to forget")
        if len(self.retain) == 0:
            raise DataError("no row of the other classes is given: nothing would stay; give a small replay sample")
        strange = np.setdiff1d(labels_of(self.forget), self.classes)
        if len(strange):
            raise DataError(f"rows to forget are of class {strange[0]}, which the request does not name")
        again = set(self.classes) & set(self.earlier)
        if again:
            raise DataError(f"class {min(again)} was forgotten by an earlier request; name it once")
        kept = np.intersect1d(labels_of(self.retain), self.gone)
        if len(kept):
            raise DataError(f"the replay sample holds rows of class {kept[0]}, which is to be forgotten")

    @property
    def gone(self) -> tuple[int, ...]:
        """The classes of this request and of all before it, ascending."""
        return tuple(sorted((*self.classes, *self.earlier)))

    def check(self, classes: int) -> None:
        """Raise DataError where the classifier lacks a class of the request."""
        unknown = [label for label in self.classes if not 0 <= label < classes]
        if unknown:
            raise DataError(f"class {unknown[0]} is not among the classifier's {classes}; give 0 to {classes - 1}")

    def steps(self, budget: BudgetConfig) -> int:
        """Return how many steps the budget comes to: passes over the replay sample."""
        return budget.epochs * passes(len(self.retain), budget.batch)


@dataclass(frozen=True)
class BlockNorms:
    """Norms of every group of factors over time, and which groups carry the update.

    `factors[pass][group]` is the norm that the group lasso holds down (A starts above zero), `updates[pass][group]` the
    Frobenius norm of s B A, which is what changes the function.
    """

    factors: Sequence[Mapping[str, float]]
    updates: Sequence[Mapping[str, float]]
    selected: tuple[str, ...]


@dataclass(frozen=True)
class Outcome(Generic[Model]):
    """What a method made of a request."""

    model: Model
    method: str
    steps: int
    cpu_s: float
    trace: Trace = field(default=(), repr=False)
    blocks: BlockNorms | None = None


class Method(Protocol):
    """A way to make a classifier forget. The classifier that is given stays as it is."""

    @property
    def name(self) -> str:
        """What tables call it."""

    def forget(
        self, classifier: Classifier, request: ClassRequest, budget: BudgetConfig, *, seed: int
    ) -> Outcome[Classifier]:
        """Return the classifier after the request. Raises DataError for a request that does not fit it."""


class Tracing:
    """Gathers the figures of steps and averages them over passes."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.trace: list[Mapping[str, float]] = []
        self._open: list[Mapping[str, float]] = []

    def add(self, **figures: float) -> bool:
        """Note one step; true where it ended a pass."""
        self._open.append(figures)
        if len(self._open) < self.every:
            return False
        self.trace.append({name: float(np.mean([each[name] for each in self._open])) for name in figures})
        self._open.clear()
        return True
