"""Users for life, replayed in order of time: what it is worth to bring users up to date, and what it costs.

    python -m benchmarks.lifelong [--data FOLDER_OR_CSV] [--start 0.5] [--periods 6] [--sample 600] [--seeds 1]
        [--router MF|DIN|SASRec] [--no-anew] [--set rate=0.003 ...] [--first-seed 0] [--kept DIRECTORY] [--device cuda]

A reader (the frozen language model) learns the texts before the start. At the start a recommender, meta-LoRAs and
routers are fitted on everything before it, the adapters on a sample that neither reader nor recommender has seen; then
every period is served by the arms of `strategies/personal/replay.py`. Periods hold equally many events, not equally
much time: months of a small log are far too uneven to compare. The arm that is trained anew fits recommender,
meta-LoRAs and routers from scratch on everything before each period; the reader stays, for that arm as for the others.

- AUC, log loss: likes among `--sample` events of every period; the last columns are of all of them. `minus`:
  differences of AUC over all seeds' samples together, whole users redrawn, 95 %.
- newcomers: users without an event at the start, by events seen before the one asked about.
- costs: bringing a whole period's users up to date, one user with one new event (median of 30), one fit. In CPU
  seconds; with `--device cuda`, where language model and adapters compute then, by the wall clock.

With `--kept` a directory keeps what came of every seed, and seeds that were replayed side by side (`--first-seed`) are
put together by the same command over all of them; nothing else is compared. The table, `results/lifelong.json` and
`results/lifelong.svg` are written.
"""

import argparse
import copy
import pickle
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from benchmarks.measure import RESULTS, publish, seconds, settings
from lethe.page import STYLE
from lethe.plots import Canvas, Series, plain
from lora.config import AdapterConfig
from lora.errors import LetheError
from strategies.personal.asking import Asking
from strategies.personal.config import PersonalConfig, RouterName
from strategies.personal.fitting import few, without_sample
from strategies.personal.lifelong import LifelongUsers
from strategies.personal.personalized import Personalized
from strategies.personal.replay import ARMS, EVENT, Period, Replayed, before, periods, replay
from strategies.personal.representation import Recommended
from strategies.personal.world import RECOMMENDERS
from tasks.config import ModelConfig
from tasks.device import place
from tasks.models import BaseModel
from tasks.recommendation.config import RatingsConfig
from tasks.recommendation.files import load_interactions
from tasks.recommendation.interactions import Interactions, Ints
from tasks.recommendation.metrics import Interval, Likes, paired_bootstrap
from tasks.recommendation.reader import ReaderSettings, train_reader
from tasks.recommendation.splits import Split


class Fitter:
    """Fits a recommender and what it routes, over copies of one frozen reader that has learned from rows `read`.

    Adapters learn from rows that neither the reader nor the recommender has seen.
    """

    def __init__(
        self, base: BaseModel, read: Ints, chosen: argparse.Namespace, config: PersonalConfig, *, seed: int
    ) -> None:
        self.base, self.read, self.chosen, self.config, self.seed = base, read, chosen, config, seed
        self.models: list[Personalized] = []
        """All that were fitted, the first at the start."""

    def __call__(self, log: Interactions, split: Split) -> Personalized:
        """Return the model of the training rows of a split."""
        unread = replace(split, train=np.setdiff1d(split.train, self.read))
        sample = few(unread.train, self.config.sample, seed=self.seed)
        recommender = RECOMMENDERS[self.chosen.router]()
        recommender.fit(log, replace(split, train=np.setdiff1d(split.train, sample)), seed=self.seed)
        placement = place(ModelConfig(device=self.chosen.device, dtype="float32"))
        base = replace(self.base, model=copy.deepcopy(self.base.model).to(placement.device), placement=placement)
        asking = Asking(base, scorer=recommender, base_score=self.config.base_score, history=self.config.history)
        adapter = AdapterConfig(rank=4, alpha=8.0, targets="all")
        representation = Recommended([recommender], self.config.routing)  # type: ignore[list-item]
        one = Personalized(base, adapter, self.config, asking=asking, representation=representation)
        one.fit(log, unread, seed=self.seed)
        print(f"{split.name}: fitted, CPU {time.process_time():.0f} s, checks {one.curve}", flush=True)
        self.models.append(one)
        return one


def one_update(
    model: Personalized, log: Interactions, moment: int, *, device: str, rounds: int = 30
) -> tuple[float, float]:
    """Return the median seconds of one user's one new event, and bytes of a slot."""
    users = LifelongUsers(model, log)
    users.start(log.taken(np.flatnonzero(log.times < moment)))
    names, found = cycle(users.names()), []
    for number in range(rounds):
        begun = seconds(device)
        users.observe(next(names), log.catalogue.names[number], 4.0, int(log.times.max()) + 1 + number)
        found.append(seconds(device) - begun)
    return statistics.median(found), users.slots.slot_bytes


def merged(found: Sequence[Likes]) -> str:
    """Write AUC, with the spread over seeds."""
    values = [each.auc for each in found]
    spread = f" ±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def loss_of(found: Sequence[Likes]) -> str:
    """Write the mean log loss."""
    return f"{statistics.fmean(each.log_loss for each in found):.4f}"


def difference(runs: Sequence[Replayed], arm: str, other: str) -> Interval:
    """Return the AUC of one arm minus another's over all seeds' samples, with its interval."""
    log, drawn = runs[0].log, [run.drawn > 0 for run in runs]
    rows = np.concatenate([run.rows[asked] for run, asked in zip(runs, drawn, strict=True)])
    one, two = (
        np.concatenate([run.logits[name][asked] for run, asked in zip(runs, drawn, strict=True)])
        for name in (arm, other)
    )
    return paired_bootstrap(log.likes[rows], one, two, users=log.users[rows])


def drift_table(runs: Sequence[Replayed], arms: Sequence[str]) -> list[list[str]]:
    """Return AUC and log loss of every arm in every period."""
    heading = ["arm", *(f"period {number + 1}" for number in range(runs[0].periods)), "all", "log loss"]
    lines = [heading]
    for arm in arms:
        each = [run.drift(arm) for run in runs]
        whole = [run.whole(arm) for run in runs]
        lines.append([arm, *(merged(column) for column in zip(*each, strict=True)), merged(whole), loss_of(whole)])
    return lines


def newcomer_lines(runs: Sequence[Replayed], arms: Sequence[str]) -> list[list[str]]:
    """Return AUC of every arm for newcomers by events seen."""
    first = runs[0].newcomers(arms[0])
    lines = [["newcomers: events seen", *(f"{name} ({likes.rows})" for name, likes in first.items())]]
    for arm in arms:
        each = [run.newcomers(arm) for run in runs]
        lines.append([arm, *(f"{merged([one[name] for one in each])}, {loss_of([one[name] for one in each])}"
                             for name in first)])  # fmt: skip
    return lines


def figures_of(runs: Sequence[Replayed], arms: Sequence[str]) -> dict[str, float]:
    """Return every figure by name."""
    found: dict[str, float] = {}
    for arm in arms:
        key = arm.replace(" ", "_")
        parts = {"all": [run.whole(arm) for run in runs]}
        for number in range(runs[0].periods):
            parts[f"period_{number + 1}"] = [run.drift(arm)[number] for run in runs]
        for name in runs[0].newcomers(arm):
            parts[f"newcomers_{name}"] = [run.newcomers(arm)[name] for run in runs]
        for name, measured in parts.items():
            for figure in ("auc", "log_loss", "rows"):
                found[f"{key}_{name}_{figure}"] = statistics.fmean(getattr(each, figure) for each in measured)
    return found


def picture(runs: Sequence[Replayed], arms: Sequence[str]) -> str:
    """Draw log loss by period on the left and by events seen on the right."""
    drift = [[statistics.fmean(run.drift(arm)[i].log_loss for run in runs) for i in range(runs[0].periods)]
             for arm in arms]  # fmt: skip
    names = [*runs[0].newcomers(arms[0])]
    known = [[statistics.fmean(run.newcomers(arm)[name].log_loss for run in runs) for name in names] for arm in arms]
    left = panel("log loss by period", [f"{i + 1}" for i in range(runs[0].periods)], arms, drift)
    right = panel("newcomers: log loss by events seen before", names, arms, known)
    return drawn("Replay in order of time", left, right, arms)


def drawn(title: str, left: str, right: str, arms: Sequence[str]) -> str:
    """Return two panels side by side over one legend, as a picture of its own."""
    step = 960 // len(arms)
    legend = "".join(
        f'<g class="curve-key"><rect class="f{hue}" x="{10 + step * (hue - 1)}" y="268" width="10" height="10"/>'
        f'<text x="{25 + step * (hue - 1)}" y="277">{arm}</text></g>'
        for hue, arm in enumerate(arms, start=1)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 290" width="980" height="290" role="img" '
        f'aria-label="{title}"><style>{STYLE}</style><rect width="980" height="290" '
        f'fill="var(--bg)"/>{left}<g transform="translate(490 0)">{right}</g>'
        f"{legend}</svg>\n"
    )


def panel(label: str, names: Sequence[str], arms: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """Draw one line an arm over named places."""
    heights = [value for row in values for value in row if np.isfinite(value)]
    room = 0.05 * (max(heights) - min(heights)) + 1e-6
    canvas = Canvas((-0.2, len(names) - 0.8), (min(heights) - room, max(heights) + room))
    canvas.y_axis(plain)
    canvas.x_axis(label, list(enumerate(names)))
    for hue, (arm, row) in enumerate(zip(arms, values, strict=True), start=1):
        line = Series(arm, [(place, value) for place, value in enumerate(row) if np.isfinite(value)], hue=hue)
        canvas.path(line.points, f"curve s{hue}")
        for x, y in line.points:
            canvas.dot(canvas.x(x), canvas.y(y), style=f"f{hue}", tip=f"{arm}, {names[int(x)]}: {y:.4f}")
    return "".join(canvas.parts)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Replay users for life in order of time.")
    parser.add_argument("--data", help="a MovieLens folder or one table; default: the built-in world")
    parser.add_argument("--start", type=float, default=0.5, help="share of the events before the first period")
    parser.add_argument("--periods", type=int, default=6)
    parser.add_argument("--sample", type=int, default=600, help="events of every period that are asked about")
    parser.add_argument("--early", type=int, default=100, help="more of newcomers, in each stretch of events seen")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--kept", type=Path, help="where what came of every seed is kept")
    parser.add_argument("--device", default="cpu", help="where language model and adapters compute: cpu, cuda, cuda:N")
    parser.add_argument("--router", choices=get_args(RouterName), default="MF", help="scores and routes")
    parser.add_argument("--reader-epochs", type=int, default=4)
    parser.add_argument("--no-anew", dest="anew", action="store_false", help="leave out the arm trained anew")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of `personal:`")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print what the command line asks for."""
    chosen = parsed(arguments)
    torch.set_num_threads(1)
    try:
        log = load_interactions(RatingsConfig(path=chosen.data))
        times = periods(log, start=chosen.start, count=chosen.periods)
        own = dict(entry.split("=", 1) for entry in chosen.set)
        config = PersonalConfig(**{"sample": 4096, "epochs": 2, "checks": 2048, **own})
    except (LetheError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    seeds = range(chosen.first_seed, chosen.first_seed + chosen.seeds)
    runs, updates = zip(*(kept_run(log, times, chosen, config, seed=seed) for seed in seeds), strict=True)
    report(runs, chosen, config, updates)


Run = tuple[Replayed, tuple[float, float]]
"""What came of a replay, and `one_update` of its first model."""


def kept_run(
    log: Interactions, times: Sequence[Period], chosen: argparse.Namespace, config: PersonalConfig, *, seed: int
) -> Run:
    """Return one seed's replay, kept or made now."""
    path = None if chosen.kept is None else chosen.kept / f"replay-{seed}.pickle"
    if path is not None and path.exists():
        replayed, update = pickle.loads(path.read_bytes())
        return replace(replayed, log=log), update
    run = one_run(log, times, chosen, config, seed=seed)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".part")
        aside.write_bytes(pickle.dumps(run))
        aside.rename(path)
    return run


def one_run(
    log: Interactions, times: Sequence[Period], chosen: argparse.Namespace, config: PersonalConfig, *, seed: int
) -> Run:
    """Replay with one seed."""
    rest = without_sample(before(log, times[0].begin), config.sample, seed=seed)
    base = train_reader(log, rest, ReaderSettings(epochs=chosen.reader_epochs), seed=seed)
    print(f"seed {seed}: reader ready, CPU {time.process_time():.0f} s", flush=True)
    fitter, clock = Fitter(base, rest.train, chosen, config, seed=seed), partial(seconds, chosen.device)
    found = replay(
        log, fitter, times, sample=chosen.sample, early=chosen.early, anew=chosen.anew, seed=seed, clock=clock
    )
    return found, one_update(fitter.models[0], log, times[0].begin, device=chosen.device)


def report(
    runs: Sequence[Replayed],
    chosen: argparse.Namespace,
    config: PersonalConfig,
    updates: Sequence[tuple[float, float]],
) -> None:
    """Print the tables and write figures and picture."""
    arms = [arm for arm in ARMS if arm in runs[0].logits]
    figures = figures_of(runs, arms)
    figures |= {"one_update_s": statistics.median(each for each, _ in updates), "slot_bytes": updates[0][1]}
    figures["period_update_s"] = statistics.fmean(value for run in runs for value in run.update_s)
    figures["period_users"] = statistics.fmean(value for run in runs for value in run.updated)
    figures["fit_s"] = statistics.fmean(value for run in runs for value in run.fit_s)
    figures["retrain_over_update_s"] = figures["fit_s"] / figures["one_update_s"]
    apart = {arm: difference(runs, EVENT, arm) for arm in arms if arm != EVENT}
    for arm, interval in apart.items():
        key = f"updated_minus_{arm.replace(' ', '_')}"
        figures |= {f"{key}_auc": interval.value, f"{key}_low": interval.low, f"{key}_high": interval.high}
    lines = drift_table(runs, arms)
    about = {key: value for key, value in vars(chosen).items() if key != "kept"}
    about |= {"data": "built-in" if chosen.data is None else "given", "personal": config.model_dump()}
    publish("lifelong", figures=figures, rows=lines, about=settings(**about))
    for line in newcomer_lines(runs, arms):
        print(" | ".join(line))
    for name in ("one_update_s", "period_update_s", "period_users", "fit_s", "retrain_over_update_s", "slot_bytes"):
        print(f"{name}: {figures[name]:.4g}")
    for other, interval in apart.items():
        print(f"{EVENT} minus {other}: {interval}")
    (RESULTS / "lifelong.svg").write_text(picture(runs, arms))


if __name__ == "__main__":
    main()
