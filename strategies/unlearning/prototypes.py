"""Prototypes: the mean feature of every class by the original model, and the divergence of features from them."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from strategies.unlearning.classifier import Featured
from tasks.encoders import Rows, labels_of

LEAST = 2
"""Fewest rows that a prototype is taken of: the mean of one row would be a copy of its feature."""


@dataclass(frozen=True)
class Prototypes:
    """Class means `means [classes, width]` of features, and which classes have one, `known [classes]`.

    **Guarantee**: nothing else is kept of the rows they were taken of, and every mean is of `LEAST` rows or more.
    """

    means: Tensor
    known: Tensor

    @classmethod
    def of(cls, original: Featured, rows: Rows, *, classes: int) -> "Prototypes":
        """Take the class means of the original model, which is in evaluation mode and trained by now.

        (GS-LoRA++'s single-step script takes them before it loads the weights, and its continual script anew from
        every task's model; the paper says the original model, and so it is here.)
        """
        labels, features = torch.from_numpy(labels_of(rows)), original.features(rows)
        sums = torch.zeros(classes, features.shape[1]).index_add_(0, labels, features)
        counts = torch.bincount(labels, minlength=classes)
        known = counts >= LEAST
        means = torch.where(known[:, None], sums / counts.clamp(min=1)[:, None], torch.zeros_like(sums))
        return cls(means, known)

    def without(self, classes: Collection[int]) -> "Prototypes":
        """Return the prototypes without those of classes that are forgotten."""
        gone = torch.tensor(sorted(classes), dtype=torch.long)
        return Prototypes(self.means.index_fill(0, gone, 0.0), self.known.index_fill(0, gone, False))

    def divergence(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the mean D of the rows that have a prototype, nats; 0 where none has.

        D = KL(softmax(prototype of the row's class) || softmax(feature)), the softmax over the feature's coordinates
        (the released code; the paper says logits).
        """
        rows = self.known[labels]
        if not bool(rows.any()):
            return features.sum() * 0.0
        target = F.log_softmax(self.means[labels[rows]], dim=1)
        found = F.log_softmax(features[rows], dim=1)
        return F.kl_div(found, target, reduction="batchmean", log_target=True)

    def between(self) -> float:
        """Return the mean D between two known classes' prototypes, nats; 1 where fewer than two are known."""
        log = F.log_softmax(self.means[self.known].double(), dim=1)
        count = len(log)
        if count < 2:
            return 1.0
        own = (log.exp() * log).sum(1)
        cross = log.exp() @ log.T
        return float((own[:, None] - cross).sum() / (count * (count - 1)))
