"""A deployed federation on loopback: resident executors beside Flower's default of a new process for every message.

    python -m benchmarks.deployment [--nodes 2 8] [--rounds 6] [--long 50] [--default-rounds 3]

Both fleets have TLS and node authentication, run the same app (MiniLM, rank-8 adapters on its attention, the built-in
questions, 2 local steps of 8, evaluation at the end only) and are started by the command lines of `lethe deploy`;
Flower's default is the same lines without process isolation, so that SuperLink and SuperNodes start their processes
themselves. One fleet runs at a time, in turn.

- Seconds per round: median over the rounds after the first, from the end of one round to the end of the next.
- Bytes on the wire: all that the SuperLink received for the run (greetings, replies, their headers) by client and
  round, over the bytes of B.
- Memory: proportional set size of the executors after 5 and after all of `--long` rounds.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import publish, settings
from lethe import processes
from lethe.config import RunFile, from_mapping
from lethe.founding import found
from lethe.operator import Operator, RunStatus, healthy
from lethe.processes import Command
from lethe.site import Site, new_site
from lethe.submission import bundle, run_config

_PROCESS_ONLY = ("--isolation", "--superexec-auth-secret-file")
"""Options that Flower's default isolation does without."""
SETTLED = 5
"""Rounds after which an executor has allocated what it needs."""


@dataclass(frozen=True)
class Outcome:
    """What one run of one fleet came to."""

    round_s: list[float]
    wire_bytes: float
    payload: int
    memory: tuple[float, float]
    """Bytes of all executors after SETTLED rounds and at the end; zeros where there are none."""


def job(nodes: int, rounds: int) -> RunFile:
    """The run file of every measurement."""
    return from_mapping(
        {
            "model": {"name": "minilm"},
            "task": {"head": "frozen", "max_length": 16},
            "data": {"name": "builtin", "max_eval": 32},
            "adapter": {"targets": "attention"},
            "federation": {"clients": nodes, "rounds": rounds, "min_clients": nodes, "timeout": 900},
            "training": {"steps": 2, "batch": 8, "rate": 0.1},
            "server": {"evaluate_every": rounds, "checkpoint_every": 1},
        }
    )


def by_default(command: Command) -> Command:
    """Return the same command with Flower's default isolation."""
    words: list[str] = []
    skip = False
    for word in command.argv:
        if not skip and word not in _PROCESS_ONLY:
            words.append(word)
        skip = word in _PROCESS_ONLY
    if words[:3] == ["python", "-m", "client.supernode"]:
        words[:3] = ["flower-supernode"]
    return replace(command, argv=tuple(words))


class Fleet:
    """SuperLink and nodes of one site as processes, with or without resident executors."""

    def __init__(self, root: Path, *, nodes: int, resident: bool) -> None:
        self.root, self.resident, self.names = root, resident, [f"node-{n + 1}" for n in range(nodes)]
        self.link, *ports = _free_ports(nodes + 1)
        entries = [
            {"name": n, "partition": i, "port": p} for i, (n, p) in enumerate(zip(self.names, ports, strict=True))
        ]
        self.site: Site = new_site(root / "site", {"port": self.link, "nodes": entries})
        found(self.site)
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, command: Command, name: str) -> None:
        """Start a process with one torch thread; its output goes to a log in the fleet's folder."""
        chosen = command if self.resident else by_default(command)
        extra = {"OMP_NUM_THREADS": "1", "LETHE_RUNS": str(self.root / "runs"), "HF_HUB_OFFLINE": "1"}
        with (self.root / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                chosen.argv,
                env=chosen.environment() | extra,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def up(self) -> Operator:
        """Start everything and wait for all nodes."""
        places = processes.superlink_places(self.site, runs=self.root / "runs")
        for folder in (places.database, places.runs):
            Path(folder).parent.mkdir(parents=True, exist_ok=True)
        self.start(processes.superlink(places), "superlink")
        _await(lambda: healthy(f"127.0.0.1:{self.link}", self.site.ca), "the SuperLink", self.root)
        operator = Operator(self.site)
        operator.register(self.site.federation.nodes)
        if self.resident:
            self.start(processes.superexec(places), "superexec")
        for node in self.site.federation.nodes:
            here = processes.node_places(self.site, node)
            self.start(
                processes.supernode(here, partition=node.partition, partitions=len(self.names)),
                f"{node.name}-supernode",
            )
            if self.resident:
                self.start(processes.executor(here), f"{node.name}-executor")
        online = lambda: sum(each["status"] == "online" for each in operator.nodes()) == len(self.names)  # noqa: E731
        _await(online, "the nodes", self.root)
        return operator

    def memory(self) -> float:
        """Sum the executors' proportional set sizes."""
        chosen = [process for name, process in self.running.items() if name.endswith("-executor")]
        return float(sum(psutil.Process(process.pid).memory_full_info().pss for process in chosen))

    def check(self) -> None:
        """Raise SystemExit where a process has ended: what is left of the fleet may wait for it for ever."""
        ended = [name for name, process in self.running.items() if process.poll() is not None]
        if ended:
            raise SystemExit(f"{', '.join(ended)} ended in the midst of a run\n{_logs(self.root)}")

    def close(self) -> None:
        """End every process that was started, and theirs."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self.running.values():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            for process in self.running.values():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=20)


@contextmanager
def fleet(*, nodes: int, resident: bool) -> Iterator[Fleet]:
    """A fleet in a temporary directory, ended at the end."""
    with tempfile.TemporaryDirectory() as directory:
        made = Fleet(Path(directory), nodes=nodes, resident=resident)
        try:
            yield made
        finally:
            made.close()


def measured(*, nodes: int, rounds: int, resident: bool) -> Outcome:
    """Start a fleet, run the job on it, and say what it came to."""
    with fleet(nodes=nodes, resident=resident) as made:
        operator = made.up()
        run = job(nodes, rounds)
        with bundle() as app:
            config = app.parent / "job.toml"
            config.write_text(run_config(run, "bench"))
            identity = operator.start(bundle=app, settings=config)
        end, memory = _followed(made, operator, identity, rounds)
        if not end.completed:
            raise SystemExit(f"the run ended as {end.status}: {end.details}\n{_logs(made.root)}")
        directory = made.root / "runs" / "bench"
        times = [line["time"] for line in _lines(directory) if line["kind"] == "round"]
        payload = int(json.loads((directory / "summary.json").read_text())["bytes_up_per_client_round"])
        round_s = [later - earlier for earlier, later in pairwise(times)]
        return Outcome(round_s, end.bytes_in / nodes / rounds, payload, memory)


def _followed(made: Fleet, operator: Operator, identity: str, rounds: int) -> tuple[RunStatus, tuple[float, float]]:
    """Wait for the end of a run; returns it and the executors' memory after SETTLED rounds and at the end."""
    directory, early = made.root / "runs" / "bench", 0.0
    while True:
        made.check()
        done = sum(line["kind"] == "round" for line in _lines(directory))
        if not early and done >= SETTLED:
            early = made.memory()
        if done in (0, rounds):
            status = operator.run(identity)
            if status.finished:
                return status, (early, made.memory())
        time.sleep(1.0)


def _lines(directory: Path) -> list[dict[str, Any]]:
    file = directory / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def _await(done: Callable[[], bool], what: str, root: Path) -> None:
    end = time.monotonic() + 300
    while not done():
        if time.monotonic() > end:
            raise SystemExit(f"{what} did not come up\n{_logs(root)}")
        time.sleep(0.5)


def _logs(root: Path) -> str:
    return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in root.glob("*.log"))


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--default-rounds", type=int, default=3)
    parser.add_argument("--long", type=int, default=50)
    given = parser.parse_args()
    found: dict[int, dict[str, Outcome]] = {}
    for nodes in given.nodes:
        default = _told(nodes, "default", given.default_rounds, resident=False)
        resident = _told(nodes, "resident", given.rounds, resident=True)
        found[nodes] = {"default": default, "resident": resident}
    long = _told(min(given.nodes), "resident", given.long, resident=True)
    publish(
        "deployment",
        figures=_figures(found, long),
        rows=_rows(found, long),
        about=settings(rounds=given.rounds, default_rounds=given.default_rounds, long=given.long, nodes=given.nodes),
    )


def _told(nodes: int, name: str, rounds: int, *, resident: bool) -> Outcome:
    outcome = measured(nodes=nodes, rounds=rounds, resident=resident)
    shown = ", ".join(f"{each:.1f}" for each in outcome.round_s)
    print(f"{nodes} nodes, {name}: {shown} s", file=sys.stderr, flush=True)
    return outcome


def _figures(found: dict[int, dict[str, Outcome]], long: Outcome) -> dict[str, float]:
    ratios = {n: _median(f["default"].round_s) / _median(f["resident"].round_s) for n, f in found.items()}
    wire = {n: f["resident"].wire_bytes / f["resident"].payload for n, f in found.items()}
    return {
        "default_over_resident_round_s": min(ratios.values()),
        "wire_over_payload_bytes": max(wire.values()),
        "executor_memory_growth": long.memory[1] / long.memory[0],
        **{f"default_over_resident_round_s_{n}_nodes": ratio for n, ratio in ratios.items()},
        **{f"resident_round_s_{n}_nodes": _median(f["resident"].round_s) for n, f in found.items()},
        **{f"wire_over_payload_bytes_{n}_nodes": ratio for n, ratio in wire.items()},
        "wire_over_payload_bytes_long": long.wire_bytes / long.payload,
    }


def _rows(found: dict[int, dict[str, Outcome]], long: Outcome) -> list[list[str]]:
    rows = [["nodes", "executor", "s per round (median, range)", "wire / payload", "executors MiB"]]
    cases = [(n, name, outcome) for n, pair in found.items() for name, outcome in pair.items()]
    for nodes, name, outcome in [*cases, (min(found), "resident, long", long)]:
        spread = f"{_median(outcome.round_s):.2f} ({min(outcome.round_s):.2f}-{max(outcome.round_s):.2f})"
        memory = " to ".join(f"{each / 2**20:.0f}" for each in outcome.memory) if outcome.memory[1] else "-"
        rows.append([str(nodes), name, spread, f"{outcome.wire_bytes / outcome.payload:.3f}", memory])
    return rows


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main()
