"""What every client has spent, read from a privacy ledger."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lethe.record import RUNS, find_run, latest_ledger, natural
from lora.errors import RunError

if TYPE_CHECKING:
    from privacy.ledger import Row

_DELTA = 1e-5


@dataclass(frozen=True)
class Spent:
    """One client's account."""

    client: str
    charged: str
    """Equal events merged: `25 steps (rate 0.05, noise 1.1)`."""
    epsilon: float
    delta: float
    unit: str
    adjacency: str
    sampling: str
    simulated: bool


def find_ledger(where: str | None, *, root: Path = RUNS) -> Path:
    """Return a ledger given by path, by run, or, for None, the one that was charged last."""
    if where is None:
        return latest_ledger(root=root)
    if Path(where).is_file():
        return Path(where)
    ledger = find_run(where, root=root) / "ledger.sqlite"
    if not ledger.is_file():
        raise RunError(f"run '{where}' has no ledger: it was not private; set privacy.epsilon to charge one")
    return ledger


def spent(path: Path, *, delta: float | None = None) -> list[Spent]:
    """Return what every client of a ledger has spent, at `delta`, else at the delta of the run beside it, else 1e-5.

    Raises PrivacyError when the file is no ledger.
    """
    from privacy.accounting import epsilon
    from privacy.ledger import Ledger

    at = _delta_of(path) if delta is None else delta
    accounts: dict[str, list[Row]] = {}
    for row in Ledger(path).rows():
        accounts.setdefault(row.client, []).append(row)
    figures = []
    for client in sorted(accounts, key=natural):
        rows = accounts[client]
        figures.append(
            Spent(
                client,
                _merged(rows),
                epsilon((row.event for row in rows), delta=at),
                at,
                _words(row.unit for row in rows),
                _words(row.adjacency for row in rows),
                _words(row.sampling for row in rows),
                any(row.simulated for row in rows),
            )
        )
    return figures


def _delta_of(ledger: Path) -> float:
    from lethe.config import load_run_file

    config = ledger.parent / "config.yaml"
    return load_run_file(config).privacy.delta if config.is_file() else _DELTA


def _merged(rows: "Iterable[Row]") -> str:
    steps: Counter[tuple[float, float]] = Counter()
    for row in rows:
        steps[row.rate, row.noise_multiplier] += row.steps
    return ", ".join(f"{count} steps (rate {rate:.4g}, noise {noise:.4g})" for (rate, noise), count in steps.items())


def _words(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))
