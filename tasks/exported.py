"""An exported classifier read back: the files of an adapter and its head, put over the base model again."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lora.errors import ModelError
from lora.frame import Frame
from lora.peft_files import ImportedAdapter, import_adapter
from tasks.heads import Head, Pooling
from tasks.learner import Classification, Learner
from tasks.models import BaseModel

HEAD, CARD = "head.safetensors", "lethe.json"
_POOLINGS: tuple[Pooling, ...] = ("mean", "first", "last")


@dataclass(frozen=True)
class ExportedClassifier:
    """Factors A `[r, d_in]` and B `[d_out, r]` by module path, the head, and how it reads token states."""

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    alpha: float
    weight: Tensor
    bias: Tensor
    labels: tuple[str, ...]
    pooling: Pooling
    max_length: int

    @classmethod
    def read(cls, directory: Path, *, max_length: int) -> "ExportedClassifier":
        """Read what `server.export` wrote. Raises ModelError for anything else, and for a language model's adapter."""
        imported = import_adapter(directory)
        card = _card(directory)
        labels = tuple(str(label) for label in card.get("labels") or ())
        weight, bias = _head(directory, classes=len(labels))
        pooling = next((each for each in _POOLINGS if each == card.get("pooling")), None)
        if pooling is None:
            raise ModelError(f"{directory / CARD}: pooling={card.get('pooling')}; one of {', '.join(_POOLINGS)}")
        return cls(imported.frame.matrices, imported.b, imported.alpha, weight, bias, labels, pooling, max_length)

    @property
    def rank(self) -> int:
        """Rank of all factors."""
        return next(iter(self.a.values())).shape[0]

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.alpha / self.rank

    def over(self, base: BaseModel) -> tuple[Learner, Tensor]:
        """Put the classifier over its base model; returns the learner and its vector `[learner.layout.size]`.

        Raises ModelError for a base that it does not fit.
        """
        adapted, blocks = ImportedAdapter(Frame(self.a, self.rank), self.b, self.alpha).attach(base.model)
        if self.weight.shape != (len(self.labels), base.width):
            raise ModelError(
                f"the head has shape {tuple(self.weight.shape)}, and {len(self.labels)} labels over a base of width "
                f"{base.width} need {(len(self.labels), base.width)}; export the adapter again"
            )
        length = min(self.max_length, base.positions or self.max_length)
        task = Classification(base, Head(self.weight, self.bias, True), self.pooling, length)
        learner = Learner(base, adapted, task, trains_frame=False, labels=self.labels)
        values = torch.zeros(learner.layout.size)
        own = {**blocks, ("head", "weight"): self.weight, ("head", "bias"): self.bias}
        for key, view in learner.layout.views(values).items():
            view.copy_(own[key])
        return learner, values


def _card(directory: Path) -> dict[str, Any]:
    try:
        card = json.loads((directory / CARD).read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory}: no {CARD} that can be read ({error}); export the adapter again") from error
    if not isinstance(card, dict) or not card.get("labels"):
        raise ModelError(f"{directory / CARD}: names no labels; only classifiers forget by request so far")
    return card


def _head(directory: Path, *, classes: int) -> tuple[Tensor, Tensor]:
    try:
        head = load_file(directory / HEAD)
        weight, bias = head["weight"].float(), head["bias"].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(f"{directory}: no {HEAD} that can be read ({error}); export the adapter again") from error
    if len(weight) != classes or bias.shape != (classes,):
        raise ModelError(f"{directory / HEAD}: has {len(weight)} rows for {classes} labels; export the adapter again")
    return weight, bias
