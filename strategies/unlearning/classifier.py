"""A trained classifier that can be asked to forget classes: an encoder and a linear head over its features."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora.errors import ModelError
from strategies.unlearning.config import FitConfig
from tasks.config import ModelConfig
from tasks.encoders import Encoder, ImageEncoder, Rows, TextEncoder, labels_of
from tasks.models import load_base
from tasks.tokens import Ids
from tasks.vision import VitConfig


class Answering(Protocol):
    """Whatever classifies rows, gated or not."""

    def logits(self, rows: Rows) -> Tensor:
        """Return logits `[rows, classes]`, float32, without gradients."""


class Featured(Answering, Protocol):
    """A classifier whose features before the head can be looked at."""

    def features(self, rows: Rows) -> Tensor:
        """Return features `[rows, width]`, float32, without gradients."""


class Classifier:
    """Encoder and head. `fresh(seed)` makes the classifier that had never been trained on the task."""

    def __init__(self, encoder: Encoder, head: nn.Linear, *, fresh: Callable[[int], "Classifier"]) -> None:
        self.encoder, self.head, self.fresh = encoder, head, fresh
        self.evaluating()

    @property
    def device(self) -> torch.device:
        """Where it computes; what it returns without gradients lies on the CPU all the same."""
        return self.head.weight.device

    @property
    def classes(self) -> int:
        """Number of classes, forgotten ones included."""
        return self.head.out_features

    def answer(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Return features and logits of one gathered input; gradients flow."""
        features = self.encoder.features(inputs)
        return features, self.head(features)

    def logits(self, rows: Rows) -> Tensor:
        """Return logits `[rows, classes]` without gradients."""
        with torch.no_grad():
            return self.head(self._features(rows)).cpu()  # type: ignore[no-any-return]

    def features(self, rows: Rows) -> Tensor:
        """Return features `[rows, width]` without gradients."""
        return self._features(rows).cpu()

    @torch.no_grad()
    def _features(self, rows: Rows) -> Tensor:
        prepared = self.encoder.prepared(rows)
        found = torch.empty(len(rows), self.encoder.width, device=self.device)
        for places in self.encoder.divided(prepared):
            made = self.encoder.features(self.encoder.gathered(prepared, places)).float()
            found[torch.from_numpy(places).to(self.device)] = made
        return found

    def parameters(self) -> list[nn.Parameter]:
        """Return every weight of encoder and head."""
        return [*self.encoder.module.parameters(), *self.head.parameters()]

    def state(self) -> dict[str, Tensor]:
        """Return every weight and buffer by name, shared with the classifier."""
        parts = {"encoder": self.encoder.module, "head": self.head}
        return {
            f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()
        }

    def copied(self) -> "Classifier":
        """Return a classifier with weights of its own."""
        head = nn.Linear(self.head.in_features, self.head.out_features, device=self.device)
        head.load_state_dict(self.head.state_dict())
        return Classifier(self.encoder.copied(), head, fresh=self.fresh)

    def evaluating(self) -> "Classifier":
        """Freeze all weights, switch dropout off, and return the classifier itself."""
        for module in (self.encoder.module, self.head):
            module.eval().requires_grad_(False)
        return self

    def training(self, *, dropout: bool) -> "Classifier":
        """Let all weights train, with or without dropout, and return the classifier itself."""
        for module in (self.encoder.module, self.head):
            module.train(dropout).requires_grad_(True)
        return self

    def save(self, path: Path) -> None:
        """Write the weights as a safetensors file, aside and renamed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        save_file({name: value.contiguous() for name, value in self.state().items()}, aside)
        aside.replace(path)

    def load(self, path: Path) -> "Classifier":
        """Take the weights of a saved classifier of the same shape. Raises ModelError."""
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: cannot be read as a saved classifier ({error})") from error
        own = self.state()
        wrong = sorted(name for name in {*own, *found} if _shape(own, name) != _shape(found, name))
        if wrong:
            raise ModelError(f"{path}: holds another classifier ({wrong[0]} differs); remove it to train anew")
        for name, value in own.items():
            value.copy_(found[name])
        return self


def _shape(state: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


def text_classifier(model: ModelConfig, *, classes: int, max_length: int = 64, seed: int = 0) -> Classifier:
    """Return a classifier of texts over a pre-trained encoder, with a random head. Raises ModelError."""

    def fresh(seed: int) -> Classifier:
        encoder = TextEncoder(load_base(model, causal=False), max_length=max_length)
        return Classifier(encoder, _head(encoder, classes, seed=seed), fresh=fresh)

    return fresh(seed)


def image_classifier(shape: VitConfig, *, classes: int, seed: int = 0) -> Classifier:
    """Return a classifier of images, all of it random. Raises ConfigError for an impossible shape."""

    def fresh(seed: int) -> Classifier:
        encoder = ImageEncoder.drawn(shape, seed=seed)
        return Classifier(encoder, _head(encoder, classes, seed=seed), fresh=fresh)

    return fresh(seed)


def _head(encoder: Encoder, classes: int, *, seed: int) -> nn.Linear:
    width = encoder.width
    head = nn.Linear(width, classes)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.uniform_(-(width**-0.5), width**-0.5, generator=source)
        head.bias.zero_()
    return head.to(next(encoder.module.parameters()).device)


def recycled(count: int, size: int, *, rng: np.random.Generator) -> Iterator[Ids]:
    """Yield batches of shuffled rows for ever, shuffled anew after every pass; the last of a pass may be smaller."""
    while True:
        order = rng.permutation(count)
        for begin in range(0, count, size):
            yield order[begin : begin + size]


def passes(count: int, size: int) -> int:
    """Return how many batches one pass takes."""
    return -(-count // size)


def fit(classifier: Classifier, rows: Rows, config: FitConfig, *, seed: int, steps: int | None = None) -> int:
    """Train all weights in place, with dropout, and return the number of steps.

    `steps` cuts or stretches the training to so many. Torch's generator is left as it was.
    """
    rows = classifier.encoder.prepared(rows)
    total = steps or config.epochs * passes(len(rows), config.batch)
    groups = [
        {"params": list(classifier.encoder.module.parameters()), "lr": config.rate},
        {"params": list(classifier.head.parameters()), "lr": config.head_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _triangle(step, total))
    drawn = recycled(len(rows), config.batch, rng=np.random.default_rng(seed))
    classifier.training(dropout=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(total):
            batch = gathered(classifier, rows, next(drawn))
            _, logits = classifier.answer(batch.inputs)
            step(optimizer, F.cross_entropy(logits, batch.labels))
            schedule.step()
    classifier.evaluating()
    return total


@dataclass(frozen=True)
class Gathered:
    """Some rows as one input: their places in the whole, the encoder's input, and class indices `[rows]`."""

    places: Ids
    inputs: Any
    labels: Tensor


def gathered(classifier: Classifier, rows: Rows, places: Ids) -> Gathered:
    """Return some of the prepared rows as one input."""
    inputs = classifier.encoder.gathered(rows, places)
    return Gathered(places, inputs, torch.from_numpy(labels_of(rows)[places]).to(classifier.device))


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take one optimizer step down the loss."""
    optimizer.zero_grad()
    torch.autograd.backward([loss])
    optimizer.step()


def cosine(step: int, total: int, *, floor: float = 1e-3) -> float:
    """Return the share of the rate at a step that falls along a cosine to `floor`."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / max(1, total)))


def _triangle(step: int, total: int) -> float:
    rise = max(1, total // 10)
    return min((step + 1) / rise, max(0.0, (total - step) / max(1, total - rise)))
