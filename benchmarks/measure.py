"""What every benchmark shares: interleaved timing, allocation peaks, a table, and the results file."""

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results"
DEVICES = "where models compute, cpu (timed in CPU seconds) or cuda (timed by the clock)"
"""What `--device` says of itself."""


def seconds(device: str = "cpu") -> float:
    """Read the clock that a device is timed by: CPU seconds of this process, which load disturbs least.

    On a GPU the wall clock, once all that was asked of it is done.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def interleaved(
    variants: Mapping[str, Callable[[], None]], *, rounds: int, warmup: int = 2, device: str = "cpu"
) -> dict[str, list[float]]:
    """Time variants in turn, the order rotated every round, in the device's `seconds`."""
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for count in range(-warmup, rounds):
        turn = count % len(names)
        for name in names[turn:] + names[:turn]:
            gc.disable()
            start = seconds(device)
            variants[name]()
            if count >= 0:
                times[name].append(seconds(device) - start)
            gc.enable()
    return times


def paired_ratio(times: Mapping[str, Sequence[float]], over: str, under: str) -> tuple[float, float, float]:
    """Return the median of the rounds' ratios and its quartiles."""
    ratios = sorted(one / two for one, two in zip(times[over], times[under], strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def redrawn_mean(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of two values or more, such as differences by seed, and 95 % of it with the values redrawn."""
    found = bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval
    return statistics.fmean(values), float(found.low), float(found.high)


def peak_bytes(step: Callable[[], None]) -> int:
    """Return the largest sum of live allocations during a step, from the profiler's allocation events."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    live = peak = 0
    for event in sorted(_allocations(seen), key=lambda pair: pair[0]):
        live += event[1]
        peak = max(peak, live)
    return peak


def _allocations(seen: Any) -> list[tuple[int, int]]:
    found = []
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            found.append((event.start_ns(), event.nbytes()))
    return found


def settings(**own: Any) -> dict[str, Any]:
    """Return what was run and on what: versions, cores, threads, and the benchmark's own settings."""
    on_gpu = str(own.get("device", "cpu")).startswith("cuda")
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name()} if on_gpu else {}),
        **own,
    }


def publish(
    name: str,
    *,
    figures: Mapping[str, float],
    rows: Sequence[Sequence[str]],
    about: Mapping[str, Any],
    part: str | None = None,
) -> Path:
    """Print the table and write benchmarks/results/NAME.json.

    A `part` of a file that several benchmarks write leaves the others' figures and settings in it.
    """
    table = Table(*rows[0], title=name)
    for row in rows[1:]:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=1000)  # A pipe has no width; the usual 80 columns would cut digits off.
    console.print(table)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    found = {"figures": dict(figures), "settings": dict(about)}
    if part is not None:
        before = json.loads(path.read_text()) if path.exists() else {"figures": {}, "settings": {}}
        found = {
            "figures": before["figures"] | found["figures"],
            "settings": before["settings"] | {part: found["settings"]},
        }
    path.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"written: benchmarks/results/{path.name}", highlight=False)
    return path
