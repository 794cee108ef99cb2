"""Forgetting without retained data: O3's gated slots beside methods that read the request alone and have no gate.

    python -m benchmarks.gated --data FOLDER [--cache FOLDER] [--kept FOLDER] [--seeds 3] [--requests 6] [--on test]
        [--epochs 2] [--coverage 0.97] [--single 4] [--retrained]

FOLDER holds `data_full.json.gz` and `domains.json.gz` of CLINC150. The model is MiniLM with FFA-LoRA's B and a head,
trained here on all training queries; the frozen MiniLM without them is the detectors' encoder. Requests come one after
another: the domains work, travel, home and banking, then single intents. Each reads its own training queries and
nothing else, which an audit checks: 80 % for slot and statistics, 20 % for scale and threshold.

- own slots: one slot a request over blocks of one orthonormal frame (ours), which learns the model's next best label;
  carried: one adapter for all requests with the penalty on overlap and random labels (the paper).
- gates: hard (within the threshold), soft (the paper's formula, which touches every row), cut, none (always on).
- ungated: one slot a request, always on: next best label, random labels, gradient ascent, NPO.
- seen, unseen: accuracy on a request's own training and test queries at the end of the stream; `worst` is the largest
  of all requests. Utility loss: points lost on the test queries of all other intents, out-of-scope ones left out.
- coverage: the share of held-back rows within the threshold; its curve is drawn in `results/gated.svg`, with the
  paper's weights for the first request's queries, for the rest and for out-of-scope queries.
- `--retrained` trains the model anew without the requests' queries (seed 0): its seconds, and its loss MIA.
- `--on validation` asks validation queries, to choose settings; `--rate`, `--epochs`, `--single` (times the epochs for
  single intents) and `--coverage` are those of the gated slots. What gates cost: `python -m benchmarks.gate_costs`.
"""

import argparse
import pickle
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.intents import DOMAINS, Corpus, Questions, World, logits_of, made_world, taken, trained
from benchmarks.measure import RESULTS, publish, settings
from lethe.page import STYLE
from lethe.plots import Canvas, percent, plain
from lora.errors import LetheError
from strategies.unlearning.attacks import loss_membership
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.detector import Detector, Detectors, DetectorSettings, detector_of, request_features
from strategies.unlearning.encoder import SharedEncoder
from strategies.unlearning.frames import OrthogonalFrames, overlaps
from strategies.unlearning.gate import ForgettingGate, Weighting
from strategies.unlearning.measures import Answers
from strategies.unlearning.o3 import Slot, SlotSettings, Variant, slot_bank, unlearn
from strategies.unlearning.objectives import ASCEND, LEARN, Descent, Objective, RandomLabels, prefer_less, runner_up
from tasks.examples import Examples

COVERAGES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99, 1.0)
HEADING = ("method", "gate", "worst at end", "mean seen", "mean unseen", "utility loss", "worst utility loss", "H",
           "rows touched", "loss MIA", "CPU s a request")  # fmt: skip
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


RECIPES = (
    Recipe("own slots, next best label", "per-request", "next best", gates=("hard", "soft", "cut", "always")),
    Recipe("own slots, random labels", "per-request", "random", gates=("hard", "always")),
    Recipe("carried, random labels", "carried", "random", gates=("soft", "hard", "always")),
    Recipe("gradient ascent", "per-request", "same", ASCEND, rate=3e-4),
    Recipe("NPO", "per-request", "same", prefer_less(), rate=1e-3),
)


@dataclass
class Method:
    """What a recipe has made of the requests so far."""

    slots: list[Slot] = field(default_factory=list)
    detectors: list[Detector] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    carried: bool = False

    def gate(self, weighting: Weighting) -> ForgettingGate:
        """Return the gate over everything that was forgotten."""
        kept = self.slots[-1:] if self.carried else self.slots
        return ForgettingGate(Detectors(self.detectors), slot_bank(kept), weighting)


@dataclass(frozen=True)
class Asked:
    """One request: its rows, and what detectors are made of."""

    labels: tuple[int, ...]
    examples: Examples
    used: Tensor
    classes: Tensor
    held_back: Tensor
    seconds: float

    def detector(self, encoder: SharedEncoder, coverage: float) -> Detector:
        """Make a detector of the features at hand."""
        chosen = DetectorSettings(coverage=coverage)
        return detector_of(self.used, self.classes, self.held_back, encoder=encoder, settings=chosen)


def asked(world: World, labels: tuple[int, ...]) -> Asked:
    """Take a request's rows and features."""
    begun = time.process_time()
    examples = taken(world.corpus.train, world.corpus.rows(labels))
    request = AuditedRequest(examples, seed=world.seed)
    tokens = request.tokens(world.learner.task)
    used, held_back = (
        request_features(world.encoder, request, tokens, rows, size=128) for rows in (request.used, request.held_back)
    )
    classes = torch.from_numpy(np.asarray(tokens.labels)[request.used])
    return Asked(labels, examples, used, classes, held_back, time.process_time() - begun)


def answered(
    world: World, recipe: Recipe, one: Asked, method: Method, *, gone: Sequence[int], chosen: argparse.Namespace
) -> None:
    """Answer one request by a recipe: a slot more, trained on the request's rows alone."""
    begun = time.process_time()
    sites, number = world.learner.adapted.sites, len(method.slots)
    request = AuditedRequest(one.examples, seed=world.seed)
    carried = recipe.variant == "carried"
    config = SlotSettings(
        epochs=chosen.epochs if len(one.labels) > 1 else chosen.epochs * chosen.single,
        rate=recipe.rate or chosen.rate, variant=recipe.variant,
    )  # fmt: skip
    frames = OrthogonalFrames(sites, rank=config.rank, seed=world.seed, beside=world.learner.adapted.frame)
    start = method.slots[-1] if carried and method.slots else Slot.fresh(sites, frames.block(number))
    if carried and not method.slots:
        method.carried = True
    objective: Objective = RandomLabels(range(len(world.corpus.names)), avoid=gone)
    if recipe.answers != "random":
        avoid = gone if recipe.answers == "next best" else ()
        objective = runner_up(world.learner, request, model=world.model, avoid=avoid)
    made = unlearn(
        world.learner, request, objective, model=world.model, slot=start, settings=config,
        earlier=method.slots if carried else (), descent=recipe.descent, seed=world.seed,
    )  # fmt: skip
    method.slots.append(made.slot)
    method.detectors.append(one.detector(world.encoder, chosen.coverage))
    method.seconds.append(one.seconds + time.process_time() - begun)


def through(gate: ForgettingGate, world: World, asked: Questions) -> tuple[Answers, Marks]:
    """Answer questions through the gate; also returns which rows any slot touched."""
    weights = gate.mixture(asked.features).weights
    if weights is None:
        raise LetheError("the gate has no weights")
    rows = np.flatnonzero((weights != 0).any(1).numpy())
    logits = asked.logits.clone()
    if len(rows):
        logits[torch.from_numpy(rows)] = logits_of(world, asked.tokens, rows, (gate.slots, weights))
    touched = np.zeros(len(weights), dtype=np.bool_)
    touched[rows] = True
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
    gate = method.gate(weighting)
    after, touched = through(gate, world, world.asked)
    before = Answers(after.labels, world.asked.logits)
    members = [through(gate, world, world.seen(one.labels))[0] for one in done]
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
    for weighting in recipe.gates[1:]:
        course.ways[weighting] = [stands(world, course.method, weighting, requests)]
        say(world, recipe, weighting, course.ways[weighting][-1])
    return course


def say(world: World, recipe: Recipe, when: str, standing: Standing) -> None:
    """Print a standing."""
    print(f"seed {world.seed}, {recipe.name}, {when}: {told(standing)}", flush=True)


def kept(world: World, recipe: Recipe, requests: Sequence[Asked], chosen: argparse.Namespace) -> Course:
    """Return a course that was kept, or make and keep it: a run that breaks off goes on where it was."""
    if chosen.kept is None:
        return course_of(world, recipe, requests, chosen)
    told_by = (chosen.on, len(requests), chosen.epochs, chosen.single, chosen.rate, chosen.coverage, world.seed)
    path = chosen.kept / ("gated-" + "-".join(map(str, told_by)) + f"-{recipe.name.replace(' ', '_')}.pickle")
    if path.is_file():
        return cast(Course, pickle.loads(path.read_bytes()))
    made = course_of(world, recipe, requests, chosen)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(made))
    return made


def streamed(
    world: World, requests: Sequence[Asked], chosen: argparse.Namespace, found: dict[tuple[str, str], Found]
) -> dict[str, Method]:
    """Answer the whole stream with every recipe."""
    made: dict[str, Method] = {}
    for recipe in RECIPES:
        if chosen.methods and recipe.name not in chosen.methods:
            continue
        course = kept(world, recipe, requests, chosen)
        made[recipe.name] = course.method
        for weighting, way in course.ways.items():
            each = found.setdefault((recipe.name, weighting), Found())
            each.ends.append(way[-1])
            each.ways.append(way)
            each.seconds += course.method.seconds
    return made


def told(standing: Standing) -> str:
    """Say accuracies in words."""
    pairs = [f"{100 * s:.1f}/{100 * u:.1f}" for s, u in zip(standing.seen, standing.unseen, strict=True)]
    return f"seen/unseen {' '.join(pairs)} %, utility loss {standing.utility_loss:.2f}, touched {standing.touched:.4f}"


def traded(world: World, method: Method, requests: Sequence[Asked]) -> list[tuple[float, float, float]]:
    """Return for every coverage the mean accuracy on unseen forgotten queries and the points that the rest lost."""
    rows = []
    for coverage in COVERAGES:
        detectors = [one.detector(world.encoder, coverage) for one in requests]
        standing = stands(world, replace(method, detectors=detectors), "hard", requests)
        rows.append((coverage, statistics.fmean(standing.unseen), standing.utility_loss))
    return rows


def aurocs(world: World, requests: Sequence[Asked], coverage: float) -> list[float]:
    """Return how well each request's detector tells its asked queries from all others and the out-of-scope ones."""
    inside = Detectors([one.detector(world.encoder, coverage) for one in requests])
    distances = torch.cat([inside.distances(each.features) for each in (world.asked, world.strange)]).numpy()
    labels = np.concatenate([np.asarray(world.asked.tokens.labels), np.full(len(world.strange.tokens), -1)])
    return [float(roc_auc_score(~np.isin(labels, one.labels), distances[:, place]))
            for place, one in enumerate(requests)]  # fmt: skip


def weighed(world: World, requests: Sequence[Asked], coverage: float) -> dict[str, NDArray[np.float64]]:
    """Return histograms (shares of ten bins) of the paper's weight of the first request."""
    gate = Detectors([requests[0].detector(world.encoder, coverage)])
    own = np.isin(np.asarray(world.asked.tokens.labels), requests[0].labels)
    of = {"its own queries": (world.asked.features, own), "other intents": (world.asked.features, ~own),
          "out of scope": (world.strange.features, np.ones(len(world.strange.tokens), dtype=np.bool_))}  # fmt: skip
    found = {}
    for name, (features, rows) in of.items():
        weights = gate.each[0].weight(gate.distances(features[torch.from_numpy(rows)])[:, 0]).numpy()
        found[name] = np.histogram(weights, bins=10, range=(0, 1))[0] / max(1, rows.sum())
    return found


def picture(curve: Sequence[tuple[float, float, float]], weights: Mapping[str, NDArray[np.float64]]) -> str:
    """Draw the trade-off of the hard gate on the left and the soft gate's weights on the right."""
    losses = [loss for _, _, loss in curve]
    widest = max(0.2, *(share for _, share, _ in curve))
    left = Canvas((0.0, 1.05 * widest), (min(0.0, *losses), 1.1 * max(1.0, *losses)))
    left.y_axis(plain)
    left.x_axis("forgotten accuracy, unseen", [(share, percent(share)) for _, share, _ in curve[::2]])
    left.path([(share, loss) for _, share, loss in curve], "s1")
    for coverage, share, loss in curve:
        left.dot(share, loss, style="f1", tip=f"coverage {coverage:g}: {100 * share:.1f} %, {loss:.2f} points")
    right = Canvas((0.0, 1.0), (0.0, 1.0))
    right.y_axis(percent)
    right.x_axis("weight of the first request's slot (the paper's formula)", [(x / 5, f"{x / 5:g}") for x in range(6)])
    for hue, (name, shares) in enumerate(weights.items(), start=1):
        points = [((place + 0.5) / 10, float(share)) for place, share in enumerate(shares)]
        right.path(points, f"s{hue}")
        for x, y in points:
            right.dot(x, y, style=f"f{hue}", tip=f"{name}: {100 * y:.1f} %")
    legend = "".join(
        f'<rect class="f{hue}" x="{500 + 150 * (hue - 1)}" y="268" width="10" height="10"/>'
        f'<text x="{515 + 150 * (hue - 1)}" y="277">{name}</text>'
        for hue, name in enumerate(weights, start=1)
    )
    parts = (left.svg("utility loss, points, by coverage"), right.svg("weights of the soft gate"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 290" width="980" height="290" role="img" '
        f'aria-label="The gate of forgetting"><style>{STYLE}</style><rect width="980" height="290" fill="var(--bg)"/>'
        f'{parts[0]}<g transform="translate(490 0)">{parts[1]}</g>{legend}</svg>\n'
    )


def retrained(world: World, requests: Sequence[Asked], chosen: argparse.Namespace) -> dict[str, float]:
    """Train the model anew without the requests' queries."""
    gone = sorted({label for one in requests for label in one.labels})
    rest = np.setdiff1d(np.arange(len(world.corpus.train)), world.corpus.rows(gone))
    tokens = world.learner.task.tokenize(taken(world.corpus.train, rest))
    vector, seconds = trained(world.learner, tokens, seed=world.seed, cache=chosen.cache, name=f"without-{len(gone)}")
    gold = World(world.corpus, world.learner, vector, world.encoder, world.seed, seconds)
    labels, own = np.asarray(world.asked.tokens.labels), requests[0].labels
    asks = [gold.seen(own), gold.asked]
    members, strangers = (Answers(np.asarray(each.tokens.labels, dtype=np.int64), each.logits) for each in asks)
    mine = torch.from_numpy(np.flatnonzero(np.isin(labels, own)))
    outside = Answers(strangers.labels[mine.numpy()], strangers.logits[mine])
    staying = set(range(len(world.corpus.names))) - set(gone)
    return {"retrain_s": seconds, "loss_mia_retrained": loss_membership(members, outside),
            "retrained_accuracy": strangers.accuracy(staying)}  # fmt: skip


def figures_of(found: Mapping[tuple[str, str], Found], more: Mapping[str, float]) -> dict[str, float]:
    """Return what the results file holds."""
    figures = dict(more)
    for (name, gate), each in found.items():
        key = f"{name}_{gate}".replace(", ", "_").replace(" ", "_").replace("-", "_").lower()
        figures |= {
            f"{key}_worst_end": each.worst, f"{key}_utility_loss": each.mean(lambda end: end.utility_loss),
            f"{key}_seen_end": each.mean(lambda end: statistics.fmean(end.seen)),
            f"{key}_unseen_end": each.mean(lambda end: statistics.fmean(end.unseen)),
            f"{key}_h": each.mean(lambda end: end.h), f"{key}_loss_mia": each.mean(lambda end: end.membership),
            f"{key}_s": statistics.fmean(each.seconds),
        }  # fmt: skip
    ours = found.get((RECIPES[0].name, "hard"))
    if ours is not None:
        figures |= {"o3_forget_acc_end_max": ours.worst, "o3_utility_loss_points": ours.worst_loss}
        if "retrain_s" in more:
            figures["o3_retrain_over_request_s"] = more["retrain_s"] / statistics.fmean(ours.seconds)
    return figures


def table(found: Mapping[tuple[str, str], Found]) -> list[list[str]]:
    """Return the printed rows."""
    rows = [[*HEADING]]
    for (name, gate), each in found.items():
        shares = [each.worst, each.mean(lambda end: statistics.fmean(end.seen)),
                  each.mean(lambda end: statistics.fmean(end.unseen))]  # fmt: skip
        losses = [each.mean(lambda end: end.utility_loss), each.worst_loss]
        rows.append([name, gate, *(f"{100 * share:.1f}" for share in shares), *(f"{loss:.2f}" for loss in losses),
                     f"{100 * each.mean(lambda end: end.h):.1f}",
                     f"{100 * each.mean(lambda end: end.touched):.1f}", f"{each.mean(lambda end: end.membership):.3f}",
                     f"{statistics.fmean(each.seconds):.1f}"])  # fmt: skip
    return rows


def measured(chosen: argparse.Namespace) -> tuple[dict[tuple[str, str], Found], dict[str, float]]:
    """Run all seeds; the first also draws the trade-off."""
    corpus = Corpus.read(chosen.data, requests=chosen.requests, on=chosen.on)
    found: dict[tuple[str, str], Found] = {}
    more: dict[str, float] = {}
    lowest: list[float] = []
    for seed in range(chosen.seeds):
        world = made_world(corpus, cache=chosen.cache, seed=seed)
        requests = [asked(world, labels) for labels in corpus.sequence]
        made = streamed(world, requests, chosen, found)
        lowest += aurocs(world, requests, chosen.coverage)
        if seed == 0:
            before = Answers(np.asarray(world.asked.tokens.labels, dtype=np.int64), world.asked.logits)
            more |= {"accuracy_before": before.accuracy(range(len(corpus.names))), "pretraining_s": world.pretraining_s}
            own = made.get(RECIPES[0].name)
            if own is not None:
                curve = traded(world, own, requests)
                for coverage, share, loss in curve:
                    more |= {f"coverage_{coverage:g}_unseen": share, f"coverage_{coverage:g}_utility_loss": loss}
                more["overlap_own"] = float(overlaps([slot.part("A") for slot in own.slots]).max())
                RESULTS.mkdir(exist_ok=True)
                (RESULTS / "gated.svg").write_text(picture(curve, weighed(world, requests, chosen.coverage)))
            if chosen.retrained:
                more |= retrained(world, requests, chosen)
    domains = [value for place, value in enumerate(lowest) if place % len(corpus.sequence) < len(DOMAINS)]
    return found, more | {"o3_auroc_min": min(domains), "o3_auroc_min_all": min(lowest)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print what the command line asks for."""
    parser = argparse.ArgumentParser(description="Forgetting without retained data, gated and not.")
    parser.add_argument("--data", type=Path, help="the folder of CLINC150; without it nothing is measured")
    parser.add_argument("--cache", type=Path, help="folder of trained models, filled where empty")
    parser.add_argument("--kept", type=Path, help="folder of what is measured, from which a broken run goes on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--on", choices=("test", "validation"), default="test")
    parser.add_argument("--epochs", type=int, default=2, help="passes over a domain's used queries")
    parser.add_argument("--single", type=int, default=4, help="times as many for a single intent")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--coverage", type=float, default=0.97)
    parser.add_argument("--methods", nargs="+", choices=[recipe.name for recipe in RECIPES], help="default: all")
    parser.add_argument("--retrained", action="store_true", help="train the model anew without the requests' queries")
    chosen = parser.parse_args(arguments)
    if chosen.data is None:
        print("benchmarks.gated measures on CLINC150 only: give --data FOLDER")
        return
    torch.set_num_threads(1)
    try:
        found, more = measured(chosen)
    except LetheError as error:
        raise SystemExit(f"error: {error}") from None
    about = {key: value for key, value in vars(chosen).items() if key not in ("data", "cache", "kept")}
    publish("unlearning", figures=figures_of(found, more), rows=table(found), about=settings(**about), part="gated")


if __name__ == "__main__":
    main()
