"""Texts through an encoder, every row by its own user's adapter: class probabilities and embeddings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora.errors import LetheError, ModelError
from lora.overlay import Overlaying
from server.service.answers import BASE, Provenance
from server.service.warm import WarmSlots
from tasks.examples import Examples
from tasks.heads import TEMPERATURE, pool
from tasks.learner import Classification, Learner
from tasks.tokens import Batch, Tokens, buckets, collate, tokenize_classification

Kind = Literal["classify", "embed"]


@dataclass(frozen=True)
class Gated:
    """What forget requests add to the rows of a batch, and the weight of each by its name, `weights [rows, names]`."""

    overlay: Overlaying | None
    names: tuple[str, ...]
    weights: Tensor

    def mixed(self) -> list[dict[str, float]]:
        """Return for every row the requests whose slots were mixed in."""
        rows = self.weights.tolist()
        return [{name: weight for name, weight in zip(self.names, row, strict=True) if weight} for row in rows]


Gates = Callable[[Batch], Gated]
"""Says what forget requests add to a batch."""


@dataclass(frozen=True)
class TextAsked:
    """A text for one adapter (None: the base model)."""

    adapter: str | None
    text: str
    kind: Kind = "classify"
    reason: str = BASE
    """Why the base model is asked, where it is."""


@dataclass(frozen=True)
class TextAnswer:
    """Class probabilities in the order of the labels, or a vector of length 1."""

    values: tuple[float, ...]
    provenance: Provenance


@dataclass(frozen=True)
class _Values:
    numbers: Sequence[float]
    mixed: Mapping[str, float]

    def of(self, asked: TextAsked, version: int) -> TextAnswer:
        own = Provenance.of(asked.adapter, version, reason=asked.reason)
        return TextAnswer(tuple(self.numbers), own.beside(self.mixed))


class Texts:
    """Answers texts in batches of like length; slots are gathered once a batch into a buffer that is kept.

    The slots hold B of every site, and A or the head where the learner's layout has them. Raises ModelError for a
    learner that is no classifier, or slots of another layout. `blank` answers where no adapter is asked for.
    """

    def __init__(
        self, learner: Learner, warm: WarmSlots, *, rows: int = 32, gates: Gates | None = None,
        blank: Tensor | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(learner.task, Classification):
            raise ModelError("task.kind=causal-lm: texts are classified and embedded by an encoder; set classification")
        if warm.layout.digest != learner.layout.digest:
            raise ModelError("the slots have another layout than the model; make them for this model")
        self.learner, self.task, self.warm, self.gates = learner, learner.task, warm, gates
        self.labels = learner.labels
        warm.answer_blank(learner.start() if blank is None else blank)
        self._kept = warm.buffer(rows)

    @torch.no_grad()
    def __call__(self, asked: Sequence[TextAsked]) -> list[TextAnswer | LetheError]:
        """Return an answer for every text, or why there is none."""
        tokens = self._tokens([each.text for each in asked])
        order = [*buckets(tokens.lengths, overhead=float(self.learner.overhead), budget=self.learner.room.tokens)]
        places = [int(place) for group in order for place in group]
        buffer = self._buffer(len(places))
        versions = self.warm.gather([asked[place].adapter for place in places], buffer)
        found: list[TextAnswer | LetheError] = [ModelError("the text was not answered")] * len(asked)
        start = 0
        for group in order:
            own = slice(start, start + len(group))
            batch = collate([(tokens, int(place)) for place in group], pad=self.learner.pad)
            alone = len({asked[place].adapter for place in group}) == 1
            answers = self._answers(batch, buffer[own], [asked[place] for place in group], alone=alone)
            for place, version, answer in zip(group, versions[own], answers, strict=True):
                found[place] = version if isinstance(version, LetheError) else answer.of(asked[place], version)
            start += len(group)
        return found

    def _tokens(self, texts: Sequence[str]) -> Tokens:
        blank = Examples(tuple(texts), (0,) * len(texts))
        return tokenize_classification(blank, self.learner.base.tokenizer, max_length=self.task.max_length)

    def _buffer(self, rows: int) -> Tensor:
        if rows > len(self._kept):
            self._kept = self.warm.buffer(rows)
        return self._kept

    def _answers(self, batch: Batch, slots: Tensor, asked: Sequence[TextAsked], *, alone: bool) -> "list[_Values]":
        batch = batch.to(self.learner.device)
        gated = None if self.gates is None else self.gates(batch)
        mixed = [_NOTHING] * len(asked) if gated is None else gated.mixed()
        logits, features = self._pass(batch, slots, alone=alone, overlay=None if gated is None else gated.overlay)
        shares, vectors = torch.softmax(logits, dim=1).tolist(), (features / TEMPERATURE**0.5).tolist()
        rows = zip(asked, shares, vectors, mixed, strict=True)
        return [_Values(share if each.kind == "classify" else vector, more) for each, share, vector, more in rows]

    def _pass(self, batch: Batch, slots: Tensor, *, alone: bool, overlay: Overlaying | None) -> tuple[Tensor, Tensor]:
        """Return logits and features of one padded batch, with a slot a row, or one for all of them."""
        blocks = self.warm.turned.views(slots[0] if alone else slots)
        with self.learner.adapted.bound(blocks, overlay=overlay) as model:
            states = model(input_ids=batch.input_ids, attention_mask=batch.mask).last_hidden_state
        features = pool(states, batch, self.task.pooling)
        weight, bias = blocks.get(("head", "weight")), blocks.get(("head", "bias"))
        return self.task.head.logits(features, weight=weight, bias=bias, sink=None), features


_NOTHING: Mapping[str, float] = {}
