"""Engines over the same apps: for the same seeds, cohort, sequential and Ray come to the same global adapter."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import simulation.engine
from lora.errors import ConfigError, FederationError
from privacy.ledger import Ledger
from simulation.config import SimulationConfig
from simulation.engine import Stage, play

Sections = dict[str, Any]
Make = Callable[..., Any]
ROOT = Path(simulation.engine.__file__).parents[1]
ADAMW = {"training": {"optimizer": "adamw", "rate": 0.002}}
CAUSAL = {"model": {"name": "tiny-llama"}, "task": {"kind": "causal-lm"}}
SEEDED = {"privacy": {"epsilon": 5.0, "delta": 1e-4, "test_seed": 3}}

CASES: dict[str, Sections] = {
    f"{strategy} {name}": {"federation": {"strategy": strategy}, **training}
    for strategy in ("ffa-lora", "lora", "rolora")
    for name, training in (("sgd", {}), ("adamw", ADAMW))
} | {
    "causal": CAUSAL,
    "seeded noise": SEEDED,
    "fedadam": {"federation": {"aggregator": "fedadam"}, "training": {"proximal": 0.1, "momentum": 0.5}},
    "median of a sample": {
        "federation": {"clients": 6, "aggregator": "median", "sampling": "fixed", "fraction": 0.5},
    },
    "poisson, skewed, weighted": {
        "federation": {"clients": 5, "sampling": "poisson", "fraction": 0.6, "weights": "examples"},
        "data": {"partition": "dirichlet", "dirichlet_alpha": 0.3},
        "training": {"min_examples": 1},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_cohort_and_sequential_come_to_the_same_adapter(sections: Make, played: Make, case: str) -> None:
    tree = sections(**CASES[case])
    one, many = played(tree, "sequential"), played(tree, "cohort", cohort=2)
    torch.testing.assert_close(one.vector, many.vector, rtol=1e-5, atol=1e-5)
    assert many.vector.abs().max() > 1e-3
    keys = ("accuracy_final", "rounds", "epsilon_max", "bytes_up_per_client_round", "refused")
    assert {key: one.summary[key] for key in keys} == {key: many.summary[key] for key in keys}
    assert one.summary["loss_final"] == pytest.approx(many.summary["loss_final"], rel=1e-4)
    assert (one.summary["engine"], many.summary["engine"]) == ("sequential", "cohort")
    for left, right in zip(one.lines, many.lines, strict=True):
        assert left.get("selected") == right.get("selected")
        assert left.get("accepted") == right.get("accepted")


def test_two_runs_of_the_same_seed_are_equal_and_of_another_are_not(sections: Make, played: Make) -> None:
    first, again, other = (played(sections(seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first.vector, again.vector)
    assert not torch.equal(first.vector, other.vector)


def test_private_runs_never_draw_the_same_noise(sections: Make, played: Make) -> None:
    tree = sections(privacy={"noise_multiplier": 50.0}, task={"head": "frozen"})
    runs = torch.stack([played(tree).vector for _ in range(2)])
    assert float(torch.corrcoef(runs)[0, 1].abs()) < 0.2


def test_a_simulated_ledger_lies_in_the_run_s_directory_and_says_so(sections: Make, played: Make) -> None:
    run = played(sections(privacy={"epsilon": 5.0, "delta": 1e-4}), "sequential")
    rows = Ledger(run.directory / "ledger.sqlite").rows()
    assert len(rows) == 9
    assert all(row.simulated for row in rows)
    assert not (played(sections()).directory / "ledger.sqlite").exists()


def test_listeners_and_the_first_line_get_what_the_stage_says(sections: Make, tmp_path: Path) -> None:
    heard: list[Sections] = []
    stage = Stage(sections(), tmp_path, about={"engine": "cohort", "clients": []}, listen=heard.append)
    play(stage, SimulationConfig(threads=1))
    assert [record["kind"] for record in heard] == ["start", "round", "round", "round", "end"]
    assert (heard[0]["engine"], heard[0]["clients"]) == ("cohort", [])


def test_threads_are_those_of_the_config_for_the_run_only(sections: Make, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    play(Stage(sections(), tmp_path), SimulationConfig(threads=2))
    assert torch.get_num_threads() == before


def test_a_federation_that_loses_its_clients_raises_through_the_engine(sections: Make, tmp_path: Path) -> None:
    tree = sections(training={"min_examples": 1000})
    with pytest.raises(FederationError, match=r"0: declined \(client 0 holds 14 examples"):
        play(Stage(tree, tmp_path), SimulationConfig(threads=1))
    assert not (tmp_path / "summary.json").exists()


def test_without_ray_its_engine_is_an_error_with_a_remedy(
    sections: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation.engine, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install 'lethe\\[ray\\]'"):
        play(Stage(sections(), tmp_path), SimulationConfig(engine="ray"))


RAY = """
import json, sys
from pathlib import Path
from simulation.config import SimulationConfig
from simulation.engine import Stage, play

if __name__ == "__main__":
    play(Stage(json.loads(sys.argv[1]), Path(sys.argv[2])), SimulationConfig(engine="ray", threads=1))
"""


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_ray_comes_to_the_same_adapter(sections: Make, played: Make, tmp_path: Path) -> None:
    """In a process of its own (about half a minute: Ray's start)."""
    tree = sections(federation={"rounds": 2, "timeout": 300.0, "min_clients": 3})
    directory = tmp_path / "ray"
    directory.mkdir()
    command = [sys.executable, "-c", RAY, json.dumps(tree), str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, ours = type(played(tree))(directory), played(tree)
    assert theirs.summary["engine"] == "ray"
    assert [line["accepted"] for line in theirs.lines if line["kind"] == "round"] == [["0", "1", "2"]] * 2
    torch.testing.assert_close(theirs.vector, ours.vector, rtol=1e-5, atol=1e-5)
