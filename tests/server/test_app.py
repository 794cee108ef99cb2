"""The ServerApp as a deployment runs it: named, held, resumed, refused when done, and ready for reports."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from lethe.cli import main
from lethe.run import resume
from lora.errors import CheckpointError, FederationError, RunError
from server.app import build
from server.directory import RUNS_VARIABLE, held
from simulation.grid import SequentialGrid

Sections = dict[str, Any]
QUICK: Sections = {"federation": {"timeout": 5.0, "rounds": 3}}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(RUNS_VARIABLE, str(tmp_path / "runs"))
    monkeypatch.setattr("server.grid.POLL_S", 0.0)
    return tmp_path / "runs"


@pytest.fixture
def deploy(runs: Path, small_federation: Callable[..., Any]) -> Callable[..., Path]:
    """Play a small job as Flower's runtime would start it, under a name."""

    def run(name: str = "pilot", tamper: Any = None, **changes: Any) -> Path:
        tree = small_federation(runs.parent / "unused", **{**QUICK, **changes}).tree
        config = {"name": name, "job": json.dumps(tree)}
        clients = tree["federation"]["clients"]
        grid = SequentialGrid(clients=clients, run_config=config, ledger=runs.parent / "ledger.sqlite", tamper=tamper)
        build()(grid, Context(run_id=3, node_id=0, node_config={}, state=RecordDict(), run_config=config))
        return runs / name

    return run


def lines(directory: Path, kind: str) -> list[Sections]:
    text = (directory / "metrics.jsonl").read_text()
    return [each for line in text.splitlines() if (each := json.loads(line))["kind"] == kind]


def test_a_run_has_all_that_a_report_needs(deploy: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    directory = deploy()
    assert main(["report", str(directory)]) == 0
    assert (directory / "report.html").is_file()
    summary = json.loads((directory / "summary.json").read_text())
    assert (summary["name"], summary["engine"], summary["rounds"]) == ("pilot", "deployment", 3)
    (start,) = lines(directory, "start")
    assert start["engine"] == "deployment"
    assert [each["client"] for each in start["clients"]] == ["0", "1", "2", "3"]
    assert "round 3: 4 of 4 clients, accuracy" in capsys.readouterr().err
    assert not logging.getLogger("lethe.server").handlers


def test_a_private_run_says_what_its_epsilon_rests_on(deploy: Callable[..., Path]) -> None:
    directory = deploy(privacy={"epsilon": 5.0, "delta": 1e-4})
    (start,) = lines(directory, "start")
    assert (start["privacy"]["epsilon_budget"], start["privacy"]["simulated"]) == (5.0, False)
    assert main(["report", str(directory)]) == 0


def test_the_same_run_submitted_again_goes_on(deploy: Callable[..., Path]) -> None:
    asked = [0]

    def dies(client: int, reply: Any) -> Any:
        asked[0] += 1
        if asked[0] > 4 * 2 + 4:  # Greetings and a round of four clients, twice.
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        deploy(tamper=dies)
    directory = deploy()
    assert [line["round"] for line in lines(directory, "resumed")] == [2]
    assert [line["round"] for line in lines(directory, "round")] == [1, 2, 3]
    whole = deploy("whole")
    last = [json.loads((each / "summary.json").read_text())["loss_final"] for each in (directory, whole)]
    assert last[0] == last[1]


def test_a_finished_run_is_refused(deploy: Callable[..., Path]) -> None:
    deploy()
    with pytest.raises(RunError, match="run 'pilot' has finished all 3 rounds"):
        deploy()


def test_another_config_under_the_same_name_is_refused(deploy: Callable[..., Path]) -> None:
    deploy(federation={"timeout": 5.0, "rounds": 2})
    with pytest.raises(CheckpointError, match=r"federation\.rounds: 2 then, 3 now"):
        deploy()


def test_a_run_that_is_going_on_is_refused(deploy: Callable[..., Path], runs: Path) -> None:
    with held(runs / "pilot"), pytest.raises(RunError, match="is going on in another process"):
        deploy()


def test_too_few_clients_end_the_run_after_the_greeting_s_own_timeout(deploy: Callable[..., Path]) -> None:
    impatient = {"timeout": 3600.0, "greeting_timeout": 0.3, "min_clients": 3}
    with pytest.raises(FederationError, match=r"2 clients are connected, federation\.min_clients=3"):
        deploy(tamper=lambda client, reply: reply if client < 2 else None, federation=impatient)


def test_a_simulation_does_not_go_on_with_what_real_nodes_began(deploy: Callable[..., Path]) -> None:
    directory = deploy()
    (directory / "summary.json").unlink()
    with pytest.raises(RunError, match="played by real nodes"):
        resume(directory)
