"""The stream of requests that `benchmarks.gated` measures: what a method makes of each, and where it stands after."""

import argparse
import pickle
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.intents import Questions, World, logits_of, taken, trained
from benchmarks.measure import DEVICES, seconds
from lora.errors import LetheError
from strategies.unlearning.attacks import loss_membership
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.config import ForgettingConfig
from strategies.unlearning.detector import (
    Detector,
    Detectors,
    DetectorSettings,
    detector_of,
    left_out_distances,
    request_features,
)
from strategies.unlearning.encoder import SharedEncoder
from strategies.unlearning.forgotten import detector_settings, slot_settings
from strategies.unlearning.frames import OrthogonalFrames
from strategies.unlearning.gate import ForgettingGate, Weighting
from strategies.unlearning.measures import Answers
from strategies.unlearning.o3 import Slot, Variant, slot_bank, unlearn
from strategies.unlearning.objectives import ASCEND, LEARN, Descent, Objective, RandomLabels, prefer_less, runner_up

Marks = NDArray[np.bool_]


@dataclass(frozen=True)
class Recipe:
    """How slots are made."""

    name: str
    variant: Variant
    answers: str
    """`next best` or `random`."""
    descent: Descent = LEARN
    gates: tuple[Weighting, ...] = ("always",)
    rate: float | None = None
    """None: that of the command line."""
    penalty: float = 0.1
    passes: int | None = None
    """Over a request's used queries; None: those of the command line."""
    once: bool = False
    """With the first seed alone."""


RECIPES = (
    Recipe("own slots, next best label", "per-request", "next best", gates=("hard", "soft", "cut", "always")),
    Recipe("own slots, random labels", "per-request", "random", gates=("hard", "always"), passes=1, once=True),
    Recipe("carried, random labels", "carried", "random", gates=("soft", "hard", "always"), passes=1, once=True),
    Recipe("carried, no penalty", "carried", "random", gates=("soft",), penalty=0.0, passes=1, once=True),
    Recipe("gradient ascent", "per-request", "same", ASCEND, rate=3e-4, passes=1, once=True),
    Recipe("NPO", "per-request", "same", prefer_less(), rate=1e-3, passes=1, once=True),
)


@dataclass
class Method:
    """What a recipe has made of the requests so far."""

    slots: list[Slot] = field(default_factory=list)
    detectors: list[Detector] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    reads: list[dict[str, int]] = field(default_factory=list)
    """What the audit of every request counted."""
    carried: bool = False
    logits: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    """Weights and logits of questions that were asked before: slots of their own never change."""

    def gate(self, weighting: Weighting) -> ForgettingGate:
        """Return the gate over everything that was forgotten."""
        kept = self.slots[-1:] if self.carried else self.slots
        return ForgettingGate(Detectors(self.detectors), slot_bank(kept), weighting)


@dataclass(frozen=True)
class Asked:
    """One request: its rows, and what detectors are made of."""

    labels: tuple[int, ...]
    request: AuditedRequest
    used: Tensor
    classes: Tensor
    held_back: Tensor
    seconds: float
    """For the features."""
    _made: dict[int, tuple[Detector, Tensor, float]] = field(default_factory=dict, repr=False)

    def detector(self, encoder: SharedEncoder, chosen: DetectorSettings) -> Detector:
        """Make a detector of the features at hand; by coverage only its threshold differs."""
        made, distances, _ = self._of(encoder, chosen)
        return replace(made, threshold=float(distances.quantile(chosen.coverage)))

    def detector_s(self, encoder: SharedEncoder, chosen: DetectorSettings) -> float:
        """Return the seconds of features and detector."""
        return self.seconds + self._of(encoder, chosen)[2]

    def _of(self, encoder: SharedEncoder, chosen: DetectorSettings) -> tuple[Detector, Tensor, float]:
        if chosen.folds not in self._made:
            device = str(encoder.device)
            begun = seconds(device)
            made = detector_of(self.used, self.classes, self.held_back, encoder=encoder, settings=chosen)
            taken_s = seconds(device) - begun
            left_out = left_out_distances(self.used, self.classes, made.weights, settings=chosen)
            if left_out is None:
                left_out = Detectors([made]).distances(self.held_back)[:, 0]
            self._made[chosen.folds] = made, left_out, taken_s
        return self._made[chosen.folds]


def asked(world: World, labels: tuple[int, ...]) -> Asked:
    """Take a request's rows and features."""
    begun = seconds(world.device)
    request = AuditedRequest(taken(world.corpus.train, world.corpus.rows(labels)), seed=world.seed)
    tokens = request.tokens(world.learner.task)
    base = world.learner.adapted.base
    request.audit.declare("model", [*base.parameters(), *base.buffers()])
    with request.audit.watching():
        used, held_back = (
            request_features(world.encoder, request, tokens, rows, size=128)
            for rows in (request.used, request.held_back)
        )
    request.audit.check()
    classes = torch.from_numpy(np.asarray(tokens.labels)[request.used])
    return Asked(labels, request, used, classes, held_back, seconds(world.device) - begun)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every benchmark of the stream is asked by."""
    store = ForgettingConfig()
    parser.add_argument("--data", type=Path, help="the folder of CLINC150; without it nothing is measured")
    parser.add_argument("--cache", type=Path, help="folder of trained models, filled where empty")
    parser.add_argument("--kept", type=Path, help="folder of slots, from which a broken run goes on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--models", type=int, help="models that are trained; seeds share them in turn; default: all own"
    )
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--on", choices=("test", "validation"), default="test")
    parser.add_argument("--epochs", type=int, default=store.epochs, help="passes over a request's used queries")
    parser.add_argument("--least-steps", type=int, default=store.least_steps, help="more passes for small requests")
    parser.add_argument("--rate", type=float, default=store.rate)
    parser.add_argument("--factor", type=float, default=1.0, help="of every method's rate")
    parser.add_argument("--coverage", type=float, default=store.coverage)
    parser.add_argument("--folds", type=int, default=store.folds, help="clusters left out in turn, for the threshold")
    parser.add_argument("--device", default="cpu", help=DEVICES)


def forgetting(chosen: argparse.Namespace) -> ForgettingConfig:
    """Return the settings of a store, with those of the command line."""
    return ForgettingConfig(
        epochs=chosen.epochs, least_steps=chosen.least_steps, rate=chosen.rate, coverage=chosen.coverage,
        folds=chosen.folds,
    )  # fmt: skip


class Made(NamedTuple):
    """A trained slot, the seconds that it took, and what its audit counted."""

    slot: Slot
    seconds: float
    reads: dict[str, int]


def answered(
    world: World, recipe: Recipe, one: Asked, method: Method, *, gone: Sequence[int], chosen: argparse.Namespace
) -> None:
    """Answer one request by a recipe: a slot more, trained on the request's rows alone, or kept from an earlier run."""
    settings_ = detector_settings(forgetting(chosen))
    path = None
    if chosen.kept is not None:
        told_by = (
            recipe.passes or chosen.epochs,
            chosen.least_steps,
            rate_of(recipe, chosen),
            model_of(chosen, world.seed),
            world.seed,
            *(() if world.device == "cpu" else (world.learner.device.type,)),
        )
        path = chosen.kept / f"{key_of(recipe.name)}-{'-'.join(map(str, told_by))}-{len(method.slots)}.pickle"
    method.carried = recipe.variant == "carried"
    if path is not None and path.is_file():
        made = Made(*pickle.loads(path.read_bytes()))
    else:
        made = slot_for(world, recipe, one, method, gone=gone, chosen=chosen)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pickle.dumps(tuple(made)))
    method.slots.append(made.slot)
    method.detectors.append(one.detector(world.encoder, settings_))
    method.seconds.append(one.detector_s(world.encoder, settings_) + made.seconds)
    features = one.request.audit.report()
    method.reads.append({key: count + features.get(key, 0) for key, count in made.reads.items()})


def rate_of(recipe: Recipe, chosen: argparse.Namespace) -> float:
    """Return the rate at which a recipe's slots are trained."""
    return float((recipe.rate or chosen.rate) * chosen.factor)


def model_of(chosen: argparse.Namespace, seed: int) -> int:
    """Return which trained model a seed forgets from."""
    return int(seed % (chosen.models or chosen.seeds))


def slot_for(
    world: World, recipe: Recipe, one: Asked, method: Method, *, gone: Sequence[int], chosen: argparse.Namespace
) -> Made:
    """Train a slot by a recipe."""
    begun = seconds(world.device)
    sites, number = world.learner.adapted.sites, len(method.slots)
    request = AuditedRequest(one.request.examples, seed=world.seed)
    config = replace(
        slot_settings(forgetting(chosen)), rate=rate_of(recipe, chosen), variant=recipe.variant,
        penalty=recipe.penalty, epochs=recipe.passes or chosen.epochs,
    )  # fmt: skip
    frames = OrthogonalFrames(sites, rank=config.rank, seed=world.seed, beside=world.learner.adapted.frame)
    start = method.slots[-1] if method.carried and method.slots else Slot.fresh(sites, frames.block(number))
    objective: Objective = RandomLabels(range(len(world.corpus.names)), avoid=gone)
    if recipe.answers != "random":
        avoid = gone if recipe.answers == "next best" else ()
        objective = runner_up(world.learner, request, model=world.model, avoid=avoid)
    made = unlearn(
        world.learner, request, objective, model=world.model, slot=start, settings=config,
        earlier=method.slots if method.carried else (), descent=recipe.descent, seed=world.seed,
    )  # fmt: skip
    return Made(made.slot, seconds(world.device) - begun, request.audit.report())


def through(
    gate: ForgettingGate, world: World, asked: Questions, known: dict[int, tuple[Tensor, Tensor]] | None = None
) -> tuple[Answers, Marks]:
    """Answer questions through the gate; also returns which rows any slot touched.

    What `known` holds of the same questions is kept for rows whose weights are the same and 0 for all newer slots.
    """
    weights = gate.mixture(asked.features).weights
    if weights is None:
        raise LetheError("the gate has no weights")
    touched: Marks = (weights != 0).any(1).numpy()
    logits, stale = asked.logits.clone(), touched
    if known is not None and id(asked) in known:
        before, logits = known[id(asked)][0], known[id(asked)][1].clone()
        wider = torch.cat([before, before.new_zeros(len(before), weights.shape[1] - before.shape[1])], dim=1)
        stale = (wider != weights).any(1).numpy()
    rows = np.flatnonzero(stale)
    if len(rows):
        logits[torch.from_numpy(rows)] = logits_of(world, asked.tokens, rows, (gate.slots, weights))
    if known is not None:
        known[id(asked)] = (weights, logits)
    return Answers(np.asarray(asked.tokens.labels, dtype=np.int64), logits), touched


@dataclass
class Standing:
    """Accuracies of a method under one gate after some requests."""

    seen: list[float]
    unseen: list[float]
    utility_loss: float
    touched: float
    membership: float
    h: float
    """2 Acc_r Drop / (Acc_r + Drop), on unseen queries."""

    @property
    def worst(self) -> float:
        """Return the largest accuracy on any request, seen or unseen."""
        return max(*self.seen, *self.unseen)


def stands(world: World, method: Method, weighting: Weighting, done: Sequence[Asked]) -> Standing:
    """Measure every request so far, and what remains."""
    gone = {label for one in done for label in one.labels}
    rest = set(range(len(world.corpus.names))) - gone
    gate, known = method.gate(weighting), None if method.carried or weighting != "hard" else method.logits
    after, touched = through(gate, world, world.asked, known)
    before = Answers(after.labels, world.asked.logits)
    members = [through(gate, world, world.seen(one.labels), known)[0] for one in done]
    strangers = [Answers(after.labels[rows], after.logits[torch.from_numpy(rows)])
                 for rows in (after.of_classes(one.labels) for one in done)]  # fmt: skip
    staying, drop = after.accuracy(rest), before.accuracy(gone) - after.accuracy(gone)
    return Standing(
        [each.accuracy(one.labels) for each, one in zip(members, done, strict=True)],
        [after.accuracy(one.labels) for one in done],
        100 * (before.accuracy(rest) - staying),
        float(touched[after.of_classes(rest)].mean()),
        loss_membership(members[0], strangers[0]),
        2 * staying * drop / max(staying + drop, 1e-9),
    )


@dataclass
class Found:
    """Figures of one method under one gate, one entry a seed, and the standing after every request."""

    ends: list[Standing] = field(default_factory=list)
    ways: list[list[Standing]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    retraining_s: list[float] = field(default_factory=list)
    """What training without everything asked so far would take, a request each."""

    def mean(self, figure: Callable[[Standing], float]) -> float:
        """Return the mean over seeds at the end of the stream."""
        return statistics.fmean(figure(end) for end in self.ends)

    @property
    def worst(self) -> float:
        """Return the largest accuracy on any request of any seed at the end."""
        return max(end.worst for end in self.ends)

    @property
    def worst_loss(self) -> float:
        """Return the most points lost after any request that was measured, of any seed."""
        return max(each.utility_loss for way in self.ways for each in way)


@dataclass
class Course:
    """What one recipe made of the stream with one seed: the standing under every gate, after requests or at the end."""

    method: Method
    ways: dict[Weighting, list[Standing]] = field(default_factory=dict)


def course_of(world: World, recipe: Recipe, requests: Sequence[Asked], chosen: argparse.Namespace) -> Course:
    """Answer the whole stream by a recipe; its first gate is measured after every request if it is a gate."""
    course, gone = Course(Method()), list[int]()
    for number, one in enumerate(requests, start=1):
        gone += one.labels
        answered(world, recipe, one, course.method, gone=gone, chosen=chosen)
        if recipe.gates[0] != "always" or number == len(requests):
            course.ways.setdefault(recipe.gates[0], []).append(
                stands(world, course.method, recipe.gates[0], requests[:number])
            )
            say(world, recipe, f"after {number}", course.ways[recipe.gates[0]][-1])
    for weighting in recipe.gates[1:] if world.seed == 0 else ():
        course.ways[weighting] = [stands(world, course.method, weighting, requests)]
        say(world, recipe, weighting, course.ways[weighting][-1])
    course.method.logits.clear()
    return course


def say(world: World, recipe: Recipe, when: str, standing: Standing) -> None:
    """Print a standing."""
    print(f"seed {world.seed}, {recipe.name}, {when}: {told(standing)}", flush=True)


def streamed(
    world: World, requests: Sequence[Asked], chosen: argparse.Namespace, found: dict[tuple[str, str], Found]
) -> dict[str, Method]:
    """Answer the whole stream with every recipe."""
    made: dict[str, Method] = {}
    for recipe in RECIPES:
        if (chosen.methods and recipe.name not in chosen.methods) or (recipe.once and world.seed):
            continue
        course = course_of(world, recipe, requests, chosen)
        made[recipe.name] = course.method
        for weighting, way in course.ways.items():
            each = found.setdefault((recipe.name, weighting), Found())
            each.ends.append(way[-1])
            each.ways.append(way)
            each.seconds += course.method.seconds
            gone, whole = 0, len(world.corpus.train)
            for one in requests:
                gone += len(one.request.examples)
                each.retraining_s.append(world.pretraining_s * (whole - gone) / whole)
    return made


def without(world: World, requests: Sequence[Asked], chosen: argparse.Namespace, *, seed: int | None = None) -> World:
    """Train the model anew without the requests' queries, by the world's seed or another."""
    gone = sorted({label for one in requests for label in one.labels})
    rest = np.setdiff1d(np.arange(len(world.corpus.train)), world.corpus.rows(gone))
    tokens, seed = world.learner.task.tokenize(taken(world.corpus.train, rest)), world.seed if seed is None else seed
    vector, taken_s = trained(world.learner, tokens, seed=seed, cache=chosen.cache, name=f"without-{len(gone)}")
    return World(world.corpus, world.learner, vector, world.encoder, seed, taken_s)


def told(standing: Standing) -> str:
    """Say accuracies in words."""
    pairs = [f"{100 * s:.1f}/{100 * u:.1f}" for s, u in zip(standing.seen, standing.unseen, strict=True)]
    return f"seen/unseen {' '.join(pairs)} %, utility loss {standing.utility_loss:.2f}, touched {standing.touched:.4f}"


def key_of(name: str) -> str:
    """Return a recipe's name as figures are named by it."""
    return name.replace(", ", "_").replace(" ", "_").replace("-", "_").lower()
