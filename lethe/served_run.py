"""What a personal run keeps so that it can be served, and how it is opened again."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lethe.config import PersonalRun, load_personal_run
from lora.errors import ModelError, RunError
from strategies.personal.asking import Asking
from strategies.personal.config import Told
from strategies.personal.files import load_personalized, save_personalized
from strategies.personal.personalized import Personalized
from strategies.personal.recommenders.files import keepable, load_recommender, save_recommender
from strategies.personal.representation import Recommended
from strategies.personal.retriever import SemanticRetriever
from strategies.personal.world import World, base_of
from tasks.models import BaseModel, load_base
from tasks.recommendation.files import load_interactions
from tasks.recommendation.interactions import Interactions
from tasks.recommendation.splits import SPLITS

BASE, RECOMMENDERS, META = "base", "recommenders", "adapter/meta"
SCORER, ROUTER, RETRIEVER = "scorer", "router-", "texts.safetensors"


@dataclass(frozen=True)
class ServedRun:
    """A finished run as a service needs it."""

    personal: Personalized
    log: Interactions
    """Everybody's, whoever was left out: the catalogue is what a service needs of it."""
    left_out: tuple[str, ...]
    """Where users were forgotten (`ratings.forgotten`)."""


def keep_recommenders(world: World, directory: Path, *, told: Told = "latest") -> None:
    """Write the recommenders that score and route, where they can be saved: boosted ones cannot, nor be served.

    Where prompts are told similar events, what finds them is kept too.
    """
    if told == "similar":
        (directory / RECOMMENDERS).mkdir(parents=True, exist_ok=True)
        world.retriever.save(directory / RECOMMENDERS / RETRIEVER)
    if keepable(world.scorer):
        save_recommender(world.scorer, directory / RECOMMENDERS / SCORER)
    for place, router in enumerate(world.routers):
        save_recommender(router, directory / RECOMMENDERS / f"{ROUTER}{place}")


def keep_personal(personal: Personalized, directory: Path) -> None:
    """Write what all users' adapters are mixed of."""
    save_personalized(personal, directory / META)


def open_run(directory: Path) -> ServedRun:
    """Read a finished personal run. Raises RunError for one that cannot be served, DataError for lost ratings."""
    _check(directory)
    run = load_personal_run(directory / "config.yaml")
    log = load_interactions(run.ratings, seed=run.seed)
    base = _base(directory, run, log)
    scorer = load_recommender(directory / RECOMMENDERS / SCORER)
    folders = sorted((directory / RECOMMENDERS).glob(f"{ROUTER}*"), key=lambda path: int(path.name[len(ROUTER) :]))
    routers: list[Any] = [load_recommender(folder) for folder in folders]
    own = run.personal
    retriever = SemanticRetriever.load(directory / RECOMMENDERS / RETRIEVER) if own.told == "similar" else None
    asking = Asking(
        base, scorer=scorer, base_score=own.base_score, history=own.history, max_length=own.max_length,
        chosen=None if retriever is None else partial(retriever.similar, count=own.history),
    )  # fmt: skip
    representation = Recommended(routers, own.routing)
    personal = load_personalized(directory / META, base, asking=asking, representation=representation)
    return ServedRun(personal, log, run.ratings.forgotten)


def _check(directory: Path) -> None:
    if not (directory / META).is_dir():
        raise RunError(f"{directory}: no personal run that has finished; make one with lethe personalize")
    if not (directory / RECOMMENDERS / SCORER).is_dir():
        raise RunError(
            f"{directory}: its recommenders were not saved (comparison.scorer=boosted cannot be, and runs made before "
            "this could be served have none); run lethe personalize again, with comparison.scorer=MF"
        )


def _base(directory: Path, run: PersonalRun, log: Interactions) -> BaseModel:
    """Load the language model: the run's own reader, or the one that its run file names."""
    if (directory / BASE).is_dir():
        base = load_base(run.model.model_copy(update={"path": str(directory / BASE)}), causal=True)
    else:
        base = base_of(run.model)(log, SPLITS[run.comparison.split](log), run.seed)
    if base.reference == "reader":
        raise ModelError(f"{directory / BASE}: the reader that was trained there is gone; run lethe personalize again")
    return base
