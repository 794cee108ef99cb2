"""The same federation by three engines: a cohort in one batch, ClientApps one by one, and Flower's Ray engine.

    python -m benchmarks.simulation [--passes 3] [--stories DIRECTORY] [--only TEXT]

Each run is a process of its own, engines interleaved. Wall time is from the call that starts the engine to the result:
it holds loading model and data and, for Ray, starting its actors with their imports, but not the imports of the main
process, which every engine pays alike (among them pandas, for the partitioners). Memory is the peak of the summed
proportional set sizes of all processes of the run.

- stories260k (or, without `--stories`, a random Llama of that size), K=32 clients with texts by speaker, 20 steps of
  2 texts of 16 tokens: overhead rules. The same with 8 texts of 32 tokens, where arithmetic does.
- MiniLM, 32 clients x 3 rounds: 2 local steps of 8 queries of at most 8 tokens (overhead) and of at most 16, and 20
  local steps of 32 of at most 16 (arithmetic).
- The two works of larger lots take minutes a run, so they get a third of the passes.
- MiniLM by cohort, 8 and 128 clients, 3 steps of 32 (so that batches are full in both): memory beside what the slots
  themselves take.

`--only` measures the works whose names hold a text anew, and leaves the others in the results file as they are.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import RESULTS, publish, settings

Sections = dict[str, Any]


def stories(model: str | None, *, batch: int, length: int) -> Sections:
    """A causal language model of 260,000 parameters and 32 clients."""
    return {
        "model": {"path": model} if model else {"name": "tiny-llama"},
        "task": {"kind": "causal-lm", "max_length": length},
        "data": {"name": "builtin", "max_eval": 32},
        "adapter": {"rank": 4, "targets": "attention"},
        "federation": {"clients": 32, "rounds": 5},
        "training": {"steps": 20, "batch": batch, "rate": 0.1},
        "server": {"evaluate_every": 5, "checkpoint_every": 5},
    }


def minilm(*, clients: int, steps: int, batch: int, length: int = 16, rounds: int = 3) -> Sections:
    """MiniLM with adapters in its attention, on the built-in questions."""
    return {
        "model": {"name": "minilm"},
        "task": {"head": "frozen", "max_length": length},
        "data": {"name": "builtin", "max_eval": 32},
        "adapter": {"targets": "attention"},
        "federation": {"clients": clients, "rounds": rounds},
        "training": {"steps": steps, "batch": batch, "rate": 0.1},
        "server": {"evaluate_every": rounds, "checkpoint_every": rounds},
    }


def play(engine: str, sections: Sections) -> None:
    """Run one engine in this process and print its wall seconds: what a worker process does."""
    import flwr_datasets.partitioner  # noqa: F401 (else imported when the data are divided, inside the timed span)

    from simulation.config import SimulationConfig
    from simulation.engine import Stage
    from simulation.engine import play as start

    with tempfile.TemporaryDirectory() as directory:
        began = time.perf_counter()
        start(Stage(sections, Path(directory)), SimulationConfig(engine=engine))
        print(json.dumps({"wall_s": time.perf_counter() - began}))


def measured(engine: str, sections: Sections) -> dict[str, float]:
    """Run one engine in a process of its own; returns wall seconds and peak memory in bytes."""
    command = [sys.executable, "-m", "benchmarks.simulation", "--engine", engine, "--sections", json.dumps(sections)]
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(0.4)
        out.seek(0)
        lines = [line for line in out.read().splitlines() if line.startswith('{"wall_s"')]
    if process.returncode or not lines:
        raise SystemExit(f"engine {engine} failed with exit status {process.returncode}")
    return {**json.loads(lines[-1]), "bytes": float(peak)}


def _memory(pid: int) -> int:
    """Sum the proportional set sizes of a process and its descendants."""
    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for member in family:
        try:
            total += member.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def compared(name: str, sections: Sections, engines: tuple[str, ...], *, passes: int) -> dict[str, dict[str, float]]:
    """Run engines in turn, `passes` times; returns the medians by engine."""
    found: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    for count in range(passes):
        for engine in engines[count % len(engines) :] + engines[: count % len(engines)]:
            found[engine].append(measured(engine, sections))
            print(f"{name}: {engine} {found[engine][-1]['wall_s']:.1f} s", file=sys.stderr, flush=True)
    return {
        engine: {key: statistics.median(run[key] for run in runs) for key in ("wall_s", "bytes")}
        | {"low_s": min(run["wall_s"] for run in runs), "high_s": max(run["wall_s"] for run in runs)}
        for engine, runs in found.items()
    }


def main() -> None:
    """Measure, print and write; or, as a worker, play one engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--stories", help="directory of the stories260k model; without it, random weights of its size")
    parser.add_argument("--only", default="", metavar="TEXT", help="measure only works with this in their names")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--sections", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.engine:
        play(chosen.engine, json.loads(chosen.sections))
        return
    _measure(chosen.passes, chosen.stories, only=chosen.only)


def _measure(passes: int, model: str | None, *, only: str) -> None:
    both, ray = ("cohort", "sequential"), ("cohort", "ray")
    jobs = {
        "stories K=32, 2 x 16 tokens": (stories(model, batch=2, length=16), both, passes),
        "stories K=32, 8 x 32 tokens": (stories(model, batch=8, length=32), both, max(1, passes // 3)),
        "minilm K=32, 2 steps of 8, 8 tokens": (minilm(clients=32, steps=2, batch=8, length=8), ray, passes),
        "minilm K=32, 2 steps of 8": (minilm(clients=32, steps=2, batch=8), ray, passes),
        "minilm K=32, 20 steps of 32": (minilm(clients=32, steps=20, batch=32), ray, max(1, passes // 3)),
        "minilm K=8": (minilm(clients=8, steps=3, batch=32, rounds=1), ("cohort",), 1),
        "minilm K=128": (minilm(clients=128, steps=3, batch=32, rounds=1), ("cohort",), 1),
    }
    kept = json.loads((RESULTS / "simulation.json").read_text())["settings"]["runs"] if only else {}
    found = {
        name: compared(name, sections, engines, passes=n) if only in name else kept[name]
        for name, (sections, engines, n) in jobs.items()
    }
    rows = [["work", "engine", "wall s (median, range)", "peak MiB"]]
    for name, engines in found.items():
        for engine, run in engines.items():
            wall = f"{run['wall_s']:.1f} ({run['low_s']:.1f}-{run['high_s']:.1f})"
            rows.append([name, engine, wall, f"{run['bytes'] / 2**20:.0f}"])
    figures = _figures(found)
    publish("simulation", figures=figures, rows=rows, about=settings(passes=passes, model=bool(model), runs=found))


def _figures(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    small, middling = found["minilm K=32, 2 steps of 8, 8 tokens"], found["minilm K=32, 2 steps of 8"]
    large = found["minilm K=32, 20 steps of 32"]
    tiny, tiny_large = found["stories K=32, 2 x 16 tokens"], found["stories K=32, 8 x 32 tokens"]
    few, many = found["minilm K=8"]["cohort"], found["minilm K=128"]["cohort"]
    return {
        "sequential_over_cohort_k32": tiny["sequential"]["wall_s"] / tiny["cohort"]["wall_s"],
        "sequential_over_cohort_k32_large_lots": tiny_large["sequential"]["wall_s"] / tiny_large["cohort"]["wall_s"],
        "ray_over_cohort_small_work": small["ray"]["wall_s"] / small["cohort"]["wall_s"],
        "ray_over_cohort_small_work_16_tokens": middling["ray"]["wall_s"] / middling["cohort"]["wall_s"],
        "ray_over_cohort_large_work": large["ray"]["wall_s"] / large["cohort"]["wall_s"],
        "ray_over_cohort_memory": large["ray"]["bytes"] / large["cohort"]["bytes"],
        "memory_k128_over_k8": many["bytes"] / few["bytes"],
    }


if __name__ == "__main__":
    main()
