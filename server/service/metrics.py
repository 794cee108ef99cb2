"""Figures of the service for Prometheus. No figure has a user's name."""

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from server.service.answers import Provenance
from server.service.engine import Engine
from server.service.warm import WarmSlots

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.all = CollectorRegistry()
        self.requests = Counter(
            "lethe_requests", "HTTP requests", ["method", "route", "status"], registry=self.all
        )  # fmt: skip
        self.seconds = Histogram(
            "lethe_request_seconds", "Seconds of a request", ["route"], buckets=_SECONDS, registry=self.all
        )
        self._answers = Counter(
            "lethe_answers", "Answers by task, and whether personal", ["task", "personalized"], registry=self.all
        )
        self.forgotten = Counter("lethe_forgotten", "Forget requests that were carried out", registry=self.all)

    def answered(self, task: str, provenance: Provenance) -> None:
        """Count an answer."""
        self._answers.labels(task, str(provenance.personalized).lower()).inc()

    def follow(self, engine: Engine[object]) -> None:
        """Count an engine's batches, and show how much waits."""
        name = engine.name
        rows = Histogram(f"lethe_{name}_rows", f"Rows of a step of {name}", buckets=_ROWS, registry=self.all)
        seconds = Histogram(
            f"lethe_{name}_seconds", f"Seconds of a step of {name}", buckets=_SECONDS, registry=self.all
        )

        def observe(count: int, spent: float) -> None:
            rows.observe(count)
            seconds.observe(spent)

        engine.observers.append(observe)
        Gauge(f"lethe_{name}_waiting", f"Requests that wait for {name}", registry=self.all).set_function(
            lambda: float(engine.waiting)
        )

    def follow_warm(self, name: str, warm: WarmSlots) -> None:
        """Show what slots come from memory."""
        for figure in ("hits", "misses", "evictions"):
            gauge = Gauge(f"lethe_{name}_slots_{figure}", f"Warm slots of {name}: {figure}", registry=self.all)
            gauge.set_function(partial(_figure, warm, figure))
        Gauge(f"lethe_{name}_slots_warm", f"Slots of {name} in memory", registry=self.all).set_function(
            lambda: float(len(warm))
        )

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self.all)


def _figure(warm: WarmSlots, name: str) -> float:
    return float(getattr(warm.traffic, name))
