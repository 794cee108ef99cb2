"""The Prometheus endpoint of one process; it may fail, and what it watches goes on."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server

from lora.errors import ConfigError

log = logging.getLogger("lethe.observe")

METRICS_VARIABLE = "LETHE_METRICS"
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Address:
    """Where metrics are served; port 0 takes any free one."""

    port: int
    host: str = LOOPBACK

    @classmethod
    def read(cls, text: str) -> "Address":
        """Read HOST:PORT, :PORT or PORT; no host means loopback. Raises ConfigError."""
        host, _, port = text.rpartition(":")
        if not (port.isascii() and port.isdigit() and int(port) < 2**16):
            raise ConfigError(f"{METRICS_VARIABLE}={text}: give HOST:PORT, such as {LOOPBACK}:9464")
        return cls(int(port), host.strip("[]") or LOOPBACK)

    @classmethod
    def given(cls, port: int | None = None) -> "Address | None":
        """Return the address that the environment names, else `port` on loopback, else None."""
        text = os.environ.get(METRICS_VARIABLE)
        if text:
            return cls.read(text)
        return None if port is None else cls(port)


@contextmanager
def exported(registry: CollectorRegistry, address: Address | None) -> Iterator[Address | None]:
    """Serve a registry while the block runs; yields where, or None where nothing is served.

    An address that cannot be taken is a warning: no run ends because nobody can watch it.
    """
    if address is None:
        yield None
        return
    disable_created_metrics()  # type: ignore[no-untyped-call]
    try:
        server, thread = start_http_server(address.port, address.host, registry)
    except OSError as error:
        taken, reason = f"{address.host}:{address.port}", error.strerror or type(error).__name__
        log.warning("no metrics: %s cannot be taken (%s); set %s=HOST:PORT", taken, reason, METRICS_VARIABLE)
        yield None
        return
    try:
        yield Address(server.server_port, address.host)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
