"""The registry: what service processes share. SQLite by default, PostgreSQL by URL; migrated when it is opened."""

import fcntl
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, event, select, text, update
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.exc import DataError as ImpossibleData
from sqlalchemy.orm import Session

from lora.errors import Busy, ConfigError, DataError, RunError, Unavailable
from server.service.tables import AdapterRow, ChangeRow

MIGRATIONS = Path(__file__).parent / "migrations"
CHANNEL = "lethe_changes"
FILE = "registry.sqlite"
"""The database, where it is SQLite."""
IDENTITY = "registry.id"
"""The file by which a folder and its registry know each other."""
_ADVISORY = 5_438_411
"""The number of PostgreSQL's lock that a process holds while it migrates."""


class Registry:
    """A database with the registry's tables, and the folder beside which processes agree on files.

    | case | what happens |
    |---|---|
    | a URL of another kind, or a driver that is not installed | ConfigError with the remedy |
    | a text with NUL, over PostgreSQL | DataError; SQLite holds it |
    | the database cannot be reached | Unavailable, now and at every later request; it comes back by itself |
    | tables of an older version | migrated, once, however many processes open it |
    | tables of a newer version | RunError; nothing is changed |
    | another folder than the registry's, or one that is not mounted | RunError; no file is cleared, no row changed |
    """

    def __init__(self, url: str | None, folder: Path) -> None:
        """Open or make the registry; `url` None is a SQLite file in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.url = url or f"sqlite:///{folder / FILE}"
        self.engine = _engine(self.url)
        self._migrate()

    @property
    def postgres(self) -> bool:
        """Whether it is PostgreSQL, which tells changes by itself."""
        return self.engine.dialect.name == "postgresql"

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Yield a session that is committed at the end, or rolled back. Raises Unavailable without a database."""
        try:
            with Session(self.engine, expire_on_commit=False) as session, session.begin():
                yield session
        except IntegrityError as error:
            raise Busy("another request changed the same at the same moment; ask again") from error
        except ImpossibleData as error:
            # PostgreSQL holds no NUL in a text. Its own words would repeat what was sent.
            raise DataError(
                "the request has a name that the registry cannot hold; leave out what is no text"
            ) from error
        except DBAPIError as error:
            raise _unavailable(error) from error

    def changed(self, session: Session) -> int:
        """Count a change and tell the other processes of it once it is committed; returns the count.

        Called first in a transaction, it makes the transactions that change adapters wait for each other.
        """
        session.execute(update(ChangeRow).values(count=ChangeRow.count + 1))
        count = int(session.execute(select(ChangeRow.count)).scalar_one())
        if self.postgres:
            session.execute(text(f"SELECT pg_notify('{CHANNEL}', :count)"), {"count": str(count)})
        return count

    def count(self) -> int:
        """Return how many changes there were."""
        with self.session() as session:
            return int(session.execute(select(ChangeRow.count)).scalar_one())

    @contextmanager
    def hold(self, *, alone: bool) -> Iterator[None]:
        """Keep other processes from clearing files up (or, `alone`, from writing any) meanwhile."""
        with (self.folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Let one process at a time do something; the lock goes with the process, however that ends."""
        with (self.folder / f".{what}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def scrub(self) -> None:
        """Have the database overwrite what was deleted, also in its log and in copies that moved rows left behind."""
        statements = ["VACUUM"] if self.postgres else ["VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"]
        try:
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                for statement in statements:
                    connection.execute(text(statement))
        except DBAPIError as error:
            raise _unavailable(error) from error

    def close(self) -> None:
        """Let go of all connections."""
        self.engine.dispose()

    def _migrate(self) -> None:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        logging.getLogger("alembic").setLevel(logging.WARNING)
        try:
            with self.hold(alone=True), self.engine.begin() as connection:
                if self.postgres:
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY})
                _check_version(connection)
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
                self._agree(connection)
        except DBAPIError as error:
            raise _unavailable(error) from error
        except SQLAlchemyError as error:
            raise RunError(f"the registry cannot be migrated ({error}); restore it, or name another") from error

    def _agree(self, connection: Connection) -> None:
        """Raise RunError unless the folder is this registry's: in another all adapters would be missing.

        A registry that has no folder yet takes this one.
        """
        path = self.folder / IDENTITY
        here = path.read_text().strip() if path.exists() else None
        known = connection.execute(select(ChangeRow.folder)).scalar()
        if known is None and self._may_take(connection, marked=here is not None):
            known = here = here or uuid.uuid4().hex
            _write(path, known)
            connection.execute(update(ChangeRow).values(folder=known))
        if here is None or here != known:
            raise RunError(
                f"{self.folder} {'has no' if here is None else 'has another'} {IDENTITY}: it is not where this "
                "registry's adapters are; name or mount the folder that the registry was made with (--data), or give "
                "this one a registry of its own"
            )

    def _may_take(self, connection: Connection, *, marked: bool) -> bool:
        """Whether the folder can be that of a registry that knows none: it has the files that rows name, or none."""
        names = {*connection.execute(select(AdapterRow.file)).scalars()}
        files = {file.name for file in (self.folder / "adapters").glob("*.safetensors")}
        return bool(names & files) if names else not (marked and files)


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}")
    with aside.open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def _check_version(connection: Connection) -> None:
    """Raise RunError for tables that a newer Lethe made."""
    if not connection.dialect.has_table(connection, "alembic_version"):
        return
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    known = {file.name[1:5] for file in (MIGRATIONS / "versions").glob("v*.py")}
    if found is not None and found not in known:
        raise RunError(f"the registry is of version {found}, newer than this Lethe knows; install a newer Lethe")


def _engine(url: str) -> Engine:
    try:
        kind = make_url(url).get_backend_name()
        if kind not in ("sqlite", "postgresql"):
            raise ConfigError(f"registry of kind '{kind}'; give sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME")
        if kind == "sqlite":
            engine = create_engine(url, connect_args={"timeout": 30})
            event.listen(engine, "connect", _durable)
            return engine
        return create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 5})
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        remedy = "give sqlite:///FILE, or postgresql+psycopg://USER@HOST/NAME with pip install 'lethe[postgres]'"
        # The URL may hold a password: it is not repeated.
        raise ConfigError(f"the registry's URL cannot be used ({type(error).__name__}); {remedy}") from None


def _durable(connection: Any, _: object) -> None:
    """Set a SQLite connection up: what was committed survives a power cut, and what is deleted is overwritten."""
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _unavailable(error: DBAPIError) -> Unavailable:
    return Unavailable(
        f"the registry's database does not answer ({type(error.orig).__name__}); ask again once it is back"
    )
