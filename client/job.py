"""The job as a client reads it, and what a client keeps between messages of one process."""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from client.config import TrainingConfig
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
    """Where a client stands: its number among the job's partitions, its name, and its ledger's file."""

    index: int
    ledger: Path
    simulated: bool = False

    @property
    def name(self) -> str:
        """The client's name in reports and in the ledger."""
        return str(self.index)

    @classmethod
    def of(cls, context: Context) -> "Place":
        """Read the node's own configuration. Raises ConfigError where it names no partition."""
        if "partition-id" not in context.node_config:
            raise ConfigError(
                "the node's configuration has no partition-id; start it with --node-config partition-id=N"
            )
        ledger = context.node_config.get("ledger") or os.environ.get(LEDGER_VARIABLE) or DEFAULT_LEDGER
        simulated = bool(context.node_config.get("simulated", False))
        return cls(int(context.node_config["partition-id"]), Path(str(ledger)).expanduser(), simulated)


def work_for(job: ClientJob, index: int, *, number: int) -> Work:
    """Gather a client's examples and its privacy plan for a round. Raises Declined for a client with too few."""
    if not 0 <= index < job.federation.clients:
        raise Declined(f"partition-id {index} is outside 0 to {job.federation.clients - 1} (federation.clients)")
    tokens = job.world.client(index)
    if len(tokens) < job.training.min_examples:
        raise Declined(
            f"client {index} holds {len(tokens)} examples, fewer than training.min_examples={job.training.min_examples}"
        )
    if not job.privacy.private:
        return Work(str(index), tokens)
    return Work(str(index), tokens, private_plan(job, len(tokens)), _randomness(job, index, number))


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
