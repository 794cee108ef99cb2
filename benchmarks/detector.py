"""The detector of requests to forget, part by part: AUROC for every domain of CLINC150.

    python -m benchmarks.detector --data FOLDER [--domains work travel home banking] [--adapted home] [--padded home]
        [--device cuda]

FOLDER holds `data_full.json.gz` and `domains.json.gz` of CLINC150. A domain's training queries are the request; in are
its test queries, out are all other test queries and the 1,000 out-of-scope ones. Everything is made of the request's
rows alone (80 % used, 20 % held back for scale and threshold), with the embedded MiniLM.

- bank: largest cosine to the stored features of all used rows, as O3 keeps them: the reference, not a part.
- default: what `DetectorSettings()` does. Every other row changes one thing.
- caught, touched: shares of the domain's and of all other test queries (out-of-scope ones left out) that the hard gate
  lets the slot answer, at the held-back coverage of the column.
- sample: on 1,500 of the asked queries only. `--adapted` trains O3's adapter of the encoder (entropy and MLM, each
  alone, both; one pass over the used rows) for these domains; `--padded` takes means over padding too (32 tokens a
  row), as the released code does.
"""

import argparse
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.measure import DEVICES, publish, settings
from lora.config import AdapterConfig
from lora.frame import Frame
from lora.model import AdaptedModel
from privacy.randomness import SeededRandomness
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.class_statistics import Shape
from strategies.unlearning.contrastive import ContrastiveSettings, train_encoder
from strategies.unlearning.detector import Detector, Detectors, DetectorSettings, detector_of
from strategies.unlearning.encoder import SharedEncoder
from strategies.unlearning.o3 import Slot
from tasks.config import ModelConfig
from tasks.examples import Examples
from tasks.models import BaseModel, load_base
from tasks.tokens import Batch, Tokens, buckets, collate, tokenize_classification

MAIN = ("work", "travel", "home", "banking")
LAYERS = tuple(range(1, 7))
COVERAGES = (0.8, 0.9, 0.95, 0.99)
PADDED = 32
SAMPLE = 1500
EPOCHS = 1
OVERHEAD = 12.0
Marks = NDArray[np.bool_]


@dataclass(frozen=True)
class World:
    """Token ids and intents of the training queries and of the asked ones, out-of-scope queries last."""

    train: Tokens
    asked: Tokens
    intents: tuple[NDArray[Any], NDArray[Any]]
    domains: Mapping[str, list[str]]

    def rows(self, domain: str) -> NDArray[np.int64]:
        """Return the training rows of a domain."""
        return np.flatnonzero(np.isin(self.intents[0], self.domains[domain]))

    def outside(self, domain: str) -> Marks:
        """Return which asked rows are not of a domain."""
        marks: Marks = ~np.isin(self.intents[1], self.domains[domain])
        return marks

    @property
    def in_scope(self) -> Marks:
        """Return which asked rows have an intent."""
        marks: Marks = self.intents[1] != "oos"
        return marks


@dataclass(frozen=True)
class Views:
    """Features `[n, layers, d]` of a domain's used and held-back rows and of the asked rows; classes of the used."""

    used: Tensor
    labels: Tensor
    held_back: Tensor
    asked: Tensor

    def at(self, *layers: int) -> "Views":
        """Keep some layers."""
        places = [LAYERS.index(layer) for layer in layers]
        return replace(
            self, used=self.used[:, places], held_back=self.held_back[:, places], asked=self.asked[:, places]
        )


def read(folder: Path, base: BaseModel) -> World:
    """Read and tokenize CLINC150."""
    with gzip.open(folder / "data_full.json.gz") as file:
        data = json.load(file)
    with gzip.open(folder / "domains.json.gz") as file:
        domains = json.load(file)
    splits = (data["train"], data["test"] + data["oos_test"])
    names = {intent: place for place, intent in enumerate(sorted({row[1] for rows in splits for row in rows}))}

    def tokens(rows: list[list[str]]) -> Tokens:
        examples = Examples(tuple(row[0] for row in rows), tuple(names[row[1]] for row in rows))
        return tokenize_classification(examples, base.tokenizer, max_length=64)

    intents = (np.asarray([row[1] for row in rows]) for rows in splits)
    return World(tokens(splits[0]), tokens(splits[1]), (next(intents), next(intents)), domains)


def features(encoder: SharedEncoder, tokens: Tokens, *, fill: int | None = None) -> Tensor:
    """Return the features of all rows; `fill` pads every row to so many tokens and takes the padding into the mean."""
    found: list[Tensor] = [torch.empty(0)] * len(tokens)
    for rows in buckets(tokens.lengths, overhead=OVERHEAD, budget=2048):
        batch = collate([(tokens, int(row)) for row in rows], pad=encoder.pad)
        made = encoder.features(batch) if fill is None else _padded(encoder, batch, fill)
        for row, each in zip(rows, made.cpu(), strict=True):
            found[int(row)] = each
    return torch.stack(found)


@torch.no_grad()
def _padded(encoder: SharedEncoder, batch: Batch, width: int) -> Tensor:
    """Take means over padding too, as the released code of O3 does."""
    ids, mask = batch.input_ids[:, :width], batch.mask
    mask = torch.ones_like(ids) if mask is None else mask[:, :width]
    more = width - ids.shape[1]
    ids = torch.nn.functional.pad(ids, (0, more), value=encoder.pad)
    wide = Batch(ids, torch.nn.functional.pad(mask, (0, more)), batch.labels)
    states = encoder.states(wide.to(encoder.device))
    return torch.stack([torch.nn.functional.normalize(states[layer].mean(1), dim=1) for layer in encoder.layers], dim=1)


def views(
    world: World, domain: str, seen: Callable[[Tokens], Tensor], asked: Tensor
) -> tuple[Views, AuditedRequest, Tokens]:
    """Divide a domain's training rows as a request does, and take features of both parts."""
    tokens = world.train.take(world.rows(domain))
    request = AuditedRequest(Examples(("",) * len(tokens), tuple(map(int, tokens.labels))))  # type: ignore[arg-type]
    used, held_back = request.used, request.held_back
    labels = torch.from_numpy(tokens.labels[used])  # type: ignore[index]
    whole = seen(tokens)
    found = Views(whole[torch.from_numpy(used)], labels, whole[torch.from_numpy(held_back)], asked)
    return found, request, tokens


def made(views: Views, chosen: DetectorSettings, *, labelled: bool = True, noise: bool = False) -> Detector:
    """Make a detector of features."""
    layers = SharedEncoder(None, layers=tuple(range(views.used.shape[1])))  # type: ignore[arg-type]
    labels = views.labels if labelled else None
    source = SeededRandomness(0, "detector") if noise else None
    return detector_of(views.used, labels, views.held_back, encoder=layers, settings=chosen, randomness=source)


def auroc(outside: Marks, distances: Tensor) -> float:
    """Return the AUROC of a distance that rises outside."""
    return float(roc_auc_score(outside, distances.double().numpy()))


def parts(
    found: Views, outside: Marks, lengths: NDArray[np.int64], used_lengths: NDArray[np.int64]
) -> dict[str, float]:
    """Return the AUROC of the default and of every change of one part."""
    shape, last = Shape(), found.at(6)

    def score(view: Views, chosen: DetectorSettings = DetectorSettings(), **how: bool) -> float:  # noqa: B008
        detector = made(view, chosen, **how)
        return auroc(outside, Detectors([detector]).distances(view.asked)[:, 0])

    def shaped(**changes: Any) -> DetectorSettings:
        return DetectorSettings(shape=replace(shape, **changes))

    bank = 1 - (last.asked[:, 0] @ last.used[:, 0].T).amax(1)
    middle = float(np.median(used_lengths))
    return {
        "bank (stored features)": auroc(outside, bank),
        "default": score(last),
        "Mahalanobis alone": score(last, DetectorSettings(terms=("mahalanobis",))),
        "cosine alone": score(last, DetectorSettings(terms=("cosine",))),
        "one-class SVM": score(last, DetectorSettings(combine="svm")),
        "all layers": score(found),
        "all layers, SVM": score(found, DetectorSettings(combine="svm")),
        "one mean": score(last, shaped(classes=1), labelled=False),
        "clusters, no labels": score(last, labelled=False),
        "shrinkage 0.05": score(last, shaped(shrinkage=0.05)),
        "shrinkage 1 (no covariance)": score(last, shaped(shrinkage=1.0)),
        "noise 0.1": score(last, shaped(noise_multiplier=0.1), noise=True),
        "noise 1": score(last, shaped(noise_multiplier=1.0), noise=True),
        "same pass, layers to 3": score(found.at(3)),
        "same pass, layers to 4": score(found.at(4)),
        "same pass, layers to 5": score(found.at(5)),
        "length alone": auroc(outside, torch.from_numpy(np.abs(lengths - middle))),
    }


def gated(found: Views, outside: Marks, in_scope: Marks) -> dict[str, tuple[float, float]]:
    """Return for every coverage the shares that are caught inside and touched outside, in scope."""
    shares = {}
    for coverage in COVERAGES:
        detector = made(found.at(6), DetectorSettings(coverage=coverage))
        near = (Detectors([detector]).distances(found.at(6).asked)[:, 0] <= detector.threshold).numpy()
        shares[f"{coverage:g}"] = (float(near[~outside].mean()), float(near[outside & in_scope].mean()))
    return shares


def adapted_parts(
    model: AdaptedModel, base: BaseModel, world: World, domain: str, seen: Callable[[Tokens], Tensor]
) -> dict[str, float]:
    """Return the AUROC with an encoder adapter of the request's own, for each loss and both."""
    _, request, tokens = views(world, domain, seen, torch.empty(0))
    found: dict[str, float] = {}
    for name, switches in {"entropy + MLM": {}, "entropy": {"mlm": False}, "MLM": {"entropy": False}}.items():
        start = Slot.fresh(model.sites, Frame.draw(model.sites, rank=8, seed=1))
        chosen = replace(ContrastiveSettings(epochs=EPOCHS), **switches)
        slot = train_encoder(model, base, request, tokens, start=start, settings=chosen).slot
        encoder = SharedEncoder(model, layers=LAYERS, factors=slot.layout.views(slot.values.to(base.placement.device)))
        found |= sampled_parts(world, domain, partial(features, encoder), name=f"sample, adapter, {name}")
    return found


def sampled_parts(world: World, domain: str, seen: Callable[[Tokens], Tensor], *, name: str) -> dict[str, float]:
    """Return the AUROC of the default on a sample of the queries with other features, of the last and of all layers."""
    chosen = np.sort(np.random.default_rng(0).choice(len(world.asked), size=SAMPLE, replace=False))
    own, _, _ = views(world, domain, seen, seen(world.asked.take(chosen)))
    found = {}
    for label, view in (("", own.at(6)), (", all layers", own)):
        distances = Detectors([made(view, DetectorSettings())]).distances(view.asked)[:, 0]
        found[f"{name}{label}"] = auroc(world.outside(domain)[chosen], distances)
    return found


def table(found: Mapping[str, Mapping[str, float]], gates: Mapping[str, Any]) -> list[list[str]]:
    """Return the printed rows: a part a row, a domain a column."""
    names = list(dict.fromkeys(part for each in found.values() for part in each))
    rows = [["AUROC", *found]]
    rows += [[part, *(f"{each[part]:.4f}" if part in each else "" for each in found.values())] for part in names]
    for coverage in next(iter(gates.values())):
        cells = [f"{100 * gates[d][coverage][0]:.1f} / {100 * gates[d][coverage][1]:.1f}" for d in found]
        rows.append([f"caught / touched %, coverage {coverage}", *cells])
    return rows


def measured(chosen: argparse.Namespace) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Measure what was asked for."""
    base = load_base(ModelConfig(name="minilm", device=chosen.device, dtype="float32"), causal=False)
    model = AdaptedModel.attach(base.model, AdapterConfig(rank=8))
    world = read(Path(chosen.data), base)
    encoder = SharedEncoder(model, layers=LAYERS, pad=int(base.tokenizer.pad_token_id))

    def seen(tokens: Tokens) -> Tensor:
        return features(encoder, tokens)

    asked, found, gates = seen(world.asked), {}, {}
    for domain in chosen.domains or world.domains:
        own, request, tokens = views(world, domain, seen, asked)
        outside = world.outside(domain)
        found[domain] = parts(own, outside, world.asked.lengths, tokens.lengths[request.used])
        gates[domain] = gated(own, outside, world.in_scope)
        if domain in {*chosen.padded, *chosen.adapted}:
            found[domain] |= sampled_parts(world, domain, seen, name="sample, default")
        if domain in chosen.padded:
            over = partial(features, encoder, fill=PADDED)
            found[domain] |= sampled_parts(world, domain, over, name="sample, means over padding")
        if domain in chosen.adapted:
            found[domain] |= adapted_parts(model, base, world, domain, seen)
        print(domain, {part: round(value, 4) for part, value in found[domain].items()}, gates[domain], flush=True)
    return found, gates


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print what the command line asks for."""
    parser = argparse.ArgumentParser(description="The detector of requests to forget, part by part.")
    parser.add_argument("--data", help="the folder of CLINC150; without it nothing is measured")
    parser.add_argument("--domains", nargs="+", default=list(MAIN), help="which domains; none named: work to banking")
    parser.add_argument("--all", dest="domains", action="store_const", const=[], help="all ten domains")
    parser.add_argument("--adapted", nargs="*", default=[])
    parser.add_argument("--padded", nargs="*", default=[])
    parser.add_argument("--device", default="cpu", help=DEVICES)
    chosen = parser.parse_args(arguments)
    if chosen.data is None:
        print("benchmarks.detector measures on CLINC150 only: give --data FOLDER")
        return
    torch.set_num_threads(1)
    found, gates = measured(chosen)
    figures = {f"{_key(domain)}_{_key(part)}": value for domain, each in found.items() for part, value in each.items()}
    figures["auroc_min"] = min(each["default"] for each in found.values())
    for domain, shares in gates.items():
        for coverage, (caught, touched) in shares.items():
            figures |= {f"{domain}_caught_{coverage}": caught, f"{domain}_touched_{coverage}": touched}
    about = settings(model="minilm", data="CLINC150", device=chosen.device)
    publish("detector", figures=figures, rows=table(found, gates), about=about)


def _key(name: str) -> str:
    return "_".join("".join(c if c.isalnum() or c == "." else " " for c in name.lower()).split())


if __name__ == "__main__":
    main()
