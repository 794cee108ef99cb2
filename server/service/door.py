"""The gRPC server of a service: a thread with a loop of its own, health checks and reflection."""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from lora.errors import ConfigError
from server.service import personal_pb2_grpc
from server.service.edge import LARGEST_BODY
from server.service.peft import LARGEST
from server.service.rpc import SERVICE, Calls
from server.service.service import Service

Result = TypeVar("Result")
CALLS = 4096
"""Calls that are open at the same time; beyond them a call is refused."""
GRACE = 30.0
"""Seconds in which open calls may end when the door closes."""
_LOOK = 0.5
"""Seconds between two looks at whether the service is ready."""


class Door:
    """Serves a service over gRPC at `host:port` until `close`; port 0 takes a free one, which `port` names.

    Health (`grpc.health.v1`) follows what /readyz says. Raises ConfigError where it cannot listen. As over HTTP nothing
    is encrypted here: a proxy in front of it does that.
    """

    def __init__(self, service: Service, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.service = service
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lethe-grpc", daemon=True)
        self._thread.start()
        try:
            self.port = self._run(self._open(host, port))
        except RuntimeError as error:
            self._end()
            raise ConfigError(
                f"--grpc-port {port}: the service cannot listen at {host}; choose another port"
            ) from error

    def close(self, *, grace: float = GRACE) -> None:
        """Take no more calls, and let those that are open end; once is enough."""
        if self._loop.is_closed():
            return
        self._run(self._shut(grace))
        self._end()

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self, host: str, port: int) -> int:
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=CALLS,
            options=[
                ("grpc.max_receive_message_length", LARGEST + LARGEST_BODY),
                ("grpc.max_send_message_length", -1),
                # Else a second server takes half of the first one's calls.
                ("grpc.so_reuseport", 0),
            ],
        )
        add: Any = personal_pb2_grpc.add_PersonalServicer_to_server
        add(Calls(self.service), self._server)
        self._health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        health: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection((SERVICE, health, reflection.SERVICE_NAME), self._server)
        found = int(self._server.add_insecure_port(f"{f'[{host}]' if ':' in host else host}:{port}"))
        await self._look()
        await self._server.start()
        self._looking = asyncio.create_task(self._keep_looking())
        return found

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(_LOOK)
            await self._look()

    async def _look(self) -> None:
        status = health_pb2.HealthCheckResponse
        now = status.NOT_SERVING if self.service.faults() else status.SERVING
        for name in ("", SERVICE):
            await self._health.set(name, now)

    async def _shut(self, grace: float) -> None:
        self._looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._looking
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)
        await self._loop.shutdown_default_executor()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
