"""Run directories as a run leaves them, made up but of realistic size and shape."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lethe.config import from_mapping, to_yaml

MakeRun = Callable[..., Path]
REASONS = ("missing", "error", "nan", "shape", "digest", "declined", "budget")


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Return a maker of run directories below `tmp_path / "runs"`."""

    def make(name: str = "first", **traits: Any) -> Path:
        directory = tmp_path / "runs" / name
        write_run(directory, **traits)
        return directory

    return make


def write_run(
    directory: Path,
    *,
    clients: int = 4,
    rounds: int = 10,
    labels: int = 5,
    private: bool = False,
    causal: bool = False,
    finished: bool = True,
    refuse: float = 0.0,
    fraction: float = 1.0,
    resumed: int | None = None,
) -> None:
    """Write config.yaml, metrics.jsonl and, for a finished run, summary.json."""
    draw = random.Random(7)
    directory.mkdir(parents=True)
    tree: dict[str, Any] = {"federation": {"clients": clients, "rounds": rounds}}
    tree |= {"privacy": {"epsilon": 8.0, "delta": 1e-5}} if private else {}
    tree |= {"task": {"kind": "causal-lm"}, "model": {"name": "tiny-llama"}} if causal else {}
    (directory / "config.yaml").write_text(to_yaml(from_mapping(tree)))
    names = [str(i) for i in range(clients)]
    start = start_line(draw, names, labels=labels, private=private, causal=causal)
    lines, spent = [start], dict.fromkeys(names, 0.0)
    for number in range(1, rounds + 1 if finished else rounds // 2 + 1):
        line = round_line(draw, number, names, rounds=rounds, refuse=refuse, fraction=fraction, private=private)
        if private:
            spent |= {each: 8.0 * (number / rounds) ** 0.5 * draw.uniform(0.8, 1) for each in line["accepted"]}
            line["epsilon"] = {each: spent[each] for each in line["accepted"]}
        lines.append(line)
        if number == resumed:
            lines += [{"kind": "resumed", "round": number}, line | {"accuracy": 0.5}]
    if finished:
        accuracy = None if private else {each: draw.uniform(0.6, 0.95) for each in names}
        lines.append({"kind": "end", "accuracy_final": 0.87, "loss_final": 0.45, "client_accuracy": accuracy})
        (directory / "summary.json").write_text(json.dumps(summary(directory, clients, rounds, private=private)))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def start_line(draw: random.Random, names: list[str], *, labels: int, private: bool, causal: bool) -> dict[str, Any]:
    kinds = [f"label <{i}> & co" for i in range(labels)]
    held = []
    for name in names:
        shares = [draw.gammavariate(0.5, 1) for _ in kinds]
        examples = draw.randint(80, 600)
        counts = {kind: int(examples * share / sum(shares)) for kind, share in zip(kinds, shares, strict=True)}
        held.append(
            {"client": name, "examples": sum(counts.values()) or examples, "labels": None if causal else counts}
        )
    privacy = {
        "epsilon_budget": 8.0,
        "delta": 1e-5,
        "unit": "example",
        "adjacency": "add/remove one",
        "sampling": "poisson",
        "assumptions": ["sampling: Poisson lots", "adversary: the server and everybody after it", "no other release"],
        "simulated": True,
    }
    first = {"kind": "start", "time": "2030-01-01T00:00:00Z", "clients": held, "engine": "cohort"}
    return first | {"privacy": privacy if private else None, "accuracy": 0.21, "loss": 1.61}


def round_line(
    draw: random.Random,
    number: int,
    names: list[str],
    *,
    rounds: int,
    refuse: float,
    fraction: float,
    private: bool,
) -> dict[str, Any]:
    selected = [name for name in names if draw.random() < fraction] or names[:1]
    lost = [name for name in selected if draw.random() < refuse]
    accepted = [name for name in selected if name not in lost]
    progress = number / rounds
    line = {
        "kind": "round",
        "round": number,
        "selected": selected,
        "accepted": accepted,
        "refused": [{"client": name, "reason": draw.choice(REASONS), "detail": "<b>odd</b>"} for name in lost],
        "seconds": {"train": 2.0, "aggregate": 0.02, "evaluate": 0.6, "checkpoint": 0.05},
        "bytes_up": 74_000 * len(accepted),
        "bytes_down": 74_000 * len(selected),
        "accuracy": 0.21 + 0.66 * progress**0.5 + draw.uniform(-0.02, 0.02),
        "loss": 1.61 * (1 - 0.7 * progress**0.5),
        "aggregation_error": 2.4e-8,
        "update_norm": {name: draw.lognormvariate(-1, 0.4) * (1.5 - progress) for name in accepted},
    }
    return line if private else line | {"train_loss": {name: draw.uniform(0.4, 1.6) for name in accepted}}


def summary(directory: Path, clients: int, rounds: int, *, private: bool) -> dict[str, Any]:
    return {
        "name": directory.name,
        "recipe": "quickstart",
        "strategy": "ffa-lora",
        "model": "minilm",
        "rounds": rounds,
        "clients": clients,
        "accuracy_initial": 0.21,
        "accuracy_final": 0.87,
        "loss_initial": 1.61,
        "loss_final": 0.45,
        "epsilon_max": 7.98 if private else None,
        "delta": 1e-5 if private else None,
        "unit": "example" if private else None,
        "sampling": "poisson" if private else None,
        "frame_digest_start": "ab" * 32,
        "frame_digest_end": "ab" * 32,
        "bytes_up_per_client_round": 74_000,
        "bytes_down_per_client_round": 74_000,
        "bytes_up_plain_lora": 148_000,
        "aggregation_error": 2.4e-8,
        "wall_s": 61.2,
        "engine": "cohort",
        "refused": [],
        "labels": 5,
    }
