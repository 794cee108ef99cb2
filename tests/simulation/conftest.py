"""Small simulations in this process, and a stage beside it whose players can be killed at any instant."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import simulation.engine
from server.checkpoint import Checkpoints
from simulation.config import SimulationConfig
from simulation.engine import Stage, play
from tests.sections import Sections, merge

ROOT = Path(simulation.engine.__file__).parents[1]

SMALL: Sections = {
    "model": {"name": "tiny-bert"},
    "data": {"max_train": 42, "max_eval": 12},
    "adapter": {"rank": 4},
    "federation": {"clients": 3, "rounds": 3, "timeout": 5.0},
    "training": {"steps": 2, "batch": 6},
}


@pytest.fixture
def sections() -> Callable[..., Sections]:
    """Make the sections of a small run, with changes."""
    return lambda **changes: merge(SMALL, changes)


@dataclass(frozen=True)
class Played:
    """What a run left behind."""

    directory: Path

    @property
    def vector(self) -> Tensor:
        found = Checkpoints(self.directory / "checkpoints").latest()
        assert found is not None
        return found.vector

    @property
    def summary(self) -> Sections:
        return dict(json.loads((self.directory / "summary.json").read_text()))

    @property
    def lines(self) -> list[Sections]:
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def played(tmp_path: Path) -> Callable[..., Played]:
    """Play a run in this process; each engine into a directory of its own."""

    def make(tree: Sections, engine: str = "cohort", **options: Any) -> Played:
        directory = tmp_path / f"{engine}-{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        play(Stage(tree, directory), SimulationConfig(engine=engine, threads=1, **options))
        return Played(directory)

    return make


PLAYERS = """
import dataclasses, json, os, signal, sys, time, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
import client.app, simulation.grid
from lethe.config import from_mapping
from lethe.run import resume, simulate
from simulation.config import SimulationConfig
from simulation.engine import Stage, play
from tasks.learner import Learner

class Spied:
    # Writes down every draw of noise, by client, before it is drawn.
    def __init__(self, real, client, path):
        self.real, self.secure, self.client, self.path = real, real.secure, client, path
    def lot(self, population, *, rate):
        return self.real.lot(population, rate=rate)
    def gaussian(self, size):
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, f"{self.client}\\n".encode())
        os.close(handle)
        return self.real.gaussian(size)

def spy_on_noise(path):
    for module in (client.app, simulation.grid):
        work_for = module.work_for
        def spied(*args, work_for=work_for, **kwargs):
            work = work_for(*args, **kwargs)
            return dataclasses.replace(work, randomness=Spied(work.randomness, work.client, path))
        module.work_for = spied

def count_calls(path, last):
    answers = Learner.answers
    calls = [0]
    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return answers(*args, **kwargs)
    Learner.answers = counted
    return calls

def perform(wish):
    if wish["noise"]:
        spy_on_noise(wish["noise"])
    calls = count_calls(wish["noise"], wish["kill_at_call"])
    directory = Path(wish["directory"])
    if wish["how"] == "play":
        play(Stage(wish["sections"], directory), SimulationConfig(engine=wish["engine"], threads=1))
    elif wish["how"] == "simulate":
        run = from_mapping({**wish["sections"], "name": directory.name, "simulation": {"threads": 1}})
        simulate(run, root=directory.parent)
    else:
        resume(directory)
    (directory.parent / (directory.name + ".calls")).write_text(str(calls[0]))

def watch(pid, seconds):
    deadline = time.monotonic() + (seconds if seconds is not None else 1e9)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + 1e9
        time.sleep(0.0005)

for line in sys.stdin:
    wish = json.loads(line)
    world = Stage(wish["sections"], Path("unused")).job.world
    world.shares
    world.learner.score(world.learner.start(), world.test)
    world.learner.score(world.learner.start(), world.validation)
    world.train
    pid = os.fork()
    if pid == 0:
        try:
            perform(wish)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    began = time.monotonic()
    code = watch(pid, wish["kill_after"])
    print(json.dumps({"code": code, "seconds": time.monotonic() - began}), flush=True)
"""


@dataclass(frozen=True)
class Ending:
    """How a player ended: 0 at the end of its run, -9 killed, 1 in an error; and after how many seconds."""

    code: int
    seconds: float


class Players:
    """A process that has loaded everything, and forks one player for every run."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", PLAYERS],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def perform(
        self,
        tree: Sections,
        directory: Path,
        *,
        how: str = "play",
        engine: str = "cohort",
        kill_after: float | None = None,
        kill_at_call: int | None = None,
        noise: Path | None = None,
    ) -> Ending:
        """Play a run to its end, or kill it after some seconds or at some forward pass."""
        wish = {
            "sections": tree,
            "directory": str(directory),
            "how": how,
            "engine": engine,
            "kill_after": kill_after,
            "kill_at_call": kill_at_call,
            "noise": str(noise) if noise else None,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(wish) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Ending(answer["code"], answer["seconds"])

    @staticmethod
    def calls(directory: Path) -> int:
        """Return how many forward passes a run took that came to its end."""
        return int((directory.parent / f"{directory.name}.calls").read_text())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="session")
def players() -> Iterator[Players]:
    company = Players()
    yield company
    company.close()
