"""Personal runs: a directory, recommenders and adapters compared into it, one user's adapter, and a report."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lethe.config import PersonalRun
from lethe.directory import METRICS, REPORT, SUMMARY, check_free, new_directory
from lethe.progress import Progress
from lethe.ratings import load_ratings
from lethe.report import write_report
from lethe.served_run import BASE, keep_recommenders
from strategies.personal.comparison import (
    RECLORA,
    RECOMMENDER,
    SINGLE,
    SINGLE_VARIANT,
    STACK,
    STACK_WITH,
    Asked,
    Comparison,
    Found,
    check_split,
)
from strategies.personal.config import PersonalConfig
from strategies.personal.personalized import Personalized
from strategies.personal.portrait import Sitter, export_user, portrait, sitter
from strategies.personal.variants import variant
from strategies.personal.world import BaseOf, World, base_of
from tasks.recommendation.interactions import Interactions
from tasks.recommendation.reader import save_reader
from tasks.recommendation.splits import SPLITS, Split

ADAPTER = "adapter"
_PAIRS = ((RECLORA, SINGLE), (RECLORA, RECOMMENDER), (STACK_WITH, STACK))
_SHOWN = 1000
"""Test rows over which the mean weights of all users are taken."""


@dataclass(frozen=True)
class Prepared:
    """What a run needs before its directory is made, so that a mistake in the run file leaves nothing behind."""

    log: Interactions
    split: Split
    who: Sitter
    base: BaseOf
    asked: Asked
    left_out: int
    """Users who were asked to be forgotten."""
    personal: PersonalConfig
    """As in the run file, but adapters get at most half of the training rows: the rest is for what they stand on."""

    @classmethod
    def of(cls, run: PersonalRun) -> "Prepared":
        """Load data and language model, and find the user to show and the arms."""
        for name in run.comparison.arms:
            variant(name).personal(run.personal)
        log, left_out = load_ratings(run)
        split = SPLITS[run.comparison.split](log)
        check_split(log, split)
        who = sitter(log, split, run.comparison.show_user)
        asked = Asked.of(log, split, run.comparison, seed=run.seed)
        sample = min(run.personal.sample, len(split.train) // 2)
        return cls(
            log, split, who, base_of(run.model), asked, left_out, run.personal.model_copy(update={"sample": sample})
        )


def personalize(
    run: PersonalRun, *, root: Path = Path("runs"), recipe: str = "run", progress: Progress | None = None
) -> Path:
    """Fit recommenders, a single LoRA and RecLoRA as a run file says, and compare them; returns the run directory.

    Raises RunError when the named directory exists, DataError for ratings that cannot be used or an unknown user,
    ModelError for a model that cannot be loaded, ConfigError for an unknown arm; then nothing is left behind.
    """
    check_free(root, run)
    began = time.perf_counter()
    prepared = Prepared.of(run)
    playing = _Playing(run, prepared, new_directory(root, run, recipe=recipe), recipe, progress)
    playing.start()
    for index in range(run.comparison.seeds):
        playing.seed(index)
    playing.close(wall=time.perf_counter() - began)
    return playing.directory


@dataclass
class _Playing:
    """One run as it goes on: every part that is done is a line of the metrics and of the terminal."""

    run: PersonalRun
    prepared: Prepared
    directory: Path
    recipe: str
    progress: Progress | None
    comparison: Comparison = field(init=False)
    model: str = ""
    parts: int = 0

    def __post_init__(self) -> None:
        ready = self.prepared
        self.comparison = Comparison(ready.log, ready.split, ready.asked, self.run.comparison)

    def start(self) -> None:
        about = self._about()
        self._write({"kind": "start"} | about)
        if self.progress is not None:
            self.progress.rounds = _planned(self.run)
            self.progress.started(self.directory, self._decisions(about))

    def seed(self, index: int) -> None:
        """Fit and ask everybody once; the first seed's adapter and user are kept."""
        run, ready = self.run, self.prepared
        world = World.made(
            ready.log,
            ready.split,
            run.comparison,
            base=ready.base,
            sample=ready.personal.sample,
            seed=run.seed + index,
            listen=self._done,
        )
        self.model = world.base.reference
        if index == 0 and world.base.reference == "reader":
            kept = save_reader(world.base, self.directory / BASE)
            world = replace(world, base=replace(world.base, reference=str(kept)))
        if index == 0:
            keep_recommenders(world, self.directory, told=ready.personal.told)
        arms = self.comparison.run(world, ready.personal, run.adapter, listen=self._done)
        if index == 0:
            self._show(arms)

    def _show(self, arms: Mapping[str, Personalized]) -> None:
        log, who = self.prepared.log, self.prepared.who
        everybody = self.prepared.asked.queries.take(slice(0, _SHOWN))
        shown = portrait(log, who, personal=arms[RECLORA], others={SINGLE: arms[SINGLE]}, everybody=everybody)
        self._write({"kind": "portrait"} | shown)
        export_user(arms[RECLORA], log, who, self.directory / ADAPTER)

    def close(self, *, wall: float) -> None:
        """Write the summary and the report, and say where everything is."""
        summary = self._about() | self._outcome() | {"wall_s": round(wall, 3)}
        self._write({"kind": "end", "wall_s": summary["wall_s"]})
        aside = (self.directory / SUMMARY).with_suffix(".tmp")
        aside.write_text(json.dumps(summary, indent=1) + "\n")
        aside.rename(self.directory / SUMMARY)
        write_report(self.directory)
        if self.progress is not None:
            self.progress.finished(summary, self.directory)

    def _about(self) -> dict[str, Any]:
        log, split, run = self.prepared.log, self.prepared.split, self.run
        return {
            "name": self.directory.name,
            "recipe": self.recipe,
            "model": self.model or run.model.path or run.model.name,
            "split": split.name,
            "users": len(log.user_names),
            "left_out": self.prepared.left_out,
            "items": len(log.catalogue),
            "interactions": len(log),
            "train_rows": len(split.train),
            "test_rows": len(split.test),
            "seeds": run.comparison.seeds,
            "user_shown": self.prepared.who.name,
            "adapter_path": str(self.directory / ADAPTER),
            "metrics_path": str(self.directory / METRICS),
            "report_path": str(self.directory / REPORT),
        }

    def _outcome(self) -> dict[str, Any]:
        found, gates = self.comparison.found, self.comparison.gates
        figures: dict[str, Any] = {}
        for name, each in found.items():
            for figure in each.figures:
                key = f"{figure}_{name.lower().replace('-', '_')}"
                figures |= {key: each.mean(figure), f"{key}_spread": each.spread(figure)}
        ranked = {f"ndcg10_{name}": figures.get(f"ndcg10_{name}") for name in ("recommender", "reclora")}
        swaps = {key: found[RECLORA].mean(key) for key in ("swap_auc_drop", "swap_history_auc_drop")}
        swaps["swap_auc_drop_spread"] = found[RECLORA].spread("swap_auc_drop")
        differences = [self._difference(one, other) for one, other in _PAIRS]
        return {
            **figures,
            **ranked,
            **swaps,
            "gate_entropy": _mean([gate.entropy for gate in gates]),
            "gate_entropy_share": _mean([gate.relative_entropy for gate in gates]),
            "gate_information": _mean([gate.information for gate in gates]),
            "gate_cosine": _mean([gate.cosine for gate in gates]),
            "gate_collapsed": any(gate.collapsed for gate in gates),
            "untrained": not any(found[RECLORA].figures["kept_epoch"]),
            "gate_usage": [_mean(list(each)) for each in zip(*(gate.usage for gate in gates), strict=True)],
            "differences": differences,
            "arms": [{"name": name, **_row(each)} for name, each in found.items()],
        }

    def _difference(self, one: str, other: str) -> dict[str, Any]:
        found = self.comparison.difference(one, other, seed=self.run.seed)
        return {"one": one, "other": other, "value": found.value, "low": found.low, "high": found.high}

    # --- What is said on the way ---

    def _decisions(self, about: Mapping[str, Any]) -> list[str]:
        import torch

        personal, chosen = self.prepared.personal, self.run.comparison
        gone = f" ({about['left_out']:,} more were forgotten, and are left out)" if about["left_out"] else ""
        return [
            f"{about['users']:,} users{gone}, {about['items']:,} items, {about['interactions']:,} ratings; split "
            f"{about['split']}: {about['train_rows']:,} rows to learn from, {about['test_rows']:,} to be asked about",
            f"model {about['model']}, {personal.meta_loras} meta-LoRAs of rank {self.run.adapter.rank}, "
            f"{personal.mixing} mixing, {personal.frame} frame, routed by {personal.routing} vectors of "
            f"{' and '.join(chosen.routers)}",
            f"adapters learn from {personal.sample:,} of these rows, {personal.epochs} "
            f"epoch{'s'[: personal.epochs != 1]}, and what routes and reads from the others; seeds {chosen.seeds}, "
            f"{torch.get_num_threads()} torch threads",
        ]

    def _done(self, record: Mapping[str, Any]) -> None:
        self.parts += 1
        self._write(record)
        if self.progress is not None:
            self.progress.done(_line(record), self.parts)

    def _write(self, record: Mapping[str, Any]) -> None:
        with (self.directory / METRICS).open("a", encoding="utf-8") as metrics:
            metrics.write(json.dumps(dict(record)) + "\n")


def _planned(run: PersonalRun) -> int:
    """Return how many parts a run has: fits, arms, and one ranking a seed."""
    members, arms = len(run.comparison.recommenders), len({*run.comparison.arms} - {SINGLE_VARIANT})
    fits, asked = members + 3, members + 3 + 2 + arms
    return run.comparison.seeds * (fits + asked + 1)


def _row(each: Found) -> dict[str, Any]:
    figures = ("auc", "log_loss", "accuracy", "ndcg10", "hit10", "mrr", "numbers")
    row = {figure: each.mean(figure) for figure in figures}
    return row | {f"{figure}_spread": each.spread(figure) for figure in figures[:-1]}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _line(record: Mapping[str, Any]) -> str:
    """Return one part in one line: `seed 0  reclora  AUC 0.7912  log loss 0.5534  12.1 s`."""
    parts = [f"seed {record['seed']}", str(record["name"])]
    if record["kind"] == "fitted":
        parts.append("fitted")
    if record["kind"] == "arm":
        parts += [f"AUC {record['auc']:.4f}", f"log loss {record['log_loss']:.4f}"]
    if record.get("seconds") is not None:
        parts.append(f"{record['seconds']:.1f} s")
    ranked = {name: value for name, value in record.get("ndcg10", {}).items() if value is not None}
    parts += [f"{name} {value:.4f}" for name, value in ranked.items()]
    return "  ".join(parts)
