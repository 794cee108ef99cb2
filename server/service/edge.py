"""The edge of the HTTP service: bodies that are too large are cut off as they come, and every request is counted."""

import json
import time
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.service.metrics import Metrics
from server.service.problems import TOO_LARGE, problem

LARGEST_BODY = 2**20
"""Bytes of a request's body."""


def sender_of(request: Request) -> str:
    """Return the address that a request comes from."""
    return "" if request.client is None else request.client.host


class _TooLarge(Exception):
    """More came than may."""


class BodyLimit:
    """Answers 413 as soon as a body is longer than allowed: by its Content-Length, or once more has come.

    `larger` has the prefixes of paths that take up to `largest_there` bytes.
    """

    def __init__(self, app: ASGIApp, *, most: int = LARGEST_BODY, larger: dict[str, int] | None = None) -> None:
        self.app, self.most, self.larger = app, most, larger or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, counting what comes."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = next((size for path, size in self.larger.items() if scope["path"].startswith(path)), self.most)
        counting = _Counting(receive, send, most)
        if _declared(scope) > most:
            await _refuse(send, most)
            return
        with suppress(_TooLarge):
            await self.app(scope, counting.receive, counting.send)
        if counting.over and not counting.answered:
            await _refuse(send, most)


class _Counting:
    def __init__(self, receive: Receive, send: Send, most: int) -> None:
        self._receive, self._send, self._most = receive, send, most
        self._seen, self.over, self.answered = 0, False, False

    async def receive(self) -> Message:
        message = await self._receive()
        self._seen += len(message.get("body", b""))
        if self._seen > self._most:
            self.over = True
            raise _TooLarge
        return message

    async def send(self, message: Message) -> None:
        # What is raised in the middle of a body is answered by the framework as a body that cannot be read.
        if not self.over:
            self.answered = True
            await self._send(message)


def _declared(scope: Scope) -> int:
    found = dict(scope["headers"]).get(b"content-length", b"0")
    return int(found) if found.isdigit() else 0


async def _refuse(send: Send, most: int) -> None:
    body = json.dumps(problem(TOO_LARGE, f"the body has more than {most} bytes; send less at a time")).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
               (b"connection", b"close")]  # fmt: skip
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Counted:
    """Counts requests and times them by route (never by path, which has users' names)."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and note how it went."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, began = 500, time.perf_counter()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            route: Any = scope.get("route")
            path = getattr(route, "path", "none")
            self.metrics.requests.labels(scope["method"] if path != "none" else "any", path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - began)
