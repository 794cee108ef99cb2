"""What the gates of forget requests cost at inference: none, 1, 10 and 100 requests, in a pass of their own and not.

    python -m benchmarks.gate_costs --data FOLDER [--cache FOLDER] [--requests 1 10 100] [--hits 4] [--rounds 40]
        [--on test] [--device cuda]

FOLDER holds `data_full.json.gz` and `domains.json.gz` of CLINC150. The model is that of `benchmarks.gated`; a request
is one intent, its detector made of the intent's training queries (10 intents, again and again for more requests), its
slot of rank 8 filled with random numbers (they change no time). A batch is 32 test queries, `--hits` of which the gate
lets the first slot answer, the rest of intents that nobody asked to forget; thresholds are set so, and the batch is the
same for every number of requests, so that only the gates differ.

- none: the model with the users' slot, no gate. separate: features of a pass of the frozen encoder (MiniLM), then the
  model's pass with slots of all its layers. same pass: detectors read layer `--layer` of the model's own pass,
  slots are in the layers above. second look: detectors read the last layer of the model's own pass, and the rows that
  are caught are answered anew with slots of all layers.
- Times are CPU seconds of one thread, the variants in turn, the order rotated; ratios are medians of rounds. With
  `--device cuda` model, slots and detectors are on the GPU, and times are the clock's.
- AUROC: each of the domains work, travel, home and banking against all other queries and the out-of-scope ones (of
  `--on`), by each way; nothing is chosen by it.
- bytes: statistics and slot of one request, in memory.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.intents import DOMAINS, Corpus, World, made_world, taken
from benchmarks.measure import DEVICES, interleaved, paired_ratio, publish, settings
from lora.bank import Bank
from lora.errors import LetheError
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.config import ForgettingConfig
from strategies.unlearning.detector import Detector, Detectors, detector_of, request_features
from strategies.unlearning.encoder import SharedEncoder
from strategies.unlearning.forgotten import detector_settings
from strategies.unlearning.gate import ForgettingGate, GatedLearner, SamePass, SecondLook
from strategies.unlearning.o3 import slot_layout
from tasks.tokens import Batch, Tokens, collate

ROWS = 32
RANK = 8
DISTINCT = 10
"""Intents that detectors are made of; more requests have them again, which takes the same time."""


class Pass(NamedTuple):
    """One way to detect: its encoder, the sites that slots adapt, and the detectors of all requests."""

    encoder: SharedEncoder
    sites: tuple[int, ...]
    detectors: list[Detector]
    wide: SharedEncoder
    """Reads the layers of all ways that share its pass."""
    place: int
    known: dict[int, Tensor]
    """Features of questions that were asked before, by the id of their tokens."""


class Seen(NamedTuple):
    """Features of a request's used and held-back rows, and the classes of the used ones."""

    used: Tensor
    held_back: Tensor
    classes: Tensor


def seen(world: World, encoder: SharedEncoder, labels: Sequence[int]) -> Seen:
    """Take the features of a request for some intents."""
    request = AuditedRequest(taken(world.corpus.train, world.corpus.rows(labels)), seed=world.seed)
    tokens = request.tokens(world.learner.task)
    used, held_back = (
        request_features(encoder, request, tokens, rows, size=128) for rows in (request.used, request.held_back)
    )
    return Seen(used, held_back, torch.from_numpy(np.asarray(tokens.labels)[request.used]))


def detector(each: Seen, encoder: SharedEncoder, place: int) -> Detector:
    """Make a detector of the features of one layer, as a forgetting store does."""
    columns = (each.used[:, place : place + 1], each.classes, each.held_back[:, place : place + 1])
    return detector_of(*columns, encoder=encoder, settings=detector_settings(ForgettingConfig()))


def passes(
    world: World, requests: Sequence[tuple[int, ...]], *, layer: int, known: dict[int, Tensor]
) -> dict[str, Pass]:
    """Make all ways; the two that read the model's own pass share the features of their requests and of questions."""
    learner = world.learner
    whole = tuple(range(len(learner.adapted.sites)))
    above = tuple(place for place, site in enumerate(learner.adapted.sites) if _block(site.name) >= layer)
    factors, last = learner.layout.views(world.model), 1 + max(_block(site.name) for site in learner.adapted.sites)
    wide = SharedEncoder(learner.adapted, layers=(layer, last), factors=factors, pad=learner.pad)
    own = [seen(world, wide, labels) for labels in requests]
    apart = [seen(world, world.encoder, labels) for labels in requests]
    found = {}
    for way, rows, place, encoder, sites in (
        ("separate", apart, 0, world.encoder, whole),
        ("same pass", own, 0, replace(wide, layers=(layer,)), above),
        ("second look", own, 1, replace(wide, layers=(last,)), whole),
    ):
        made = [detector(each, encoder, place) for each in rows]
        found[way] = Pass(encoder, sites, made, wide, place, known)
    return found


def _block(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


def slots(world: World, sites: Sequence[int], count: int) -> Bank:
    """Return slots of random numbers, too small to change an answer much."""
    layout = slot_layout([world.learner.adapted.sites[place] for place in sites], rank=RANK)
    source = torch.Generator().manual_seed(world.seed)
    return Bank(layout, (0.01 * torch.randn(count, layout.size, generator=source)).to(world.learner.device))


def features_of(world: World, way: Pass, tokens: Tokens) -> Tensor:
    """Return a way's features of queries, in their order."""
    key = id(tokens) if way.encoder is not world.encoder else -id(tokens)
    if key not in way.known:
        order = np.asarray(tokens.lengths).argsort(kind="stable")
        chunks = [order[start : start + 128].tolist() for start in range(0, len(order), 128)]
        encoder = way.encoder if way.encoder is world.encoder else way.wide
        made = [encoder.features(batch_of(world, tokens, chunk)).cpu() for chunk in chunks]
        way.known[key] = torch.cat(made)[torch.from_numpy(order.argsort())]
    found = way.known[key]
    return found if way.encoder is world.encoder else found[:, way.place : way.place + 1]


def batch_of(world: World, tokens: Tokens, rows: Sequence[int]) -> Batch:
    """Put rows into one batch."""
    return collate([(tokens, row) for row in rows], pad=world.learner.pad)


def chosen_batch(world: World, ways: Mapping[str, Pass], *, hits: int) -> Batch:
    """Return `hits` queries that are nearest to the first request, then others of intents that no request is about."""
    corpus = world.corpus
    asked = {label for labels in corpus.sequence for label in labels}
    mine = taken(corpus.asked, corpus.rows(corpus.sequence[len(DOMAINS)], part="asked"))
    tokens = world.learner.task.tokenize(mine)
    far = sum(
        Detectors(way.detectors[:1]).distances(features_of(world, way, tokens))[:, 0] / way.detectors[0].threshold
        for way in ways.values()
    )
    near = torch.as_tensor(far).argsort()[:hits].tolist()
    rest = corpus.rows([label for label in range(len(corpus.names)) if label not in asked], part="asked")
    others = world.learner.task.tokenize(taken(corpus.asked, np.random.default_rng(0).permutation(rest)[: ROWS - hits]))
    pairs = [(tokens, row) for row in near] + [(others, row) for row in range(len(others))]
    return collate(pairs, pad=world.learner.pad)


def detectors_for(way: Pass, batch: Batch, count: int, *, hits: int) -> Detectors:
    """Return as many detectors, those at hand again and again, of which the first catches the hits and no other row.

    Raises LetheError where the first request's queries are not the nearest to it.
    """
    distances = Detectors(way.detectors[:1]).distances(way.encoder.features(batch))[:, 0]
    inside, outside = float(distances[:hits].max()), float(distances[hits:].min())
    if inside >= outside:
        raise LetheError("a query of another intent is nearer to the first request than its own; give fewer --hits")
    made = [replace(way.detectors[place % len(way.detectors)], threshold=-float("inf")) for place in range(count)]
    made[0] = replace(made[0], threshold=(inside + outside) / 2)
    return Detectors(made).to(way.encoder.device)


def variants(
    world: World, ways: Mapping[str, Pass], counts: Sequence[int], batch: Batch, *, hits: int
) -> tuple[dict[str, Callable[[], None]], list[SamePass | SecondLook]]:
    """Return what is timed, by name, and what is to be closed afterwards."""
    batch = batch.to(world.learner.device)
    timed = {"none": timed_answer(world.learner.answers, world.model, batch)}
    opened: list[SamePass | SecondLook] = []
    for way, each in ways.items():
        for count in counts:
            gate = ForgettingGate(detectors_for(each, batch, count, hits=hits), slots(world, each.sites, count))
            if way != "separate":
                opened.append((SamePass if way == "same pass" else SecondLook)(world.learner, gate))
                timed[f"{way} {count}"] = timed_answer(opened[-1].answers, world.model, batch)
            else:
                gated = GatedLearner(world.learner, each.encoder, gate)
                timed[f"{way} {count}"] = timed_answer(gated.answers, world.model, batch)
    return timed, opened


def timed_answer(ask: Callable[[Tensor, Batch], object], values: Tensor, batch: Batch) -> Callable[[], None]:
    """Return a call that answers the batch."""

    def answer() -> None:
        with torch.no_grad():
            ask(values, batch)

    return answer


def aurocs(world: World, *, layer: int, known: dict[int, Tensor]) -> dict[str, float]:
    """Return the least AUROC over the domains, a way each."""
    domains = world.corpus.sequence[: len(DOMAINS)]
    asked, strange = (world.learner.task.tokenize(each) for each in (world.corpus.asked, world.corpus.strange))
    labels = np.concatenate([np.asarray(asked.labels), np.full(len(strange), -1)])
    found: dict[str, float] = {}
    for way, each in passes(world, domains, layer=layer, known=known).items():
        features = torch.cat([features_of(world, each, tokens) for tokens in (asked, strange)])
        distances = Detectors(each.detectors).distances(features).numpy()
        scores = [roc_auc_score(~np.isin(labels, own), distances[:, place]) for place, own in enumerate(domains)]
        found |= {f"auroc_{_key(way)}_{name}": float(score) for name, score in zip(DOMAINS, scores, strict=True)}
        found[f"auroc_{_key(way)}_min"] = float(min(scores))
    return found


def _key(name: str) -> str:
    return name.replace(" ", "_")


def sizes(way: Pass, world: World) -> dict[str, float]:
    """Return the bytes of one request: what its detector keeps, and its slot."""
    numbers = statistics.fmean(each.numbers for each in way.detectors)
    return {"detector_bytes": 4 * numbers, "slot_bytes": 4.0 * slots(world, way.sites, 1).layout.size}


def measured(chosen: argparse.Namespace) -> tuple[dict[str, float], list[list[str]]]:
    """Time all variants on one batch; return figures and the printed rows."""
    corpus = Corpus.read(chosen.data, requests=len(DOMAINS) + DISTINCT, on=chosen.on)
    world = made_world(corpus, cache=chosen.cache, seed=0, device=chosen.device)
    known: dict[int, Tensor] = {}
    ways = passes(world, corpus.sequence[len(DOMAINS) :], layer=chosen.layer, known=known)
    batch = chosen_batch(world, ways, hits=chosen.hits)
    timed, opened = variants(world, ways, chosen.requests, batch, hits=chosen.hits)
    times = interleaved(timed, rounds=chosen.rounds, warmup=5, device=chosen.device)
    for each in opened:
        each.close()
    rows = [["variant", "ms a batch of 32", "over none", "over 1 request"]]
    figures = aurocs(world, layer=chosen.layer, known=known)
    for name, taken_s in times.items():
        way, _, count = name.rpartition(" ")
        over = {"none": paired_ratio(times, name, "none")} if way else {}
        if way and int(count) != chosen.requests[0]:
            over["1"] = paired_ratio(times, name, f"{way} {chosen.requests[0]}")
        figures |= {f"{_key(name)}_over_{other}": ratio[0] for other, ratio in over.items()}
        told = {other: f"{middle:.3f} ({low:.3f} to {high:.3f})" for other, (middle, low, high) in over.items()}
        rows.append([name, f"{1e3 * statistics.median(taken_s):.2f}", told.get("none", ""), told.get("1", "")])
    first, last = chosen.requests[0], chosen.requests[-1]
    figures |= {f"gate{last}_over_gate{first}": figures[f"separate_{last}_over_1"],
                f"gate{first}_over_none": figures[f"separate_{first}_over_none"],
                f"same_pass_gate{first}_over_none": figures[f"same_pass_{first}_over_none"],
                f"second_look_gate{first}_over_none": figures[f"second_look_{first}_over_none"]}  # fmt: skip
    return figures | sizes(ways["separate"], world) | {"tokens": float(batch.input_ids.numel())}, rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print what the command line asks for."""
    parser = argparse.ArgumentParser(description="What the gates of forget requests cost at inference.")
    parser.add_argument("--data", type=Path, help="the folder of CLINC150; without it nothing is measured")
    parser.add_argument("--cache", type=Path, help="folder of trained models, filled where empty")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--hits", type=int, default=4, help=f"rows of {ROWS} that a slot answers")
    parser.add_argument("--layer", type=int, default=4, help="what detectors read in the same pass")
    parser.add_argument("--on", choices=("test", "validation"), default="test")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", default="cpu", help=DEVICES)
    chosen = parser.parse_args(arguments)
    if chosen.data is None:
        print("benchmarks.gate_costs measures on CLINC150 only: give --data FOLDER")
        return
    torch.set_num_threads(1)
    try:
        figures, rows = measured(chosen)
    except LetheError as error:
        raise SystemExit(f"error: {error}") from None
    about = {key: value for key, value in vars(chosen).items() if key not in ("data", "cache")}
    publish("unlearning", figures=figures, rows=rows, about=settings(**about), part="gates")


if __name__ == "__main__":
    main()
