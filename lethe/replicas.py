"""`lethe serve --replicas`: the same application as replicas of a Ray Serve deployment, on one machine or on many."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from lethe.serve import Place, Say, announce, found_run, has_users, open_service, operator_key
from lora.errors import ConfigError, ServiceError
from server.service.identity import Keys
from server.service.parts import WHOLE, Held, Part, check_division, hold
from server.service.registry import Registry

NAME = "lethe"
ONGOING = 1024
"""Requests that a replica takes at once; its engines refuse what is too much long before, so that Ray need not."""
GRACE = 30.0


@dataclass(frozen=True)
class Replicas:
    """How many replicas there are, and what each gets."""

    count: int
    most: int | None = None
    """Where given, there are `count` to `most` of them, by load. Not where users with histories are divided."""
    ongoing: float = 32.0
    """Requests at a time that a replica is to have, on average, before another is started."""
    ray: str | None = None
    """Address of a Ray cluster; None starts one of this machine."""
    cpus: float = 1.0
    gpus: float = 0.0


class Replica:
    """A replica: its process answers by the application of `lethe serve`.

    Users with histories are divided: each replica holds a part. Adapters are shared: any replica answers by any.
    """

    def __init__(self, run: Path, place: Place, count: int) -> None:
        from lethe.shown_runs import ShownRuns
        from server.service.http import create_app

        self.held: Held | None = hold(place.data or run, count) if has_users(run) else None
        log = logging.getLogger("lethe.service")
        self.service = open_service(run, place, say=log.info, part=self.part)
        _APPS.append(create_app(self.service, runs=ShownRuns(place.runs)))

    @property
    def part(self) -> Part:
        """Which users are here."""
        return WHOLE if self.held is None else self.held.part

    def record_routing_stats(self) -> dict[str, int]:
        """Tell Ray's routers which users are here."""
        return {"part": self.part.number, "of": self.part.of}

    def check_health(self) -> None:
        """Have Ray start a replica anew whose engines have stopped; a database that is away comes back by itself."""
        stopped = [name for name, engine in self.service.engines.items() if not engine.alive]
        if stopped:
            raise ServiceError(f"engine {stopped[0]} has stopped; the replica is started again")


KNOWN = frozenset(
    {"run", "replicas", "most", "ongoing", "data", "registry", "runs", "rate", "burst", "waiting", "cpus", "gpus"}
)
"""What `application` takes."""
_APPS: list[FastAPI] = []
"""The application of this process's replica: Ray asks a function for it that is given nothing."""


def _app() -> FastAPI:
    return _APPS[-1]


def deployed(run: Path, place: Place, replicas: Replicas) -> Any:
    """Return the application for `serve.run`. Raises ConfigError for divided users by a number that changes."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from server.service.routing import STATS_PERIOD, ByUser

    routing = RequestRouterConfig(request_router_class=ByUser, request_routing_stats_period_s=STATS_PERIOD)
    deployment = serve.deployment(
        serve.ingress(_app)(Replica), name=NAME, max_ongoing_requests=ONGOING, request_router_config=routing,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus}, logging_config=_QUIET,
        graceful_shutdown_timeout_s=GRACE, health_check_period_s=5, **_number(replicas, fixed=has_users(run)),
    )  # fmt: skip
    return deployment.bind(run, place, replicas.count)


def _number(replicas: Replicas, *, fixed: bool) -> dict[str, Any]:
    """Return how many replicas Ray is to keep."""
    from ray.serve.config import AutoscalingConfig

    most = replicas.most
    if most is None or most == replicas.count:
        return {"num_replicas": replicas.count}
    if fixed:
        raise ConfigError(
            f"--most-replicas {most}: users with histories are divided among a number of replicas that stays; leave "
            "it out"
        )
    if most < replicas.count:
        raise ConfigError(f"--most-replicas {most}: there are {replicas.count} at least; give more, or leave it out")
    scaling = AutoscalingConfig(
        min_replicas=replicas.count, max_replicas=most, target_ongoing_requests=replicas.ongoing, upscale_delay_s=10,
        downscale_delay_s=300,
    )  # fmt: skip
    return {"autoscaling_config": scaling}


# Ray's own log of requests has their paths, and so users' names.
_QUIET: dict[str, Any] = {"enable_access_log": False, "log_level": "ERROR"}


def application(arguments: Mapping[str, str]) -> Any:
    """Return the application for Ray's own commands: `serve run lethe.replicas:application run=DIR replicas=4`.

    Also takes most=N, ongoing=32, data=DIR, registry=URL, runs=DIR, rate=50, burst=200, waiting=1024, cpus=1, gpus=0.
    Raises ConfigError for others.
    """
    given = dict(arguments)
    unknown = sorted({*given} - KNOWN)
    if unknown or "run" not in given:
        raise ConfigError(f"{unknown[0] if unknown else 'run'}: give run=DIR, and what docs/operate.md lists")
    place = Place(
        data=Path(given["data"]) if "data" in given else None, registry=given.get("registry"),
        runs=Path(given.get("runs", "runs")), rate=float(given.get("rate", Place.rate)),
        burst=int(given.get("burst", Place.burst)), waiting=int(given.get("waiting", Place.waiting)),
    )  # fmt: skip
    replicas = Replicas(
        int(given.get("replicas", 2)), int(given["most"]) if "most" in given else None,
        ongoing=float(given.get("ongoing", 32)), cpus=float(given.get("cpus", 1)), gpus=float(given.get("gpus", 0)),
    )  # fmt: skip
    run, place, _ = prepared(Path(given["run"]), place, replicas.count, say=logging.getLogger("lethe.service").info)
    return deployed(run, place, replicas)


def prepared(run: Path | None, place: Place, count: int, *, say: Say) -> tuple[Path, Place, str]:
    """Return the run, the place and an operator's key, made before any replica starts; paths become absolute."""
    run, place = found_run(run, place, say=say)
    folder = (place.data or run).resolve()
    if has_users(run):
        check_division(folder, count)
    registry = Registry(place.registry, folder)
    try:
        key = operator_key(Keys(registry), folder)
    finally:
        registry.close()
    return run.resolve(), replace(place, data=folder, runs=place.runs.resolve()), key


def serve_replicas(run: Path | None, place: Place, replicas: Replicas, *, say: Say) -> None:
    """Serve by replicas until interrupted. Raises ConfigError without ray, or where the port is taken."""
    if find_spec("ray") is None:
        raise ConfigError("--replicas: ray is not installed; pip install 'lethe[ray]', or serve with one process")
    if place.grpc_port is not None:
        raise ConfigError("--grpc-port: gRPC is served by one process only; leave it or --replicas out")
    _check_port(place)
    run, place, key = prepared(run, place, replicas.count, say=say)
    stop = threading.Event()
    before = signal.getsignal(signal.SIGTERM)
    try:
        _start(run, place, replicas)
        # Ray takes the signal for itself when it starts.
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        announce(None, place, key, say)
        if has_users(run):
            say(f"users are divided among {replicas.count} replicas, for as long as {place.data} is kept")
        stop.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        _stop()


def _check_port(place: Place) -> None:
    try:
        with socket.create_server((place.host, place.port)):
            pass
    except OSError as error:
        raise ConfigError(
            f"--port {place.port}: the service cannot listen at {place.host} ({error.strerror}); choose another port"
        ) from error


def _start(run: Path, place: Place, replicas: Replicas) -> None:
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    options: dict[str, Any] = {"address": replicas.ray} if replicas.ray else {"include_dashboard": False}
    ray.init(log_to_driver=False, configure_logging=False, **options)
    # A proxy at every node: whoever asks any of them is sent to the user's replica.
    serve.start(
        proxy_location="EveryNode", http_options=HTTPOptions(host=place.host, port=place.port, request_timeout_s=120),
        logging_config=_QUIET,
    )  # fmt: skip
    serve.run(deployed(run, place, replicas), name=NAME, route_prefix="/")


def _stop() -> None:
    import ray
    from ray import serve

    if ray.is_initialized():
        serve.shutdown()
        ray.shutdown()
