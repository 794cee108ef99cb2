"""The learner: base model, adapter, head and task as one thing that is trained and scored."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lora.codec import Entry, Layout, Part
from lora.config import AdapterConfig
from lora.errors import ModelError
from lora.gradients import ExampleGradients, GradientSink
from lora.model import AdaptedModel
from lora.overlay import Overlaying
from tasks.config import ModelConfig, TaskConfig
from tasks.device import Room, free_bytes
from tasks.examples import Examples
from tasks.heads import Head, Pooling, pool, random_weight, unit
from tasks.memory import Memory, memory_of
from tasks.metrics import Scores, macro_f1
from tasks.models import BaseModel, load_base
from tasks.parallel import even_budget, spread, workers
from tasks.tokens import IGNORED, Batch, Tokens, buckets, collate, tokenize_causal, tokenize_classification

Blocks = Mapping[tuple[Part, str], Tensor]

OVERHEAD_FLOP = 2.5e8
"""What starting a batch costs on a CPU, in floating-point operations it could have done meanwhile (measured)."""
GPU_OVERHEAD_FLOP = 1e12
"""The same on a GPU: some thousand kernels of 10 us each, at 1e14 operations a second (estimated, not measured)."""


@dataclass(frozen=True)
class Answers:
    """Of every row: loss `[rows]`, right answers `[rows]`, and how many were asked `[rows]`; guesses where classes."""

    loss: Tensor
    right: Tensor
    asked: Tensor
    guess: Tensor | None = None


class Task(Protocol):
    """What is learned on top of token states."""

    def entries(self) -> tuple[Entry, ...]:
        """Layout entries that the task trains beside the factors."""

    def start(self) -> dict[tuple[Part, str], Tensor]:
        """Starting values of those entries."""

    def tokenize(self, examples: Examples) -> Tokens:
        """Turn examples into token ids."""

    def answer(self, base: torch.nn.Module, batch: Batch, blocks: Blocks, sink: GradientSink | None) -> Answers:
        """Run the bound base model on a batch."""


@dataclass(frozen=True)
class Classification:
    """Text classification: pooled token states through a linear head, cross entropy."""

    base: BaseModel
    head: Head
    pooling: Pooling
    max_length: int

    def entries(self) -> tuple[Entry, ...]:
        """Return the trained head's entries, if any."""
        return self.head.entries()

    def start(self) -> dict[tuple[Part, str], Tensor]:
        """Return the head as it starts."""
        return {("head", "weight"): self.head.weight, ("head", "bias"): self.head.bias}

    def tokenize(self, examples: Examples) -> Tokens:
        """Tokenize texts and labels."""
        return tokenize_classification(examples, self.base.tokenizer, max_length=self.max_length)

    def answer(self, base: torch.nn.Module, batch: Batch, blocks: Blocks, sink: GradientSink | None) -> Answers:
        """Classify the rows."""
        states = base(input_ids=batch.input_ids, attention_mask=batch.mask).last_hidden_state
        weight, bias = blocks.get(("head", "weight")), blocks.get(("head", "bias"))
        logits = self.head.logits(pool(states, batch, self.pooling), weight=weight, bias=bias, sink=sink)
        guess = logits.detach().argmax(1)
        loss = F.cross_entropy(logits, batch.labels, reduction="none")
        return Answers(loss, (guess == batch.labels).long(), torch.ones_like(guess), guess)


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction; an example's loss is the mean over its own learned tokens.

    The mean is per example, never over the batch: a batch mean would let one example's length rescale every other
    gradient before clipping, and the sensitivity would no longer be the clip bound.
    """

    base: BaseModel
    max_length: int

    def entries(self) -> tuple[Entry, ...]:
        """Return nothing: the language-modelling head stays the base model's."""
        return ()

    def start(self) -> dict[tuple[Part, str], Tensor]:
        """Return nothing."""
        return {}

    def tokenize(self, examples: Examples) -> Tokens:
        """Tokenize prompts and texts."""
        return tokenize_causal(examples, self.base.tokenizer, max_length=self.max_length)

    def answer(self, base: torch.nn.Module, batch: Batch, blocks: Blocks, sink: GradientSink | None) -> Answers:
        """Predict every learned token; padding stands on the right, where causal attention never looks back at it."""
        logits = base(input_ids=batch.input_ids, use_cache=False).logits.float()
        # The labels move one place to the left, not the logits: a slice of those would be copied.
        wanted = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=IGNORED)
        learned = wanted != IGNORED
        asked = learned.sum(1)
        right = ((logits.detach().argmax(2) == wanted) & learned).sum(1)
        return Answers(losses.view(wanted.shape).sum(1) / asked.clamp(min=1), right, asked)


class Learner:
    """Base, adapter and task; trains and answers for any number of flat vectors at once."""

    def __init__(
        self, base: BaseModel, adapted: AdaptedModel, task: Task, *, trains_frame: bool, labels: Sequence[str] = ()
    ) -> None:
        self.base, self.adapted, self.task, self.labels = base, adapted, task, tuple(labels)
        factors = (*adapted.entries("A"), *adapted.entries("B")) if trains_frame else adapted.entries("B")
        self.layout = Layout((*factors, *task.entries()))
        self.device = next(base.model.parameters()).device
        on_cpu = self.device.type == "cpu"
        self.overhead = (OVERHEAD_FLOP if on_cpu else GPU_OVERHEAD_FLOP) / base.parameters
        free = free_bytes(self.device)
        self.room = Room() if free is None else Room.within(free, token=self.memory.token, row=self.memory.row)
        self.pad = int(base.tokenizer.pad_token_id)

    @property
    def memory(self) -> Memory:
        """What the model and its passes take, by arithmetic."""
        return memory_of(self.adapted, self.layout, causal=self.base.causal, recomputed=self.adapted.recomputes)

    @property
    def workers(self) -> int:
        """How many passes run side by side: as many as cores are given, one on a GPU."""
        return workers() if self.device.type == "cpu" else 1

    @property
    def signature(self) -> str:
        """Fingerprint of what two sides must agree on beside the frame: the layout and the order of the labels."""
        return hashlib.sha256(json.dumps([self.layout.digest, *self.labels]).encode()).hexdigest()

    def start(self) -> Tensor:
        """Return the vector `[size]` at round zero: A the frame (where it trains), B zero, the head as it starts."""
        flat = torch.zeros(self.layout.size)
        own = self.task.start()
        for (part, name), view in self.layout.views(flat).items():
            if part == "A":
                view.copy_(self.adapted.frame.matrices[name])
            elif part == "head":
                view.copy_(own[part, name])
        return flat

    def example_gradients(self, parts: Collection[Part]) -> ExampleGradients:
        """Return an empty sink that keeps every example's gradient of some parts apart."""
        return ExampleGradients(self.layout, parts)

    def peft_blocks(self, values: Tensor) -> Blocks:
        """Return the factors that leave as a PEFT directory."""
        return self.layout.views(values)

    def files(self, values: Tensor) -> dict[str, bytes]:
        """Return the files that leave beside them, by name."""
        return {}

    def answers(
        self, values: Tensor, batch: Batch, *, sink: GradientSink | None = None, overlay: Overlaying | None = None
    ) -> Answers:
        """Answer a batch with one vector `[size]`, or with one for each group of rows, `[groups, size]`.

        Both move to the base's device, where the answers stay. An overlay adds slots with frames of their own to rows.
        """
        batch, blocks = batch.to(self.device), self.layout.views(values.to(self.device))
        with self.adapted.bound(blocks, sink=sink, overlay=overlay) as model:
            return self.task.answer(model, batch, blocks, sink)

    def batches(self, rows: Sequence[tuple[Tokens, int]], *, group: int = 1) -> list[tuple[NDArray[np.int64], Batch]]:
        """Divide groups of `group` neighbouring rows into batches of like length; returns group indices, ascending.

        A batch holds the rows of its groups one group after the other, and at most `room.tokens`; fewer where that
        gives every core as much to do.
        """
        lengths = np.fromiter((len(tokens.ids[row]) for tokens, row in rows), dtype=np.int64, count=len(rows))
        longest = lengths.reshape(-1, group).max(1) + self.room.row
        total, least = int(longest.sum()) * group, int(self.overhead)
        budget = even_budget(total, most=self.room.tokens, least=least, count=self.workers)
        found = buckets(longest, overhead=self.overhead / group, budget=max(budget // group, 1))
        return [(places, self._collate(rows, places, group)) for places in map(np.sort, found)]

    def _collate(self, rows: Sequence[tuple[Tokens, int]], places: NDArray[np.int64], group: int) -> Batch:
        chosen = [rows[place * group + offset] for place in places for offset in range(group)]
        return collate(chosen, pad=self.pad)

    def score(self, values: Tensor, tokens: Tokens) -> Scores:
        """Score one vector on a split. Raises ModelError for an empty split."""
        if len(tokens) == 0:
            raise ModelError("nothing to score: the split is empty")
        loss = np.zeros(len(tokens))
        right, asked, guess = (np.zeros(len(tokens), dtype=np.int64) for _ in range(3))
        batches = self.batches([(tokens, row) for row in range(len(tokens))])
        values = values.to(self.device)

        @torch.no_grad()
        def answer(share: list[int]) -> None:
            for rows, batch in (batches[index] for index in share):
                answers = self.answers(values, batch)
                found = (answers.loss, answers.right, answers.asked)
                loss[rows], right[rows], asked[rows] = (each.cpu().numpy() for each in found)
                if answers.guess is not None:
                    guess[rows] = answers.guess.cpu().numpy()

        spread(answer, [float(batch.input_ids.numel()) for _, batch in batches], count=self.workers)
        f1 = None if tokens.labels is None else macro_f1(tokens.labels, guess)
        return Scores(float(loss.mean()), float(right.sum() / max(asked.sum(), 1)), len(tokens), f1)


def build_learner(
    model: ModelConfig, task: TaskConfig, adapter: AdapterConfig, *, labels: Sequence[str], trains_frame: bool
) -> Learner:
    """Load the base model, attach the adapter and make the task; equal on every machine by construction."""
    causal = task.kind == "causal-lm"
    base = load_base(model, causal=causal)
    max_length = min(task.max_length, base.positions or task.max_length)
    made: Task = CausalLM(base, max_length)
    if not causal:
        pooling = _pooling(task, base)
        made = Classification(base, _head(task, base, labels, pooling, seed=adapter.frame_seed), pooling, max_length)
    adapted = AdaptedModel.attach(base.model, adapter)
    if model.gradient_checkpointing:
        adapted.recompute_blocks()
    return Learner(base, adapted, made, trains_frame=trains_frame, labels=labels)


def _pooling(task: TaskConfig, base: BaseModel) -> Pooling:
    if task.pooling != "auto":
        return task.pooling
    return "last" if getattr(base.model.config, "model_type", "") in _DECODERS else "mean"


_DECODERS = {"llama", "qwen2", "qwen3", "gpt2", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "gpt_neox", "opt"}


def _head(task: TaskConfig, base: BaseModel, labels: Sequence[str], pooling: Pooling, *, seed: int) -> Head:
    trained = task.head == "trained"
    if task.head == "none" or task.head_init == "labels":
        weight = _label_embeddings(base, labels, pooling)
    else:
        weight = random_weight(len(labels), base.width, seed=seed)
    return Head(weight, torch.zeros(len(labels)), trained)


@torch.no_grad()
def _label_embeddings(base: BaseModel, labels: Sequence[str], pooling: Pooling) -> Tensor:
    """Embed the label names with the base model: class vectors that need no data, less their common mean."""
    texts = tuple(label.replace("_", " ").replace("-", " ") for label in labels)
    tokens = tokenize_classification(Examples(texts, tuple(range(len(texts)))), base.tokenizer, max_length=32)
    batch = collate([(tokens, row) for row in range(len(tokens))], pad=int(base.tokenizer.pad_token_id))
    batch = batch.to(base.placement.device)
    base.model.eval()
    states = base.model(input_ids=batch.input_ids, attention_mask=batch.mask).last_hidden_state
    vectors = pool(states, batch, pooling).cpu()
    if len(labels) > 1:
        vectors = vectors - vectors.mean(0)
    return unit(vectors)
