"""Pages: templates that escape all they are given, headers that let a page load nothing from elsewhere, and errors."""

import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.routing import APIRoute
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora.errors import LetheError
from server.service.identity import NoKey
from server.service.problems import status_of

HOME = "/console"
COOKIE = "lethe_console"
STATIC = Path(__file__).parent / "static"
OWN = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
"""What a page may load and send: nothing but what comes from here, and no script in the page itself."""
REPORT = "default-src 'none'; style-src 'unsafe-inline'; sandbox; base-uri 'none'; frame-ancestors 'none'"
"""A run's report has its style inside, and no script at all."""
_HEADERS = {
    "content-security-policy": OWN,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}
_SECURED = (HOME, "/docs")


class SignIn(NoKey):
    """Nobody is signed in."""


class SecureHeaders:
    """Adds the security headers to whatever is answered below the console's paths, errors included."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; headers that an answer has already are left."""
        if scope["type"] != "http" or not scope["path"].startswith(_SECURED):
            await self.app(scope, receive, send)
            return

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, secured)


def _when(seconds: float | None) -> str:
    """Write a time of day, UTC; years that a calendar does not have are given in seconds."""
    if seconds is None:
        return "-"
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))
    except (OverflowError, OSError, ValueError):
        return f"{seconds:g} s"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _bytes(value: float) -> str:
    for unit, step in (("MB", 1e6), ("kB", 1e3)):
        if value >= step:
            return f"{value / step:.3g} {unit}"
    return f"{value:.0f} B"


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
TEMPLATES.filters |= {"when": _when, "share": _share, "bytes": _bytes}


def html(request: Request, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """Return a page; the visitor and the form token of the request go with it."""
    about = {"visitor": None, "form_token": "", "path": request.url.path} | request.scope.get("console", {})
    text = TEMPLATES.get_template(template).render(about | values)
    return HTMLResponse(text.encode("utf-8", "replace"), status)


def moved(where: str) -> RedirectResponse:
    """Return a redirection that is followed by GET."""
    return RedirectResponse(where, 303)


def sign(request: Request, response: Response, token: str | None) -> None:
    """Give the browser a token, or take it away."""
    secure = request.url.scheme == "https"
    if token is None:
        response.delete_cookie(COOKIE, path=HOME, httponly=True, samesite="strict", secure=secure)
    else:
        response.set_cookie(COOKIE, token, path=HOME, httponly=True, samesite="strict", secure=secure)


def failure(request: Request, message: str, status: int, headers: Mapping[str, str] | None = None) -> Response:
    """Return the page of an error: what is wrong, and what to do."""
    what, _, remedy = message.rpartition("; ")
    answer = html(request, "failure.html", status=status, what=what or remedy, remedy=remedy if what else "")
    answer.headers.update(headers or {})
    return answer


class ConsoleRoute(APIRoute):
    """A route whose errors are pages; whoever is not signed in is sent to where that is done."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler with errors caught."""
        own = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await own(request)
            except SignIn:
                return moved(f"{HOME}/sign-in")
            except LetheError as error:
                wait = getattr(error, "retry_after", None)
                more = {} if wait is None else {"Retry-After": str(max(1, round(wait)))}
                return failure(request, str(error), status_of(error), more)
            except RequestValidationError as error:
                fields = ", ".join(sorted({str(each["loc"][-1]) for each in error.errors()}))
                return failure(request, f"the request is wrong in {fields}; go back and correct it", 422)

        return handle
