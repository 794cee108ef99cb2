"""Encoders: rows of one kind, texts or images, as one feature vector each."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from lora.errors import DataError
from tasks.device import CPU_TOKENS, MOST_TOKENS
from tasks.examples import Examples
from tasks.heads import Pooling, pool
from tasks.images import Images
from tasks.models import BaseModel
from tasks.tokens import Batch, Ids, Tokens, buckets, collate, tokenize_classification
from tasks.vision import VitConfig, build_vit

IMAGES_A_PASS = 256
PASS_OVERHEAD = 30.0
"""Tokens that a pass costs beside its own."""


class Rows(Protocol):
    """Examples of one kind in memory, with their class indices: `Tokens`, `Images`, `Examples`."""

    @property
    def labels(self) -> Sequence[int] | Ids | None:
        """Class index of every row."""

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int] | Ids) -> Self:
        """Return the given rows."""


def labels_of(rows: Rows) -> Ids:
    """Return the class index of every row, `[n]`. Raises DataError for rows without labels."""
    if rows.labels is None:
        raise DataError("these rows have no labels; classes can be forgotten, and measured, only by label")
    return np.asarray(rows.labels, dtype=np.int64)


class Encoder(Protocol):
    """A model that makes features `[rows, width]`."""

    @property
    def module(self) -> nn.Module:
        """The model whose weights are trained or adapted."""

    @property
    def width(self) -> int:
        """Width of a feature."""

    def prepared(self, rows: Rows) -> Rows:
        """Return rows in the form that is gathered from fastest. Raises DataError for rows of another kind."""

    def divided(self, rows: Rows) -> list[Ids]:
        """Divide prepared rows into passes without gradients."""

    def gathered(self, rows: Rows, places: Ids) -> Any:
        """Return some of the prepared rows as one input."""

    def features(self, inputs: Any) -> Tensor:
        """Return the features of one input; gradients flow."""

    def copied(self) -> "Encoder":
        """Return an encoder with weights of its own."""


@dataclass(frozen=True)
class TextEncoder:
    """Token states of a language model, pooled to length sqrt(TEMPERATURE) as `tasks.heads.pool` does."""

    base: BaseModel
    pooling: Pooling = "mean"
    max_length: int = 64

    @property
    def module(self) -> nn.Module:
        """The language model."""
        return self.base.model

    @property
    def width(self) -> int:
        """Width of a token state."""
        return self.base.width

    def prepared(self, rows: Rows) -> Tokens:
        """Tokenize texts; tokens stay as they are."""
        if isinstance(rows, Examples):
            return tokenize_classification(rows, self.base.tokenizer, max_length=self.max_length)
        if isinstance(rows, Tokens):
            return rows
        raise DataError(f"a text encoder was given {type(rows).__name__}; give Examples or Tokens")

    def divided(self, rows: Rows) -> list[Ids]:
        """Divide tokens into passes of like length."""
        budget = CPU_TOKENS if self._on_cpu else MOST_TOKENS
        return buckets(self.prepared(rows).lengths, overhead=PASS_OVERHEAD, budget=budget)

    @property
    def _on_cpu(self) -> bool:
        return self.base.placement.device.type == "cpu"

    def gathered(self, rows: Rows, places: Ids) -> Batch:
        """Pad some rows to the longest of them."""
        tokens = self.prepared(rows)
        batch = collate([(tokens, int(place)) for place in places], pad=int(self.base.tokenizer.pad_token_id))
        return batch.to(self.base.placement.device)

    def features(self, inputs: Any) -> Tensor:
        """Encode and pool, rows of like length together: half of a mixed batch of queries would be padding.

        On a GPU all at once: there a pass costs more than padding does.
        """
        mask = inputs.mask
        parts: list[Ids] = []
        if mask is not None and self._on_cpu:
            parts = buckets(mask.sum(1).numpy(), overhead=PASS_OVERHEAD, budget=CPU_TOKENS)
        if mask is None or len(parts) < 2:
            states = self.base.model(input_ids=inputs.input_ids, attention_mask=mask).last_hidden_state
            return pool(states, inputs, self.pooling)
        # Looked up once: where the embeddings train, every look-up's gradient is as large as all of them.
        model: Any = self.base.model
        embedded = model.get_input_embeddings()(inputs.input_ids)
        found = []
        for places in parts:
            rows = torch.from_numpy(places).to(mask.device)
            part = _cut(inputs, mask, rows)
            states = model(
                inputs_embeds=embedded[rows, : part.input_ids.shape[1]], attention_mask=part.mask
            ).last_hidden_state
            found.append(pool(states, part, self.pooling))
        return torch.cat(found)[torch.from_numpy(np.argsort(np.concatenate(parts))).to(mask.device)]

    def copied(self) -> "TextEncoder":
        """Return an encoder with weights of its own; the tokenizer is shared."""
        return replace(self, base=replace(self.base, model=copy.deepcopy(self.base.model)))


def _cut(inputs: Batch, mask: Tensor, rows: Tensor) -> Batch:
    """Return some rows of a batch that is padded on the right, no longer than the longest of them."""
    longest = int(mask[rows].sum(1).max())
    return Batch(inputs.input_ids[rows, :longest], mask[rows, :longest], inputs.labels[rows])


@dataclass(frozen=True)
class ImageEncoder:
    """The class token of a vision transformer after its last norm; pixels are scaled to [-1, 1]."""

    model: nn.Module
    shape: VitConfig

    @classmethod
    def drawn(cls, shape: VitConfig, *, seed: int) -> "ImageEncoder":
        """Return an encoder with random weights."""
        return cls(build_vit(shape, seed=seed), shape)

    @property
    def module(self) -> nn.Module:
        """The vision transformer."""
        return self.model

    @property
    def width(self) -> int:
        """Width of a token state."""
        return self.shape.width

    def prepared(self, rows: Rows) -> Images:
        """Check the shape of the images; they stay as they are."""
        if not isinstance(rows, Images):
            raise DataError(f"an image encoder was given {type(rows).__name__}; give Images")
        expected = (self.shape.channels, self.shape.side, self.shape.side)
        if rows.pixels.shape[1:] != expected:
            raise DataError(f"images of shape {list(rows.pixels.shape[1:])}, but the model takes {list(expected)}")
        return rows

    def divided(self, rows: Rows) -> list[Ids]:
        """Divide images in their order."""
        return [np.arange(len(rows))[i : i + IMAGES_A_PASS] for i in range(0, len(rows), IMAGES_A_PASS)]

    def gathered(self, rows: Rows, places: Ids) -> Tensor:
        """Return pixels `[rows, channels, side, side]`, float32."""
        pixels = torch.from_numpy(self.prepared(rows).pixels[places])
        return pixels.to(next(self.model.parameters()).device).float() / 127.5 - 1

    def features(self, inputs: Any) -> Tensor:
        """Encode and take the class token."""
        states: Tensor = self.model(pixel_values=inputs).last_hidden_state
        return states[:, 0]

    def copied(self) -> "ImageEncoder":
        """Return an encoder with weights of its own."""
        return replace(self, model=copy.deepcopy(self.model))
