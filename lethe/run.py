"""Runs: a directory, a federation played into it, and a report."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from client.config import TrainingConfig
from client.job import private_plan
from lethe.config import FederatedPersonalRun, RunFile, load_run_file, resolved
from lethe.directory import CONFIG, METRICS, REPORT, SUMMARY, check_free, new_directory
from lethe.progress import Progress
from lethe.record import read_record
from lethe.report import write_report
from lora.errors import CheckpointError, RunError
from privacy.plan import assumptions
from simulation.engine import LEDGER, Stage, play
from strategies.federated.job import World

_ROOF = ("name", "simulation")
_RESUME = ", or go on with it: lethe resume {name}"


def simulate(run: RunFile, *, root: Path = Path("runs"), recipe: str = "run", progress: Progress | None = None) -> Path:
    """Play a run file on this machine; returns the run directory.

    Data and model are loaded first, so that a mistake in the run file leaves nothing behind. Raises RunError when the
    named directory exists.
    """
    check_free(root, run, remedy=_RESUME)
    world = _prepared(Stage(_sections(run), root))
    directory = new_directory(root, run, recipe=recipe, remedy=_RESUME)
    return _play(run, directory, world, recipe=recipe, progress=progress)


def resume(directory: Path, *, progress: Progress | None = None) -> Path:
    """Go on with a run that was stopped at any instant. Raises RunError where there is no run, or it has finished."""
    file = directory / CONFIG
    if not file.is_file():
        raise RunError(f"{directory} is not a run: no {CONFIG} there")
    if (directory / METRICS).is_file() and read_record(directory).start.get("engine") == "deployment":
        raise RunError(
            f"{directory} was played by real nodes, and a simulation cannot go on with it; submit it again under the "
            f"same name: lethe deploy submit {file} name={directory.name}"
        )
    run = load_run_file(file)
    if (directory / SUMMARY).is_file():
        summary = json.loads((directory / SUMMARY).read_text())
        if not (directory / REPORT).is_file():  # Stopped between the last round and its report.
            return _close(run, directory, recipe=summary.get("recipe"), wall=summary["wall_s"], progress=progress)
        if summary["rounds"] >= run.federation.rounds:
            rounds = summary["rounds"]
            raise CheckpointError(f"{directory} has finished all {rounds} rounds; start a new run under another name")
    return _play(run, directory, _prepared(Stage(_sections(run), directory)), recipe=None, progress=progress)


def _play(run: RunFile, directory: Path, world: World, *, recipe: str | None, progress: Progress | None) -> Path:
    began = time.perf_counter()
    stage = Stage(_sections(run), directory, about=_about(run, world), listen=_listener(progress))
    if progress is not None:
        progress.started(directory, _decisions(run, world))
    (directory / REPORT).unlink(missing_ok=True)
    play(stage, run.simulation)
    return _close(run, directory, recipe=recipe, wall=time.perf_counter() - began, progress=progress)


def _close(run: RunFile, directory: Path, *, recipe: str | None, wall: float, progress: Progress | None) -> Path:
    """Complete the summary, write the report, and say where everything is."""
    summary = _complete(run, directory, recipe=recipe, wall=wall)
    write_report(directory)
    if progress is not None:
        progress.finished(summary, directory)
    return directory


def _sections(run: RunFile) -> dict[str, Any]:
    """Return the sections that travel to server and clients."""
    return {key: value for key, value in resolved(run).items() if key not in _ROOF}


def _prepared(stage: Stage) -> World:
    """Load data and model now, and plan every client's privacy: a budget that cannot be met fails before the start."""
    job = stage.job
    world = job.world
    sizes = {len(share) for share in world.shares}
    _ = world.learner, world.train
    if job.privacy.private:
        for size in sorted(sizes, reverse=True):
            if size >= job.training.min_examples:
                private_plan(job, size)
    return world


def _about(run: RunFile, world: World) -> dict[str, Any]:
    """Return what the first record says about clients and privacy; only a simulation knows the clients' labels."""
    private = run.privacy.private
    return {
        "engine": run.simulation.engine,
        "clients": [
            {"client": str(index), "examples": len(share), "labels": _label_counts(world, share)}
            for index, share in enumerate(world.shares)
        ],
        "privacy": _privacy(run) if private else None,
    }


def _label_counts(world: World, share: Any) -> dict[str, int] | None:
    labels, names = world.splits.train.labels, world.splits.label_names
    if labels is None:
        return None
    counts: dict[str, int] = {}
    for row in share:
        name = names[labels[row]]
        counts[name] = counts.get(name, 0) + 1
    return counts


def _privacy(run: RunFile) -> dict[str, Any]:
    stated = assumptions(run.privacy)
    return {
        "epsilon_budget": run.privacy.epsilon,
        "delta": run.privacy.delta,
        "unit": stated["unit"],
        "adjacency": stated["adjacency"],
        "sampling": run.privacy.sampling,
        "assumptions": [f"{key}: {text}" for key, text in stated.items()],
        "simulated": True,
    }


def _decisions(run: RunFile, world: World) -> list[str]:
    """Say what was decided, and why, before anything runs."""
    import torch

    sizes = sorted(len(share) for share in world.shares)
    training: TrainingConfig = run.training
    learner = world.learner
    dealt = "whole users" if isinstance(run, FederatedPersonalRun) else run.data.partition
    lines = [
        f"engine {run.simulation.engine}, {torch.get_num_threads()} torch threads, {learner.base.placement}",
        f"model {learner.base.reference}: {len(learner.adapted.sites)} adapted matrices, frame "
        f"{learner.adapted.frame.digest[:12]}, {learner.layout.size:,} numbers in an adapter",
        f"{len(sizes)} clients with {sizes[0]} to {sizes[-1]} examples ({dealt}); "
        f"{run.federation.rounds} rounds of {training.steps} steps of {training.batch}",
    ]
    if run.privacy.private:
        lines.append(
            f"privacy: epsilon {run.privacy.epsilon} at delta {run.privacy.delta:g}, per example, add/remove one, "
            "Poisson lots, against the server and everybody after it"
        )
    return lines


def _listener(progress: Progress | None) -> Callable[[dict[str, Any]], None]:
    def listen(record: dict[str, Any]) -> None:
        if progress is not None and record["kind"] == "round":
            progress.round_done(record)

    return listen


def _complete(run: RunFile, directory: Path, *, recipe: str | None, wall: float) -> dict[str, Any]:
    """Add to the server's summary what only the roof knows."""
    file = directory / SUMMARY
    summary: dict[str, Any] = json.loads(file.read_text())
    summary |= {
        "name": directory.name,
        "recipe": recipe,
        "engine": run.simulation.engine,
        "wall_s": round(wall, 3),
        "ledger_path": str(directory / LEDGER) if run.privacy.private else None,
        "metrics_path": str(directory / "metrics.jsonl"),
        "report_path": str(directory / REPORT),
    }
    aside = file.with_suffix(".tmp")
    aside.write_text(json.dumps(summary, indent=1) + "\n")
    aside.rename(file)
    return summary
