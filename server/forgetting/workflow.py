"""Requests as durable workflows of dbos: queued, one at a time, and resumed at the step where a crash left them.

Only ids go through dbos: what a request is about is in the store's files alone, so that deleting it there deletes it.
"""

import logging
import threading
from collections.abc import Callable

from dbos import DBOS, DBOSConfig, SetWorkflowID

from lora.errors import LetheError, RunError
from server.forgetting.files import RequestFile
from server.forgetting.steps import Stage, steps_of
from server.forgetting.store import Store

QUEUE = "forget requests"
DATABASE = "requests.sqlite"
_POLL = 0.05
_RARELY = 3600.0
_NOTED = 10

log = logging.getLogger("lethe.forgetting")


class Worker:
    """Works off a store's requests in order; one in a process, and one process a store (`Store.held`)."""

    now: "Worker | None" = None

    def __init__(self, stage: Stage, *, database: str | None = None, told: Callable[[str, str], None] | None = None):
        """Start dbos on the store's own SQLite file, or on a PostgreSQL database by URL, and take up what waits.

        `told` hears (request, step) when a step begins. Raises RunError where the database cannot be used.
        """
        if Worker.now is not None:
            raise RunError("a forgetting store is open in this process already; close it first")
        self.stage, self.told = stage, told
        self._turn = threading.Condition()
        Worker.now = self
        try:
            _launch(stage.store, database)
        except Exception as error:
            self.close()
            where = "the database" if database else str(stage.store.directory / DATABASE)
            raise RunError(f"{where} cannot keep requests ({type(error).__name__}: {_first_line(error)})") from error
        self.take_up()

    def take_up(self) -> None:
        """Queue every unfinished request; one that is queued already stays as it is."""
        for request in self.stage.store.unfinished():
            attempt = self.stage.store.state(request.id).attempt
            with SetWorkflowID(f"{request.id}.{attempt}"):
                DBOS.enqueue_workflow(QUEUE, _forget, request.id)

    def wait(self, request: RequestFile) -> None:
        """Return when a request is done or has stopped."""
        store = self.stage.store
        with self._turn:
            while not (store.done(request.id) or store.state(request.id).stopped is not None):
                self._turn.wait(timeout=1.0)

    def drain(self) -> None:
        """Return when nothing is left to do, also of what other processes have asked for meanwhile."""
        while left := self.stage.store.unfinished():
            self.take_up()
            self.wait(left[0])

    def close(self) -> None:
        """Stop taking up requests; a step that runs is left to end with the process."""
        # What is done is noted by dbos a moment later; nothing is to write to the store when it is given up.
        idle = not self.stage.store.unfinished()
        DBOS.destroy(workflow_completion_timeout_sec=_NOTED if idle else 0)
        Worker.now = None

    def carry_out(self, request: RequestFile, step: Callable[[str, Callable[[], str | None]], str | None]) -> None:
        """Take all steps of a request when those before it are through; `step` makes one durable."""
        with self._turn:
            self._turn.wait_for(lambda: all(each.number >= request.number for each in self.stage.store.unfinished()))
        for name in steps_of(request):
            why = step(name, lambda name=name: self._take(name, request))  # type: ignore[misc]
            if why is not None:
                self.stage.stop(request, why)
                break
        with self._turn:
            self._turn.notify_all()

    def _take(self, name: str, request: RequestFile) -> str | None:
        """Take one step; returns why it cannot be taken, in words that hold nothing of what is to be forgotten."""
        if self.told is not None:
            self.told(request.id, name)
        try:
            self.stage.run(name, request)
        except LetheError as error:
            return f"{name}: {error}"
        except Exception as error:
            # What failed unforeseen may quote rows: the log of this process has it, the database does not.
            log.exception("request %s: %s failed", request.id, name)
            return f"{name}: {type(error).__name__}; the log of the process that worked on it has the details"
        return None


@DBOS.workflow(name="forget", max_recovery_attempts=None)
def _forget(request: str) -> None:
    worker = Worker.now
    if worker is None:
        raise RunError("no forgetting store is open in this process")
    worker.carry_out(worker.stage.store.request(request), _durable)


def _durable(name: str, action: Callable[[], str | None]) -> str | None:
    return DBOS.run_step({"name": name}, action)


def _launch(store: Store, database: str | None) -> None:
    logger = logging.getLogger("dbos")
    # dbos writes to the console unless somebody else listens.
    logger.handlers = [logging.NullHandler()]
    logger.propagate = False
    DBOS(config=_config(store, database))
    DBOS.launch()
    DBOS.register_queue(QUEUE, concurrency=1, worker_concurrency=1, polling_interval_sec=_POLL)


def _config(store: Store, database: str | None) -> DBOSConfig:
    own = f"sqlite:///{(store.directory / DATABASE).absolute()}"
    return {
        "name": "lethe-forget",
        "system_database_url": own if database is None else _with_driver(database),
        # One database can serve many stores.
        "dbos_system_schema": f"lethe_{store.about.identity}",
        "application_version": "1",
        "executor_id": store.about.identity,
        "log_level": "CRITICAL",
        "enable_otlp": False,
        "notification_listener_polling_interval_sec": _POLL,
        "scheduler_polling_interval_sec": _RARELY,
    }


def _with_driver(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"postgresql+psycopg://{rest}" if scheme in ("postgres", "postgresql") else url


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else ""
