"""Examples and their splits: what every task learns from, whatever the source was."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


@dataclass(frozen=True)
class Examples:
    """Rows of one split, column by column; every column that is there has one value per row."""

    texts: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    """Class indices into `Splits.label_names` (classification)."""
    prompts: tuple[str, ...] | None = None
    """What conditions the text and is not learned (causal LM)."""
    owners: tuple[str, ...] | None = None
    """Natural id of whose row it is: a speaker, a user."""

    def __post_init__(self) -> None:
        for name in ("labels", "prompts", "owners"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.texts):
                raise ValueError(f"{name} has {len(column)} values for {len(self.texts)} texts")

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> "Examples":
        """Return the rows at `indices`, in that order."""
        return Examples(
            texts=tuple(self.texts[i] for i in indices),
            labels=_pick(self.labels, indices),
            prompts=_pick(self.prompts, indices),
            owners=_pick(self.owners, indices),
        )


@dataclass(frozen=True)
class Splits:
    """The three splits of a task and the names of its labels, which the train split fixes."""

    train: Examples
    validation: Examples
    test: Examples
    label_names: tuple[str, ...]
    """Name of label 0, 1, ...; empty for causal LM."""


def _pick(column: tuple[T, ...] | None, indices: Sequence[int] | NDArray[np.int64]) -> tuple[T, ...] | None:
    return None if column is None else tuple(column[i] for i in indices)
