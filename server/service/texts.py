"""Texts through an encoder, every row by its own user's adapter: class probabilities and embeddings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora.errors import LetheError, ModelError
from lora.model import Blocks
from lora.overlay import Overlaying
from server.service.answers import BASE, Provenance
from server.service.lent import Desk, Lent
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
    """Answers texts in batches of like length; slots are lent once for all of them.

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
        self._desk = Desk(warm.turned, dtype=learner.base.placement.dtype)

    @torch.no_grad()
    def __call__(self, asked: Sequence[TextAsked]) -> list[TextAnswer | LetheError]:
        """Return an answer for every text, or why there is none."""
        tokens = self._tokens([each.text for each in asked])
        order = [*buckets(tokens.lengths, overhead=float(self.learner.overhead), budget=self.learner.room.tokens)]
        places = [int(place) for group in order for place in group]
        found: list[TextAnswer | LetheError] = [ModelError("the text was not answered")] * len(asked)
        start = 0
        with self.warm.lent([asked[place].adapter for place in places]) as lent:
            for group in order:
                own = lent.part(slice(start, start + len(group)))
                batch = collate([(tokens, int(place)) for place in group], pad=self.learner.pad)
                answers = self._answers(batch, own, [asked[place] for place in group])
                for place, version, answer in zip(group, own.versions, answers, strict=True):
                    found[place] = version if isinstance(version, LetheError) else answer.of(asked[place], version)
                start += len(group)
        return found

    def _tokens(self, texts: Sequence[str]) -> Tokens:
        blank = Examples(tuple(texts), (0,) * len(texts))
        return tokenize_classification(blank, self.learner.base.tokenizer, max_length=self.task.max_length)

    def _answers(self, batch: Batch, slots: Lent, asked: Sequence[TextAsked]) -> "list[_Values]":
        batch = batch.to(self.learner.device)
        gated = None if self.gates is None else self.gates(batch)
        mixed = [_NOTHING] * len(asked) if gated is None else gated.mixed()
        alone = len({each.adapter for each in asked}) == 1
        blocks = self._desk.blocks(slots, alone=alone)
        logits, features = self._pass(batch, blocks, overlay=None if gated is None else gated.overlay)
        shares, vectors = torch.softmax(logits, dim=1).tolist(), (features / TEMPERATURE**0.5).tolist()
        rows = zip(asked, shares, vectors, mixed, strict=True)
        return [_Values(share if each.kind == "classify" else vector, more) for each, share, vector, more in rows]

    def _pass(self, batch: Batch, blocks: Blocks, *, overlay: Overlaying | None) -> tuple[Tensor, Tensor]:
        """Return logits and features of one padded batch, with a slot a row, or one for all of them."""
        with self.learner.adapted.bound(blocks, overlay=overlay) as model:
            states = model(input_ids=batch.input_ids, attention_mask=batch.mask).last_hidden_state
        features = pool(states, batch, self.task.pooling)
        weight, bias = blocks.get(("head", "weight")), blocks.get(("head", "bias"))
        return self.task.head.logits(features, weight=weight, bias=bias, sink=None), features


_NOTHING: Mapping[str, float] = {}
