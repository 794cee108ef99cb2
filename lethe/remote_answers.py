"""What the service's client returns."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Whose:
    """Whose answer it is: never another user's, and never the base model's without saying so."""

    adapter: str | None
    adapter_version: int | None
    gate: Mapping[str, float]
    personalized: bool
    reason: str


@dataclass(frozen=True)
class Event:
    """A user rated an item at a time, in whole seconds since 1970."""

    item: str
    rating: float
    time: int


@dataclass(frozen=True)
class Observed:
    """Events were taken; `repeated` where they had been before, under the same key."""

    user: str
    taken: int
    adapter_version: int
    new: bool
    repeated: bool


@dataclass(frozen=True)
class Rated:
    """An item, and the probability that the user likes it."""

    item: str
    title: str
    like: float


@dataclass(frozen=True)
class Recommendations:
    """Items, best first (or in the order asked for), and whose answer it is."""

    items: tuple[Rated, ...]
    whose: Whose

    def __iter__(self) -> Iterator[Rated]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> Rated:
        return self.items[place]


@dataclass(frozen=True)
class Prediction:
    """The probabilities of a text's classes by label, or its embedding."""

    shares: Mapping[str, float]
    embedding: tuple[float, ...]
    whose: Whose

    @property
    def label(self) -> str | None:
        """The likeliest class; None for an embedding."""
        return max(self.shares, key=self.shares.__getitem__, default=None)


Predictions = tuple[Prediction, ...]


@dataclass(frozen=True)
class History:
    """What is known of a user: the adapter's version, how many events, and the latest, the last first."""

    adapter_version: int
    events: int
    latest: tuple[Event, ...]


@dataclass(frozen=True)
class Adapter:
    """An adapter without its numbers."""

    name: str
    owner: str | None
    version: int
    base: str
    rank: int
    state: str


@dataclass(frozen=True)
class Completion:
    """How a text goes on, why it ended, and whose it is."""

    text: str
    finish_reason: str
    whose: Whose


@dataclass(frozen=True)
class ForgetRequest:
    """A request to forget, as it stands, with its evidence; `subject` is the SHA-256 of the user's name."""

    id: str
    subject: str
    state: str
    evidence: Mapping[str, Any]
    created: float
    finished: float | None
