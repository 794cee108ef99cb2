"""A small federation in one process: a driver over the sequential Grid, whose replies a test may tamper with."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from flwr.serverapp import Grid

from server.driver import RoundDriver
from server.job import ServerJob
from server.records import Records
from simulation.grid import SequentialGrid
from tests.sections import Sections, merge

Tamper = Callable[[int, Message], Message | None]

SMALL: Sections = {
    "model": {"name": "tiny-bert"},
    "data": {"max_train": 40, "max_eval": 12},
    "adapter": {"rank": 4},
    "federation": {"clients": 4, "rounds": 2, "timeout": 0.1},
    "training": {"steps": 1, "batch": 4},
}


@dataclass
class Federation:
    """A run directory, and drivers that play a job into it."""

    directory: Path
    tree: Sections
    tamper: Tamper | None = None
    about: Sections = field(default_factory=dict)
    kind: type[SequentialGrid] = SequentialGrid

    @property
    def ledger(self) -> Path:
        return self.directory / "ledger.sqlite"

    def grid(self) -> SequentialGrid:
        job = ServerJob.model_validate(self.tree)
        run_config = {"job": json.dumps(self.tree)}
        return self.kind(clients=job.federation.clients, run_config=run_config, ledger=self.ledger, tamper=self.tamper)

    def driver(self, grid: Grid | None = None) -> RoundDriver:
        job = ServerJob.model_validate(self.tree)
        return RoundDriver(job, grid or self.grid(), self.directory, records=Records(self.directory), about=self.about)

    def run(self) -> dict[str, Any]:
        return self.driver().run()

    def lines(self, kind: str | None = None) -> list[dict[str, Any]]:
        text = (self.directory / "metrics.jsonl").read_text()
        records = [json.loads(line) for line in text.splitlines()]
        return [record for record in records if kind in (None, record["kind"])]


@pytest.fixture(scope="session")
def small_federation() -> Callable[..., Federation]:
    """Make a small federation in a directory, with changes to its sections."""

    def make(directory: Path, tamper: Tamper | None = None, **options: Any) -> Federation:
        kind = options.pop("kind", SequentialGrid)
        return Federation(directory, merge(SMALL, options), tamper, kind=kind)

    return make


@pytest.fixture
def federation(tmp_path: Path, small_federation: Callable[..., Federation]) -> Callable[..., Federation]:
    """Make a small federation in the test's own directory."""
    return lambda tamper=None, **options: small_federation(tmp_path, tamper, **options)
