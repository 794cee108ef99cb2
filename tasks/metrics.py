"""Sums over examples from which loss, accuracy and macro-F1 are read."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Scores:
    """What an evaluation found.

    `loss` is the mean over examples (nats; for causal LM of each example's mean over its learned tokens), `accuracy`
    the share of right answers (for causal LM of right next tokens), `macro_f1` the mean of the classes' F1.
    """

    loss: float
    accuracy: float
    examples: int
    macro_f1: float | None = None


def macro_f1(truth: NDArray[np.int64], guess: NDArray[np.int64]) -> float:
    """Average F1 over the classes that occur in truth or guess, as scikit-learn does."""
    classes = np.union1d(truth, guess)
    hits = np.array([np.sum((truth == c) & (guess == c)) for c in classes], dtype=float)
    sizes = np.array([np.sum(truth == c) + np.sum(guess == c) for c in classes], dtype=float)
    return float(np.mean(2 * hits / sizes))
