"""RecLoRA beside what it has to beat: one LoRA for everybody, other gates, the recommenders and their stack.

    python -m benchmarks.reclora [--data FOLDER_OR_CSV] [--seeds 5] [--splits per-user global-time] [--arms NAME ...]
        [--base reader] [--scorer MF] [--routers MF DIN] [--recommenders MF DIN ...] [--sample 16384] [--validation]
        [--set temperature=0.3 epochs=1 ...] [--own single-lora-equal-rank:rate=0.001 ...] [--rates 0.001 0.004 ...]
        [--ranked 100] [--part NAME] [--kept DIRECTORY] [--first-seed 0] [--device cuda]

Without `--data` the built-in world, where no arm gains. All arms of a seed share recommenders, cross-fitted scores of
training rows, the sample, prompts, and a language model that is trained here without the sample (`--base reader`), or
any other. Validation rows choose the epoch, and the stack's weights. The test rows are asked once; with
`--validation` settings are chosen on the second half of the validation rows (every other one), while the first ends
training and weighs the stack.

Arms of different size want rates of their own. `--rates` tries them for every arm that trains, with seed 0 on the
first split: the first half of its validation rows ends training, the second chooses, by log loss. `--own` names them.
With `--kept` a directory keeps every seed's recommenders and language model and every arm's answers, and a run that
was broken off goes on, or seeds that were measured side by side (`--first-seed`) are put together. (It is for the same
settings only: nothing else is compared.) With `--part` the figures are
written beside those that the results file has, their names led by the part's.

- AUC, log loss, accuracy: mean over seeds, with the spread. `vs single`, `vs own A`, `vs stack`: AUC minus that of the
  single LoRA of equal parameters over the frame or with its own A, and of stack + arm minus the stack alone: means over
  seeds, whole users redrawn, 95 %. The
  results file also has the differences from the other arms of `BEATEN`.
- stacked: AUC of the recommenders' stack with the arm as one more member.
- NDCG@10: the item that came next among 100 that its user never rates, `--ranked` test rows drawn anew for each seed.
- vs even gate: minus the same trained arm with equal weights in place of its gate's; `uniform-gate` is trained so.
- swapped gate: routed as another user, whose history is not told; swapped: another user's history in all.
- entropy (share of ln N), information (nats) and cosine of the meta-LoRAs.
"""

import argparse
import json
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from benchmarks.measure import publish, settings
from lora.config import AdapterConfig
from lora.errors import LetheError
from strategies.personal.comparison import Asked, Found, note
from strategies.personal.config import ComparisonConfig, PersonalConfig, RouterName
from strategies.personal.personalized import Personalized
from strategies.personal.recommenders.factors import recent_level
from strategies.personal.recommenders.levels import ItemMean
from strategies.personal.recommenders.protocol import Recommender
from strategies.personal.recommenders.remembered import Remembered
from strategies.personal.recommenders.stack import Stack
from strategies.personal.variants import VARIANTS, variant
from strategies.personal.world import RECOMMENDERS, World, base_of
from tasks.config import ModelConfig
from tasks.device import place
from tasks.recommendation.config import RatingsConfig, ReadingModelConfig
from tasks.recommendation.files import load_interactions
from tasks.recommendation.interactions import Floats, Interactions, Queries
from tasks.recommendation.metrics import Interval, auc, likes, paired_bootstrap
from tasks.recommendation.reader import read
from tasks.recommendation.splits import SPLITS, Split

SINGLE = "single-lora-equal-parameters"
DEFAULT = ("reclora-product-shared-user", "reclora-product-own-user", "reclora-factor-own-pair", SINGLE,
           "single-lora-own-equal-parameters", "single-lora-equal-rank", "uniform-gate", "random-gate",
           "unadapted")  # fmt: skip
BEATEN = (SINGLE, "single-lora-own-equal-parameters", "single-lora-equal-rank", "uniform-gate", "random-gate",
          "unadapted", "score-in-prompt", "retrieved-history")  # fmt: skip
KEPT = ("stacked", "rerouted", "evened")
"""Further log odds of the test rows that are kept of an arm, where it has them."""
SHOWN = (SINGLE, "single-lora-own-equal-parameters", "unadapted", "uniform-gate", "even gate", "swapped gate", "stack")
"""What the table's columns are differences from."""
SIMPLE: Mapping[str, Callable[[], Recommender]] = {"item mean": ItemMean, "item + recent level": recent_level}
READER = "language model alone"
HEADING = ("split", "arm", "AUC", "log loss", "accuracy", "vs single", "vs own A", "vs unadapted", "vs uniform",
           "vs even gate", "vs swapped gate", "stacked", "vs stack", "NDCG@10", "swapped gate", "swapped", "entropy",
           "information", "cosine", "numbers", "CPU s")  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What all seeds of one split share."""

    log: Interactions
    split: Split
    chosen: argparse.Namespace
    config: PersonalConfig
    adapter: AdapterConfig

    @cached_property
    def comparison(self) -> ComparisonConfig:
        """The recommenders, and what is ranked."""
        chosen = self.chosen
        return ComparisonConfig(
            recommenders=tuple(chosen.recommenders), routers=tuple(chosen.routers), scorer=chosen.scorer,
            folds=chosen.folds, ranked=max(1, chosen.ranked),
        )  # fmt: skip

    def world(self, seed: int) -> World:
        """Fit recommenders and language model on the training rows."""
        named = self.chosen.base in ("reader", "minilm")
        base = base_of(ReadingModelConfig(**{"name" if named else "path": self.chosen.base}, device="cpu"))

        def listen(record: Mapping[str, object]) -> None:
            print(f"{self.split.name}, seed {seed}: {record['name']}, CPU {time.process_time():.0f} s", flush=True)

        return World.made(
            self.log, self.split, self.comparison, base=base, sample=self.chosen.sample, seed=seed, listen=listen
        )

    def path(self, seed: int, what: str) -> Path | None:
        """Return where something of a seed is kept; None where nothing is."""
        if self.chosen.kept is None:
            return None
        folder: Path = self.chosen.kept / self.split.name.replace(" ", "-") / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / what.replace(" ", "-")

    def configured(self, changes: Mapping[str, str]) -> PersonalConfig:
        """Return the settings of one arm."""
        return PersonalConfig(**{**self.config.model_dump(), **changes})


class Alone:
    """The language model without adapter, calibration or recommender."""

    name = READER

    def __init__(self, world: World) -> None:
        self._arm = world.arm("unadapted", PersonalConfig(base_score="none"), AdapterConfig(rank=1, alpha=1.0))

    def fit(self, log: Interactions, split: Split, *, seed: int) -> None:
        """Learn nothing."""

    def logits(self, log: Interactions, queries: Queries) -> Floats:
        """Return the log odds of Yes, `[queries]`."""
        return read(self._arm.base, self._arm.asking(log, queries).tokens)


class Seeded:
    """One seed's arms; its world is made when the first of them is missing."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan, self.seed, self.log, self.split = plan, seed, plan.log, plan.split
        self.asked = Asked.of(plan.log, plan.split, plan.comparison, seed=seed)

    @cached_property
    def world(self) -> World:
        """What all arms stand on."""
        path = self.plan.path(self.seed, "world.pickle")
        if path is not None and path.exists():
            return self._placed(pickle.loads(path.read_bytes()))
        made = self.plan.world(self.seed)
        if path is not None:
            aside = path.with_suffix(".part")
            aside.write_bytes(pickle.dumps(made))
            aside.rename(path)
        return self._placed(made)

    def _placed(self, world: World) -> World:
        """Put the language model where arms compute; what it was trained on, and the recommenders, stay on the CPU."""
        placement = place(ModelConfig(device=self.plan.chosen.device, dtype="float32"))
        model = world.base.model.to(placement.device)
        return replace(world, base=replace(world.base, model=model, placement=placement))

    @cached_property
    def members(self) -> dict[str, Recommender]:
        """The stack's recommenders, whose answers are remembered."""
        return {name: Remembered(member) for name, member in self.world.members.items()}

    @cached_property
    def stack(self) -> Stack:
        """The recommenders' stack, without an arm."""
        return self._stacked()

    def _stacked(self, *more: Recommender) -> Stack:
        stack = Stack([*self.members.values(), *more], fitted=True)
        stack.fit(self.log, self.split, seed=self.seed)
        return stack

    def found(self, name: str, changes: Mapping[str, str]) -> Found:
        """Return one arm's figures, kept or made now."""
        path = self.plan.path(self.seed, f"{name}.npz")
        if path is not None and path.exists():
            with np.load(path) as kept:
                more = {key: [kept[key]] for key in KEPT if key in kept}
                return Found(json.loads(str(kept["figures"])), [kept["logits"]], **more)
        found = self._measured(name, changes)
        if path is not None:
            rows = {key: each[0] for key in KEPT if (each := getattr(found, key))}
            np.savez(path, figures=np.array(json.dumps(found.figures)), logits=found.logits[0], **rows)
        told = ", ".join(f"{key} {values[-1]:.4f}" for key, values in found.figures.items())
        print(f"{self.split.name}, seed {self.seed}, {name}: {told}", flush=True)
        return found

    def _measured(self, name: str, changes: Mapping[str, str]) -> Found:
        begun = time.process_time()
        if name in VARIANTS:
            return self._arm(name, changes, begun)
        one = self._plain(name)
        each = note({}, name, self.asked.labels, one.logits(self.log, self.asked.queries))
        if self.plan.chosen.ranked and name != READER:
            each.add(**self.asked.ranking(one, self.log))
        each.add(cpu_s=time.process_time() - begun)
        return each

    def _plain(self, name: str) -> Recommender:
        if name in SIMPLE:
            one: Recommender = SIMPLE[name]()
            one.fit(self.log, self.split, seed=self.seed)
            return one
        if name == READER:
            return Alone(self.world)
        return self.stack if name == "stack" else self.members[name]

    def _arm(self, name: str, changes: Mapping[str, str], begun: float) -> Found:
        """Fit one arm and ask about the test rows."""
        log, asked = self.log, self.asked
        arm = self.world.fitted(name, self.plan.configured(changes), self.plan.adapter)
        one = Remembered(arm)
        each = note({}, name, asked.labels, one.logits(log, asked.queries))
        together = self._stacked(one)
        each.stacked.append(together.logits(log, asked.queries))
        each.add(stacked=auc(asked.labels, each.stacked[-1]), numbers=arm.trained_parameters, rate=arm.config.rate,
                 kept=int(np.argmin(arm.curve)), before=arm.curve[0], after=min(arm.curve))  # fmt: skip
        if self.plan.chosen.ranked:
            stacked = {f"{key}_stacked": value for key, value in asked.ranking(together, log).items()}
            each.add(**asked.ranking(one, log), **stacked)
        self._swapped(arm, each)
        each.add(cpu_s=time.process_time() - begun)
        return each

    def _swapped(self, arm: Personalized, each: Found) -> None:
        """Ask a router what it does, and what another user's would; with the first seed, another's whole history."""
        if arm.config.gate != "router":
            return
        log, asked = self.log, self.asked
        report = arm.routing(log, asked.queries)
        each.add(entropy=report.relative_entropy, information=report.information, cosine=report.cosine,
                 collapsed=float(report.collapsed))  # fmt: skip
        each.rerouted.append(arm.logits(log, asked.queries, routed_as=asked.others))
        each.add(swapped_gate=auc(asked.labels, each.rerouted[-1]))
        if arm.config.frame == "shared" and arm.config.routing == "user":
            # What a user is served. Every further question takes as long as the test rows do.
            each.evened.append(arm.evenly().logits(log, asked.queries))
        if self.seed == 0:
            each.add(swapped=auc(asked.labels, arm.logits(log, asked.others)))


def searched(
    plan: Plan, names: Sequence[str], rates: Sequence[float], own: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, str]]:
    """Try rates for every arm that trains, seed 0; return the settings of each with the rate of least log loss."""
    found = {name: dict(own.get(name, {})) for name in names}
    seeded = Seeded(plan, 0)
    for name in names:
        if "epochs" in variant(name).changes or "rate" in found[name]:
            continue
        tried = {rate: _tried(seeded, name, {**found[name], "rate": str(rate)}) for rate in rates}
        found[name]["rate"] = str(min(tried, key=lambda rate: tried[rate]))
        told = ", ".join(f"{rate:g} {loss:.5f}" for rate, loss in tried.items())
        print(f"rates of {name}{_sampled(found[name])}: {told}", flush=True)
    return found


def _sampled(changes: Mapping[str, str]) -> str:
    return f", {changes['sample']} rows" if "sample" in changes else ""


def _tried(seeded: Seeded, name: str, changes: Mapping[str, str]) -> float:
    """Return an arm's log loss on the half of the validation rows that ended no training."""
    plan, what = seeded.plan, "-".join([*changes.values(), name])
    path = plan.path(0, f"tried-{what}.json")
    if path is not None and path.exists():
        return float(json.loads(path.read_text()))
    halves = halved(plan.split)
    arm = replace(seeded.world, split=halves).fitted(name, plan.configured(changes), plan.adapter)
    loss = likes(plan.log.likes[halves.test], arm.logits(plan.log, plan.log.queries(halves.test))).log_loss
    if path is not None:
        path.write_text(json.dumps(loss))
    return loss


def gathered(plan: Plan, own: Mapping[str, Mapping[str, str]]) -> dict[str, Found]:
    """Return every arm's figures over all seeds."""
    found: dict[str, Found] = {}
    names = [*SIMPLE, READER, *plan.chosen.recommenders, "stack", *plan.chosen.arms]
    if plan.chosen.base == "minilm":
        names.remove(READER)
    for seed in range(plan.chosen.first_seed, plan.chosen.first_seed + plan.chosen.seeds):
        seeded = Seeded(plan, seed)
        for name in names:
            one, each = seeded.found(name, own.get(name, {})), found.setdefault(name, Found())
            each.logits += one.logits
            each.stacked += one.stacked
            each.rerouted += one.rerouted
            each.evened += one.evened
            each.add(**{figure: values[0] for figure, values in one.figures.items()})
    return found


def differences(log: Interactions, split: Split, found: Mapping[str, Found]) -> dict[tuple[str, str], Interval]:
    """Return the AUC of every arm minus that of each arm that it has to beat, and of stack + arm minus the stack."""
    labels, users = log.likes[split.test], log.users[split.test]

    def between(one: Sequence[Floats], other: Sequence[Floats]) -> Interval:
        return paired_bootstrap(labels, np.stack(one), np.stack(other), users=users)

    made: dict[tuple[str, str], Interval] = {}
    for name, each in found.items():
        if not each.stacked:
            continue
        for other in BEATEN:
            if other in found and name != other:
                made[name, other] = between(each.logits, found[other].logits)
                made[name, f"{other}, stacked"] = between(each.stacked, found[other].stacked)
        made[name, "stack"] = between(each.stacked, found["stack"].logits)
        for other, answers in (("swapped gate", each.rerouted), ("even gate", each.evened)):
            if len(answers) == len(each.logits):
                made[name, other] = between(each.logits, answers)
    return made


def table(split: Split, found: Mapping[str, Found], beside: Mapping[tuple[str, str], Interval]) -> list[list[str]]:
    """Return the rows of one split's table, the heading first."""
    lines = [[*HEADING]]
    for name, each in found.items():
        *gained, stacked = (str(beside.get((name, other), "")) for other in SHOWN)
        shown = [
            each.told(figure) for figure in ("ndcg10", "swapped_gate", "swapped", "entropy", "information", "cosine")
        ]
        numbers = [each.told(figure, 0) for figure in ("numbers", "cpu_s")]
        scores = [each.told(figure) for figure in ("auc", "log_loss", "accuracy")]
        lines.append([split.name, name, *scores, *gained, each.told("stacked"), stacked, *shown, *numbers])
    return lines


def halved(split: Split) -> Split:
    """Keep the first half of the validation rows (every other one) for validation and ask about the second."""
    return Split(f"{split.name} (validation)", split.train, split.validation[::2], split.validation[1::2])


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="RecLoRA beside what it has to beat.")
    parser.add_argument("--data", help="a MovieLens folder or one table; default: the built-in world")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where arms compute: cpu, cuda, cuda:N")
    parser.add_argument("--splits", nargs="+", choices=sorted(SPLITS), default=["per-user"])
    parser.add_argument("--arms", nargs="+", choices=sorted(VARIANTS), default=list(DEFAULT))
    parser.add_argument("--sample", type=int, default=16384)
    parser.add_argument("--base", default="reader", help="reader, minilm, or a directory with a decoder")
    parser.add_argument("--scorer", default="MF", choices=[*RECOMMENDERS])
    parser.add_argument("--routers", nargs="+", default=["MF", "DIN"], choices=[*get_args(RouterName)])
    parser.add_argument("--recommenders", nargs="+", default=[*RECOMMENDERS], help="members of the stack")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--targets", default="all")
    parser.add_argument("--ranked", type=int, default=100, help="test rows of a seed that are ranked; 0 for none")
    parser.add_argument("--validation", action="store_true", help="figures of validation rows, to choose settings")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of `personal:`")
    parser.add_argument("--own", nargs="*", default=[], metavar="ARM:KEY=VALUE", help="settings of one arm")
    parser.add_argument("--rates", nargs="*", default=[], type=float, help="rates to choose from for each arm")
    parser.add_argument("--part", help="name of a run that leaves the results file's other figures in it")
    parser.add_argument("--kept", type=Path, help="where a run that may be broken off keeps what it has found")
    return parser.parse_args(arguments)


def changes_of(entries: Sequence[str], config: PersonalConfig) -> dict[str, dict[str, str]]:
    """Read `--own`. Raises ConfigError for an unknown arm, ValueError for an unknown setting."""
    found: dict[str, dict[str, str]] = {}
    for entry in entries:
        name, _, setting = entry.partition(":")
        key, _, value = setting.partition("=")
        variant(name)
        found.setdefault(name, {})[key] = value
        PersonalConfig(**{**config.model_dump(), **found[name]})
    return found


def figures_of(name: str, found: Mapping[str, Found], beside: Mapping[tuple[str, str], Interval]) -> dict[str, float]:
    """Return one split's figures by the keys of the results file."""
    figures: dict[str, float] = {}
    for (arm, other), interval in beside.items():
        key = f"{name}_{arm}_minus_{other}".replace(", ", "_").replace("-", "_")
        figures |= {key: interval.value, f"{key}_low": interval.low, f"{key}_high": interval.high}
    for arm, each in found.items():
        key = f"{name}_{arm}".replace(" + ", "_").replace(" ", "_").replace("-", "_")
        for figure in each.figures:
            mean, spread = each.mean(figure), each.spread(figure)
            if mean is not None:
                figures[f"{key}_{figure}"] = mean
            if spread is not None and figure in ("auc", "log_loss", "stacked", "ndcg10"):
                figures[f"{key}_{figure}_spread"] = spread
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print what the command line asks for."""
    chosen = parsed(arguments)
    torch.set_num_threads(1)
    try:
        log = load_interactions(RatingsConfig(path=chosen.data))
        config = PersonalConfig(**{"sample": chosen.sample, **dict(entry.split("=", 1) for entry in chosen.set)})
        own = changes_of(chosen.own, config)
    except (LetheError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    adapter = AdapterConfig(rank=chosen.rank, alpha=2.0 * chosen.rank, targets=chosen.targets)
    splits = [halved(SPLITS[name](log)) if chosen.validation else SPLITS[name](log) for name in chosen.splits]
    plans = [Plan(log, split, chosen, config, adapter) for split in splits]
    if chosen.rates:
        own = searched(plans[0], chosen.arms, chosen.rates, own)
    figures: dict[str, float] = {}
    lines: list[list[str]] = []
    for name, plan in zip(chosen.splits, plans, strict=True):
        found = gathered(plan, own)
        beside = differences(log, plan.split, found)
        lines += table(plan.split, found, beside)[bool(lines) :]
        figures |= figures_of(name, found, beside)
    about = {"seeds": chosen.seeds, "data": "built-in" if chosen.data is None else "given", "rank": chosen.rank}
    about |= {"base": chosen.base if chosen.base in ("reader", "minilm") else Path(chosen.base).name}
    about |= {"scorer": chosen.scorer, "routers": chosen.routers, "folds": chosen.folds, "targets": chosen.targets}
    about |= {
        "device": chosen.device,
        "validation": chosen.validation,
        "ranked": chosen.ranked,
        "rates": chosen.rates,
        "own": own,
    }
    if chosen.part:
        figures = {f"{chosen.part}_{key}": value for key, value in figures.items()}
    publish("reclora", figures=figures, rows=lines, about=settings(**about, **config.model_dump()), part=chosen.part)


if __name__ == "__main__":
    main()
