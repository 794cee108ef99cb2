"""The Flower ServerApp: the round driver over whatever Grid Flower hands it."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.directory import check_unfinished, held, run_directory, write_config
from server.driver import RoundDriver
from server.grid import PacedGrid
from server.job import ServerJob
from server.records import METRICS, Records, printed
from strategies.federated.job import read_job, sections_of
from strategies.observe.watch import watched_run

log = logging.getLogger("lethe.server")


def build(
    run_config: dict[str, Any] | None = None,
    *,
    directory: Path | None = None,
    engine: str = "deployment",
    about: Mapping[str, Any] | None = None,
    listen: Callable[[dict[str, Any]], None] | None = None,
    ledger_position: Callable[[], int | None] = lambda: None,
) -> ServerApp:
    """Make the ServerApp; a simulation may give it the run config and the directory that Flower would else name.

    Without a directory it makes one by the run's name, and holds it: a run of the same name and config goes on from the
    last checkpoint. Raises RunError where another process holds it or the run has finished.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = dict(context.run_config) if run_config is None else run_config
        if config.get("forget"):
            return _forget(grid, config, context.run_id)
        job = read_job(ServerJob, config)
        place = directory or run_directory(config, context.run_id)
        place.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            told = dict(about or {})
            records = Records(place)
            if directory is None:
                stack.enter_context(deployed(records, config, rounds=job.federation.rounds))
                grid, told = PacedGrid(grid), {"engine": engine} | told
            records.listeners += [listen] if listen is not None else []
            records.watchers.append(stack.enter_context(watched_run(run=place.name, engine=engine)))
            driver = RoundDriver(job, grid, place, records=records, about=told, ledger_position=ledger_position)
            records.summarise({**driver.run(), "engine": engine} | ({} if directory else _whereabouts(place)))

    return app


def _forget(grid: Grid, config: dict[str, Any], number: int) -> None:
    """Serve what nodes offer to have forgotten, instead of training."""
    from server.forgetting.collecting import collect, collection

    collect(grid, collection(config), name=str(config.get("name") or f"flower-{number}"))


@contextmanager
def deployed(records: Records, config: dict[str, Any], *, rounds: int) -> Iterator[None]:
    """Hold the directory of a run that real nodes play, and print where it stands. Raises RunError."""
    with held(records.directory), printed(records):
        check_unfinished(records.directory, rounds=rounds)
        write_config(records.directory, sections_of(config))
        log.info("the run writes to %s", records.directory.absolute())
        yield


def _whereabouts(place: Path) -> dict[str, str]:
    return {"name": place.name, "metrics_path": str(place / METRICS)}


app = build()
