"""Events as a service receives them, and what is wrong with some."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from lora.errors import DataError, nearest

Reason = Literal["user", "item", "rating", "time", "backwards", "duplicate"]

LATEST = 2**62
"""Times are whole seconds of at most so many digits: what 64 bits hold, with room to add."""
LISTED = 20_000
"""Names among which the nearest is looked for."""


@dataclass(frozen=True)
class Event:
    """A user rated an item at a time, in whole seconds since 1970."""

    user: str
    item: str
    """The item's name in the catalogue."""
    rating: float
    time: int


class EventRefused(DataError):
    """An event cannot be taken; `reason` says why, for callers that treat a repeated delivery as done."""

    def __init__(self, message: str, *, reason: Reason, event: Event) -> None:
        super().__init__(message)
        self.reason, self.event = reason, event


class Row(NamedTuple):
    """A checked event; the item is its place in the catalogue."""

    user: str
    item: int
    rating: float
    time: int


class Known(Protocol):
    """What was observed before."""

    def last(self, user: str) -> int | None:
        """Return the time of a user's last event; None for one without events."""
        ...

    def has(self, row: Row) -> bool:
        """Return whether the user rated the item at that very time."""
        ...


def checked(
    events: Sequence[Event], known: Known, *, places: Mapping[str, int], scale: tuple[float, float]
) -> list[Row]:
    """Check events in the order in which they came, each against those before it.

    Raises EventRefused for the first that is wrong; a known event that comes again is a duplicate, not a step back.
    """
    last: dict[str, int | None] = {}
    seen: set[tuple[str, int, int]] = set()
    rows = []
    for number, event in enumerate(events, start=1):
        where = f"event {number} of {len(events)}: " if len(events) > 1 else ""
        row = _alone(event, places, scale, where)
        key = (row.user, row.item, row.time)
        if key in seen or known.has(row):
            raise _refused(
                event, "duplicate", f"{where}user '{row.user}' rated item '{event.item}' at {row.time} already; "
                "leave it out, or give the later rating its own time",
            )  # fmt: skip
        before = last[row.user] if row.user in last else known.last(row.user)
        if before is not None and row.time < before:
            raise _refused(
                event, "backwards", f"{where}time {row.time} of user '{row.user}' is before the last event, at "
                f"{before}; send events in order of time, or forget the user and send the whole history",
            )  # fmt: skip
        last[row.user] = row.time
        seen.add(key)
        rows.append(row)
    return rows


def _alone(event: Event, places: Mapping[str, int], scale: tuple[float, float], where: str) -> Row:
    """Check what needs no other event."""
    if not isinstance(event.user, str) or not event.user.strip():
        raise _refused(event, "user", f"{where}user {event.user!r} is no name; give a text that is not empty")
    if event.item not in places:
        close = nearest(str(event.item), places) if len(places) <= LISTED else ""
        close = close if "did you mean" in close else f"; there are {len(places)}"
        raise _refused(
            event, "item", f"{where}unknown item '{event.item}'{close}; new items need a recommender fitted with them"
        )
    low, high = scale
    if not low <= event.rating <= high:
        raise _refused(
            event, "rating", f"{where}rating {event.rating} is out of range; give {low:g} to {high:g} "
            "(ratings.lowest, ratings.highest)",
        )  # fmt: skip
    return Row(event.user, places[event.item], float(event.rating), _seconds(event, where))


def _seconds(event: Event, where: str) -> int:
    try:
        time = operator.index(event.time)
    except TypeError:
        time = LATEST + 1
    if abs(time) > LATEST:
        raise _refused(event, "time", f"{where}time {event.time!r} is none; give whole seconds since 1970")
    return time


def _refused(event: Event, reason: Reason, message: str) -> EventRefused:
    return EventRefused(message, reason=reason, event=event)
