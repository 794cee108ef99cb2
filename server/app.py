"""The Flower ServerApp: the round driver over whatever Grid Flower hands it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.driver import RoundDriver
from server.job import ServerJob
from server.records import Records
from strategies.federated.job import read_job


def build(
    run_config: dict[str, Any] | None = None,
    *,
    directory: Path | None = None,
    engine: str = "deployment",
    about: Mapping[str, Any] | None = None,
    listen: Callable[[dict[str, Any]], None] | None = None,
    ledger_position: Callable[[], int | None] = lambda: None,
) -> ServerApp:
    """Make the ServerApp; a simulation may give it the run config and the directory that Flower would else name."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = dict(context.run_config) if run_config is None else run_config
        place = directory or Path(str(config.get("run-dir") or f"runs/flower-{context.run_id}"))
        place.mkdir(parents=True, exist_ok=True)
        records = Records(place)
        if listen is not None:
            records.listeners.append(listen)
        driver = RoundDriver(
            read_job(ServerJob, config), grid, place, records=records, about=about, ledger_position=ledger_position
        )
        records.summarise({**driver.run(), "engine": engine})

    return app


app = build()
