"""Forgetting without retained data: O3's gated slots beside methods that read the request alone and have no gate.

    python -m benchmarks.gated --data FOLDER [--cache FOLDER] [--kept FOLDER] [--seeds 3] [--requests 6] [--on test]
        [--epochs 1] [--least-steps 24] [--factor 1] [--coverage 0.97] [--folds 8] [--retrained] [--device cuda]

FOLDER holds `data_full.json.gz` and `domains.json.gz` of CLINC150. The model is MiniLM with FFA-LoRA's B and a head,
trained here on all training queries (`--models` of them; seeds draw the rest); the frozen MiniLM without them is the
detectors' encoder. Requests come one after another: the domains work, travel, home and banking, then single intents.
Each reads its own training queries and nothing else, which an audit checks: 80 % for slot, statistics and
(left out in turn) threshold, 20 % for the scale. Settings are those of a forgetting store (`forgetting:`) unless given.

- own slots: one slot a request over blocks of one orthonormal frame (ours), which learns the model's next best label;
  carried: one adapter for all requests with the penalty on overlap and random labels (the paper).
- gates: hard (within the threshold), soft (the paper's formula, which touches every row), cut, none (always on).
  The first gate is measured after every request, the others at the end and with the first seed alone.
- ungated: one slot a request, always on: next best label, random labels (O3's own answers, as preference optimisation
  has them), gradient ascent, NPO; one pass each, with the first seed alone. Gradient difference reads retained data: it
  is in `benchmarks.unlearning`.
- seen, unseen: accuracy on a request's own training queries (at most 300 of each request, drawn once) and on its test
  queries, at the end of the stream; `worst` is the largest of all requests. Utility loss: points lost on the test
  queries of all other intents, out-of-scope ones left out.
- retrain over request: CPU seconds of training the model without what was asked so far (the model's own training time
  by step), mean over the requests, over the CPU seconds of a request: features, statistics, threshold and slot. With
  `--device cuda` all are the clock's.
- relearned (`--retrained`, first seed): the first request's slot trained further on 5 queries of each of its intents
  with their true labels, always on, beside a fresh slot on a model that was trained without all requests.
- `--on validation` asks validation queries, to choose settings. What gates cost: `python -m benchmarks.gate_costs`.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.gated_stream import (
    RECIPES,
    Asked,
    Found,
    Method,
    add_arguments,
    asked,
    forgetting,
    key_of,
    model_of,
    streamed,
    through,
    without,
)
from benchmarks.intents import DOMAINS, Corpus, World, logits_of, made_world, taken
from benchmarks.measure import RESULTS, publish, settings
from lethe.page import STYLE
from lethe.plots import Canvas, percent, plain, ticks
from lora.errors import LetheError
from strategies.unlearning.attacks import loss_membership
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.detector import (
    Detectors,
)
from strategies.unlearning.forgotten import detector_settings, slot_settings
from strategies.unlearning.frames import overlaps
from strategies.unlearning.measures import Answers
from strategies.unlearning.o3 import Slot, slot_bank, unlearn
from tasks.examples import Examples
from tasks.tokens import Ids

COVERAGES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99, 1.0)
RELEARNED = (0, 2, 4, 8, 16, 32)
"""Passes over the rows that an attacker has."""
ATTACKER = 5
"""Queries of each intent that an attacker has."""
HEADING = ("method", "gate", "worst at end", "mean seen", "mean unseen", "utility loss", "worst utility loss", "H",
           "rows touched", "loss MIA", "s a request")  # fmt: skip


def traded(
    world: World, method: Method, requests: Sequence[Asked], chosen: argparse.Namespace
) -> list[tuple[float, float, float]]:
    """Return for every coverage the mean accuracy on unseen forgotten queries and the points that the rest lost."""
    rows, settings_ = [], detector_settings(forgetting(chosen))
    gone = {label for one in requests for label in one.labels}
    rest = set(range(len(world.corpus.names))) - gone
    known: dict[int, tuple[Tensor, Tensor]] = {}
    for coverage in COVERAGES:
        detectors = [one.detector(world.encoder, replace(settings_, coverage=coverage)) for one in requests]
        after, _ = through(replace(method, detectors=detectors).gate("hard"), world, world.asked, known)
        before = Answers(after.labels, world.asked.logits)
        unseen = statistics.fmean(after.accuracy(one.labels) for one in requests)
        rows.append((coverage, unseen, 100 * (before.accuracy(rest) - after.accuracy(rest))))
    return rows


def distances_of(world: World, requests: Sequence[Asked], chosen: argparse.Namespace) -> tuple[Detectors, Tensor, Ids]:
    """Return the detectors, the distances of all asked queries and the out-of-scope ones, and their labels (-1)."""
    made = Detectors([one.detector(world.encoder, detector_settings(forgetting(chosen))) for one in requests])
    distances = torch.cat([made.distances(each.features) for each in (world.asked, world.strange)])
    return (
        made,
        distances,
        np.concatenate([np.asarray(world.asked.tokens.labels), np.full(len(world.strange.tokens), -1)]),
    )


def aurocs(world: World, requests: Sequence[Asked], chosen: argparse.Namespace) -> list[float]:
    """Return how well each request's detector tells its asked queries from all others and the out-of-scope ones."""
    _, distances, labels = distances_of(world, requests, chosen)
    return [float(roc_auc_score(~np.isin(labels, one.labels), distances[:, place].numpy()))
            for place, one in enumerate(requests)]  # fmt: skip


def weighed(
    world: World, requests: Sequence[Asked], chosen: argparse.Namespace
) -> tuple[dict[str, NDArray[np.float64]], dict[str, float]]:
    """Return histograms (shares of ten bins) of the paper's weight of the first request, and shares of the hard gate.

    Of its own queries, of other intents, and of those out of scope; both over all queries of the kind.
    """
    made, distances, labels = distances_of(world, requests[:1], chosen)
    own = np.isin(labels, requests[0].labels)
    of = {"its own queries": own, "other intents": ~own & (labels >= 0), "out of scope": labels < 0}
    weights = made.each[0].weight(distances[:, 0]).numpy()
    within = distances[:, 0].numpy() <= made.each[0].threshold
    histograms = {name: np.histogram(weights[rows], bins=10, range=(0, 1))[0] / max(1, rows.sum())
                  for name, rows in of.items()}  # fmt: skip
    shares = {f"{kind}_{name.replace(' ', '_')}": float(value[rows].mean())
              for name, rows in of.items()
              for kind, value in (("soft_weight", weights), ("hard_share", within))}  # fmt: skip
    return histograms, shares


def picture(
    curve: Sequence[tuple[float, float, float]], weights: Mapping[str, NDArray[np.float64]], *, coverage: float
) -> str:
    """Draw the trade-off of the hard gate on the left and the soft gate's weights on the right."""
    losses, shares = [loss for _, _, loss in curve], [share for _, share, _ in curve]
    left = Canvas((0.0, max(0.22, 1.1 * max(shares))), (min(0.0, *losses) - 0.1, max(2.4, 1.1 * max(losses))))
    left.y_axis(plain)
    left.x_axis("forgotten accuracy, unseen queries", [(x, percent(x)) for x in ticks(*left.x_range, count=6)])
    for start, end in (((0.1, left.y_range[0]), (0.1, 2.0)), ((0.0, 2.0), (0.1, 2.0))):
        left.line((left.x(start[0]), left.y(start[1])), (left.x(end[0]), left.y(end[1])), "level")
    left.path([(share, loss) for _, share, loss in curve], "curve s1")
    for each, share, loss in curve:
        tip = f"coverage {each:g}: {100 * share:.1f} %, {loss:.2f} points"
        left.dot(left.x(share), left.y(loss), style="f1", tip=tip, radius=5 if each == coverage else 3)
        left.text(left.x(share) + 6, left.y(loss) - 6, f"{each:g}", "start")
    right = Canvas((0.0, 1.0), (0.0, 1.0))
    right.y_axis(percent)
    right.x_axis("weight of the first request's slot (the paper's formula)", [(x / 5, f"{x / 5:g}") for x in range(6)])
    for hue, (name, bins) in enumerate(weights.items(), start=1):
        points = [((place + 0.5) / 10, float(share)) for place, share in enumerate(bins)]
        right.path(points, f"curve s{hue}")
        for x, y in points:
            right.dot(right.x(x), right.y(y), style=f"f{hue}", tip=f"{name}: {100 * y:.1f} %")
    legend = "".join(
        f'<rect class="f{hue}" x="{70 + 130 * (hue - 1)}" y="302" width="10" height="10"/>'
        f'<text x="{85 + 130 * (hue - 1)}" y="311">{name}</text>'
        for hue, name in enumerate(weights, start=1)
    )
    titles = ("utility loss in points, by coverage of the hard gate (dashed: the bounds)",
              "shares of queries by their weight in the soft gate")  # fmt: skip
    plots = "".join(
        f'<g transform="translate({490 * place} 0)"><text x="58" y="20">{title}</text>'
        f'<g transform="translate(0 30)">{"".join(canvas.parts)}</g>{below}</g>'
        for place, (canvas, title, below) in enumerate(zip((left, right), titles, ("", legend), strict=True))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 322" width="980" height="322" role="img" '
        f'aria-label="The gate of forgetting"><style>{STYLE}</style><rect width="980" height="322" fill="var(--bg)"/>'
        f"{plots}</svg>\n"
    )


def retrained(world: World, requests: Sequence[Asked], chosen: argparse.Namespace) -> tuple[World, dict[str, float]]:
    """Train the model anew without the requests' queries; returns it and its figures."""
    gold = without(world, requests, chosen)
    gone = {label for one in requests for label in one.labels}
    own = requests[0].labels
    asks = [gold.seen(own), gold.asked]
    members, strangers = (Answers(np.asarray(each.tokens.labels, dtype=np.int64), each.logits) for each in asks)
    mine = strangers.of_classes(own)
    outside = Answers(strangers.labels[mine], strangers.logits[torch.from_numpy(mine)])
    staying = set(range(len(world.corpus.names))) - gone
    return gold, {"retrain_s": gold.pretraining_s, "loss_mia_retrained": loss_membership(members, outside),
                  "retrained_accuracy": strangers.accuracy(staying)}  # fmt: skip


def same(examples: Examples, source: object) -> Examples:
    """Return the rows with their true labels."""
    return examples


def relearned(world: World, one: Asked, start: Slot, chosen: argparse.Namespace) -> dict[int, float]:
    """Let an attacker train a slot further on a few of a request's queries; returns accuracy on its unseen ones."""
    labels = np.asarray(one.request.examples.labels)
    picked = np.concatenate([np.flatnonzero(labels == label)[:ATTACKER] for label in one.labels])
    mine = np.flatnonzero(np.isin(np.asarray(world.asked.tokens.labels), one.labels))
    slot, found, done = start, dict[int, float](), 0
    for passes in RELEARNED:
        if passes:
            attacker = AuditedRequest(taken(one.request.examples, picked), seed=world.seed)
            config = replace(slot_settings(forgetting(chosen)), epochs=passes - done, batch=16, least_steps=0)
            slot = unlearn(
                world.learner, attacker, same, model=world.model, slot=slot, settings=config, seed=world.seed + passes
            ).slot
            done = passes
        weights = torch.ones(len(world.asked.tokens), 1)
        logits = logits_of(world, world.asked.tokens, mine, (slot_bank([slot]), weights))
        found[passes] = Answers(np.asarray(world.asked.tokens.labels)[mine], logits).accuracy(one.labels)
    return found


def figures_of(found: Mapping[tuple[str, str], Found], more: Mapping[str, float]) -> dict[str, float]:
    """Return what the results file holds."""
    figures = dict(more)
    for (name, gate), each in found.items():
        key = f"{key_of(name)}_{gate}"
        figures |= {
            f"{key}_worst_end": each.worst, f"{key}_utility_loss": each.mean(lambda end: end.utility_loss),
            f"{key}_seen_end": each.mean(lambda end: statistics.fmean(end.seen)),
            f"{key}_unseen_end": each.mean(lambda end: statistics.fmean(end.unseen)),
            f"{key}_h": each.mean(lambda end: end.h), f"{key}_loss_mia": each.mean(lambda end: end.membership),
            f"{key}_s": statistics.fmean(each.seconds),
        }  # fmt: skip
    gated = found.get((RECIPES[0].name, "hard"))
    if gated is not None:
        figures |= {
            "o3_forget_acc_end_max": gated.worst, "o3_utility_loss_points": gated.worst_loss,
            "o3_retrain_over_request_s": statistics.fmean(gated.retraining_s) / statistics.fmean(gated.seconds),
        }  # fmt: skip
        for time_, number in ((t, i) for t in range(len(gated.ways[0])) for i in range(t + 1)):
            for kind in ("seen", "unseen"):
                shares = [getattr(way[time_], kind)[number] for way in gated.ways]
                figures[f"o3_request_{number + 1}_after_{time_ + 1}_{kind}"] = statistics.fmean(shares)
        for number in range(len(gated.ways[0])):
            shares = [getattr(end, kind)[number] for end in gated.ends for kind in ("seen", "unseen")]
            figures[f"o3_request_{number + 1}_end_max"] = max(shares)
            each_s = gated.seconds[number :: len(gated.ways[0])]
            figures[f"o3_request_{number + 1}_s"] = statistics.fmean(each_s)
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


def drawn_first(
    world: World, requests: Sequence[Asked], made: Mapping[str, Method], chosen: argparse.Namespace
) -> dict[str, float]:
    """Return what is measured with the first seed alone, and draw the trade-off."""
    before = Answers(np.asarray(world.asked.tokens.labels, dtype=np.int64), world.asked.logits)
    more = {"accuracy_before": before.accuracy(range(len(world.corpus.names))), "pretraining_s": world.pretraining_s}
    for name, method in made.items():
        frames = method.slots if name.startswith("carried") else method.slots[:0]
        if frames:
            more[f"overlap_{key_of(name)}"] = float(overlaps([slot.part("A") for slot in frames]).max())
    gold = None
    if chosen.retrained:
        gold, figures = retrained(world, requests, chosen)
        more |= figures
    own = made.get(RECIPES[0].name)
    if own is None:
        return more
    curve = traded(world, own, requests, chosen)
    for coverage, share, loss in curve:
        more |= {f"coverage_{coverage:g}_unseen": share, f"coverage_{coverage:g}_utility_loss": loss}
    more["overlap_own"] = float(overlaps([slot.part("A") for slot in own.slots]).max())
    for key in own.reads[0]:
        more[f"o3_reads_{key}"] = float(sum(each.get(key, 0) for each in own.reads))
    histograms, shares = weighed(world, requests, chosen)
    more |= shares
    if chosen.on == "test":
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "gated.svg").write_text(picture(curve, histograms, coverage=chosen.coverage))
    if gold is not None:
        fresh = Slot(own.slots[0].layout, own.slots[0].values.clone())
        fresh.values[fresh.layout.span("B")] = 0
        for who, at, start in (("o3", world, own.slots[0]), ("retrained", gold, fresh)):
            steps = relearned(at, requests[0], start, chosen)
            more |= {f"relearned_{who}_{passes}": share for passes, share in steps.items()}
    return more


def ours(chosen: argparse.Namespace) -> bool:
    """Whether O3's own slots are among the methods, and not the baselines alone."""
    return not chosen.methods or RECIPES[0].name in chosen.methods


def measured(chosen: argparse.Namespace) -> tuple[dict[tuple[str, str], Found], dict[str, float]]:
    """Run all seeds; the first also draws the trade-off."""
    corpus = Corpus.read(chosen.data, requests=chosen.requests, on=chosen.on)
    found: dict[tuple[str, str], Found] = {}
    more: dict[str, float] = {}
    scores: list[list[float]] = []
    worlds: dict[int, World] = {}
    for seed in range(chosen.seeds):
        number = model_of(chosen, seed)
        if number not in worlds:
            worlds[number] = made_world(corpus, cache=chosen.cache, seed=number, device=chosen.device)
            before = Answers(
                np.asarray(worlds[number].asked.tokens.labels, dtype=np.int64), worlds[number].asked.logits
            )
            print(f"model {number}: accuracy {before.accuracy(range(len(corpus.names))):.4f}", flush=True)
        world = worlds[number].seeded(seed)
        requests = [asked(world, labels) for labels in corpus.sequence]
        made = streamed(world, requests, chosen, found)
        if ours(chosen):
            scores.append(aurocs(world, requests, chosen))
            print(f"seed {seed}, AUROC: {' '.join(f'{score:.4f}' for score in scores[-1])}", flush=True)
        if seed == 0:
            more |= drawn_first(world, requests, made, chosen)
    if not ours(chosen):
        return found, {name: value for name, value in more.items() if name.startswith("overlap")}
    for number in range(len(corpus.sequence)):
        more[f"o3_auroc_request_{number + 1}_min"] = min(each[number] for each in scores)
    domains = [score for each in scores for score in each[: len(DOMAINS)]]
    return found, more | {"o3_auroc_min": min(domains), "o3_auroc_min_all": min(map(min, scores))}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print what the command line asks for."""
    parser = argparse.ArgumentParser(description="Forgetting without retained data, gated and not.")
    add_arguments(parser)
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
    publish("unlearning", figures=figures_of(found, more), rows=table(found), about=settings(**about),
            part="gated" if ours(chosen) else "gated baselines")  # fmt: skip


if __name__ == "__main__":
    main()
