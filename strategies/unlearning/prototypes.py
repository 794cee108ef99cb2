"""Prototypes: the mean feature of every class by the original model, and the divergence of features from them."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lora.errors import RunError
from strategies.unlearning.classifier import Featured
from tasks.encoders import Rows, labels_of

LEAST = 2
"""Fewest rows that a prototype is taken of: the mean of one row would be a copy of its feature."""


@dataclass(frozen=True)
class Prototypes:
    """Class means `means [classes, width]` of features, and which classes have one, `known [classes]`.

    `spread [classes]` is the mean divergence (nats) of a class's own rows from its mean by the original model.

    **Guarantee**: nothing else is kept of the rows they were taken of, and every mean is of `LEAST` rows or more.
    """

    means: Tensor
    known: Tensor
    spread: Tensor

    @classmethod
    def of(cls, original: Featured, rows: Rows, *, classes: int, copies: Rows | None = None) -> "Prototypes":
        """Take the class means of the original model, which is in evaluation mode and trained by now.

        Where rows are few, `copies` may be distorted ones of them, as in the paper's few-shot runs: means are of both,
        the spread is of the rows alone. What counts for `LEAST` are the rows.

        (GS-LoRA++'s single-step script takes them before it loads the weights, and its continual script anew from
        every task's model; the paper says the original model, and so it is here.)
        """
        labels, features = torch.from_numpy(labels_of(rows)), original.features(rows)
        counts = torch.bincount(labels, minlength=classes)
        sums = torch.zeros(classes, features.shape[1]).index_add_(0, labels, features)
        known, taken = counts >= LEAST, counts
        if copies is not None:
            more = torch.from_numpy(labels_of(copies))
            sums = sums.index_add_(0, more, original.features(copies))
            taken = counts + torch.bincount(more, minlength=classes)
        means = torch.where(known[:, None], sums / taken.clamp(min=1)[:, None], torch.zeros_like(sums))
        far = torch.zeros(classes).index_add_(0, labels, divergences(means[labels], features))
        return cls(means, known, torch.where(known, far / counts.clamp(min=1), torch.zeros_like(far)))

    def to(self, device: torch.device) -> "Prototypes":
        """Return the prototypes on a device."""
        return Prototypes(self.means.to(device), self.known.to(device), self.spread.to(device))

    def without(self, classes: Collection[int]) -> "Prototypes":
        """Return the prototypes without those of classes that are forgotten."""
        gone = torch.tensor(sorted(classes), dtype=torch.long)
        kept = (each.index_fill(0, gone, 0) for each in (self.means, self.known, self.spread))
        return Prototypes(*kept)

    def to_bytes(self) -> bytes:
        """Return them as a safetensors file."""
        return save({"means": self.means, "known": self.known, "spread": self.spread})

    @classmethod
    def load(cls, path: Path) -> "Prototypes":
        """Read a file of `to_bytes`. Raises RunError for a missing or damaged file."""
        try:
            found = load_file(path)
            return cls(found["means"], found["known"], found["spread"])
        except (OSError, SafetensorError, KeyError) as error:
            raise RunError(f"{path}: prototypes cannot be read ({error}); restore them from a backup") from error

    def divergence(self, features: Tensor, labels: Tensor, *, beyond_spread: bool = False) -> Tensor:
        """Return the mean D of the rows that have a prototype, nats; 0 where none has. Gradients flow.

        D = KL(softmax(prototype of the row's class) || softmax(feature)), the softmax over the feature's coordinates
        (the released code; the paper says logits). With `beyond_spread`, what the mean exceeds that of the original
        model by.
        """
        rows = self.known[labels]
        if not bool(rows.any()):
            return features.sum() * 0.0
        mean = divergences(self.means[labels[rows]], features[rows]).mean()
        return F.relu(mean - self.spread[labels[rows]].mean()) if beyond_spread else mean

    def between(self) -> float:
        """Return the mean D between two known classes' prototypes, nats; 1 where fewer than two are known."""
        means = self.means[self.known].double()
        count = len(means)
        if count < 2:
            return 1.0
        return float(sum(divergences(mean.expand_as(means), means).sum() for mean in means) / (count * (count - 1)))


def divergences(targets: Tensor, features: Tensor) -> Tensor:
    """Return KL(softmax(target) || softmax(feature)) of every row, nats, `[rows]`, for vectors `[rows, width]`."""
    logs = F.log_softmax(features, dim=1), F.log_softmax(targets, dim=1)
    return F.kl_div(*logs, reduction="none", log_target=True).sum(1)
