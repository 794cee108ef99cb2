"""`lethe serve`: the personalisation service by HTTP, gRPC and console, of a finished run or of a demo."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora.errors import ConfigError, LetheError
from server.service.engine import Limits
from server.service.identity import Keys, RateLimits
from server.service.parts import WHOLE, Part, check_division
from server.service.registry import Registry
from server.service.service import WARM, Service, Writer
from server.service.warm import Warm
from strategies.personal.lifelong import LifelongUsers

if TYPE_CHECKING:
    from lethe.served_run import ServedRun

SERVICE, KEY_FILE, STARTED = "service", "operator.key", "started"
TRY = {"texts": ["wake me up at noon"], "fallback": "cold"}
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
    warm: Warm = WARM
    """What is kept in memory of adapters that texts and completions are answered by."""
    rate: float = 50.0
    """Requests a second that one key may ask in the long run."""
    burst: int = 200
    """Requests that one key may ask at once."""
    waiting: int = 1024
    """Requests that may wait for an engine."""

    @property
    def load(self) -> dict[str, Any]:
        """What a service is given of this."""
        rates = RateLimits(rate=self.rate, burst=self.burst)
        return {"warm": self.warm, "rates": rates, "limits": Limits(waiting=self.waiting)}

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
        key = operator_key(service.keys, folder_of(run, place))
        app = create_app(service, runs=ShownRuns(place.runs))
        # uvicorn's own log configuration would shut down every handler of the process, and absl's closes its stream.
        settings = uvicorn.Config(
            app, host=place.host, port=place.port, log_level="warning", access_log=False, timeout_graceful_shutdown=30,
            server_header=False, log_config=None,
        )  # fmt: skip
        server = uvicorn.Server(settings)
        with _door(service, place):
            announce(service, place, key, say)
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


def found_run(run: Path | None, place: Place, *, say: Say) -> tuple[Path, Place]:
    """Return the run that is served, and the place with its data directory; the demo is made if there is none yet."""
    from lethe.serving_demo import demo_run

    folder = folder_of(run, place)
    if run is None:
        run = demo_run(listen=lambda part: say(f"preparing the demo: {part}"))
    return run, replace(place, data=folder)


def open_service(run: Path | None, place: Place, *, say: Say, part: Part = WHOLE) -> Service:
    """Open the service of a run, or of the demo; of `part` of its users. Raises RunError where it cannot be served."""
    run, place = found_run(run, place, say=say)
    return _personal(run, place, part) if has_users(run) else _classifying(run, place)


def has_users(run: Path) -> bool:
    """Return whether a run has users with histories, which one process holds; a classifier's adapters are shared."""
    from lethe.config import read_kind

    return read_kind(run / "config.yaml") == "personal"


def _classifying(run: Path, place: Place) -> Service:
    from lethe.served_classifier import open_classifier

    opened = open_classifier(run)
    registry = Registry(place.registry, folder_of(run, place))
    return Service(registry, learner=opened.learner, blank=opened.shared, gates=opened.gates, **place.load)


def _personal(run: Path, place: Place, part: Part) -> Service:
    from lethe.served_run import open_run

    folder = folder_of(run, place)
    check_division(folder, part.of)
    opened = open_run(run)
    users = LifelongUsers(opened.personal, opened.log, directory=folder / part.folder)
    try:
        _start(users, opened, part)
        base = opened.personal.base
        writer = Writer(base, opened.personal.adapted) if base.causal else None
        return Service(Registry(place.registry, folder), users=users, writer=writer, part=part, **place.load)
    except BaseException:
        users.close()
        raise


def _start(users: LifelongUsers, opened: "ServedRun", part: Part) -> None:
    """Take the run's own users, once: who was forgotten since does not come back, even if nobody is left."""
    if users.histories.noted(STARTED) is None:
        if not len(users):
            from lethe.ratings import asked_to_forget

            gone = asked_to_forget(opened.left_out)
            users.start(opened.log, among=lambda name: part.has(name) and not gone(name))
        users.histories.note(STARTED, "yes")


def operator_key(keys: Keys, folder: Path) -> str:
    """Return the operator's key that is kept beside the service, for its owner to read; it is made if need be."""
    file = folder / KEY_FILE
    try:
        key = file.read_text().strip()
        keys.caller(key)
    except (OSError, LetheError):
        key = keys.issue("operator", label="made by lethe serve")
        file.unlink(missing_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as kept:
            kept.write(key + "\n")
    return key


def announce(service: Service | None, place: Place, key: str, say: Say) -> None:
    """Say where it is served, and how to ask; of a service that is elsewhere, without its users."""
    users: Any = None if service is None else service.users
    what, name = ("", "USER") if not users else (f"{len(users):,} users ", users.names()[0])
    if service is not None and service.learner is not None:
        what = f"a classifier of {len(service.labels)} labels "
    say(f"serving {what}at {place.url} (documentation: {place.url}/docs)")
    if place.grpc_port is not None:
        say(f"the same calls over gRPC at {place.host}:{place.grpc_port} (lethe.v1.Personal; reflection is on)")
    say(f"operator's key: {key}")
    ask = "recommendations?count=3'"
    if service is not None and service.learner is not None:
        ask = f"""predictions' -H 'Content-Type: application/json' -d '{json.dumps(TRY)}'"""
    say(f"try: curl -H 'Authorization: Bearer {key}' '{place.url}/v1/users/{name}/{ask}")
    say(f"console: {place.url}/console  sign in with {key}")
