"""Authors forgotten one request after another: TOFU's forget01, then 05, then 10, by O3 and beside it.

    python -m benchmarks.tofu --data FOLDER [--cache FOLDER] [--seeds 1] [--authors 180] [--epochs 20] [--on test]
        [--passes 8] [--least-steps 40] [--rate 3e-3] [--coverage 0.97] [--sample 200] [--without-retrained]
        [--width 192] [--layers 3] [--batch 8] [--model-rate 2e-3] [--device cuda]

FOLDER holds TOFU (retain90 and forget01/05/10 as `.jsonl.gz`). A Llama of 2 M parameters is trained here on all pairs
of `--authors` authors that stay (180 are all) and of the 20 that are to be forgotten, until it knows them by heart; it
knows nothing else, so that TOFU's real authors and world facts are not asked.
Requests are 2 authors (forget01), 8 more (the rest of forget05) and 10 more. Each method reads the request's own pairs
and nothing else; an audit checks it.

- O3: one slot a request over blocks of one orthonormal frame, which learns to refuse (hard gate; MiniLM on the question
  is the detector, its classes are the authors). refusals, ascent, NPO: the same slots, always on.
- probability: of the true answer, by token (geometric mean), over rows. ROUGE: words of the true answer that the greedy
  answer has in order (recall). refused: greedy answers that are a refusal. unended: those that do not end.
- forgotten: all authors asked to be forgotten so far, by the questions that were trained on (seen) and by paraphrases
  of them (unseen), at most `--sample` pairs. rest: as many pairs that stay (others with `--on validation`, which is for
  choosing settings).
- forget quality: p-value of the Kolmogorov-Smirnov test between the truth ratios of forgotten pairs under the method
  and under a model trained without them (large: not told apart), as in TOFU; its figures for the same model untouched
  are in the row `before`.
- AUROC: paraphrased questions of a request against the questions of all 180 authors that stay.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score

from benchmarks.authors import (
    HEAD,
    Pairs,
    Training,
    Weights,
    World,
    likelihoods,
    made_world,
    read,
    recall,
    said,
    truth_ratios,
)
from benchmarks.measure import DEVICES, publish, seconds, settings
from lora.errors import LetheError
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.config import ForgettingConfig
from strategies.unlearning.detector import Detector, Detectors, fit_detector
from strategies.unlearning.forgotten import detector_settings
from strategies.unlearning.frames import OrthogonalFrames
from strategies.unlearning.gate import ForgettingGate, Weighting
from strategies.unlearning.o3 import Slot, SlotSettings, slot_bank, unlearn
from strategies.unlearning.objectives import ASCEND, LEARN, REFUSALS, Descent, Refusals, prefer_less
from tasks.examples import Examples
from tasks.tokens import tokenize_classification

HEADING = ("method", "after", "probability seen", "probability unseen", "ROUGE seen", "ROUGE unseen", "refused unseen",
           "unended", "probability rest", "ROUGE rest", "refused rest", "forget quality", "s")  # fmt: skip
NAMES = ("forget01", "forget05", "forget10")


@dataclass(frozen=True)
class Recipe:
    """How a method's slots are made and when they answer."""

    name: str
    weighting: Weighting
    refuses: bool
    descent: Descent = LEARN
    rate: float | None = None


RECIPES = (
    Recipe("O3", "hard", True),
    Recipe("refusals", "always", True),
    Recipe("ascent", "always", False, ASCEND, rate=3e-4),
    Recipe("NPO", "always", False, prefer_less(), rate=1e-3),
)


@dataclass
class Method:
    """The slots and detectors of the requests so far."""

    recipe: Recipe
    slots: list[Slot] = field(default_factory=list)
    detectors: list[Detector] = field(default_factory=list)
    seconds: float = 0.0

    def gate(self) -> ForgettingGate | None:
        """Return the gate, None before the first request."""
        if not self.slots:
            return None
        return ForgettingGate(Detectors(self.detectors), slot_bank(self.slots), self.recipe.weighting)

    def weights(self, world: World, questions: Sequence[str]) -> Weights:
        """Return every slot's weight for every question, None before the first request."""
        gate = self.gate()
        return None if gate is None else gate.mixture(world.features(questions)).weights


@dataclass
class Standing:
    """What a method says of one set of pairs."""

    probability: float
    rouge: float
    refused: float
    unended: float


def answered(world: World, method: Method, pairs: Pairs, *, chosen: argparse.Namespace, seed: int) -> None:
    """Answer a request with one slot more."""
    device = str(world.learner.device)
    begun = seconds(device)
    recipe, sites = method.recipe, world.learner.adapted.sites
    config = SlotSettings(epochs=chosen.passes, least_steps=chosen.least_steps, rate=recipe.rate or chosen.rate)
    frames = OrthogonalFrames(sites, rank=config.rank, seed=seed, beside=world.learner.adapted.frame)
    request = AuditedRequest(pairs.examples, seed=seed)
    made = unlearn(
        world.learner, request, Refusals() if recipe.refuses else _same, model=world.learner.start(),
        slot=Slot.fresh(sites, frames.block(len(method.slots))), settings=config, descent=recipe.descent, seed=seed,
    )  # fmt: skip
    method.slots.append(made.slot)
    method.detectors.append(detector(world, pairs, chosen=chosen, seed=seed))
    method.seconds = seconds(device) - begun


def _same(examples: Examples, source: object) -> Examples:
    return examples


def stands(world: World, method: Method, pairs: Pairs, questions: Sequence[str]) -> Standing:
    """Ask questions whose answers are those of the pairs."""
    gate, weights = method.gate(), method.weights(world, questions)
    examples = Pairs(tuple(questions), pairs.answers, pairs.authors).examples
    given = said(world, questions, gate, weights)
    refusals = set(REFUSALS)
    return Standing(
        float(likelihoods(world, examples, gate, weights).mean()),
        statistics.fmean(recall(wanted, each) for wanted, each in zip(pairs.answers, given, strict=True)),
        statistics.fmean(each in refusals for each in given),
        statistics.fmean(each is None for each in given),
    )


@dataclass(frozen=True)
class Course:
    """What is asked: the pairs that stay, the requests, and the models."""

    rest: Pairs
    requests: Sequence[Pairs]
    world: World
    without: World | None
    """Trained on the rest alone."""
    sample: int = 200
    """Most pairs that are asked of the forgotten ones."""

    def asked(self, count: int) -> Pairs:
        """Return pairs of the first requests, the same of as many whenever they are asked."""
        pairs = self.forgotten(count)
        return pairs.take(np.random.default_rng(0).permutation(len(pairs))[: self.sample].tolist())

    def forgotten(self, count: int) -> Pairs:
        """Return the pairs of the first requests."""
        columns = [each.take(range(len(each))) for each in self.requests[:count]]
        return Pairs(*(sum((getattr(each, name) for each in columns), ()) for name in (
            "questions", "answers", "authors", "paraphrased", "wrong", "other_questions")))  # fmt: skip


def quality(course: Course, method: Method, pairs: Pairs) -> float:
    """Return the p-value of TOFU's test, NaN without a model to compare with."""
    if course.without is None:
        return float("nan")
    weights = method.weights(course.world, pairs.questions)
    ours = truth_ratios(course.world, pairs, method.gate(), weights)
    theirs = truth_ratios(course.without, pairs, None, None)
    return float(ks_2samp(ours, theirs).pvalue)


def row(course: Course, method: Method, count: int) -> dict[str, float]:
    """Measure a method after some requests; before the first, of what the third will have asked for."""
    pairs, world = course.asked(count or len(course.requests)), course.world
    seen = stands(world, method, pairs, pairs.questions)
    unseen = stands(world, method, pairs, pairs.other_questions)
    rest = stands(world, method, course.rest, course.rest.questions)
    return {
        "probability_seen": seen.probability, "probability_unseen": unseen.probability,
        "rouge_seen": seen.rouge, "rouge_unseen": unseen.rouge, "refused_unseen": unseen.refused,
        "unended": max(seen.unended, unseen.unended, rest.unended),
        "probability_rest": rest.probability, "rouge_rest": rest.rouge, "refused_rest": rest.refused,
        "forget_quality": quality(course, method, pairs), "s": method.seconds,
    }  # fmt: skip


def streamed(course: Course, chosen: argparse.Namespace, seed: int) -> dict[tuple[str, str], dict[str, float]]:
    """Answer all requests with every method; measure after each."""
    found = {("before", "all"): row(course, Method(RECIPES[0]), 0)}
    print(f"seed {seed}, before: {told(found['before', 'all'])}", flush=True)
    for recipe in RECIPES:
        if chosen.methods and recipe.name not in chosen.methods:
            continue
        method = Method(recipe)
        for count, pairs in enumerate(course.requests, start=1):
            answered(course.world, method, pairs, chosen=chosen, seed=seed)
            if recipe.weighting == "always" and count < len(course.requests):
                continue
            found[recipe.name, NAMES[count - 1]] = row(course, method, count)
            print(
                f"seed {seed}, {recipe.name}, {NAMES[count - 1]}: {told(found[recipe.name, NAMES[count - 1]])}",
                flush=True,
            )
    return found


def detector(world: World, pairs: Pairs, *, chosen: argparse.Namespace, seed: int) -> Detector:
    """Make a request's detector of its questions."""
    asked = AuditedRequest(pairs.asked, seed=seed)
    tokens = tokenize_classification(pairs.asked, world.tokenizer, max_length=64)
    settings_ = replace(detector_settings(ForgettingConfig()), coverage=chosen.coverage)
    return fit_detector(world.encoder, asked, tokens, settings=settings_)


def aurocs(
    world: World, rest: Pairs, requests: Sequence[Pairs], chosen: argparse.Namespace, seed: int
) -> dict[str, float]:
    """Return how well every request's detector tells its paraphrased questions from those of authors that stay."""
    found, strange = {}, world.features(rest.questions)
    for name, pairs in zip(NAMES, requests, strict=True):
        made = Detectors([detector(world, pairs, chosen=chosen, seed=seed)])
        own = world.features(pairs.other_questions)
        distances = made.distances(torch.cat([own, strange]))[:, 0].numpy()
        found[f"auroc_{name}"] = float(roc_auc_score(np.arange(len(distances)) >= len(own), distances))
        found[f"caught_{name}"] = float((distances[: len(own)] <= made.each[0].threshold).mean())
        found[f"touched_{name}"] = float((distances[len(own) :] <= made.each[0].threshold).mean())
    return found


def told(figures: Mapping[str, float]) -> str:
    """Say figures in words."""
    return ", ".join(f"{name} {value:.3g}" for name, value in figures.items())


def measured(chosen: argparse.Namespace) -> tuple[dict[str, float], list[list[str]]]:
    """Run all seeds; return figures and the printed rows."""
    all_rest, requests = read(chosen.data)
    staying = set(np.random.default_rng(1).permutation(sorted(set(all_rest.authors)))[: chosen.authors].tolist())
    rest = all_rest.take([row for row, author in enumerate(all_rest.authors) if author in staying])
    order = np.random.default_rng(0).permutation(len(rest))
    part = order[: chosen.sample] if chosen.on == "test" else order[-chosen.sample :]
    whole = Course(rest, requests, None, None).forgotten(len(requests))  # type: ignore[arg-type]
    both = Pairs(rest.questions + whole.questions, rest.answers + whole.answers, rest.authors + whole.authors)
    texts = [*map(str, both.questions), *both.answers, "Question: Answer:", *REFUSALS]
    runs, more = [], {}
    how = Training(chosen.epochs, chosen.width, chosen.layers, chosen.batch, chosen.model_rate, chosen.device)
    for seed in range(chosen.seeds):
        cache = (chosen.cache or Path("runs") / "tofu") / f"{chosen.authors}"
        world = made_world(cache, both, name="whole", how=how, seed=seed, texts=texts)
        without = None
        if not chosen.without_retrained:
            without = made_world(cache, rest, name="without", how=how, seed=seed, texts=texts)
            more["retrain_s"] = without.training_s
        course = Course(rest.take(part.tolist()), requests, world, without, chosen.sample)
        runs.append(streamed(course, chosen, seed))
        more |= {"training_s": world.training_s} | aurocs(world, all_rest, requests, chosen, seed)
    more = {f"tofu_{name}": value for name, value in more.items()}
    mean = {key: {name: statistics.fmean(run[key][name] for run in runs) for name in figures}
            for key, figures in runs[0].items()}  # fmt: skip
    figures = more | {f"tofu_{method}_{after}_{name}": value
                      for (method, after), each in mean.items() for name, value in each.items()}  # fmt: skip
    rows = [[*HEADING], *([method, after, *(f"{value:.3g}" for value in each.values())]
                          for (method, after), each in mean.items())]  # fmt: skip
    return figures, rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print what the command line asks for."""
    parser = argparse.ArgumentParser(description="TOFU's authors forgotten one request after another.")
    parser.add_argument("--data", type=Path, help="the folder of TOFU; without it nothing is measured")
    parser.add_argument("--cache", type=Path, help="folder of trained models, filled where empty")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--authors", type=int, default=180, help="authors that stay, of 180")
    parser.add_argument("--epochs", type=int, default=20, help="passes of the model over all pairs")
    parser.add_argument("--on", choices=("test", "validation"), default="test")
    parser.add_argument("--passes", type=int, default=8, help="passes of a slot over its request")
    parser.add_argument("--least-steps", type=int, default=40, help="more passes for small requests")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--coverage", type=float, default=ForgettingConfig().coverage)
    parser.add_argument(
        "--sample", type=int, default=200, help="pairs that are asked of those that stay, and of the forgotten ones"
    )
    parser.add_argument("--methods", nargs="+", choices=[recipe.name for recipe in RECIPES], help="default: all")
    parser.add_argument("--without-retrained", action="store_true", help="no model without the requests, no quality")
    usual = Training()
    parser.add_argument("--width", type=int, default=usual.width, help=f"of the model, a multiple of {HEAD}")
    parser.add_argument("--layers", type=int, default=usual.layers)
    parser.add_argument("--batch", type=int, default=usual.batch, help="pairs of a step of the model's training")
    parser.add_argument("--model-rate", type=float, default=usual.rate, help="the model's largest rate")
    parser.add_argument("--device", default="cpu", help=DEVICES)
    chosen = parser.parse_args(arguments)
    if chosen.width < HEAD or chosen.width % HEAD:
        parser.error(f"--width={chosen.width} is no multiple of {HEAD}")
    if chosen.data is None:
        print("benchmarks.tofu measures on TOFU only: give --data FOLDER")
        return
    torch.set_num_threads(1)
    try:
        figures, rows = measured(chosen)
    except LetheError as error:
        raise SystemExit(f"error: {error}") from None
    about = {key: value for key, value in vars(chosen).items() if key not in ("data", "cache")}
    publish("unlearning", figures=figures, rows=rows, about=settings(**about), part="tofu")


if __name__ == "__main__":
    main()
