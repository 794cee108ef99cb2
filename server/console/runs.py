"""Federation runs as the console shows them; whoever opens the console says where they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class RunShown:
    """A run as far as it got."""

    name: str
    finished: bool = False
    facts: Sequence[str] = ()
    figures: Sequence[tuple[str, str, str]] = ()
    """Name, value, note."""
    charts: Sequence[str] = ()
    """HTML, with everything in it that somebody else named escaped; drawn in the classes of console.css."""
    report: bool = False
    """Whether there is a report to read."""
    fault: str = ""
    """Why there is nothing else, such as a damaged file."""


class Runs(Protocol):
    """A folder of runs."""

    @property
    def place(self) -> str:
        """Where the runs are, in the user's spelling."""
        ...

    def names(self) -> list[str]:
        """Return all federation runs, the latest first."""
        ...

    def shown(self, name: str) -> RunShown:
        """Return one run of those that `names` has."""
        ...

    def report(self, name: str) -> str | None:
        """Return a run's report, a whole HTML page; None for a run without one, or that `names` does not have."""
        ...
