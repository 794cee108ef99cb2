"""What a node decides for itself: its name, its data, where its state is kept, and which jobs it will do."""

import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from lora.config import Section
from lora.errors import ConfigError, nearest
from strategies.federated.job import Job
from strategies.federated.wire import Declined
from tasks.recommendation.config import RatingsConfig

J = TypeVar("J", bound=Job)

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
LEDGER = "ledger.sqlite"


class Policy(Section):
    """`[policy]`, the limits that this node sets to any coordinator."""

    require_privacy: bool = False
    """Refuse a job without differential privacy."""
    max_epsilon: float | None = Field(None, gt=0)
    """Refuse a job of a larger epsilon; no job may charge this node's ledger beyond it. Implies require_privacy."""
    max_delta: float = Field(1e-3, gt=0, lt=1)
    """Refuse a private job of a larger delta."""
    job_paths: bool = False
    """Let a job name data and model files on this machine by `data.path` and `model.path`."""

    @property
    def private(self) -> bool:
        """Whether only private jobs are done here."""
        return self.require_privacy or self.max_epsilon is not None


class NodeSettings(Section):
    """A node's own settings, `node.toml`; a coordinator neither sees nor changes them."""

    name: str = Field(pattern=_NAME)
    """The node's name in reports; with `own` also its client's name in the federation."""
    federation: str = Field("lethe", pattern=_NAME)
    """The federation's name, part of every entry in the ledger."""
    partition: int | None = Field(None, ge=0)
    """Which part of the job's data this node holds; null: what the SuperNode's partition-id says."""
    partitions: int | None = Field(None, ge=1)
    """How many parts the data have; a job of another number of clients is refused. null: whatever the job says."""
    data: Path | None = None
    """This node's data, a file or a directory; wins over the job's data.path."""
    own: bool = False
    """All training rows of `data` are this node's: nothing is divided and nothing held out."""
    model: Path | None = None
    """Directory of the base model on this machine; wins over the job's model.name and model.path."""
    state: Path = Path("state")
    """Directory of the ledger and of whatever else outlives a process."""
    policy: Policy = Policy()
    device: str | None = Field(None, pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")
    """Where the base model computes; wins over the job's model.device."""
    metrics_port: int | None = Field(None, ge=1, le=65535)
    """Port of the Prometheus endpoint; null: none."""
    log: Path | None = None
    """File of the node's log, as JSON lines; null: standard error."""

    @field_validator("data", "model", "state", "log", mode="after")
    @classmethod
    def _home(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser()

    @model_validator(mode="after")
    def _own_data_are_named(self) -> "NodeSettings":
        if self.own and self.data is None:
            raise ValueError("own=true needs data=PATH, the file or directory that is this node's own")
        if self.own and self.partition is not None:
            raise ValueError(f"own=true and partition={self.partition} contradict each other; leave one out")
        if None not in (self.partition, self.partitions) and self.partition >= self.partitions:  # type: ignore[operator]
            raise ValueError(f"partition={self.partition} is outside 0 to {self.partitions - 1}")  # type: ignore[operator]
        return self

    @property
    def ledger(self) -> Path:
        """The node's privacy ledger: one for all federations and runs, because epsilon adds up over them."""
        return self.state / LEDGER

    def accept(self, job: J) -> J:
        """Return the job as this node does it, on its own data and model. Raises Declined where its policy says no."""
        if self.partitions not in (None, job.federation.clients):
            raise Declined(
                f"node '{self.name}' holds one of {self.partitions} partitions, and the job has "
                f"federation.clients={job.federation.clients}"
            )
        self._check_privacy(job)
        self._check_paths(job)
        data = {"path": str(self.data)} if self.data is not None else {}
        ratings = None if job.histories is None else (job.ratings or RatingsConfig()).model_copy(update=data)
        model = {"path": str(self.model)} if self.model is not None else {}
        if self.device is not None:
            model["device"] = self.device
        limited = job.privacy.private and job.privacy.epsilon is None
        privacy = {"epsilon": self.policy.max_epsilon} if limited else {}
        return job.model_copy(
            update={
                "data": job.data.model_copy(update=data),
                "ratings": ratings,
                "model": job.model.model_copy(update=model),
                "privacy": job.privacy.model_copy(update=privacy),
                "own": self.own,
            }
        )

    def _check_privacy(self, job: Job) -> None:
        policy, asked = self.policy, job.privacy
        who = f"node '{self.name}'"
        if policy.private and not asked.private:
            raise Declined(f"{who} does no job without privacy; set privacy.epsilon")
        if policy.private and asked.test_seed is not None:
            raise Declined(f"{who} does no job whose noise is seeded; leave privacy.test_seed out")
        if policy.max_epsilon is not None and (asked.epsilon or 0.0) > policy.max_epsilon:
            raise Declined(f"{who} allows privacy.epsilon up to {policy.max_epsilon:g}, the job asks {asked.epsilon:g}")
        if asked.private and asked.delta > policy.max_delta:
            raise Declined(f"{who} allows privacy.delta up to {policy.max_delta:g}, the job asks {asked.delta:g}")

    def _check_paths(self, job: Job) -> None:
        """Refuse paths that a coordinator names: it would choose which of this machine's files are trained on."""
        ratings = None if job.ratings is None else job.ratings.path
        name = job.model.name if Path(job.model.name).exists() else None  # A hub's name that is a path is one.
        named = (("data", job.data.path), ("ratings", ratings), ("model", job.model.path), ("model", name))
        for section, asked in named:
            key = "model" if section == "model" else "data"
            if asked is not None and getattr(self, key) is None and not self.policy.job_paths:
                raise Declined(
                    f"node '{self.name}' opens no file because a job names it ({section}.path); its operator sets "
                    f"{key} in node.toml, or policy.job_paths=true"
                )


def read_node(path: Path) -> NodeSettings:
    """Read a node's settings; paths in them are relative to the file. Raises ConfigError that names every fault."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
        settings = NodeSettings.model_validate(tree)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); name the node's node.toml") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    except ValidationError as error:
        faults = "\n".join(_fault(each) for each in error.errors())
        raise ConfigError(f"{path} cannot be used:\n{faults}") from error
    base = path.absolute().parent
    placed = {key: base / value for key in ("data", "model", "state", "log") if (value := getattr(settings, key))}
    return settings.model_copy(update=placed)


def _fault(fault: Any) -> str:
    key = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        section = Policy if key.startswith("policy.") else NodeSettings
        return f"{key}: unknown key{nearest(key.rpartition('.')[2], section.model_fields)}"
    return f"{key}: {fault['msg']}" if key else re.sub("^Value error, ", "", fault["msg"])
