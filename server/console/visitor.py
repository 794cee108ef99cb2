"""Who looks at a page, and the forms that they send."""

from dataclasses import dataclass
from typing import Annotated
from urllib.parse import parse_qsl

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from lora.errors import DataError, Denied
from server.console.pages import COOKIE, SignIn
from server.console.runs import Runs
from server.console.sessions import Sessions
from server.service.identity import Caller, NoKey
from server.service.service import Service

_FORM = "application/x-www-form-urlencoded"
_FIELDS = 20


@dataclass(frozen=True)
class Visitor:
    """Somebody who is signed in, and what the pages are about."""

    service: Service
    caller: Caller
    runs: Runs | None

    @property
    def sees_users(self) -> bool:
        """Whether the list of users is theirs to see."""
        return self.caller.role == "operator" and self.service.users is not None

    @property
    def sees_runs(self) -> bool:
        """Whether the federation's runs are theirs to see."""
        return self.caller.role != "user"

    @property
    def home(self) -> str | None:
        """The user whose page is their first."""
        return self.caller.owner


def sessions_of(request: Request) -> Sessions:
    """Return the sessions of the application."""
    found: Sessions = request.app.state.sessions
    return found


async def _visitor(request: Request) -> Visitor:
    """Find out who asks. Raises SignIn, and TooMany for a key that asks too often."""
    sessions, service = sessions_of(request), request.app.state.service
    token = request.cookies.get(COOKIE, "")
    digest = sessions.digest(token)
    if digest is None:
        raise SignIn("nobody is signed in; sign in with an API key")
    try:
        caller = service.keys.remembered(digest) or await run_in_threadpool(service.keys.caller_of, digest)
    except NoKey as error:
        sessions.close(token)
        raise SignIn(str(error)) from None
    visitor = Visitor(service, caller, request.app.state.runs)
    request.scope["console"] = {"visitor": visitor, "form_token": sessions.form_token(token)}
    service.rates.take(caller.key)
    return visitor


VisitorOf = Annotated[Visitor, Depends(_visitor)]


async def _form(request: Request) -> dict[str, str]:
    """Read a form that came from a page of this browser. Raises Denied for any other, DataError for what is none."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM:
        raise DataError(f"the body is no form; send {_FORM}")
    try:
        body = (await request.body()).decode("ascii")
        fields = dict(parse_qsl(body, keep_blank_values=True, max_num_fields=_FIELDS))
    except ValueError:
        raise DataError("the form cannot be read; go back and send it again") from None
    if not sessions_of(request).fits(request.cookies.get(COOKIE, ""), fields.get("csrf", "")):
        raise Denied("this form is not of this session; load the page again and send it from there")
    return fields


FormOf = Annotated[dict[str, str], Depends(_form)]


def field_of(form: dict[str, str], name: str) -> str:
    """Return a field of a form. Raises DataError for one that is missing or empty."""
    found = form.get(name, "")
    if not found:
        raise DataError(f"the form lacks '{name}'; go back and fill it in")
    return found
