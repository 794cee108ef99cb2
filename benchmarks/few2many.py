"""How many rows do adapters need? RecLoRA's learning curve beside one LoRA for everybody (Few2Many).

    python -m benchmarks.few2many [--data FOLDER_OR_CSV] [--sizes 512 2048 8192] [--rates 0.001 0.004 0.016]
        [--fixed ARM:SIZE:RATE ...] [--seeds 2] [--arms NAME ...] [--device cuda]
        [any other option of benchmarks.reclora]

Recommenders learn from all training rows, adapters from a sample; smaller samples are in larger ones. All arms and
sizes of a seed share one world (`benchmarks.reclora`), whose language model has not read the largest sample. Few rows
are few steps and want larger rates, so `--rates` are tried for every arm and size, with seed 0, by log loss on a half
of the validation rows which ended no training; `--fixed` names rates that were chosen before. The test rows of the
first split are asked once with the rate chosen.

- AUC, log loss of the adapted language model alone: mean over seeds, with the spread. Zero rows: recommender and
  unadapted model, weighed on the largest sample.
- minus: the first arm's AUC minus another's at the same size: means over seeds, whole users redrawn, 95 %.

The table, `results/few2many.json` and `results/few2many.svg` are written.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from benchmarks import reclora
from benchmarks.lifelong import drawn, panel
from benchmarks.measure import RESULTS, publish, settings
from benchmarks.reclora import Plan, Seeded, changes_of, searched
from lora.config import AdapterConfig
from lora.errors import LetheError
from strategies.personal.comparison import Found
from strategies.personal.config import PersonalConfig
from strategies.personal.fitting import learning_curve
from strategies.personal.personalized import Personalized
from strategies.personal.variants import VARIANTS
from tasks.recommendation.config import RatingsConfig
from tasks.recommendation.files import load_interactions
from tasks.recommendation.metrics import Interval, paired_bootstrap
from tasks.recommendation.splits import SPLITS

ARMS = ("reclora-product-shared-user", "single-lora-equal-parameters", "single-lora-equal-rank")
START = "unadapted"

Points = dict[tuple[str, int], Found]
"""Figures by arm and rows; the start has none."""


def point(seeded: Seeded, name: str, size: int, changes: Mapping[str, str]) -> Found:
    """Return one arm's figures of one sample and seed, kept or made now."""
    path = seeded.plan.path(seeded.seed, f"curve-{size}-{name}.npz")
    if path is not None and path.exists():
        with np.load(path) as kept:
            return Found(json.loads(str(kept["figures"])), [kept["logits"]])
    world, plan = seeded.world, seeded.plan

    def make(rows: int) -> Personalized:
        return world.arm(name, plan.configured({**changes, "sample": str(rows)}), plan.adapter)

    (one,) = learning_curve(make, plan.log, plan.split, [size], seed=seeded.seed, training_scores=world.training_scores)
    found = Found(logits=[one.logits])
    found.add(auc=one.auc, log_loss=one.log_loss, kept=float(one.kept_epoch))
    if path is not None:
        np.savez(path, figures=np.array(json.dumps(found.figures)), logits=one.logits)
    print(f"seed {seeded.seed}, {name}, {size} rows: AUC {one.auc:.4f}, log loss {one.log_loss:.4f}", flush=True)
    return found


def gathered(plan: Plan, own: Mapping[int, Mapping[str, Mapping[str, str]]]) -> Points:
    """Return every point over all seeds, the start first."""
    found: Points = {}
    for seed in range(plan.chosen.first_seed, plan.chosen.first_seed + plan.chosen.seeds):
        seeded = Seeded(plan, seed)
        asked = [(START, max(own), {}), *((name, size, own[size][name]) for size in own for name in own[size])]
        for name, size, changes in asked:
            one = point(seeded, name, size, changes)
            each = found.setdefault((name, 0 if name == START else size), Found())
            each.logits += one.logits
            each.add(**{figure: values[0] for figure, values in one.figures.items()})
    return found


def differences(plan: Plan, found: Points, arms: Sequence[str]) -> dict[tuple[str, int], Interval]:
    """Return the first arm's AUC minus every other's, and the start's, at each size."""
    labels, users = plan.log.likes[plan.split.test], plan.log.users[plan.split.test]
    made = {}
    for name, size in found:
        first = found.get((arms[0], size or plan.chosen.sample))
        if name != arms[0] and first is not None:
            pair = (np.stack(each.logits) for each in (first, found[name, size]))
            made[name, size] = paired_bootstrap(labels, *pair, users=users)
    return made


def table(found: Points, beside: Mapping[tuple[str, int], Interval]) -> list[list[str]]:
    """Return the table's rows, the heading first."""
    lines = [["rows", "arm", "AUC", "log loss", "first arm minus this", "kept"]]
    for (name, size), each in sorted(found.items(), key=lambda pair: pair[0][1]):
        minus = str(beside.get((name, size), ""))
        lines.append([str(size), name, each.told("auc"), each.told("log_loss", 5), minus, each.told("kept", 1)])
    return lines


def figures_of(found: Points, beside: Mapping[tuple[str, int], Interval], arms: Sequence[str]) -> dict[str, float]:
    """Return every figure by name."""
    figures: dict[str, float] = {}
    for (name, size), each in found.items():
        key = f"{name}_{size}".replace("-", "_")
        for figure, values in each.figures.items():
            figures[f"{key}_{figure}"] = statistics.fmean(values)
            if len(values) > 1 and figure != "kept":
                figures[f"{key}_{figure}_spread"] = statistics.stdev(values)
    for (name, size), interval in beside.items():
        key = f"{arms[0]}_minus_{name}_{size}".replace("-", "_")
        figures |= {key: interval.value, f"{key}_low": interval.low, f"{key}_high": interval.high}
    return figures


def picture(found: Points, arms: Sequence[str], sizes: Sequence[int]) -> str:
    """Draw AUC on the left and log loss on the right, every arm from the start on."""
    names = ["0", *(f"{size:,}" for size in sizes)]
    keys = [[(START, 0), *((arm, size) for size in sizes)] for arm in arms]
    auc, loss = (
        [[statistics.fmean(found[key].figures[figure]) for key in row] for row in keys]
        for figure in ("auc", "log_loss")
    )
    return drawn(
        "Learning curve over rows of the sample",
        panel("AUC by rows of the sample", names, arms, auc),
        panel("log loss by rows of the sample", names, arms, loss),
        arms,
    )


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what is not named here is an option of `benchmarks.reclora`."""
    parser = argparse.ArgumentParser(description="A learning curve over rows of the adapters' sample.")
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=sorted(VARIANTS), default=list(ARMS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 4e-3, 16e-3])
    parser.add_argument("--fixed", nargs="*", default=[], metavar="ARM:SIZE:RATE", help="rates that are not tried")
    here, rest = parser.parse_known_args(arguments)
    chosen = reclora.parsed(rest)
    for name, value in vars(here).items():
        setattr(chosen, name, value)
    chosen.sizes = sorted(chosen.sizes)
    chosen.sample = chosen.sizes[-1]
    return chosen


def settled(plan: Plan, chosen: argparse.Namespace) -> dict[int, dict[str, dict[str, str]]]:
    """Return the settings of every arm at every size, rates searched where none is fixed."""
    found = {}
    for size in chosen.sizes:
        known = [entry.split(":") for entry in chosen.fixed]
        own = {name: {"rate": rate} for name, at, rate in known if int(at) == size}
        sized = {name: {"sample": str(size), **own.get(name, {})} for name in chosen.arms}
        found[size] = searched(plan, chosen.arms, chosen.rates, sized)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print what the command line asks for."""
    chosen = parsed(arguments)
    torch.set_num_threads(1)
    try:
        log = load_interactions(RatingsConfig(path=chosen.data))
        config = PersonalConfig(**{"sample": chosen.sample, **dict(entry.split("=", 1) for entry in chosen.set)})
        changes_of([f"{name}:rate={rate}" for name, _, rate in (entry.split(":") for entry in chosen.fixed)], config)
    except (LetheError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    adapter = AdapterConfig(rank=chosen.rank, alpha=2.0 * chosen.rank, targets=chosen.targets)
    plan = Plan(log, SPLITS[chosen.splits[0]](log), chosen, config, adapter)
    own = settled(plan, chosen)
    found = gathered(plan, own)
    beside = differences(plan, found, chosen.arms)
    about = {"seeds": chosen.seeds, "data": "built-in" if chosen.data is None else "given", "rank": chosen.rank}
    about |= {"split": chosen.splits[0], "base": chosen.base, "scorer": chosen.scorer, "routers": chosen.routers}
    about |= {"rates": chosen.rates, "own": own, "device": chosen.device}
    figures = figures_of(found, beside, chosen.arms)
    publish("few2many", figures=figures, rows=table(found, beside), about=settings(**about, **config.model_dump()))
    (RESULTS / "few2many.svg").write_text(picture(found, chosen.arms, chosen.sizes))


if __name__ == "__main__":
    main()
