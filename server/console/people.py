"""What a user's page shows: history, both lists of recommendations, and what the gate mixes."""

import re
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from lora.errors import Busy, DataError, Unknown
from server.service.answers import COLD, OWN, PLAIN, Provenance
from server.service.identity import Caller
from server.service.recommending import Rated, RecommendAsked, Recommended
from server.service.service import Service, UserInfo
from strategies.personal.events import Event
from strategies.personal.lifelong import LifelongUsers

PATIENCE = 60.0
"""Seconds that a page waits for its recommendations at most."""
BEST, FOUND, LATEST, STEPS = 10, 20, 20, 20
"""Recommendations, found titles and latest events that are shown; ratings that a list offers at most."""
_REASONS = {
    OWN: "answered by the user's own adapter",
    PLAIN: "asked without, for comparison: what somebody without a history would get",
    COLD: "nothing is known of this user, so this is what somebody without a history would get",
}
"""Reasons in words for those who look at pages; the interface's own speak of its parameters."""
_WAS = re.compile(r"\d{1,9}(\.\d{1,9}){0,99}")


@dataclass(frozen=True)
class Placed:
    """A recommendation, and where it was before the last rating: None where that is not known, 0 where nowhere."""

    item: Rated
    before: int | None = None


@dataclass(frozen=True)
class Mixed:
    """What the gate mixes of one meta-LoRA, for this user and for nobody in particular."""

    name: str
    own: float
    cold: float


@dataclass(frozen=True)
class Gate:
    """The gate's weights: means over the matrices, and `rows [matrices, N]` one by one."""

    mixed: tuple[Mixed, ...]
    matrices: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]
    zero: bool
    """Whether the mixture is zero throughout, as where no training of the meta-LoRAs was better than their start."""


@dataclass(frozen=True)
class Listed:
    """Recommendations and whose they are."""

    items: tuple[Placed, ...]
    whose: Provenance


@dataclass(frozen=True)
class PastEvent:
    """An event with its title."""

    title: str
    rating: float
    time: int


@dataclass(frozen=True)
class Found:
    """An item that a search found; `rated` is the user's latest rating of it."""

    item: str
    title: str
    rated: float | None


@dataclass(frozen=True)
class Person:
    """A user as the page shows them; `info` None is somebody of whom nothing is known."""

    name: str
    info: UserInfo | None
    history: tuple[PastEvent, ...]
    own: Listed
    plain: Listed
    gate: Gate | None


def people_of(service: Service) -> LifelongUsers:
    """Return the users. Raises Unknown where the service has none."""
    if service.users is None:
        raise Unknown("this service has no users with histories; start it with a personal run")
    return service.users


def person(service: Service, caller: Caller, name: str, *, latest: int = LATEST, was: str = "") -> Person:
    """Return a user's page. Raises Denied for another's."""
    info = known(service, caller, name)
    asked = RecommendAsked(name, count=BEST, fallback="cold")
    own, plain = _told([service.recommend(caller, each) for each in (asked, replace(asked, personalized=False))])
    gate = None if info is None else _gate(service, name)
    return Person(
        name, info, _history(service, info, latest), _listed(service, own, was), _listed(service, plain), gate
    )


def known(service: Service, caller: Caller, name: str) -> UserInfo | None:
    """Return what is known of a user, or None. Raises Denied for another's."""
    try:
        return service.user(caller, name)
    except Unknown:
        people_of(service)
        return None


def _told(futures: "Sequence[Future[Any]]") -> list[Recommended]:
    try:
        return [future.result(PATIENCE) for future in futures]
    except TimeoutError:
        raise Busy(f"no answer within {PATIENCE:g} s; ask again later", retry_after=5) from None


def _history(service: Service, info: UserInfo | None, latest: int) -> tuple[PastEvent, ...]:
    events = () if info is None else info.events[::-1][:latest]
    return tuple(PastEvent(service.titles.get(e.item, e.item), e.rating, e.time) for e in events)


def _listed(service: Service, told: Recommended, was: str = "") -> Listed:
    whose = replace(told.provenance, reason=_REASONS.get(told.provenance.reason, told.provenance.reason))
    if not _WAS.fullmatch(was):
        return Listed(tuple(Placed(each) for each in told.items), whose)
    catalogue = people_of(service).histories.terms.catalogue
    before = {int(place): number for number, place in enumerate(was.split("."), start=1)}
    items = tuple(Placed(each, before.get(catalogue.index(each.item), 0)) for each in told.items)
    return Listed(items, whose)


def _gate(service: Service, name: str) -> Gate | None:
    """Return what is mixed, unless the user is forgotten at this very moment."""
    people = people_of(service)
    with people.steady():
        if name not in people:
            return None
        own, cold = people.gate(name).double(), people.gate(None).double()
        zero = not bool(people.slot(name).any())
    means = zip(own.mean(0).tolist(), cold.mean(0).tolist(), strict=True)
    mixed = tuple(Mixed(f"meta-LoRA {number}", *pair) for number, pair in enumerate(means, start=1))
    matrices = tuple(short(site.name) for site in people.personal.adapted.sites)
    return Gate(mixed, matrices, tuple(tuple(row) for row in own.tolist()), zero)


def short(matrix: str) -> str:
    """Leave out of a module's name what all of them share."""
    parts = [part for part in matrix.split(".") if part not in ("model", "base_model", "layers", "encoder", "layer")]
    return ".".join([parts[0], parts[-1]]) if len(parts) > 2 else ".".join(parts)


# --- Rating ----------------------------------------------------------------------------------------------------------


def find(service: Service, info: UserInfo | None, words: str) -> list[Found]:
    """Return the items whose titles have all the words, in the catalogue's order, `FOUND` at most."""
    wanted = words.casefold().split()
    rated = {} if info is None else {event.item: event.rating for event in info.events}
    found = [
        Found(item, title, rated.get(item))
        for item, title in service.titles.items()
        if wanted and all(word in title.casefold() for word in wanted)
    ]
    return found[:FOUND]


def ratings_of(service: Service) -> list[float]:
    """Return the ratings that may be given in half steps; nothing for a scale that has too many."""
    low, high = people_of(service).histories.terms.scale
    count = round((high - low) * 2)
    return [low + step / 2 for step in range(count + 1)] if count <= STEPS else []


def rate(service: Service, caller: Caller, name: str, *, item: str, rating: str) -> str:
    """Take a rating that was given just now; returns the places in the catalogue that were recommended before.

    Raises DataError for what is no number, and what `Service.observe` raises.
    """
    try:
        value = float(rating)
    except ValueError:
        raise DataError(f"rating '{rating[:20]}' is no number; choose one of those offered") from None
    info = known(service, caller, name)
    (before,) = _told([service.recommend(caller, RecommendAsked(name, count=BEST, fallback="cold"))])
    last = info.events[-1].time + 1 if info is not None and info.events else 0
    service.observe(caller, name, [Event(name, item, value, max(int(time.time()), last))])
    catalogue = people_of(service).histories.terms.catalogue
    return ".".join(str(catalogue.index(each.item)) for each in before.items)
