"""MiniLM that has learned CLINC150's intents by FFA-LoRA, and questions to it, through slots of requests or not."""

import gzip
import json
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.measure import seconds
from client.config import TrainingConfig
from client.training import Work, train
from lora.bank import Bank
from lora.config import AdapterConfig
from lora.gate import Gate
from lora.overlay import Overlay, Overlaying
from strategies.unlearning.encoder import SharedEncoder
from tasks.config import ModelConfig, TaskConfig
from tasks.examples import Examples
from tasks.heads import pool
from tasks.learner import Learner, build_learner
from tasks.tokens import Tokens

SEEN = 300
"""Most training queries of a request that are asked."""
DOMAINS = ("work", "travel", "home", "banking")


@dataclass(frozen=True)
class Corpus:
    """Queries with intents as numbers, and what is asked to be forgotten."""

    train: Examples
    asked: Examples
    strange: Examples
    """Out-of-scope queries."""
    names: tuple[str, ...]
    sequence: tuple[tuple[int, ...], ...]

    @classmethod
    def read(cls, folder: Path, *, requests: int, on: str) -> "Corpus":
        """Read CLINC150; single intents follow the domains in an order that is always the same."""
        with gzip.open(folder / "data_full.json.gz") as file:
            data = json.load(file)
        with gzip.open(folder / "domains.json.gz") as file:
            domains = json.load(file)
        names = tuple(sorted({intent for _, intent in data["train"]}))
        number = {name: place for place, name in enumerate(names)}
        whole = [tuple(sorted(number[intent] for intent in domains[domain])) for domain in DOMAINS]
        rest = sorted(set(range(len(names))) - {label for each in whole for label in each})
        single = [(int(label),) for label in np.random.default_rng(0).permutation(rest)]
        part = "val" if on == "validation" else on

        def examples(rows: Sequence[Sequence[str]]) -> Examples:
            return Examples(tuple(row[0] for row in rows), tuple(number.get(row[1], 0) for row in rows))

        strange = examples(data[f"oos_{part}"])
        return cls(examples(data["train"]), examples(data[part]), strange, names, (*whole, *single)[:requests])

    def rows(self, labels: Sequence[int], *, part: str = "train") -> NDArray[np.int64]:
        """Return the rows of some intents."""
        return np.flatnonzero(np.isin(getattr(self, part).labels, labels))


@dataclass
class World:
    """The model before any request, and the features of everything that is asked."""

    corpus: Corpus
    learner: Learner
    model: Tensor
    encoder: SharedEncoder
    seed: int
    pretraining_s: float
    _seen: dict[tuple[int, ...], "Questions"] = field(default_factory=dict, init=False, repr=False)

    @property
    def device(self) -> str:
        """What the model computes on, as `--device` says it."""
        return str(self.learner.device)

    @cached_property
    def asked(self) -> "Questions":
        """Asked queries of all intents."""
        return Questions.of(self, self.learner.task.tokenize(self.corpus.asked))

    @cached_property
    def strange(self) -> "Questions":
        """Out-of-scope queries."""
        return Questions.of(self, self.learner.task.tokenize(self.corpus.strange))

    def seeded(self, seed: int) -> "World":
        """Return the same model and questions for another seed of everything that forgetting draws."""
        other = copy(self)
        other.seed = seed
        return other

    def seen(self, labels: tuple[int, ...]) -> "Questions":
        """Training queries of some intents, at most `SEEN` of them, always the same."""
        if labels not in self._seen:
            rows = np.random.default_rng(0).permutation(self.corpus.rows(labels))[:SEEN]
            self._seen[labels] = Questions.of(self, self.learner.task.tokenize(taken(self.corpus.train, rows)))
        return self._seen[labels]


@dataclass(frozen=True)
class Questions:
    """Token ids, the encoder's features, and the model's own logits, which rows that no slot touches keep.

    Both are on the CPU, where detectors and scikit-learn read them.
    """

    tokens: Tokens
    features: Tensor
    logits: Tensor

    @classmethod
    def of(cls, world: World, tokens: Tokens) -> "Questions":
        """Ask encoder and model once."""
        features: list[Tensor] = [torch.empty(0)] * len(tokens)
        for places, batch in batches(world.learner, tokens, np.arange(len(tokens))):
            for place, each in zip(places, world.encoder.features(batch).cpu(), strict=True):
                features[int(place)] = each
        return cls(tokens, torch.stack(features), logits_of(world, tokens, np.arange(len(tokens)), None))


def taken(examples: Examples, rows: NDArray[np.int64]) -> Examples:
    """Return some rows."""
    labels = examples.labels or ()
    return Examples(tuple(examples.texts[row] for row in rows), tuple(labels[row] for row in rows))


def batches(learner: Learner, tokens: Tokens, rows: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], Any]]:
    """Divide rows into batches of like length; returns rows and batch."""
    return [(rows[places], batch) for places, batch in learner.batches([(tokens, int(row)) for row in rows])]


@dataclass(frozen=True)
class Dense:
    """All slots in one product of their ranks together, for gates that touch nearly every row.

    `weights` are `[rows, slots]`, `a` `[slots * r, d_in]` and `b` `[slots * r, d_out]` of every site.
    """

    weights: Tensor
    factors: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, slots: Bank, weights: Tensor) -> "Dense":
        """Stack the factors."""
        a, b = slots.views("A"), slots.views("B")
        return cls(weights, {name: (a[name].flatten(0, 1), b[name].transpose(1, 2).flatten(0, 1)) for name in b})

    def rows(self, chosen: NDArray[np.int64]) -> "Dense":
        """Return the same for some rows."""
        return Dense(self.weights[torch.from_numpy(chosen).to(self.weights.device)], self.factors)

    def add(self, name: str, x: Tensor, y: Tensor, *, scale: float) -> Tensor:
        """Add the updates of all slots, by the rows' weights."""
        a, b = self.factors[name]
        ranks = (scale * self.weights).repeat_interleave(len(a) // self.weights.shape[1], dim=1)
        return y + ((x @ a.T) * ranks[:, None, :]) @ b


@torch.no_grad()
def pooled_of(world: World, tokens: Tokens, rows: NDArray[np.int64], slots: tuple[Bank, Tensor] | None) -> Tensor:
    """Return what the head reads, `[rows, width]` on the CPU, with slots on top by weights `[all rows, slots]`."""
    learner, task = world.learner, world.learner.task
    place = {int(row): number for number, row in enumerate(rows)}
    found = torch.empty(len(rows), learner.base.width)
    views = learner.layout.views(world.model)
    dense = None
    if slots is not None:
        bank, weights = slots
        slots = Bank(bank.layout, bank.data.to(learner.device)), weights.to(learner.device)
        if bool((weights[torch.from_numpy(rows)] != 0).double().mean() > 0.5):
            dense = Dense.of(*slots)
    for chosen, batch in batches(learner, tokens, rows):
        overlay: Overlaying | None = None if dense is None else dense.rows(chosen)
        if slots is not None and dense is None:
            overlay = Overlay.of(slots[0], Gate.mixture(slots[1][torch.from_numpy(chosen).to(learner.device)]))
        here = batch.to(learner.device)
        with learner.adapted.bound(views, overlay=overlay) as base:
            states = base(input_ids=here.input_ids, attention_mask=here.mask).last_hidden_state
        found[[place[int(row)] for row in chosen]] = pool(states, here, task.pooling).cpu()  # type: ignore[attr-defined]
    return found


@torch.no_grad()
def logits_of(world: World, tokens: Tokens, rows: NDArray[np.int64], slots: tuple[Bank, Tensor] | None) -> Tensor:
    """Return logits `[rows, classes]` under the model, with slots on top by weights `[all rows, slots]`, on the CPU."""
    pooled = pooled_of(world, tokens, rows, slots).to(world.learner.device)
    views = world.learner.layout.views(world.model)
    head = world.learner.task.head  # type: ignore[attr-defined]
    made: Tensor = head.logits(pooled, weight=views["head", "weight"], bias=views["head", "bias"], sink=None)
    return made.cpu()


def trained(learner: Learner, tokens: Tokens, *, seed: int, cache: Path | None, name: str) -> tuple[Tensor, float]:
    """Return the trained vector, where the model computes, and the device's `seconds` that it took.

    Both come from the cache, else are made and put there; models of different kinds of devices are kept apart.
    """
    device = learner.device
    where = "" if device.type == "cpu" else f"-{device.type}"
    path = None if cache is None else cache / f"ffa-{name}-{len(tokens)}-{seed}{where}.safetensors"
    if path is not None and path.is_file():
        kept = load_file(path)
        return kept["vector"].to(device), float(kept["seconds"])
    begun = seconds(str(device))
    steps = 3 * len(tokens) // 64
    config = TrainingConfig(steps=steps, batch=64, optimizer="adamw", rate=3e-3, head_rate=1e-2)
    parts = ("B", "head") if learner.task.entries() else ("B",)
    works = [Work("all", tokens)]
    found = train(learner, works, start=learner.start(), config=config, parts=parts, seed=seed, number=1)  # type: ignore[arg-type]
    taken_s = seconds(str(device)) - begun
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"vector": found.values[0].clone(), "seconds": torch.tensor(taken_s)}, path)
    return found.values[0].to(device), taken_s


def made_world(corpus: Corpus, *, cache: Path | None, seed: int, device: str = "cpu") -> World:
    """Train the model that is asked to forget."""
    model = ModelConfig(name="minilm", device=device, dtype="float32")
    learner = build_learner(
        model, TaskConfig(kind="classification", head="trained"), AdapterConfig(rank=8, targets="all"),
        labels=corpus.names, trains_frame=False,
    )  # fmt: skip
    vector, taken_s = trained(learner, learner.task.tokenize(corpus.train), seed=seed, cache=cache, name="whole")
    encoder = SharedEncoder(learner.adapted, layers=(6,), pad=learner.pad)
    return World(corpus, learner, vector, encoder, seed, taken_s)
