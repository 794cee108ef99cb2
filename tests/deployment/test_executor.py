"""The resident executor at work: a real SuperLink and SuperNodes on loopback, and the simulation beside them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from lethe.cli import main
from lethe.submission import bundle
from privacy.ledger import Ledger
from server.checkpoint import Checkpoints
from simulation.config import SimulationConfig
from simulation.engine import Stage, play

pytestmark = pytest.mark.deployment

Sections = dict[str, Any]
BIN = Path(sys.executable).parent
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
SMALL: Sections = {
    "model": {"name": "tiny-bert"},
    "data": {"max_train": 40, "max_eval": 12},
    "adapter": {"rank": 4},
    "federation": {"clients": 2, "rounds": 2, "min_clients": 2, "timeout": 120, "greeting_timeout": 120},
    "training": {"steps": 2, "batch": 6},
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Fleet:
    """SuperLink, its executor, and nodes of two processes each, in plaintext; all are killed at the end."""

    def __init__(self, home: Path, *, nodes: int) -> None:
        self.home, self.processes = home, dict[str, subprocess.Popen[bytes]]()
        path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"  # SuperExec starts `flwr-serverapp` from there.
        places = {"FLWR_HOME": str(home / "flwr"), "LETHE_RUNS": str(home / "runs"), "PATH": path}
        self.environment = {**os.environ, **QUIET, **places}
        self.link, self.ports = free_port(), [free_port() for _ in range(nodes)]
        (home / "flwr").mkdir(parents=True)
        connection = f'[superlink]\ndefault = "lethe"\n[superlink.lethe]\naddress = "127.0.0.1:{self.link}"\n'
        (home / "flwr" / "config.toml").write_text(connection + "insecure = true\n")
        (home / "secret").write_bytes(os.urandom(48))

    def start(self, name: str, *argv: str | Path) -> subprocess.Popen[bytes]:
        with (self.home / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(each) for each in argv],
                cwd=self.home,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.processes[name]

    def superlink(self) -> None:
        argv = [BIN / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self.link)]
        secret = ["--superexec-auth-secret-file", self.home / "secret"]
        self.start("superlink", *argv, "--isolation", "process", *secret, "--database", self.home / "link.db")
        self.await_health(self.link)

    def superexec(self) -> None:
        argv = [BIN / "flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{self.link}"]
        self.start("superexec", *argv, "--superexec-auth-secret-file", self.home / "secret")

    def supernode(self, index: int) -> None:
        argv = [sys.executable, "-m", "client.supernode", "--insecure", "--superlink", f"127.0.0.1:{self.link}"]
        own = [
            "--isolation",
            "process",
            "--port",
            str(self.ports[index]),
            "--superexec-auth-secret-file",
            self.home / "secret",
        ]
        config = f"partition-id={index} num-partitions={len(self.ports)}"
        self.start(f"supernode-{index}", *argv, *own, "--node-config", config)

    def executor(self, index: int, settings: str = "") -> None:
        file = self.home / f"node-{index}.toml"
        file.write_text(f'name = "node-{index}"\nstate = "state-{index}"\n{settings}')
        argv = [sys.executable, "-m", "client.executor", "--runtime", f"127.0.0.1:{self.ports[index]}"]
        self.start(f"executor-{index}", *argv, "--config", file, "--secret", self.home / "secret")

    def submit(self, tree: Sections, *, name: str) -> int:
        config = self.home / f"{name}.toml"
        config.write_text(f"name = {json.dumps(name)}\njob = {json.dumps(json.dumps(tree))}\n")
        with bundle() as app:
            argv = [str(BIN / "flwr"), "run", str(app), "lethe", "--run-config", str(config), "--format", "json"]
            done = subprocess.run(
                argv, env=self.environment, cwd=self.home, capture_output=True, text=True, check=False
            )
        assert done.returncode == 0, done.stdout + done.stderr
        return int(json.loads(done.stdout)["run-id"])

    def status(self, run: int) -> tuple[str, str]:
        argv = [str(BIN / "flwr"), "ls", "lethe", "--run-id", str(run), "--format", "json"]
        done = subprocess.run(argv, env=self.environment, cwd=self.home, capture_output=True, text=True, check=False)
        found = json.loads(done.stdout)["runs"][0]
        return str(found["status"]), str(found.get("status-details"))

    def finish(self, run: int, *, seconds: float = 120) -> str:
        # Asking Flower costs a process of a second and a half, on the cores that the fleet trains on.
        self.until(lambda: not server_apps(self.home) and self.status(run)[0].startswith("finished"), seconds=seconds)
        return self.status(run)[0]

    def until(self, done: Callable[[], object], *, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(1.0)

    def await_health(self, port: int) -> None:
        def healthy() -> bool:
            with suppress(urllib.error.URLError, OSError):
                return int(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status) == 200
            return False

        self.until(healthy, seconds=60)

    def logs(self) -> str:
        return "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in self.home.glob("*.log"))

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """End a process and whatever it started."""
        process = self.processes.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        process.wait(timeout=30)

    def close(self) -> None:
        for name in list(self.processes):
            self.kill(name)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    started: list[Fleet] = []

    def make(*, nodes: int = 2, settings: str = "") -> Fleet:
        made = Fleet(tmp_path, nodes=nodes)
        started.append(made)
        made.superlink()
        made.superexec()
        for index in range(nodes):
            made.supernode(index)
            made.executor(index, settings)
        return made

    yield make
    for each in started:
        each.close()


def vector_of(directory: Path) -> torch.Tensor:
    found = Checkpoints(directory / "checkpoints").latest()
    assert found is not None
    return found.vector


def simulated(tree: Sections, directory: Path) -> torch.Tensor:
    directory.mkdir()
    play(Stage(tree, directory), SimulationConfig(engine="cohort", threads=1))
    return vector_of(directory)


def lines(directory: Path, kind: str) -> list[Sections]:
    file = directory / "metrics.jsonl"
    text = file.read_text() if file.is_file() else ""
    return [each for line in text.split("\n")[:-1] if (each := json.loads(line))["kind"] == kind]


def longer(rounds: int, **federation: Any) -> Sections:
    return SMALL | {"federation": SMALL["federation"] | {"rounds": rounds, **federation}}


def server_apps(home: Path) -> list[int]:
    """Process ids of the ServerApps of this fleet."""
    found = []
    for each in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            command = (each / "cmdline").read_bytes().split(b"\0")
            if (
                any(b"flwr-serverapp" in word for word in command)
                and home.name.encode() in (each / "environ").read_bytes()
            ):
                found.append(int(each.name))
    return found


def test_nodes_come_to_the_same_adapter_as_the_simulation(fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    nodes = fleet()
    run = nodes.submit(SMALL, name="first")
    assert nodes.finish(run) == "finished:completed", nodes.logs()
    directory = tmp_path / "runs" / "first"
    torch.testing.assert_close(vector_of(directory), simulated(SMALL, tmp_path / "alone"), rtol=1e-5, atol=1e-5)
    assert [line["accepted"] for line in lines(directory, "round")] == [["0", "1"], ["0", "1"]]
    assert main(["report", str(directory)]) == 0
    again = nodes.submit(SMALL, name="first")
    assert nodes.finish(again) == "finished:failed"
    assert "has finished all 2 rounds" in nodes.status(again)[1]


def test_a_run_goes_on_after_its_server_app_was_killed(fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    nodes, tree, directory = fleet(), longer(5), tmp_path / "runs" / "long"
    first = nodes.submit(tree, name="long")
    nodes.until(lambda: len(lines(directory, "round")) >= 2, seconds=120)
    (victim,) = server_apps(tmp_path)
    os.kill(victim, signal.SIGKILL)
    second = nodes.submit(tree, name="long")
    assert nodes.finish(second) == "finished:completed", nodes.logs()
    (resumed,) = lines(directory, "resumed")
    assert resumed["round"] >= 2
    assert [line["round"] for line in lines(directory, "round")] == [1, 2, 3, 4, 5]
    torch.testing.assert_close(vector_of(directory), simulated(tree, tmp_path / "alone"), rtol=1e-5, atol=1e-5)
    nodes.until(lambda: nodes.status(first)[0] == "finished:failed", seconds=120)


def test_a_run_goes_on_over_a_restart_of_the_superlink(fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    nodes, tree, directory = fleet(), longer(5), tmp_path / "runs" / "steady"
    run = nodes.submit(tree, name="steady")
    nodes.until(lambda: len(lines(directory, "round")) >= 2, seconds=120)
    nodes.kill("superlink")
    nodes.superlink()
    assert nodes.finish(run, seconds=180) == "finished:completed", nodes.logs()
    assert lines(directory, "resumed") == []
    torch.testing.assert_close(vector_of(directory), simulated(tree, tmp_path / "alone"), rtol=1e-5, atol=1e-5)


def test_a_node_that_dies_is_named_and_comes_back(fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    nodes, tree = fleet(), longer(500, min_clients=1)
    directory = tmp_path / "runs" / "mortal"
    nodes.submit(tree, name="mortal")
    nodes.until(lambda: len(lines(directory, "round")) >= 1, seconds=120)
    nodes.kill("supernode-1")
    nodes.kill("executor-1")
    nodes.until(lambda: any(line["refused"] for line in lines(directory, "round")), seconds=180)
    number, (lost,) = next((line["round"], line["refused"]) for line in lines(directory, "round") if line["refused"])
    assert (lost["client"], lost["reason"]) == ("1", "error")
    assert lost["detail"].startswith("node 'node-1': ")
    nodes.supernode(1)
    nodes.executor(1)

    def back() -> bool:
        return any(line["round"] > number and line["accepted"] == ["0", "1"] for line in lines(directory, "round"))

    nodes.until(back, seconds=240)


def test_the_node_s_ledger_and_policy_have_the_last_word(fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    nodes = fleet(settings="[policy]\nmax_epsilon = 3.0\n")
    private = SMALL | {"privacy": {"epsilon": 2.0, "delta": 1e-3}}
    run = nodes.submit(private, name="private")
    assert nodes.finish(run) == "finished:completed", nodes.logs()
    rows = Ledger(tmp_path / "state-0" / "ledger.sqlite").rows()
    assert [(row.client, row.purpose, row.simulated) for row in rows] == [
        ("0", "lethe/private: round 1", False),
        ("0", "lethe/private: round 2", False),
    ]
    greedy = SMALL | {"privacy": {"epsilon": 9.0, "delta": 1e-3}}
    run = nodes.submit(greedy | {"federation": SMALL["federation"] | {"greeting_timeout": 5}}, name="greedy")
    assert nodes.finish(run) == "finished:failed"
    assert "allows privacy.epsilon up to 3, the job asks 9" in nodes.status(run)[1]
    assert len(Ledger(tmp_path / "state-0" / "ledger.sqlite").rows()) == 2
    nodes.kill("executor-0", signal.SIGTERM)


def test_a_process_without_a_supernode_waits_and_ends_cleanly_on_sigterm(tmp_path: Path) -> None:
    node = tmp_path / "node.toml"
    node.write_text('name = "ward-3"\n')
    argv = [sys.executable, "-m", "client.executor", "--runtime", "127.0.0.1:9", "--config", str(node)]
    environment = {**os.environ, **QUIET, "LETHE_LOG": ""}
    process = subprocess.Popen(argv, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    try:
        told, deadline = "", time.monotonic() + 120
        while "does not answer (ConnectError)" not in told and time.monotonic() < deadline:
            told += process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert "ward-3" in told and "(ConnectError)" in told and "stops" in rest
