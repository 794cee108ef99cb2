"""The durable ledger: what every client has spent, written before it is spent and never taken back."""

import os
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from lora.errors import BudgetExceeded, PrivacyError
from privacy.accounting import Event, epsilon

_APPLICATION = 0x4C657468
_VERSION = 1
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE charges (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    time TEXT NOT NULL,
    client TEXT NOT NULL,
    mechanism TEXT NOT NULL,
    rate REAL NOT NULL,
    noise_multiplier REAL NOT NULL,
    steps INTEGER NOT NULL,
    purpose TEXT NOT NULL,
    unit TEXT NOT NULL,
    adjacency TEXT NOT NULL,
    sampling TEXT NOT NULL,
    simulated INTEGER NOT NULL
);
CREATE INDEX charges_by_client ON charges (client, position);
CREATE TRIGGER never_refunded BEFORE DELETE ON charges BEGIN SELECT RAISE(ABORT, 'a charge is never refunded'); END;
CREATE TRIGGER never_rewritten BEFORE UPDATE ON charges BEGIN SELECT RAISE(ABORT, 'a charge is never rewritten'); END;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
COMMIT;
"""
_COLUMNS = "client, mechanism, rate, noise_multiplier, steps, purpose, unit, adjacency, sampling, time, simulated"


@dataclass(frozen=True)
class Charge:
    """A request to spend: the event of one client, and the budget that it must stay within."""

    client: str
    """Whose ledger."""
    event: Event
    """What will be drawn once this is committed."""
    purpose: str
    """What for, such as the run's name and the round."""
    budget: float | None
    """Epsilon that all of the client's events together must not pass; None: no limit."""
    delta: float
    """Failure probability of the budget."""
    unit: str = "example"
    """What is protected: example or client."""
    adjacency: str = "add/remove one"
    """Which neighbours are compared."""
    sampling: str = "poisson"
    """How lots are drawn."""
    mechanism: str = "gaussian"
    """What is drawn."""
    simulated: bool = False
    """Whether a simulation played the client."""


@dataclass(frozen=True)
class Row:
    """A committed charge, as it is shown."""

    position: int
    client: str
    mechanism: str
    rate: float
    noise_multiplier: float
    steps: int
    purpose: str
    unit: str
    adjacency: str
    sampling: str
    time: str
    simulated: bool

    @property
    def event(self) -> Event:
        """What was charged."""
        return Event(self.rate, self.noise_multiplier, self.steps)


@dataclass(frozen=True)
class Receipt:
    """What became of several charges: epsilon after each one that was committed, and the error of each refused."""

    charged: dict[str, float] = field(default_factory=dict)
    refused: dict[str, BudgetExceeded] = field(default_factory=dict)


class Ledger:
    """Durable ledger of privacy spending: one SQLite file, one row per charge, over all rounds and runs.

    **Guarantee**: when `charge` returns, its row is on disk; when it raises, no row was written. A kill at any
    instant, a retry or a second process can therefore only over-count what was drawn, and the events of a client
    that are in the ledger never compose to more than the budget each was charged under.

    | case | what happens |
    |---|---|
    | killed before the commit | nothing is charged, and nothing was drawn |
    | killed after the commit | charged; the retry charges again |
    | two processes charge at once | they take turns; both cannot pass the check on the same remainder |
    | disk full, read-only, locked for 60 s | PrivacyError, nothing charged |
    | the file vanished after it was opened | PrivacyError: an empty ledger would forget |
    | a foreign, damaged, empty or newer file | PrivacyError at opening |
    | one client, two units or adjacencies | PrivacyError: they do not compose |

    Every call opens its own connection, so a Ledger may be shared by threads and survives a fork.
    """

    def __init__(self, path: Path, *, timeout: float = 60.0) -> None:
        self.path = Path(path)
        self._timeout = timeout
        with self._guarded("open"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                _found(self.path)
            with self._connection() as database:
                _check(database, self.path)

    def charge(
        self,
        client: str,
        event: Event,
        *,
        purpose: str,
        budget: float | None,
        delta: float,
        unit: str = "example",
        adjacency: str = "add/remove one",
        sampling: str = "poisson",
        simulated: bool = False,
    ) -> float:
        """Commit one event before it is drawn, and return the client's epsilon after it.

        Raises BudgetExceeded, with nothing written, when the epsilon after the event would pass `budget`.
        """
        charge = Charge(
            client,
            event,
            purpose,
            budget,
            delta,
            unit=unit,
            adjacency=adjacency,
            sampling=sampling,
            simulated=simulated,
        )
        receipt = self.charge_many([charge])
        if client in receipt.refused:
            raise receipt.refused[client]
        return receipt.charged[client]

    def charge_many(self, charges: Sequence[Charge]) -> Receipt:
        """Commit the events of several clients in one transaction: each is charged or refused on its own.

        The charged are visible all at once; a PrivacyError (of the file, not of a budget) leaves none of them.
        """
        with self._committing(charges) as receipt:
            return receipt

    def charge_together(self, charges: Sequence[Charge]) -> float:
        """Commit several events of one client, all or none, and return the client's epsilon after them.

        Raises BudgetExceeded, with nothing written, when any of them would pass its budget.
        """
        with self._committing(charges) as receipt:
            for refused in receipt.refused.values():
                raise refused
        return receipt.charged[charges[-1].client]

    @contextmanager
    def _committing(self, charges: Sequence[Charge]) -> Iterator[Receipt]:
        """Charge in one transaction, which commits when the block ends, and not where it raises."""
        with self._guarded("charge"):
            self._account_ahead(charges)
            with self._connection() as database, _transaction(database):
                receipt = Receipt()
                for charge in charges:
                    _try(database, charge, receipt)
                yield receipt

    def events(self, client: str) -> list[Event]:
        """Return all events of a client, oldest first; none for a client that was never charged."""
        return [row.event for row in self.rows(client)]

    def clients(self) -> list[str]:
        """Return the names of all clients that were ever charged, sorted."""
        with self._guarded("read"), self._connection() as database:
            return [name for (name,) in database.execute("SELECT DISTINCT client FROM charges ORDER BY client")]

    def epsilon(self, client: str, *, delta: float) -> float:
        """Return what a client has spent at `delta`, over all its events; 0 for a client never charged."""
        with self._guarded("read"), self._connection() as database:
            spent = _spent(database, client)
        return epsilon(spent, delta=delta)

    def rows(self, client: str | None = None) -> list[Row]:
        """Return all charges for display, oldest first: those of one client, or of everybody."""
        with self._guarded("read"), self._connection() as database:
            return _rows(database, client)

    def position(self) -> int:
        """Return the position of the last charge (0: none), for checkpoints; it never falls."""
        with self._guarded("read"), self._connection() as database:
            return int(database.execute("SELECT coalesce(max(position), 0) FROM charges").fetchone()[0])

    def _account_ahead(self, charges: Sequence[Charge]) -> None:
        """Compose before the file is locked: the figures are cached, so the lock is held for milliseconds."""
        with self._connection() as database:
            spent = {charge.client: _spent(database, charge.client) for charge in charges}
        for charge in charges:
            epsilon([*spent[charge.client], charge.event], delta=charge.delta)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Open the file. The rollback journal keeps all that is committed in this one file, whoever copies it;
        synchronous=EXTRA also syncs the directory, so that a commit outlives a power cut (1 ms, as WAL)."""
        address = f"{self.path.absolute().as_uri()}?mode=rw"
        opened = sqlite3.connect(address, uri=True, timeout=self._timeout, isolation_level=None)
        with closing(opened) as database:
            database.execute("PRAGMA synchronous = EXTRA")
            yield database

    @contextmanager
    def _guarded(self, verb: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise PrivacyError(
                f"cannot {verb} the privacy ledger {self.path}: {error}; nothing was charged or drawn. "
                "Check that it is a ledger, that it is there and writable, and that the disk has room"
            ) from error


def _found(path: Path) -> None:
    """Write an empty ledger aside and give it its name, unless another process was first.

    So a ledger is whole from its first instant, and a file without content is one that was damaged.
    """
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        with closing(sqlite3.connect(aside, isolation_level=None)) as database:
            database.execute("PRAGMA synchronous = EXTRA")
            database.executescript(_SCHEMA)
        with suppress(FileExistsError):
            os.link(aside, path)
    finally:
        os.unlink(aside)


def _check(database: sqlite3.Connection, path: Path) -> None:
    """Refuse any file that is not a whole ledger of this version. Raises PrivacyError."""
    if not _pragma(database, "schema_version"):
        raise PrivacyError(
            f"the privacy ledger {path} is empty, and a ledger never is: it was damaged; restore it, never start an "
            "empty one"
        )
    found = _pragma(database, "application_id"), _pragma(database, "user_version")
    if found[0] != _APPLICATION:
        raise PrivacyError(f"{path} is a database, and no privacy ledger; name another file for the ledger")
    if found[1] != _VERSION:
        raise PrivacyError(
            f"the privacy ledger {path} has schema version {found[1]}, this release reads version {_VERSION}; "
            "use the release that wrote it"
        )
    if (verdict := database.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise PrivacyError(f"the privacy ledger {path} is damaged ({verdict}); restore it, never start an empty one")


def _pragma(database: sqlite3.Connection, name: str) -> int:
    return int(database.execute(f"PRAGMA {name}").fetchone()[0])


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    finally:
        if database.in_transaction:
            database.execute("ROLLBACK")


def _try(database: sqlite3.Connection, charge: Charge, receipt: Receipt) -> None:
    """Charge or refuse one client inside the open transaction."""
    if charge.client in receipt.refused:
        return
    _check_relation(database, charge)
    spent = _spent(database, charge.client)
    after = epsilon([*spent, charge.event], delta=charge.delta)
    if charge.budget is not None and after > charge.budget * (1 + 1e-9):
        receipt.refused[charge.client] = _refusal(charge, spent, after)
        return
    _insert(database, charge)
    receipt.charged[charge.client] = after


def _check_relation(database: sqlite3.Connection, charge: Charge) -> None:
    query = "SELECT DISTINCT unit, adjacency FROM charges WHERE client = ?"
    for unit, adjacency in database.execute(query, (charge.client,)):
        if (unit, adjacency) != (charge.unit, charge.adjacency):
            raise PrivacyError(
                f"client '{charge.client}' has charges per {unit} ({adjacency}); a charge per {charge.unit} "
                f"({charge.adjacency}) does not compose with them; keep it in a ledger of its own"
            )


def _refusal(charge: Charge, spent: Sequence[Event], after: float) -> BudgetExceeded:
    before = epsilon(spent, delta=charge.delta)
    return BudgetExceeded(
        f"client '{charge.client}' has spent epsilon {before:.4g} of its budget {charge.budget:.4g} at delta "
        f"{charge.delta:g} per {charge.unit}; {charge.event.steps} more steps ({charge.purpose}) would make it "
        f"{after:.4g}. Nothing was charged. Stop here, raise privacy.epsilon, or plan with a larger "
        "privacy.noise_multiplier or fewer steps"
    )


def _insert(database: sqlite3.Connection, charge: Charge) -> None:
    event = charge.event
    values = (
        charge.client,
        charge.mechanism,
        float(event.rate),
        float(event.noise_multiplier),
        int(event.steps),
        charge.purpose,
        charge.unit,
        charge.adjacency,
        charge.sampling,
        datetime.now(UTC).isoformat(timespec="milliseconds"),
        int(charge.simulated),
    )
    database.execute(f"INSERT INTO charges ({_COLUMNS}) VALUES ({', '.join('?' * len(values))})", values)


def _rows(database: sqlite3.Connection, client: str | None) -> list[Row]:
    where, values = ("WHERE client = ?", (client,)) if client is not None else ("", ())
    found = database.execute(f"SELECT position, {_COLUMNS} FROM charges {where} ORDER BY position", values)
    return [Row(*(*values[:-1], bool(values[-1]))) for values in found]


def _spent(database: sqlite3.Connection, client: str) -> list[Event]:
    """Return what a client has spent, steps of equal events summed."""
    found = database.execute(
        "SELECT rate, noise_multiplier, sum(steps) FROM charges WHERE client = ? GROUP BY rate, noise_multiplier",
        (client,),
    )
    return [Event(*values) for values in found]
