"""RecLoRA beside what it has to beat: one table for all arms on likes.

    python -m benchmarks.reclora [--data FOLDER_OR_CSV] [--seeds 5] [--splits per-user] [--sample 16384]
        [--arms reclora-product-shared-user single-lora-equal-parameters ...] [--base reader|DIRECTORY|minilm]
        [--validation] [--set rate=0.003 temperature=0.1 ...] [--own ARM:rate=0.0003 ...]

For every seed and split, recommenders learn from all training rows. The reader (a small decoder) and the recommenders
whose vectors route learn from those that the adapters will not see; the score beside a row comes from a model that did
not learn from that row. Every arm then tunes its adapters on the same sample, with the same prompts, the same scores
and the same starting point: the weighed recommender and unadapted model, which is the arm `unadapted`. Figures are of
test rows, or with `--validation` of every other validation row, by which settings are chosen; the rest of these stops
training and weighs the stack.

Arms of different size want rates of their own: `--own`, chosen for each on validation rows.

- AUC, log loss: mean over seeds, with the spread. `vs single`, `vs stack`: AUC minus that of the single LoRA of equal
  parameters, and of stack + arm minus the stack alone, seed 0, whole users redrawn, 95 %. The results file also has the
  differences from the other single LoRA and from the uniform and the random gate.
- stacked: AUC of the recommenders' stack with the arm as one more member.
- swapped gate: routed as another user, whose history is not told; swapped: another user's history in all.
- entropy (share of ln N), information (nats) and cosine of the meta-LoRAs.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from benchmarks.measure import publish, settings
from lora.config import AdapterConfig
from lora.errors import LetheError
from strategies.personal.comparison import Found, note
from strategies.personal.config import ComparisonConfig, PersonalConfig, RouterName
from strategies.personal.recommenders.stack import Stack
from strategies.personal.variants import VARIANTS, variant
from strategies.personal.world import RECOMMENDERS, World, base_of
from tasks.recommendation.config import RatingsConfig, ReadingModelConfig
from tasks.recommendation.files import load_interactions
from tasks.recommendation.interactions import Interactions
from tasks.recommendation.metrics import Interval, auc, paired_bootstrap
from tasks.recommendation.splits import SPLITS, Split

SINGLE = "single-lora-equal-parameters"
DEFAULT = ("reclora-product-shared-user", "reclora-product-own-user", "reclora-factor-own-pair", SINGLE,
           "single-lora-equal-rank", "uniform-gate", "random-gate", "unadapted")  # fmt: skip
BEATEN = (SINGLE, "single-lora-equal-rank", "uniform-gate", "random-gate")
HEADING = ("split", "arm", "AUC", "log loss", "vs single", "stacked", "vs stack", "swapped gate", "swapped",
           "entropy", "information", "cosine", "numbers", "CPU s")  # fmt: skip


def world_of(log: Interactions, split: Split, chosen: argparse.Namespace, seed: int) -> World:
    """Fit recommenders and language model on the training rows."""
    comparison = ComparisonConfig(
        recommenders=tuple(chosen.recommenders), routers=tuple(chosen.routers), scorer=chosen.scorer, folds=chosen.folds
    )
    named = chosen.base in ("reader", "minilm")
    model = {"name" if named else "path": chosen.base}
    base = base_of(ReadingModelConfig(**model, device="cpu"))

    def listen(record: Mapping[str, object]) -> None:
        print(f"{split.name}, seed {seed}: {record['name']} fitted, CPU {time.process_time():.0f} s", flush=True)

    return World.made(log, split, comparison, base=base, sample=chosen.sample, seed=seed, listen=listen)


def measured(world: World, names: Sequence[str], config: PersonalConfig, adapter: AdapterConfig,
             found: dict[str, Found], *, changes: Mapping[str, Mapping[str, str]]) -> None:  # fmt: skip
    """Fit every arm and ask about the test rows."""
    log, split = world.log, world.split
    queries, labels = log.queries(split.test), log.likes[split.test]
    other = queries.with_history_of(np.random.default_rng(0).permutation(len(queries)))
    members = [*world.members.values()]
    stack = Stack(members, fitted=True)
    stack.fit(log, split, seed=world.seed)
    alone = stack.logits(log, queries)
    note(found, "stack", labels, alone)
    note(found, "recommender", labels, world.scorer.logits(log, queries))
    for name in names:
        begun = time.process_time()
        arm = world.fitted(name, PersonalConfig(**{**config.model_dump(), **changes.get(name, {})}), adapter)
        each = note(found, name, labels, arm.logits(log, queries))
        together = Stack([*members, arm], fitted=True)
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


def differences(log: Interactions, split: Split, found: Mapping[str, Found]) -> dict[tuple[str, str], Interval]:
    """Return the AUC of every arm minus that of each arm that it has to beat, and of stack + arm minus the stack."""
    labels, users = log.likes[split.test], log.users[split.test]
    made: dict[tuple[str, str], Interval] = {}
    for name, each in found.items():
        for other in BEATEN:
            if other in found and name not in (other, "stack"):
                made[name, other] = paired_bootstrap(labels, each.logits[0], found[other].logits[0], users=users)
                if each.stacked:
                    made[name, f"{other}, stacked"] = paired_bootstrap(
                        labels, each.stacked[0], found[other].stacked[0], users=users
                    )
        if each.stacked:
            made[name, "stack"] = paired_bootstrap(labels, each.stacked[0], found["stack"].logits[0], users=users)
    return made


def table(split: Split, found: Mapping[str, Found], beside: Mapping[tuple[str, str], Interval]) -> list[list[str]]:
    """Return the rows of one split's table, the heading first."""
    lines = [[*HEADING]]
    for name, each in found.items():
        single, stacked = (str(beside.get((name, other), "")) for other in (SINGLE, "stack"))
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
    parser.add_argument("--scorer", default="MF", choices=[*RECOMMENDERS])
    parser.add_argument("--routers", nargs="+", default=["MF", "DIN"], choices=[*get_args(RouterName)])
    parser.add_argument("--recommenders", nargs="+", default=[*RECOMMENDERS], help="members of the stack")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--targets", default="all")
    parser.add_argument("--validation", action="store_true", help="figures of validation rows, to choose settings")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of `personal:`")
    parser.add_argument("--own", nargs="*", default=[], metavar="ARM:KEY=VALUE", help="settings of one arm")
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print what the command line asks for."""
    chosen = parsed(arguments)
    torch.set_num_threads(1)
    try:
        log = load_interactions(RatingsConfig(path=chosen.data))
        own = dict(entry.split("=", 1) for entry in chosen.set)
        config = PersonalConfig(**{"sample": chosen.sample, **own})
        changes = changes_of(chosen.own, config)
    except (LetheError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    adapter = AdapterConfig(rank=chosen.rank, alpha=2.0 * chosen.rank, targets=chosen.targets)
    figures: dict[str, float] = {}
    lines: list[list[str]] = []
    for name in chosen.splits:
        split = halved(SPLITS[name](log)) if chosen.validation else SPLITS[name](log)
        found: dict[str, Found] = {}
        for seed in range(chosen.seeds):
            measured(world_of(log, split, chosen, seed), chosen.arms, config, adapter, found, changes=changes)
        beside = differences(log, split, found)
        lines += table(split, found, beside)[bool(lines) :]
        for (arm, other), interval in beside.items():
            key = f"{name}_{arm}_minus_{other}".replace(", ", "_").replace("-", "_")
            figures |= {key: interval.value, f"{key}_low": interval.low, f"{key}_high": interval.high}
        for arm, each in found.items():
            key = f"{name}_{arm}".replace("-", "_")
            figures |= {f"{key}_{figure}": statistics.fmean(values) for figure, values in each.figures.items()}
    about = {"seeds": chosen.seeds, "data": "built-in" if chosen.data is None else "given", "rank": chosen.rank}
    about |= {"base": chosen.base if chosen.base in ("reader", "minilm") else Path(chosen.base).name}
    about |= {"scorer": chosen.scorer, "routers": chosen.routers, "folds": chosen.folds, "targets": chosen.targets}
    about |= {"validation": chosen.validation, "own": chosen.own, **config.model_dump()}
    publish("reclora", figures=figures, rows=lines, about=settings(**about))


if __name__ == "__main__":
    main()
