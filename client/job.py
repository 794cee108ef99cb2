"""The job as a client reads it, and what a client keeps between messages of one process."""

import os
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from client.config import TrainingConfig
from client.node import NodeSettings
from client.training import Work
from lora.errors import ConfigError
from privacy.ledger import Ledger
from privacy.plan import PrivatePlan, plan_for
from privacy.randomness import Randomness, SecureRandomness, SeededRandomness
from strategies.federated.job import Job
from strategies.federated.wire import Declined

LEDGER_VARIABLE = "LETHE_LEDGER"
DEFAULT_LEDGER = Path("~/.lethe/ledger.sqlite")


class ClientJob(Job):
    """The shared sections, and how to train."""

    training: TrainingConfig = TrainingConfig()


@dataclass(frozen=True)
class Place:
    """Where a client stands: its number among the job's partitions, its ledger's file, and the node's own settings."""

    index: int
    ledger: Path
    simulated: bool = False
    settings: NodeSettings | None = None
    run: str | None = None
    """Federation and run, for the ledger; a simulation's ledger belongs to one run and needs no such words."""

    @property
    def name(self) -> str:
        """The client's name in reports and in the ledger: a node with data of its own bears its own name."""
        return self.settings.name if self.settings is not None and self.settings.own else str(self.index)

    @property
    def node(self) -> str:
        """What the node calls itself."""
        return self.name if self.settings is None else self.settings.name

    def job(self, job: ClientJob) -> ClientJob:
        """Return the job as it is done here. Raises Declined where the node's policy says no."""
        return job if self.settings is None else self.settings.accept(job)

    @classmethod
    def of(cls, context: Context) -> "Place":
        """Read the node's own configuration. Raises ConfigError where it names no partition."""
        ledger = context.node_config.get("ledger") or os.environ.get(LEDGER_VARIABLE) or DEFAULT_LEDGER
        simulated = bool(context.node_config.get("simulated", False))
        return cls(_partition(context), Path(str(ledger)).expanduser(), simulated)

    @classmethod
    def at(cls, settings: NodeSettings, context: Context) -> "Place":
        """Read the settings of a node that has its own. Raises ConfigError where nothing names its partition."""
        if settings.own:
            index = zlib.crc32(settings.name.encode())  # A number for seeds alone: nobody else's, whatever the order.
        else:
            index = _partition(context) if settings.partition is None else settings.partition
        run = str(context.run_config.get("name") or f"run {context.run_id}")
        return cls(index, settings.ledger, settings=settings, run=f"{settings.federation}/{run}")


def _partition(context: Context) -> int:
    if "partition-id" not in context.node_config:
        raise ConfigError("the node's configuration has no partition-id; start it with --node-config partition-id=N")
    return int(context.node_config["partition-id"])


def work_for(job: ClientJob, index: int, *, number: int, name: str | None = None) -> Work:
    """Gather a client's examples and its privacy plan for a round; `name` is its own, where a number is not.

    Raises Declined for a client with too few examples.
    """
    name = name or str(index)
    if not job.own and not 0 <= index < job.federation.clients:
        raise Declined(f"partition-id {index} is outside 0 to {job.federation.clients - 1} (federation.clients)")
    tokens = job.world.client(index)
    if len(tokens) < job.training.min_examples:
        raise Declined(
            f"client {name} holds {len(tokens)} examples, fewer than training.min_examples={job.training.min_examples}"
        )
    if not job.privacy.private:
        return Work(name, tokens)
    return Work(name, tokens, private_plan(job, len(tokens)), _randomness(job, index, number))


def private_plan(job: ClientJob, population: int) -> PrivatePlan:
    """Plan a client's privacy over all rounds of the run: it may be chosen in every one."""
    return plan_for(
        job.privacy,
        population=population,
        lot=job.training.batch,
        steps=job.training.steps * job.federation.rounds,
        trains_head=job.trains_head,
    )


@lru_cache(maxsize=64)
def open_ledger(path: Path) -> Ledger:
    """Open (or create) the ledger at its place, once in a process.

    Kept open, so to speak: a ledger that vanishes later is an error, where opening it anew would begin an empty one and
    forget what was spent.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return Ledger(path)


def _randomness(job: ClientJob, index: int, number: int) -> Randomness:
    if job.privacy.test_seed is None:
        return SecureRandomness()
    return SeededRandomness(hash_of(job.privacy.test_seed, index, number))


def hash_of(*numbers: int) -> int:
    """Mix numbers into one seed, so that no two clients or rounds share theirs."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 0x9E3779B97F4A7C15 + number + 1) % 2**63
    return mixed
