"""`lethe serve`: the personalisation service and its console, of a finished personal run or of a built-in demo."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora.errors import ConfigError, LetheError
from server.service.registry import Registry
from server.service.service import Service, Writer
from strategies.personal.lifelong import LifelongUsers

SERVICE, KEY_FILE = "service", "operator.key"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where the service listens, and where it keeps things."""

    host: str = "127.0.0.1"
    port: int = 8420
    data: Path | None = None
    """Users, adapters and the registry; else `service` in the run's directory."""
    registry: str | None = None
    """A database's URL; else SQLite in `data`."""
    runs: Path = Path("runs")
    """Where federations run, for the console to show."""
    grpc_port: int | None = None
    """Where the same calls are served over gRPC; None for nowhere."""

    @property
    def url(self) -> str:
        """The address for a browser."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def serve(run: Path | None, place: Place, *, say: Say) -> None:
    """Serve until interrupted; requests that are running are finished then. `run` None is the demo.

    Raises ConfigError where the port is taken, and what `open_service` raises.
    """
    import uvicorn

    from lethe.shown_runs import ShownRuns
    from server.service.http import create_app

    service = open_service(run, place, say=say)
    try:
        key = operator_key(service, folder_of(run, place))
        app = create_app(service, runs=ShownRuns(place.runs))
        # uvicorn's own log configuration would shut down every handler of the process, and absl's closes its stream.
        settings = uvicorn.Config(
            app, host=place.host, port=place.port, log_level="warning", access_log=False, timeout_graceful_shutdown=30,
            server_header=False, log_config=None,
        )  # fmt: skip
        server = uvicorn.Server(settings)
        with _door(service, place):
            _announce(service, place, key, say)
            try:
                server.run()
            except SystemExit as error:
                # uvicorn has told the reason on its log already, and ends the process where it cannot listen.
                raise ConfigError(
                    f"--port {place.port}: the service cannot listen at {place.host}; choose another port"
                ) from error
    finally:
        service.close()


@contextmanager
def _door(service: Service, place: Place) -> Iterator[None]:
    """Serve over gRPC too, where that is asked for."""
    if place.grpc_port is None:
        yield
        return
    from server.service.door import Door

    door = Door(service, host=place.host, port=place.grpc_port)
    try:
        yield
    finally:
        door.close()


def folder_of(run: Path | None, place: Place) -> Path:
    """Return where a service keeps things."""
    if place.data is not None:
        return place.data
    if run is not None:
        return run / SERVICE
    from lethe.serving_demo import VERSION, cache

    return cache() / f"{VERSION}-{SERVICE}"


def open_service(run: Path | None, place: Place, *, say: Say) -> Service:
    """Open the service of a run, or of the demo. Raises RunError for a run that cannot be served."""
    from lethe.served_run import open_run
    from lethe.serving_demo import demo_run

    if run is None:
        run = demo_run(listen=lambda part: say(f"preparing the demo: {part}"))
        place = replace(place, data=folder_of(None, place))
    opened = open_run(run)
    folder = folder_of(run, place)
    users = LifelongUsers(opened.personal, opened.log, directory=folder / "users")
    try:
        if not len(users):
            users.start(opened.log)
        base = opened.personal.base
        writer = Writer(base, opened.personal.adapted) if base.causal else None
        return Service(Registry(place.registry, folder), users=users, writer=writer)
    except BaseException:
        users.close()
        raise


def operator_key(service: Service, folder: Path) -> str:
    """Return the operator's key that is kept beside the service, for its owner to read; it is made if need be."""
    file = folder / KEY_FILE
    try:
        key = file.read_text().strip()
        service.keys.caller(key)
    except (OSError, LetheError):
        key = service.keys.issue("operator", label="made by lethe serve")
        file.unlink(missing_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as kept:
            kept.write(key + "\n")
    return key


def _announce(service: Service, place: Place, key: str, say: Say) -> None:
    users: Any = service.users
    name = users.names()[0] if len(users) else "USER"
    say(f"serving {len(users):,} users at {place.url} (documentation: {place.url}/docs)")
    if place.grpc_port is not None:
        say(f"the same calls over gRPC at {place.host}:{place.grpc_port} (lethe.v1.Personal; reflection is on)")
    say(f"operator's key: {key}")
    say(f"try: curl -H 'Authorization: Bearer {key}' '{place.url}/v1/users/{name}/recommendations?count=3'")
    say(f"console: {place.url}/console  sign in with {key}")
