"""How much a classifier has forgotten, and what it cost: accuracies by class, Drop, H, utility loss.

Everything here asks a model only for its logits, so gated models are measured with the same figures. Accuracies are
shares from 0 to 1.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lora.errors import DataError
from strategies.unlearning.classifier import Answering
from tasks.encoders import Rows, labels_of
from tasks.tokens import Ids

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """One pass of a model over rows: class indices `[n]` and logits `[n, classes]`."""

    labels: Ids
    logits: Tensor

    @classmethod
    def of(cls, model: Answering, rows: Rows) -> "Answers":
        """Ask the model about all rows."""
        return cls(labels_of(rows), model.logits(rows).float())

    def of_classes(self, classes: Collection[int]) -> NDArray[np.bool_]:
        """Return which rows are of the given classes, `[n]`."""
        return np.isin(self.labels, sorted(classes))

    def accuracy(self, classes: Collection[int]) -> float:
        """Return the share of right answers on rows of some classes; NaN where there is no such row."""
        rows = self.of_classes(classes)
        right = self.logits.argmax(1).numpy() == self.labels
        return float(right[rows].mean()) if rows.any() else float("nan")

    def losses(self) -> Floats:
        """Return the cross entropy of every row, nats, `[n]`."""
        found: Floats = F.cross_entropy(self.logits.double(), torch.from_numpy(self.labels), reduction="none").numpy()
        return found

    def confidence(self) -> Floats:
        """Return log(p / (1 - p)) of every row's own label, `[n]`, without ever taking 1 - p (Carlini et al., 2022)."""
        logits = self.logits.double()
        labels = torch.from_numpy(self.labels)[:, None]
        own = logits.gather(1, labels)[:, 0]
        others = logits.scatter(1, labels, -torch.inf).logsumexp(1)
        found: Floats = (own - others).numpy()
        return found


def drop(before: float, after: float) -> float:
    """Return how far the accuracy on forgotten classes fell from that of the pre-trained model."""
    return before - after


def harmonic(acc_r: float, fallen: float) -> float:
    """Return H = 2 Acc_r Drop / (Acc_r + Drop); 0 where either is not above 0 (GS-LoRA, section 4)."""
    return 2 * acc_r * fallen / (acc_r + fallen) if acc_r > 0 and fallen > 0 else 0.0


def chance(classes: int) -> float:
    """Return the accuracy of guessing among all classes."""
    return 1 / classes


@dataclass(frozen=True)
class Standing:
    """Where a classifier stands after a request, on rows that nothing was trained or chosen on.

    `acc_o` is NaN before a second request, `acc_m` where every remaining class has replay rows. Drop is against the
    pre-trained classifier (the paper), not against the one before the request (its code).
    """

    acc_r: float
    """On all classes that no request has named yet."""
    acc_f: float
    """On the classes just forgotten."""
    acc_o: float
    """On all classes forgotten earlier."""
    acc_m: float
    """On remaining classes of which there is no replay row."""
    acc_f_before: float
    """Of the pre-trained classifier on the classes just forgotten."""
    acc_r_before: float
    """Of the pre-trained classifier on the remaining classes."""

    @property
    def drop(self) -> float:
        """Return Acc_f(pre-trained) - Acc_f."""
        return drop(self.acc_f_before, self.acc_f)

    @property
    def h(self) -> float:
        """Return the harmonic mean of Acc_r and Drop."""
        return harmonic(self.acc_r, self.drop)

    @property
    def utility_loss(self) -> float:
        """Return the percentage points that the remaining classes lost."""
        return 100 * (self.acc_r_before - self.acc_r)


def standing(
    before: Answers,
    after: Answers,
    *,
    forgotten: Collection[int],
    earlier: Collection[int],
    missing: Collection[int] = (),
    classes: int,
) -> Standing:
    """Compare a classifier with the pre-trained one on the same rows. Raises DataError where nothing remains."""
    remaining = set(range(classes)) - {*forgotten, *earlier}
    if not before.of_classes(remaining).any():
        raise DataError("no row of a remaining class is given; the cost of forgetting cannot be measured")
    return Standing(
        acc_r=after.accuracy(remaining),
        acc_f=after.accuracy(forgotten),
        acc_o=after.accuracy(earlier),
        acc_m=after.accuracy(remaining & set(missing)),
        acc_f_before=before.accuracy(forgotten),
        acc_r_before=before.accuracy(remaining),
    )
