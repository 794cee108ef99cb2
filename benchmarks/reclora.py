"""RecLoRA beside what it has to beat: one table for all arms on likes.

    python -m benchmarks.reclora [--data FOLDER_OR_CSV] [--seeds 5] [--splits per-user] [--sample 16384]
        [--arms reclora-product-shared-user single-lora-equal-parameters ...] [--base reader|DIRECTORY|minilm]
        [--validation] [--set rate=0.003 temperature=0.1 ...]

For every seed and split, recommenders learn from all training rows. The reader (a small decoder) and the recommenders
whose vectors route learn from those that the adapters will not see; the score beside a row comes from a model that did
not learn from that row. Every arm then tunes its adapters on the same sample, with the same prompts, the same scores
and the same starting point: the weighed recommender and unadapted model, which is the arm `unadapted`. Figures are of
test rows, or with `--validation` of every other validation row, by which settings are chosen; the rest of these stops
training and weighs the stack.

- AUC, log loss: mean over seeds, with the spread. `vs single`, `vs stack`: AUC minus that of the single LoRA of equal
  parameters, and of stack + arm minus the stack alone, seed 0, whole users redrawn, 95 %.
- stacked: AUC of the recommenders' stack with the arm as one more member.
- swapped gate: routed as another user, whose history is not told; swapped: another user's history in all.
- entropy (share of ln N), information (nats) and cosine of the meta-LoRAs.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import publish, settings
from lora.config import AdapterConfig
from lora.errors import LetheError
from lora.targets import find_sites
from strategies.personal.asking import Asking
from strategies.personal.config import PersonalConfig
from strategies.personal.fitting import cross_fitted, without_sample
from strategies.personal.personalized import Personalized
from strategies.personal.recommenders.boosted import Boosted
from strategies.personal.recommenders.din import Din
from strategies.personal.recommenders.factors import FoldedFactors
from strategies.personal.recommenders.protocol import Recommender, Representing
from strategies.personal.recommenders.sasrec import Sasrec
from strategies.personal.recommenders.stack import Stack
from strategies.personal.representation import Drawn, Recommended, Representation
from strategies.personal.variants import VARIANTS, equal_rank, variant, widened
from tasks.config import ModelConfig
from tasks.models import BaseModel, load_base
from tasks.recommendation.config import RatingsConfig
from tasks.recommendation.files import load_interactions
from tasks.recommendation.interactions import Floats, Interactions
from tasks.recommendation.metrics import auc, likes, paired_bootstrap
from tasks.recommendation.reader import train_reader
from tasks.recommendation.splits import SPLITS, Split

SINGLE = "single-lora-equal-parameters"
DEFAULT = ("reclora-product-shared-user", "reclora-product-own-user", "reclora-factor-own-pair", SINGLE,
           "single-lora-equal-rank", "uniform-gate", "random-gate", "unadapted")  # fmt: skip
ROUTERS: dict[str, Callable[[], Recommender]] = {"MF": FoldedFactors, "DIN": Din, "SASRec": Sasrec}
HEADING = ("split", "arm", "AUC", "log loss", "vs single", "stacked", "vs stack", "swapped gate", "swapped",
           "entropy", "information", "cosine", "numbers", "CPU s")  # fmt: skip


@dataclass
class Found:
    """Figures of one arm on one split, one entry a seed."""

    figures: dict[str, list[float]] = field(default_factory=dict)
    logits: list[Floats] = field(default_factory=list)
    stacked: list[Floats] = field(default_factory=list)

    def add(self, **values: float) -> None:
        """Note figures of one seed."""
        for name, value in values.items():
            self.figures.setdefault(name, []).append(value)

    def told(self, name: str) -> str:
        """Return mean and spread."""
        values = self.figures.get(name)
        if not values:
            return ""
        spread = f" ±{statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.4f}{spread}"


@dataclass(frozen=True)
class World:
    """What all arms of one seed share."""

    log: Interactions
    split: Split
    members: tuple[Recommender, ...]
    routers: tuple[Representing, ...]
    scorer: Recommender
    training_scores: Floats
    base: BaseModel
    seed: int

    @classmethod
    def made(cls, log: Interactions, split: Split, chosen: argparse.Namespace, seed: int) -> "World":
        """Fit recommenders and reader on the training rows."""
        fitted: dict[str, Recommender] = {}
        for name, make in {**ROUTERS, "boosted": Boosted}.items():
            if name in chosen.recommenders:
                fitted[name] = make()
                fitted[name].fit(log, split, seed=seed)
                print(f"{split.name}, seed {seed}: {name} fitted, CPU {time.process_time():.0f} s", flush=True)
        rest = without_sample(split, chosen.sample, seed=seed)
        routers = {name: ROUTERS[name]() for name in chosen.routers}
        for router in routers.values():
            router.fit(log, rest, seed=seed)
        scorer = fitted[chosen.scorer]
        make = {**ROUTERS, "boosted": Boosted}[chosen.scorer]
        scores = cross_fitted(make, log, split, folds=chosen.folds, seed=seed)
        base = base_of(chosen.base, log, rest, seed)
        print(f"{split.name}, seed {seed}: base ready, CPU {time.process_time():.0f} s", flush=True)
        return cls(log, split, tuple(fitted.values()), tuple(routers.values()), scorer, scores, base, seed)  # type: ignore[arg-type]


def base_of(name: str, log: Interactions, split: Split, seed: int) -> BaseModel:
    """Return the language model: a reader trained now, one from a directory, or MiniLM."""
    if name == "reader":
        return train_reader(log, split, seed=seed)
    if name == "minilm":
        return load_base(ModelConfig(name="minilm", device="cpu"), causal=False)
    return load_base(ModelConfig(path=name, device="cpu"), causal=True)


def arm_of(world: World, name: str, config: PersonalConfig, adapter: AdapterConfig) -> Personalized:
    """Make one arm on a copy of the base."""
    chosen = variant(name)
    own = chosen.personal(config)
    base = replace(world.base, model=copy.deepcopy(world.base.model))
    sites = find_sites(base.model, adapter.targets)
    asking = Asking(
        base, scorer=world.scorer, base_score=own.base_score, history=own.history, max_length=own.max_length
    )
    representation: Representation = Recommended(world.routers, own.routing)
    if own.gate == "random":
        representation = Drawn(width=len(sites) * own.meta_loras, seed=world.seed)
    if chosen.widened:
        rows = world.log.queries(world.split.train[:8])
        probe = Recommended(world.routers, config.routing)
        probe.fit(world.log, rows)
        inputs = probe(world.log, rows).shape[1]
        adapter = widened(adapter, equal_rank(sites, config, rank=adapter.rank, inputs=inputs))
    return Personalized(base, adapter, own, asking=asking, representation=representation, name=name)


def measured(world: World, names: Sequence[str], config: PersonalConfig, adapter: AdapterConfig,
             found: dict[str, Found]) -> None:  # fmt: skip
    """Fit every arm and ask about the test rows."""
    log, split = world.log, world.split
    queries, labels = log.queries(split.test), log.likes[split.test]
    other = queries.with_history_of(np.random.default_rng(0).permutation(len(queries)))
    stack = Stack(world.members, fitted=True)
    stack.fit(log, split, seed=world.seed)
    alone = stack.logits(log, queries)
    note(found, "stack", labels, alone)
    note(found, "recommender", labels, world.scorer.logits(log, queries))
    for name in names:
        begun = time.process_time()
        arm = arm_of(world, name, config, adapter)
        arm.fit(log, split, seed=world.seed, training_scores=world.training_scores)
        each = note(found, name, labels, arm.logits(log, queries))
        together = Stack([*world.members, arm], fitted=True)
        together.fit(log, split, seed=world.seed)
        each.stacked.append(together.logits(log, queries))
        each.add(stacked=auc(labels, each.stacked[-1]), numbers=arm.trained_parameters,
                 kept=int(np.argmin(arm.curve)), stack_alone=auc(labels, alone))  # fmt: skip
        if arm.config.gate != "uniform":
            report = arm.routing(log, queries)
            each.add(
                entropy=report.relative_entropy, information=report.information, cosine=report.cosine,
                collapsed=float(report.collapsed),
                swapped_gate=auc(labels, arm.logits(log, queries, routed_as=other)),
            )  # fmt: skip
        each.add(swapped=auc(labels, arm.logits(log, other)), cpu_s=time.process_time() - begun)
        curve = " ".join(f"{value:.4f}" for value in arm.curve)
        print(f"{split.name}, seed {world.seed}, {name}: checks {curve}; "
              f"{', '.join(f'{k} {v[-1]:.4f}' for k, v in each.figures.items())}", flush=True)  # fmt: skip


def note(found: dict[str, Found], name: str, labels: np.ndarray, logits: Floats) -> Found:  # type: ignore[type-arg]
    """Note the scores of one arm."""
    each = found.setdefault(name, Found())
    scores = likes(labels, logits)
    each.logits.append(logits)
    each.add(auc=scores.auc, log_loss=scores.log_loss)
    return each


def table(log: Interactions, split: Split, found: dict[str, Found]) -> list[list[str]]:
    """Return the rows of one split's table, the heading first."""
    labels, users = log.likes[split.test], log.users[split.test]
    lines = [[*HEADING]]
    for name, each in found.items():
        single = stacked = ""
        if SINGLE in found and name not in (SINGLE, "stack"):
            single = str(paired_bootstrap(labels, each.logits[0], found[SINGLE].logits[0], users=users))
        if each.stacked:
            stacked = str(paired_bootstrap(labels, each.stacked[0], found["stack"].logits[0], users=users))
        shown = [each.told(figure) for figure in ("swapped_gate", "swapped", "entropy", "information", "cosine")]
        numbers = [
            f"{statistics.fmean(each.figures[n]):.0f}" if n in each.figures else "" for n in ("numbers", "cpu_s")
        ]
        lines.append([split.name, name, each.told("auc"), each.told("log_loss"), single, each.told("stacked"), stacked,
                      *shown, *numbers])  # fmt: skip
    return lines


def halved(split: Split) -> Split:
    """Keep the first half of the validation rows (every other one) for validation and ask about the second."""
    return Split(f"{split.name} (validation)", split.train, split.validation[::2], split.validation[1::2])


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="RecLoRA beside what it has to beat.")
    parser.add_argument("--data", help="a MovieLens folder or one table; default: the built-in world")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--splits", nargs="+", choices=sorted(SPLITS), default=["per-user"])
    parser.add_argument("--arms", nargs="+", choices=sorted(VARIANTS), default=list(DEFAULT))
    parser.add_argument("--sample", type=int, default=16384)
    parser.add_argument("--base", default="reader", help="reader, minilm, or a directory with a decoder")
    parser.add_argument("--scorer", default="MF", choices=[*ROUTERS, "boosted"])
    parser.add_argument("--routers", nargs="+", default=["MF", "DIN"], choices=list(ROUTERS))
    parser.add_argument("--recommenders", nargs="+", default=[*ROUTERS, "boosted"], help="members of the stack")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--targets", default="all")
    parser.add_argument("--validation", action="store_true", help="figures of validation rows, to choose settings")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of `personal:`")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print what the command line asks for."""
    chosen = parsed(arguments)
    torch.set_num_threads(1)
    try:
        log = load_interactions(RatingsConfig(path=chosen.data))
        own = dict(entry.split("=", 1) for entry in chosen.set)
        config = PersonalConfig(**{"sample": chosen.sample, **own})
    except (LetheError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    adapter = AdapterConfig(rank=chosen.rank, alpha=2.0 * chosen.rank, targets=chosen.targets)
    figures: dict[str, float] = {}
    lines: list[list[str]] = []
    for name in chosen.splits:
        split = halved(SPLITS[name](log)) if chosen.validation else SPLITS[name](log)
        found: dict[str, Found] = {}
        for seed in range(chosen.seeds):
            measured(World.made(log, split, chosen, seed), chosen.arms, config, adapter, found)
        lines += table(log, split, found)[bool(lines) :]
        for arm, each in found.items():
            key = f"{name}_{arm}".replace("-", "_")
            figures |= {f"{key}_{figure}": statistics.fmean(values) for figure, values in each.figures.items()}
    about = {"seeds": chosen.seeds, "data": "built-in" if chosen.data is None else "given", "rank": chosen.rank}
    about |= {"base": chosen.base if chosen.base in ("reader", "minilm") else Path(chosen.base).name}
    about |= {"scorer": chosen.scorer, "routers": chosen.routers, "folds": chosen.folds, "targets": chosen.targets}
    about |= {"validation": chosen.validation, **config.model_dump()}
    publish("reclora", figures=figures, rows=lines, about=settings(**about))


if __name__ == "__main__":
    main()
