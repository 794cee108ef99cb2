"""The job: the sections of the run file that server and clients share, and the world that they make of it."""

import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora.config import AdapterConfig
from lora.errors import ConfigError, nearest
from lora.plan import PLANS, FactorPlan
from privacy.config import PrivacyConfig
from strategies.federated.config import FederationConfig
from strategies.personal.config import HistoriesConfig, PersonalConfig
from tasks.config import DataConfig, ModelConfig, TaskConfig
from tasks.data import load_splits
from tasks.examples import Splits
from tasks.learner import Learner, build_learner
from tasks.partition import partition
from tasks.recommendation.config import RatingsConfig
from tasks.tokens import Tokens

J = TypeVar("J", bound="Job")


class Job(BaseModel):
    """What server and clients both need to know; sections of other packages are theirs to read."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    seed: int = 0
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    data: DataConfig = DataConfig()
    adapter: AdapterConfig = AdapterConfig()
    privacy: PrivacyConfig = Field(default_factory=PrivacyConfig)
    federation: FederationConfig = FederationConfig()
    histories: HistoriesConfig | None = None
    """How histories of users are kept and asked about, in a job that personalises over `ratings:`; null: none are."""
    ratings: RatingsConfig | None = None
    personal: PersonalConfig | None = None
    own: bool = False
    """Whether all training rows are one client's own; a node says so of itself, a run file never does."""

    @property
    def plan(self) -> FactorPlan:
        """Which factor trains and travels."""
        return PLANS[self.federation.strategy]

    @property
    def trains_head(self) -> bool:
        """Whether a classification head trains beside the factors."""
        return self.task.kind == "classification" and self.task.head == "trained"

    @property
    def world(self) -> "World":
        """Data and model of this job, loaded once in a process."""
        return _world(self.shared_json())

    def shared_json(self) -> str:
        """Return the shared sections as canonical JSON."""
        return json.dumps(self.model_dump(mode="json", include=set(Job.model_fields)), sort_keys=True)


def read_job(kind: type[J], run_config: dict[str, Any]) -> J:
    """Read a job from Flower's run config: `job` (JSON) or else `recipe` (a YAML file inside the app).

    Raises ConfigError for a recipe that is not there and for sections that are wrong.
    """
    try:
        return kind.model_validate(sections_of(run_config))
    except (ValidationError, yaml.YAMLError, ValueError) as error:
        source = "job" if run_config.get("job") else "recipe"
        raise ConfigError(f"the run config's {source} cannot be used: {error}") from error


def sections_of(run_config: dict[str, Any]) -> Any:
    """Return the sections of a job as they were given. Raises ValueError and yaml.YAMLError for unreadable text."""
    text = str(run_config.get("job", ""))
    return json.loads(text) if text else _recipe(run_config)


def _recipe(run_config: dict[str, Any]) -> Any:
    name = str(run_config.get("recipe", "recipes/quickstart.yaml"))
    app = Path(__file__).parents[2]
    if not (app / name).is_file():
        known = [path.relative_to(app).as_posix() for path in app.glob("recipes/*.yaml")]
        raise ConfigError(f"recipe={name}: the app has no such file{nearest(name, known)}")
    return yaml.safe_load((app / name).read_text())


class World:
    """Splits, partition, learner and token ids of one job; every piece is made when first asked for."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @cached_property
    def splits(self) -> Splits:
        """Train, validation and test examples."""
        return load_splits(self.job.data, kind=self.job.task.kind, seed=self.job.seed, own=self.job.own)

    @cached_property
    def shares(self) -> Sequence[Sequence[int]]:
        """Rows of the train split that each client holds."""
        return partition(self.splits.train, self.job.data, clients=self.job.federation.clients, seed=self.job.seed)

    @cached_property
    def learner(self) -> Learner:
        """Base model, adapter and task."""
        return build_learner(
            self.job.model,
            self.job.task,
            self.job.adapter,
            labels=self.splits.label_names,
            trains_frame=self.job.plan.moves_frame,
        )

    @cached_property
    def train(self) -> Tokens:
        """Token ids of the whole train split."""
        return self.learner.task.tokenize(self.splits.train)

    @cached_property
    def validation(self) -> Tokens:
        """Token ids of the validation split."""
        return self.learner.task.tokenize(self.splits.validation)

    @cached_property
    def test(self) -> Tokens:
        """Token ids of the test split."""
        return self.learner.task.tokenize(self.splits.test)

    def share(self, index: int) -> Sequence[int]:
        """Rows of the train split that one client holds; none for a client outside the federation."""
        if self.job.own:
            return range(len(self.splits.train))
        return self.shares[index] if 0 <= index < len(self.shares) else ()

    def client(self, index: int) -> Tokens:
        """Token ids of one client's examples."""
        return self.train.take(list(self.share(index)))


@lru_cache(maxsize=2)
def _world(text: str) -> World:
    job = Job.model_validate_json(text)
    if job.histories is None:
        return World(job)
    from strategies.personal.federated import PersonalWorld

    return PersonalWorld(job)
