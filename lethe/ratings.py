"""The ratings of a personal run, without those of users who were asked to be forgotten."""

from collections.abc import Callable
from pathlib import Path

from lethe.config import PersonalRun
from lora.errors import RunError
from server.forgetting.sources import find_store
from server.forgetting.store import Store
from server.forgetting.users import named_to_forget
from server.service.forgetting import named_in
from server.service.registry import FILE
from tasks.recommendation.files import load_interactions
from tasks.recommendation.interactions import Interactions


def load_ratings(run: PersonalRun) -> tuple[Interactions, int]:
    """Load what a run is about, without the users of `ratings.forgotten`; returns how many were left out, too.

    **Guarantee**: what is fitted is what would be fitted if the users who are left out had no row. (The catalogue is
    cut to its core before, so that directories of users, which are of one catalogue, can be served by what is fitted
    anew.)

    Raises DataError for ratings that cannot be used, or where nobody is left; RunError where nobody can be forgotten.
    """
    log = load_interactions(run.ratings, seed=run.seed)
    if run.ratings.forgotten is None:
        return log, 0
    gone = asked_to_forget(run.ratings.forgotten)
    left = log.among(lambda name: not gone(name))
    return left, len(log.user_names) - len(left.user_names)


def asked_to_forget(place: str) -> Callable[[str], bool]:
    """Return whether a user of a name was asked to be forgotten: of a forgetting store, or of a service.

    `place` is a store, a directory of users with one, a service's folder, or its database's URL; a folder may be both.
    Raises RunError where it is none of these.
    """
    folder, found = Path(place).expanduser(), list[Callable[[str], bool]]()
    store = find_store(folder)
    if store is not None:
        found.append(named_to_forget(Store(store)))
    if "://" in place:
        found.append(named_in(place))
    elif (folder / FILE).is_file():
        found.append(named_in(f"sqlite:///{folder / FILE}"))
    if not found:
        raise RunError(
            f"ratings.forgotten={place}: neither a forgetting store nor a service's folder, so nobody was forgotten "
            "there; leave it out, or name the folder of users"
        )
    return lambda name: any(one(name) for one in found)
