"""Playing a whole federation on one machine, by one of three engines over the same apps."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict
from flwr.serverapp import ServerApp

from client.app import build as build_client
from client.job import ClientJob, open_ledger
from lora.errors import ConfigError
from privacy.ledger import Ledger
from server.app import build as build_server
from simulation.config import SimulationConfig
from simulation.grid import CohortGrid, SequentialGrid
from tasks.parallel import cores

LEDGER = "ledger.sqlite"

Listener = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Stage:
    """What an engine plays: the job's sections, where its records go, and who listens to them."""

    sections: Mapping[str, Any]
    directory: Path
    about: Mapping[str, Any] = field(default_factory=dict)
    listen: Listener | None = None

    @property
    def run_config(self) -> dict[str, Any]:
        """The job as Flower carries it: one JSON string."""
        return {"job": json.dumps(self.sections)}

    @property
    def job(self) -> ClientJob:
        """The job as the clients read it."""
        return ClientJob.model_validate(self.sections)

    @property
    def ledger(self) -> Path:
        """The simulated clients' ledger."""
        return self.directory / LEDGER

    def ledger_position(self) -> int | None:
        """Position of the ledger, None while there is none."""
        return Ledger(self.ledger).position() if self.ledger.exists() else None

    def server(self, engine: str) -> ServerApp:
        """Return the ServerApp for this stage."""
        return build_server(
            self.run_config,
            directory=self.directory,
            engine=engine,
            about=self.about,
            listen=self.listen,
            ledger_position=self.ledger_position,
        )


def play(stage: Stage, config: SimulationConfig) -> None:
    """Run the job with the configured engine; the run's records are in the stage's directory afterwards."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    open_ledger.cache_clear()  # A new run starts with the file as it finds it, and then holds on to it.
    if config.engine == "ray":
        _play_ray(stage)
        return
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    with cores(config.threads or torch.get_num_threads()):
        stage.server(config.engine)(_grid(stage, config), context)


def _grid(stage: Stage, config: SimulationConfig) -> SequentialGrid:
    clients = stage.job.federation.clients
    if config.engine == "sequential":
        return SequentialGrid(clients=clients, run_config=stage.run_config, ledger=stage.ledger)
    return CohortGrid(stage.job, run_config=stage.run_config, ledger=stage.ledger, cohort=config.cohort)


def _play_ray(stage: Stage) -> None:
    """Run Flower's own simulation: one actor a core, one torch thread an actor. Raises ConfigError without ray."""
    if find_spec("ray") is None:
        raise ConfigError("simulation.engine=ray: ray is not installed; pip install 'lethe[ray]' or use cohort")
    # Ray's actors inherit this process's environment; one thread each, since every core has an actor.
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    from flwr.simulation import run_simulation

    run_simulation(
        server_app=stage.server("ray"),
        client_app=build_client(stage.run_config, ledger=stage.ledger.absolute()),
        num_supernodes=stage.job.federation.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"log_to_driver": False, "include_dashboard": False},
        },
    )
