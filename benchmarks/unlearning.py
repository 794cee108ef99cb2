"""Classes forgotten one request after another: GS-LoRA(++) beside its baselines, measured to the end of the stream.

    python -m benchmarks.unlearning [--texts FOLDER] [--images FILE.npz] [--cache FOLDER] [--seeds 1] [--first-seed 0]
        [--courses texts few-shot missing] [--methods GS-LoRA SCRUB ...] [--requests 5] [--on test]
        [--base-rows 100] [--epochs 1] [--batch 16] [--forget 20] [--replay 20] [--asked N] [--retrained 0]
        [--attack-seeds 0] [--copies 20] [--known 100] [--set rate=1e-3 ...] [--own "GS-LoRA++:bound=3" ...]
        [--factors 0.3 1 3] [--search 1] [--one-classifier] [--device cuda]

- texts: MiniLM on CLINC150 (a folder with data_full.json.gz and domains.json.gz); the domains work, travel, home and
  banking are forgotten, then single intents.
- few-shot, missing: a vision transformer trained here on an MNIST-shaped file (or on built-in digits), four requests of
  two classes (the last of one in `missing`); few-shot has 4 rows a class, in `missing` classes 0 and 1 have no replay
  row.

Every method gets the same rows and the same number of steps. `--on validation` is for choosing settings.
`--attack-seeds N` attacks the last classifier of the first N seeds; `--retrained N` trains N classifiers for each of
them, without the requests' rows on all the others: what LiRA compares with, and seconds against those of a request (by
row, for the rows that were not asked for so far, mean over the requests).
In few-shot prototypes are also taken of `--copies` distorted copies of every image. On images `--known N` takes them
of N training rows of every class, as a store does, and not only of the rows at hand.
`--set` changes settings of every GS-LoRA, `--own` those of one method. `--factors` tries so many times every method's
own rate, with seed 0 and the first `--search` requests, and keeps the one with the best H on validation rows.
`h_lead_COURSE` is the H of GS-LoRA++ minus that of GS-LoRA, with 95 % of its mean where seeds are redrawn.
"""

import argparse
import gzip
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from benchmarks.measure import RESULTS, publish, redrawn_mean, settings
from lora.errors import DataError, LetheError, nearest
from strategies.unlearning.attacks import (
    RelearningConfig,
    lira_membership,
    loss_membership,
    nearest_prototype,
    probe,
    relearn,
)
from strategies.unlearning.class_baselines import OBJECTIVES, baseline
from strategies.unlearning.class_request import ClassRequest, Method
from strategies.unlearning.classifier import Classifier, fit, image_classifier, text_classifier
from strategies.unlearning.config import BudgetConfig, FitConfig, GsLoraConfig
from strategies.unlearning.folding import SERVED, SERVED_PLUS
from strategies.unlearning.gs_lora import GsLora
from strategies.unlearning.measures import Answers
from strategies.unlearning.prototypes import Prototypes
from strategies.unlearning.stream import Moment, Report, SampleConfig, requests, run, sampled
from tasks.config import DataConfig, ModelConfig
from tasks.data import load_splits
from tasks.encoders import Rows, labels_of
from tasks.images import Images, augmented, builtin_images, load_images
from tasks.vision import VitConfig

DOMAINS = ("work", "travel", "home", "banking")
COURSES = ("texts", "few-shot", "missing")
NUMBERS = {"seeds": 1, "requests": 6, "base-rows": 100, "epochs": 1, "batch": 16, "forget": 20, "replay": 20,
           "retrained": 0, "attack-seeds": 0, "search": 1, "first-seed": 0, "copies": 20,
           "known": 0}  # fmt: skip
RATES = {
    "gradient ascent": 1e-5,
    "gradient difference": 2e-4,
    "NPO": 3e-4,
    "random labels": 2e-4,
    "SCRUB": 3e-4,
    "EWC": 3e-4,
    "retrain": 1.5e-4,
}
"""Of the course on texts."""
FEW = GsLoraConfig(rate=4e-3, bound=3.0, sparsity=0.02, hold_weight=0.5, hold_bound=2.0)
MISSING = GsLoraConfig(rate=8e-3)
PLUS: Mapping[str, Mapping[str, object]] = {
    "texts": SERVED_PLUS.model_dump(include={"prototype_forget", "prototype_retain"}),
    "few-shot": {"prototype_forget": 1.0, "prototype_retain": 10.0},
    "missing": {"rate": 6e-3, "prototype_forget": 1.0, "prototype_retain": 3.0},
}
"""What GS-LoRA++ has otherwise. All of these, and the rates, were chosen on validation rows."""
HEADING = ("course", "method", "request", "Acc_r", "Acc_f", "Acc_o", "Acc_m", "H", "utility loss", "blocks", "CPU s")


@dataclass(frozen=True)
class Course:
    """One task with its stream of requests."""

    name: str
    make: Callable[[int], Classifier]
    train: Rows
    unseen: Rows
    validation: Rows
    sequence: tuple[tuple[int, ...], ...]
    sample: SampleConfig
    budget: BudgetConfig
    fit: FitConfig
    classes: int
    gs: GsLoraConfig
    plus: Mapping[str, object]
    """What GS-LoRA++ has otherwise than GS-LoRA, beside prototypes."""
    copies: int = 0
    """Distorted copies of every image that prototypes are also taken of."""
    known: int = 0
    """Rows of every class that prototypes are taken of when the classifier has been trained; 0: those at hand."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Rates of baselines, where validation chose others than they start from."""


@dataclass
class Found:
    """Figures of one method on one course, over seeds."""

    reports: list[Report] = field(default_factory=list)
    attacks: list[Mapping[str, float]] = field(default_factory=list)

    @property
    def h(self) -> float:
        """Return the mean H over requests and seeds."""
        return statistics.fmean(report.mean_h for report in self.reports)

    @property
    def seconds(self) -> float:
        """Return the mean CPU seconds of a request."""
        return statistics.fmean(moment.outcome.cpu_s for report in self.reports for moment in report.moments)


def texts(chosen: argparse.Namespace) -> Course:
    """Return the course on CLINC150."""
    folder = Path(chosen.texts)
    config = DataConfig(path=str(folder), file="data_full.json.gz", drop_labels=("oos",))
    splits = load_splits(config, kind="classification", seed=0)
    with gzip.open(folder / "domains.json.gz", "rt") as file:
        domains = json.load(file)
    names = {name: place for place, name in enumerate(splits.label_names)}
    whole = [tuple(sorted(names[intent] for intent in domains[domain])) for domain in DOMAINS]
    rest = sorted(set(range(len(names))) - {label for each in whole for label in each})
    single = [(int(label),) for label in np.random.default_rng(0).permutation(rest)]
    model = ModelConfig(name="minilm", device=chosen.device, dtype="float32")
    return Course(
        "texts",
        lambda seed: text_classifier(model, classes=len(names), seed=seed),
        _at_most(splits.train, chosen.base_rows, classes=len(names)),
        _at_most(splits.test if chosen.on == "test" else splits.validation, chosen.asked, classes=len(names)),
        _at_most(splits.validation, chosen.asked, classes=len(names)),
        (*whole, *single)[: chosen.requests],
        SampleConfig(forget=chosen.forget, replay=chosen.replay),
        BudgetConfig(epochs=chosen.epochs, batch=chosen.batch),
        FitConfig(rate=2e-4, head_rate=2e-2),
        len(names),
        SERVED,
        PLUS["texts"],
        rates=RATES,
    )


def images(chosen: argparse.Namespace, name: str) -> Course:
    """Return a course on images: few rows, or classes of which there is none."""
    splits = load_images(Path(chosen.images)) if chosen.images else builtin_images()
    few = name == "few-shot"
    classes = len(splits.label_names)
    sequence: tuple[tuple[int, ...], ...] = tuple((label - 1, label) for label in range(classes - 1, 2, -2))
    if not few:
        # The last pair would leave classes of which there is no row.
        sequence = (*sequence[:-1], sequence[-1][1:])
    return Course(
        name,
        lambda seed: image_classifier(VitConfig(side=splits.train.pixels.shape[2]), classes=classes, seed=seed),
        _at_most(splits.train, 1600, classes=classes),
        _at_most(splits.test if chosen.on == "test" else splits.validation, chosen.asked, classes=classes),
        _at_most(splits.validation, chosen.asked, classes=classes),
        sequence[: chosen.requests],
        SampleConfig(forget=4, replay=4) if few else SampleConfig(forget=50, replay=50, missing=(0, 1)),
        BudgetConfig(epochs=60, batch=8) if few else BudgetConfig(epochs=8, batch=32),
        FitConfig(epochs=6 if chosen.images else 25, batch=64, rate=2e-3, head_rate=2e-3),
        classes,
        FEW if few else MISSING,
        PLUS[name],
        chosen.copies if few else 0,
        chosen.known,
    )


def _at_most(rows: Rows, per_class: int | None, *, classes: int) -> Rows:
    return rows if per_class is None else rows.take(sampled(rows, per_class, classes=range(classes), seed=0))


def trained(course: Course, *, seed: int, cache: Path | None) -> Classifier:
    """Return the course's classifier: from the cache, else trained and put there."""
    classifier = course.make(seed)
    kind = "texts" if course.name == "texts" else "images"
    path = None if cache is None else cache / f"{kind}-{len(course.train)}-{seed}.safetensors"
    if path is not None and path.is_file():
        return classifier.load(path)
    fit(classifier, course.train, course.fit, seed=seed)
    if path is not None:
        classifier.save(path)
    return classifier


VARIANTS: Mapping[str, Mapping[str, object]] = {
    "GS-LoRA": {},
    "GS-LoRA++": {"prototypes": True},
    "plain LoRA": {"sparsity": 0.0},
    "GS-LoRA subgradient": {"structure": "subgradient", "sparsity": 0.01},
}
NAMES = (*VARIANTS, *OBJECTIVES, "retrain")
Own = Mapping[str, Mapping[str, str]]


def method(
    course: Course, name: str, *, settled: Mapping[str, object], own: Mapping[str, str], factor: float
) -> Method:
    """Return a method; `settled` are settings of every GS-LoRA, `own` those of this method, which win.

    `factor` is of its rate. Raises DataError for a method or a setting that does not exist.
    """
    if name in VARIANTS:
        usual = course.gs.model_dump() | dict(VARIANTS[name]) | (dict(course.plus) if name == "GS-LoRA++" else {})
        config = GsLoraConfig.model_validate(usual | dict(settled) | dict(own))
        return GsLora(config.model_copy(update={"rate": config.rate * factor}), name=name)
    if name not in NAMES:
        raise DataError(f"no method is called '{name}'{nearest(name, NAMES)}")
    if set(own) - {"rate"}:
        raise DataError(f"{name} has no setting '{min(set(own) - {'rate'})}' here; only rate")
    usual_rate = course.rates.get(name, FitConfig().rate if name == "retrain" else OBJECTIVES[name][1])
    return baseline(name, rate=float(own.get("rate", usual_rate)) * factor)


def own_of(entries: Sequence[str]) -> Own:
    """Read `--own`."""
    found: dict[str, dict[str, str]] = {}
    for entry in entries:
        name, _, setting = entry.partition(":")
        key, _, value = setting.partition("=")
        found.setdefault(name, {})[key] = value
    return found


def searched(course: Course, chosen: argparse.Namespace, names: Sequence[str]) -> dict[str, float]:
    """Return for every method the factor of its rate with the best H on validation rows, seed 0."""
    if not chosen.factors:
        return dict.fromkeys(names, 1.0)
    settled, own = dict(each.partition("=")[::2] for each in chosen.set), own_of(chosen.own)
    classifier = trained(course, seed=0, cache=chosen.cache and Path(chosen.cache))
    stream = asked(course, classifier, seed=0)[: chosen.search]
    best = {}
    for name in names:
        tried = {}
        for factor in chosen.factors:
            each = method(course, name, settled=settled, own=own.get(name, {}), factor=factor)
            report = run(
                classifier, each, stream, unseen=course.validation, budget=course.budget, seed=0,
                missing=course.sample.missing,
            )  # fmt: skip
            tried[factor] = report.mean_h
        best[name] = max(tried, key=tried.__getitem__)
        told = ", ".join(f"x {factor:g} {100 * h:.2f} %" for factor, h in tried.items())
        print(f"{course.name}, rates of {name}, H on validation: {told}", flush=True)
    return best


def asked(course: Course, classifier: Classifier, *, seed: int) -> list[ClassRequest]:
    """Return the requests of a seed, with prototypes taken of what is held at the start."""
    sample = course.sample.model_copy(update={"seed": seed})
    held = [sampled(course.train, course.known, classes=range(course.classes), seed=seed)]
    if not course.known:
        staying = set(range(course.classes)) - set(sample.missing)
        held = [sampled(course.train, sample.replay, classes=staying, seed=seed)]
        held += [sampled(course.train, sample.forget, classes=named, seed=seed) for named in course.sequence]
    rows = classifier.encoder.prepared(course.train)
    own = rows.take(np.unique(np.concatenate(held)))
    copies = augmented(own, copies=course.copies, seed=seed) if course.copies and isinstance(own, Images) else None
    prototypes = Prototypes.of(classifier, own, classes=course.classes, copies=copies)
    return list(requests(rows, course.sequence, sample, classes=course.classes, prototypes=prototypes))


def measured(course: Course, chosen: argparse.Namespace, lines: list[list[str]]) -> dict[str, Found]:
    """Run every method with every seed."""
    settled, own = dict(each.partition("=")[::2] for each in chosen.set), own_of(chosen.own)
    factors = searched(course, chosen, chosen.methods or NAMES)
    known = {name: method(course, name, settled=settled, own=own.get(name, {}), factor=factor)
             for name, factor in factors.items()}  # fmt: skip
    found = {name: Found() for name in known}
    for seed in range(chosen.first_seed, chosen.first_seed + chosen.seeds):
        first = 0 if chosen.one_classifier else seed
        classifier = trained(course, seed=first, cache=chosen.cache and Path(chosen.cache))
        stream = asked(course, classifier, seed=seed)
        attacking = seed < chosen.first_seed + chosen.attack_seeds
        before = Answers.of(classifier, course.unseen)
        gold = retrained(course, stream, count=chosen.retrained if attacking else 0, seed=seed, lines=lines)
        for name, each in found.items():
            report = run(
                classifier,
                known[name],
                stream,
                unseen=course.unseen,
                budget=course.budget,
                seed=seed,
                missing=course.sample.missing,
                before=before,
                on_moment=lambda moment, name=name: lines.append(_told(course, name, moment)),  # type: ignore[misc]
            )
            each.reports.append(report)
            print("\n".join(f"{name}: {line}" for line in report.lines), flush=True)
            if attacking:
                each.attacks.append(attacked(course, report.moments[-1].outcome.model, stream, gold))
                print(f"{name}: {each.attacks[-1]}", flush=True)
    return found


def _told(course: Course, name: str, moment: Moment) -> list[str]:
    stands, outcome = moment.standing, moment.outcome
    shares = (stands.acc_r, stands.acc_f, stands.acc_o, stands.acc_m, stands.h)
    blocks = f"{len(outcome.blocks.selected)} of {len(outcome.blocks.factors[0])}" if outcome.blocks else ""
    told = ["" if np.isnan(share) else f"{100 * share:.2f}" for share in shares]
    line = [course.name, name, str(moment.time), *told, f"{stands.utility_loss:.2f}", blocks, f"{outcome.cpu_s:.1f}"]
    print(" | ".join(line), flush=True)
    return line


def retrained(
    course: Course, stream: Sequence[ClassRequest], *, count: int, seed: int, lines: list[list[str]]
) -> list[Classifier]:
    """Train classifiers anew on all rows but those of classes that the stream forgets."""
    gone = {label for request in stream for label in request.classes}
    kept = sampled(course.train, len(course.train), classes=set(range(course.classes)) - gone, seed=seed)
    made = []
    for number in range(count):
        begun = time.process_time()
        fresh = course.make(1000 * (seed + 1) + number)
        fit(fresh, course.train.take(kept), course.fit, seed=1000 * (seed + 1) + number)
        lines.append([course.name, "retrained whole", *[""] * 8, f"{time.process_time() - begun:.1f}"])
        made.append(fresh)
    return made


def so_far(course: Course) -> float:
    """Return the rows that retraining after a request takes (those not asked for so far), mean over the requests.

    Over the rows that are left at the end, which is what `retrained` trains on and times.
    """
    labels, gone, left = labels_of(course.train), set[int](), []
    for named in course.sequence:
        gone |= set(named)
        left.append(int((~np.isin(labels, sorted(gone))).sum()))
    return statistics.fmean(left) / left[-1]


def attacked(
    course: Course, model: Classifier, stream: Sequence[ClassRequest], gold: Sequence[Classifier]
) -> dict[str, float]:
    """Try to bring the first request back from a classifier at the end of the stream."""
    request = stream[0]
    others = sampled(course.unseen, len(course.unseen), classes=request.classes, seed=0)
    unseen = model.encoder.prepared(course.unseen).take(others)
    members, strangers = Answers.of(model, request.forget), Answers.of(model, unseen)
    target = 0.8
    found = {"loss_mia": loss_membership(members, strangers)}
    if len(request.classes) > 1:
        found |= {
            "probe": probe(model, request.forget, unseen),
            "prototype": nearest_prototype(model, request.forget, unseen),
        }
    for name, each in {"": model, **({"_retrained": gold[0]} if gold else {})}.items():
        again = relearn(each, request.forget, unseen, target=target, config=RelearningConfig(), seed=0)
        found[f"relearning_steps{name}"] = float("inf") if again.steps is None else float(again.steps)
    if gold and len(request.classes) > 1:
        found["probe_retrained"] = probe(gold[0], request.forget, unseen)
    if len(gold) > 1:
        pairs = [(Answers.of(each, request.forget), Answers.of(each, unseen)) for each in gold]
        found["lira_mia"] = lira_membership(members, strangers, without=pairs)
    return found


def figures(
    found: Mapping[str, Mapping[str, Found]],
    lines: Sequence[Sequence[str]],
    earlier: Mapping[str, float],
    *,
    retrain_share: float = 1.0,
) -> dict[str, float]:
    """Return what the results file holds; a figure whose course or method was left out is not there.

    `earlier` are the file's figures: the best baseline may have been measured by another command. `retrain_share`:
    see `so_far`.
    """
    made: dict[str, float] = {}
    for course, methods_of in found.items():
        key = course.replace("-", "_")
        for name, each in methods_of.items():
            made |= {f"{what}_{key}_{_key(name)}": value for what, value in of_method(each).items()}
        if {"GS-LoRA", "GS-LoRA++"} <= methods_of.keys() and len(methods_of["GS-LoRA"].reports) > 1:
            pairs = zip(methods_of["GS-LoRA++"].reports, methods_of["GS-LoRA"].reports, strict=True)
            lead = redrawn_mean([plus.mean_h - gs.mean_h for plus, gs in pairs])
            made |= {f"h_lead{end}_{key}": value for end, value in zip(("", "_low", "_high"), lead, strict=True)}
        known = {**earlier, **made}
        rivals = [known[f"h_{key}_{_key(name)}"] for name in OBJECTIVES if f"h_{key}_{_key(name)}" in known]
        if rivals:
            made[f"h_best_baseline_{key}"] = max(rivals)
    gs = found.get("texts", {}).get("GS-LoRA")
    whole = [float(line[-1]) for line in lines if line[:2] == ["texts", "retrained whole"]]
    if gs is not None and whole:
        made["retrain_over_request_s"] = statistics.fmean(whole) * retrain_share / gs.seconds
    renamed = {
        "h_gs_lora": "h_texts_gs_lora",
        "h_gs_lora_pp_fewshot": "h_few_shot_gs_lorapp",
        "h_best_baseline": "h_best_baseline_texts",
        "gs_forget_acc_end_max": "forget_acc_end_max_texts_gs_lora",
        "gs_utility_loss_points": "utility_loss_points_texts_gs_lora",
    }
    return made | {name: made[source] for name, source in renamed.items() if source in made}


def of_method(found: Found) -> dict[str, float]:
    """Return one method's figures on one course: means over seeds and requests, but for `_max` and the worst loss."""
    moments = [moment for report in found.reports for moment in report.moments]
    stands = [moment.standing for moment in moments]
    each = [report.mean_h for report in found.reports]
    made = {
        "h": found.h,
        "h_sd": statistics.stdev(each) if len(each) > 1 else 0.0,
        "acc_r": statistics.fmean(stand.acc_r for stand in stands),
        "acc_f": statistics.fmean(stand.acc_f for stand in stands),
        "acc_o": float(np.nanmean([stand.acc_o for stand in stands])) if len(stands) > len(each) else float("nan"),
        "acc_m": float(np.mean([stand.acc_m for stand in stands])),
        "forget_acc_end_max": max(report.worst_forget_accuracy for report in found.reports),
        "utility_loss_points": max(report.worst_utility_loss for report in found.reports),
        "request_s": found.seconds,
    }
    last = [moment.outcome.trace[-1] for moment in moments if moment.outcome.trace]
    if last and "at_bound" in last[0]:
        made["at_bound"] = statistics.fmean(trace["at_bound"] for trace in last)
    carried = [moment.outcome.blocks for moment in moments if moment.outcome.blocks is not None]
    if carried:
        made["blocks"] = statistics.fmean(len(blocks.selected) for blocks in carried)
        made["update_norm"] = statistics.fmean(sum(blocks.updates[-1].values()) for blocks in carried)
    for lines in zip(*(report.lines for report in found.reports), strict=True):
        at = f"request_{lines[0].request}_after_{lines[0].time}"
        made[f"{at}_seen"] = statistics.fmean(line.seen for line in lines)
        made[f"{at}_unseen"] = statistics.fmean(line.unseen for line in lines)
    for name in found.attacks[0] if found.attacks else ():
        made[name] = statistics.fmean(attack[name] for attack in found.attacks)
    return {name: value for name, value in made.items() if np.isfinite(value)}


def _key(name: str) -> str:
    return name.lower().replace("++", "pp").replace(" ", "_").replace("-", "_")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print what the command line asks for."""
    parser = argparse.ArgumentParser(description="Classes forgotten one request after another.")
    parser.add_argument("--texts", help="a folder with CLINC150; without it the course on texts is left out")
    parser.add_argument("--images", help="an NPZ file such as mnist.npz; default: built-in digits")
    parser.add_argument("--cache", help="folder of trained classifiers, filled where empty")
    parser.add_argument("--courses", nargs="+", choices=COURSES, default=COURSES)
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of every GS-LoRA")
    parser.add_argument("--own", nargs="+", default=[], metavar="METHOD:KEY=VALUE", help="settings of one method")
    parser.add_argument(
        "--factors", nargs="+", type=float, default=[], help="times every method's rate, to choose from"
    )
    parser.add_argument("--on", choices=("test", "validation"), default="test", help="what accuracy is measured on")
    parser.add_argument(
        "--one-classifier", action="store_true", help="all seeds forget from one; they draw rows, adapters and batches"
    )
    parser.add_argument("--device", default="cpu", help="of the course on texts: cpu, cuda, cuda:N")
    for name, usual in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--asked", type=int, help="rows of every class that accuracy is measured on; default: all")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, dict[str, Found]] = {}
    lines, share = [[*HEADING]], 1.0
    try:
        for name in chosen.courses:
            if name != "texts" or chosen.texts:
                course = texts(chosen) if name == "texts" else images(chosen, name)
                found[name] = measured(course, chosen, lines)
                share = so_far(course) if name == "texts" else share
    except (LetheError, ValidationError) as error:
        raise SystemExit(f"error: {error}") from None
    about = {key: value for key, value in vars(chosen).items() if key not in ("texts", "images", "cache")}
    part = " ".join(found) + (f": {', '.join(chosen.methods)}" if chosen.methods else "")
    path = RESULTS / "unlearning.json"
    earlier = json.loads(path.read_text())["figures"] if path.exists() else {}
    made = figures(found, lines, earlier, retrain_share=share)
    publish("unlearning", figures=made, rows=lines, about=settings(**about), part=part)


if __name__ == "__main__":
    main()
