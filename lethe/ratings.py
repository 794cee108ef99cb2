"""The ratings of a personal run, without those of users who were asked to be forgotten."""

from collections.abc import Callable, Sequence
from pathlib import Path

from lethe.config import PersonalRun
from lora.errors import RunError
from server.forgetting.sources import find_store
from server.forgetting.store import Store
from server.forgetting.users import named_to_forget
from server.service.forgetting import named_in
from server.service.registry import FILE
from strategies.personal.erasure import is_users
from tasks.recommendation.files import load_interactions
from tasks.recommendation.interactions import Interactions

Named = Callable[[str], bool]


def load_ratings(run: PersonalRun) -> tuple[Interactions, int]:
    """Load what a run is about, without the users of `ratings.forgotten`; returns how many were left out, too.

    **Guarantee**: nothing that is fitted on them reads a row of a user who was left out. (Which items there are, and
    which rows of others belong to the core, was decided with everybody's: directories of users are of one catalogue,
    and can be served by what is fitted anew.)

    Raises DataError for ratings that cannot be used, or where nobody is left; RunError where nobody can be forgotten.
    """
    log = load_interactions(run.ratings, seed=run.seed)
    if not run.ratings.forgotten:
        return log, 0
    gone = asked_to_forget(run.ratings.forgotten)
    left = log.among(lambda name: not gone(name))
    return left, len(log.user_names) - len(left.user_names)


def asked_to_forget(places: Sequence[str]) -> Named:
    """Return whether a user of a name was asked to be forgotten in any of some places.

    A place is a forgetting store, a directory of users, or a service's folder, with all of these that lie in it; beside
    users, also the service that they are of. Raises RunError where there is none.
    """
    found = [one for place in places for one in _in(Path(place).expanduser())]
    return lambda name: any(one(name) for one in found)


def _in(place: Path) -> list[Named]:
    inner = [each for each in sorted(place.iterdir()) if is_users(each)] if place.is_dir() else []
    stores = [store for each in (place, *inner) if (store := find_store(each)) is not None]
    registries = [place / FILE, *([place.parent / FILE] if is_users(place) else [])]
    found = [named_to_forget(Store(store)) for store in stores]
    found += [named_in(file) for file in registries if file.is_file()]
    if not found:
        raise RunError(
            f"ratings.forgotten={place}: neither a forgetting store nor a service's folder with {FILE}, so nobody was "
            "forgotten there; leave it out, or name the folder of users"
        )
    return found
