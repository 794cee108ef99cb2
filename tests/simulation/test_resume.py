"""Runs killed at random instants: they resume to the same bits, and private ones draw nothing uncharged."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lethe.run import resume, simulate
from lora.errors import CheckpointError, RunError
from privacy.ledger import Ledger
from server.checkpoint import Checkpoints
from server.records import Records
from simulation.config import SimulationConfig
from simulation.engine import Stage, play
from tasks.learner import Learner

Sections = dict[str, Any]
Make = Callable[..., Sections]
KILLED = -9


@pytest.fixture
def source() -> random.Random:
    """A source of instants; its seed is printed for a failure to be repeated."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def kills(source: random.Random, *, seconds: float, calls: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield instants to be killed at: by the clock, which hits instants of every kind, and by work, inside a round."""
    for turn in range(count):
        if turn % 2:
            yield {"kill_after": source.uniform(0, seconds)}
        else:
            yield {"kill_at_call": source.randint(1, calls)}


def final(directory: Path) -> torch.Tensor:
    found = Checkpoints(directory / "checkpoints").latest()
    assert found is not None
    return found.vector


OPEN: dict[str, tuple[str, Sections]] = {
    "cohort": ("cohort", {}),
    "sequential": ("sequential", {"training": {"optimizer": "adamw", "rate": 0.01}}),
    "fedadam": ("cohort", {"federation": {"aggregator": "fedadam"}}),
    "fedavgm": (
        "cohort",
        {"federation": {"aggregator": "fedavgm", "aggregator_options": {"server_momentum": 0.9}, "strategy": "lora"}},
    ),
    "sampled rolora": ("cohort", {"federation": {"strategy": "rolora", "sampling": "fixed", "fraction": 0.67}}),
}


@pytest.mark.parametrize("case", OPEN)
def test_an_open_run_killed_at_random_instants_comes_to_the_same_bits(
    sections: Make, players: Any, tmp_path: Path, source: random.Random, case: str
) -> None:
    engine, changes = OPEN[case]
    tree = sections(**changes)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ending = players.perform(tree, whole, engine=engine)
    assert ending.code == 0
    calls = players.calls(whole)
    endings = [
        players.perform(tree, broken, engine=engine, **kill)
        for kill in kills(source, seconds=ending.seconds, calls=calls, count=4)
    ]
    assert {each.code for each in endings} <= {0, KILLED}
    assert players.perform(tree, broken, engine=engine).code == 0
    assert torch.equal(final(whole), final(broken))
    timing = {"wall_s", "adapter_path"}
    left, right = (json.loads((each / "summary.json").read_text()) for each in (whole, broken))
    assert {k: v for k, v in left.items() if k not in timing} == {k: v for k, v in right.items() if k not in timing}
    assert rounds(whole) == rounds(broken)
    adapters = [(each / "adapter" / "adapter_model.safetensors").read_bytes() for each in (whole, broken)]
    assert adapters[0] == adapters[1]


class Stopped(BaseException):
    """A kill that this process survives: nothing after it is done, and nothing but `finally` cleans up."""


@pytest.mark.parametrize("changes", [{}, {"federation": {"aggregator": "fedadam"}}], ids=["fedavg", "fedadam"])
def test_law_a_stop_at_every_single_step_of_a_run_resumes_to_the_same_bits(
    sections: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Sections
) -> None:
    """Every forward pass, every record and both sides of every checkpoint are stopped at in turn."""
    tree = merged(sections(**changes), federation={"rounds": 2}, training={"steps": 1})
    left = [10**9]

    def stop_at_zero() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Stopped

    def wrap(kind: type, name: str, *, after: bool = False) -> None:
        real = getattr(kind, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            stop_at_zero()
            result = real(*args, **kwargs)
            if after:
                stop_at_zero()
            return result

        monkeypatch.setattr(kind, name, counted)

    def run(directory: Path, *, steps: int = 10**9) -> int:
        left[0] = steps
        directory.mkdir(exist_ok=True)
        play(Stage(tree, directory), SimulationConfig(threads=1))
        return steps - left[0]

    wrap(Learner, "answers")
    wrap(Records, "write", after=True)
    wrap(Checkpoints, "save", after=True)
    steps = run(tmp_path / "whole")
    assert steps > 15
    for step in range(steps):
        directory = tmp_path / f"stopped-{step}"
        with pytest.raises(Stopped):
            run(directory, steps=step)
        run(directory)
        assert torch.equal(final(tmp_path / "whole"), final(directory)), f"stopped at step {step}"
        assert rounds(tmp_path / "whole") == rounds(directory)


def merged(tree: Sections, **changes: Sections) -> Sections:
    return tree | {name: {**tree[name], **values} for name, values in changes.items()}


def rounds(directory: Path) -> dict[int, Sections]:
    """Return the last line of every round, less what a clock wrote."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {
        line["round"]: {key: value for key, value in line.items() if key not in ("time", "seconds")}
        for line in lines
        if line["kind"] == "round"
    }


@pytest.mark.parametrize("engine", ["cohort", "sequential"])
def test_law_a_private_run_killed_at_random_instants_never_draws_what_it_did_not_charge(
    sections: Make, players: Any, tmp_path: Path, source: random.Random, engine: str
) -> None:
    tree = sections(privacy={"noise_multiplier": 1.0})
    ending = players.perform(tree, tmp_path / "whole", engine=engine, noise=tmp_path / "unused")
    assert ending.code == 0
    calls = players.calls(tmp_path / "whole")
    directory, noise = tmp_path / "run", tmp_path / "draws"
    for kill in [*kills(source, seconds=ending.seconds, calls=calls, count=6), {}]:
        code = players.perform(tree, directory, engine=engine, noise=noise, **kill).code
        assert code in (0, KILLED)
        drawn = Counter(noise.read_text().split()) if noise.exists() else Counter()
        charged = charges(directory / "ledger.sqlite")
        assert all(drawn[client] <= charged[client] for client in drawn), (drawn, charged)
    assert code == 0
    planned = tree["federation"]["rounds"] * tree["training"]["steps"]
    assert all(charged[client] >= planned for client in "012")
    # Some kills left a charge behind whose noise was never drawn; none left the reverse.
    assert all(drawn[client] >= planned for client in "012")


def charges(path: Path) -> Counter[str]:
    """Return the steps that each client was charged."""
    counted: Counter[str] = Counter()
    for row in Ledger(path).rows() if path.exists() else []:
        counted[row.client] += row.steps
    return counted


def test_a_private_run_that_is_killed_again_and_again_ends_within_its_budget(
    sections: Make, players: Any, tmp_path: Path, source: random.Random
) -> None:
    """Each kill costs the clients a round; when the budget is gone the run ends in order, with an adapter."""
    tree = sections(privacy={"epsilon": 4.0, "delta": 1e-4})
    directory = tmp_path / "run"
    ending = players.perform(tree, tmp_path / "whole", noise=tmp_path / "unused")
    calls = players.calls(tmp_path / "whole")
    for _ in range(3):
        players.perform(tree, directory, kill_at_call=source.randint(calls // 2, calls - 2))
    assert players.perform(tree, directory).code == ending.code == 0
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["stopped"] == ("budget" if summary["rounds"] < 3 else None)
    assert 0 < summary["epsilon_max"] <= 4.0
    assert (directory / "adapter" / "adapter_model.safetensors").is_file()
    assert all(Ledger(directory / "ledger.sqlite").epsilon(client, delta=1e-4) <= 4.0 for client in "012")


# --- The roof: simulate and resume -----------------------------------------------------------------------------------


def test_simulate_killed_and_resumed_comes_to_the_same_bits(
    sections: Make, players: Any, tmp_path: Path, source: random.Random
) -> None:
    tree = sections()
    assert players.perform(tree, tmp_path / "whole", how="simulate").code == 0
    calls = players.calls(tmp_path / "whole")
    broken = tmp_path / "broken"
    assert players.perform(tree, broken, how="simulate", kill_at_call=source.randint(1, calls)).code == KILLED
    for kill in kills(source, seconds=1.0, calls=calls, count=2):
        if not (broken / "summary.json").exists():
            players.perform(tree, broken, how="resume", **kill)
    if not (broken / "summary.json").exists():
        assert players.perform(tree, broken, how="resume").code == 0
    assert torch.equal(final(tmp_path / "whole"), final(broken))


@pytest.fixture
def finished(sections: Make, tmp_path: Path) -> Path:
    from lethe.config import from_mapping

    run = from_mapping({**sections(), "name": "done", "simulation": {"threads": 1}})
    return simulate(run, root=tmp_path)


def test_a_finished_run_is_not_resumed(finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="finished all 3 rounds"):
        resume(finished)
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_run_directory_that_exists_is_an_error_and_stays(sections: Make, finished: Path) -> None:
    from lethe.config import from_mapping

    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=r"exists already.*lethe resume done"):
        simulate(from_mapping({**sections(), "name": "done"}), root=finished.parent)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "key"),
    [("  rate: 0.1", "training.rate"), ("  rank: 4", "adapter.rank"), ("seed: 0", "seed")],
)
def test_a_checkpoint_of_another_config_is_an_error_that_names_the_key(finished: Path, change: str, key: str) -> None:
    (finished / "summary.json").unlink()
    config = finished / "config.yaml"
    text = config.read_text()
    assert text.count(f"\n{change} ") + text.startswith(change) == 1
    config.write_text(text.replace(change, change.rsplit(" ", 1)[0] + " 1", 1))
    with pytest.raises(CheckpointError, match=key):
        resume(finished)


def test_a_directory_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"not a run: no config\.yaml"):
        resume(tmp_path)
