"""What brings O3's first request back, at the end of the stream and through the gate: a probe, class means, LiRA.

    python -m benchmarks.gated_attacks --data FOLDER [--cache FOLDER] [--kept FOLDER] [--without 4] [options of
        `benchmarks.gated`]

The stream, its settings and its model are those of `python -m benchmarks.gated`; one seed. Beside O3's model stand the
model before any request, which is also what an attacker has who takes the gate away, and models that were trained anew
without all requests' queries (`--without` of them, by seeds of their own).

- probe, means: accuracy on the first request's asked queries of a linear classifier, and of nearest class means, fitted
  to what the head reads of at most 300 of its training queries. Trained anew: mean over the models.
- loss: AUC of the loss, of those training queries (members) against the asked queries of the same intents.
- LiRA: the same of the likelihood ratio to the models that were trained anew, whose own figure is each against the
  others (mean).
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from benchmarks.gated_stream import RECIPES, Asked, Method, add_arguments, answered, asked, model_of, through, without
from benchmarks.intents import Corpus, Questions, World, made_world, pooled_of
from benchmarks.measure import publish, settings
from lora.errors import LetheError
from strategies.unlearning.attacks import lira_membership, loss_membership, nearest_prototype, probe
from strategies.unlearning.gate import ForgettingGate
from strategies.unlearning.measures import Answers
from tasks.encoders import Rows
from tasks.tokens import Tokens

HEADING = ("model", "probe", "nearest means", "loss MIA", "LiRA")


@dataclass(frozen=True)
class Attacked:
    """A model as whoever asks it sees it: with the gate, where there is one. Probes read it as `Featured`."""

    world: World
    gate: ForgettingGate | None
    _known: dict[int, Questions] = field(default_factory=dict, repr=False)

    def features(self, rows: Rows) -> Tensor:
        """Return what the head reads `[rows, width]`."""
        tokens, slots = _tokens(rows), None
        if self.gate is not None:
            weights = self.gate.mixture(self.asked(tokens).features).weights
            slots = None if weights is None else (self.gate.slots, weights)
        return pooled_of(self.world, tokens, np.arange(len(tokens)), slots)

    def asked(self, rows: Tokens) -> Questions:
        """Ask encoder and bare model, once."""
        if id(rows) not in self._known:
            self._known[id(rows)] = Questions.of(self.world, rows)
        return self._known[id(rows)]

    def logits(self, rows: Rows) -> Tensor:
        """Return the answers' logits `[rows, classes]`."""
        questions = self.asked(_tokens(rows))
        return questions.logits if self.gate is None else through(self.gate, self.world, questions)[0].logits


def _tokens(rows: Rows) -> Tokens:
    if not isinstance(rows, Tokens):
        raise TypeError(f"{type(rows).__name__}: only token ids are asked here")
    return rows


@dataclass(frozen=True)
class Pair:
    """Queries that were trained on, and others of the same intents that never were."""

    members: Tokens
    strangers: Tokens

    @classmethod
    def of(cls, world: World, one: Asked) -> "Pair":
        """Take those of a request."""
        everything = world.asked.tokens
        places = np.flatnonzero(np.isin(np.asarray(everything.labels), one.labels))
        return cls(world.seen(one.labels).tokens, everything.take(places.tolist()))

    def answers(self, model: Attacked) -> tuple[Answers, Answers]:
        """Ask a model both."""
        return Answers.of(model, self.members), Answers.of(model, self.strangers)


def of(model: Attacked, pair: Pair, others: Sequence[Attacked]) -> dict[str, float]:
    """Attack one model; `others` are those that were trained anew."""
    members, strangers = pair.answers(model)
    found = {
        "probe": probe(model, pair.members, pair.strangers),
        "prototype": nearest_prototype(model, pair.members, pair.strangers),
        "loss_mia": loss_membership(members, strangers),
    }
    if len(others) > 1:
        apart = [pair.answers(each) for each in others]
        found["lira_mia"] = lira_membership(members, strangers, without=apart)
    return found


def measured(chosen: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return every model's figures."""
    corpus = Corpus.read(chosen.data, requests=chosen.requests, on=chosen.on)
    world = made_world(corpus, cache=chosen.cache, seed=model_of(chosen, 0), device=chosen.device).seeded(0)
    requests = [asked(world, labels) for labels in corpus.sequence]
    method, gone = Method(), list[int]()
    for one in requests:
        gone += one.labels
        answered(world, RECIPES[0], one, method, gone=gone, chosen=chosen)
    anew = []
    for seed in range(chosen.without):
        anew.append(Attacked(without(world, requests, chosen, seed=seed), None))
        print(f"trained anew without {len(gone)} intents, seed {seed}", flush=True)
    pair = Pair.of(world, requests[0])
    found = {
        "o3": of(Attacked(world, method.gate("hard")), pair, anew),
        "before": of(Attacked(world, None), pair, anew),
    }
    each = [of(model, pair, [other for other in anew if other is not model]) for model in anew]
    if each:
        found["retrained"] = {name: statistics.fmean(one[name] for one in each) for name in each[0]}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print what the command line asks for."""
    parser = argparse.ArgumentParser(description="What brings O3's first request back.")
    add_arguments(parser)
    parser.add_argument("--without", type=int, default=4, help="models that are trained without the requests' queries")
    chosen = parser.parse_args(arguments)
    if chosen.data is None:
        print("benchmarks.gated_attacks measures on CLINC150 only: give --data FOLDER")
        return
    torch.set_num_threads(1)
    try:
        found = measured(chosen)
    except LetheError as error:
        raise SystemExit(f"error: {error}") from None
    about = {key: value for key, value in vars(chosen).items() if key not in ("data", "cache", "kept")}
    figures = {f"o3_attacked_{who}_{name}": value for who, each in found.items() for name, value in each.items()}
    keys = ("probe", "prototype", "loss_mia", "lira_mia")
    rows = [
        [*HEADING],
        *([who, *(f"{each.get(key, float('nan')):.3f}" for key in keys)] for who, each in found.items()),
    ]
    publish("unlearning", figures=figures, rows=rows, about=settings(**about), part="gated attacks")


if __name__ == "__main__":
    main()
