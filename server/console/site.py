"""The console's addresses: signing in and out, users, forgetting, runs, adapters and forget requests."""

from pathlib import PurePosixPath
from typing import Annotated, Any
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, Response
from starlette.concurrency import run_in_threadpool

from lora.errors import Unknown
from server.console import people
from server.console.evidence import rows
from server.console.pages import COOKIE, HOME, REPORT, STATIC, ConsoleRoute, html, moved, sign
from server.console.shelf import PAGE, shelf
from server.console.visitor import FormOf, Visitor, VisitorOf, field_of, sessions_of
from server.service.edge import sender_of
from server.service.forgetting import ForgetRequest, subject_of
from server.service.identity import NoKey, digest_of
from server.service.tables import LONGEST_NAME

console = APIRouter(prefix=HOME, route_class=ConsoleRoute, include_in_schema=False)

Name = Annotated[str, Query(min_length=1, max_length=LONGEST_NAME)]
Number = Annotated[int, Query(ge=1, le=1_000_000)]
Words = Annotated[str, Query(max_length=200)]
RUNS_SHOWN = 10
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def page_of(name: str, **more: str) -> str:
    """Return the address of a user's page."""
    return f"{HOME}/user?{urlencode({'name': name, **more}, quote_via=quote)}"


# --- Signing in and out ----------------------------------------------------------------------------------------------


@console.get("")
def get_home(visitor: VisitorOf) -> Response:
    """Lead to what concerns the visitor first."""
    if visitor.home is not None:
        return moved(page_of(visitor.home) if visitor.service.users is not None else f"{HOME}/adapters")
    return moved(f"{HOME}/users" if visitor.sees_users else f"{HOME}/adapters")


@console.get("/sign-in")
def get_sign_in(request: Request) -> HTMLResponse:
    """Ask for a key."""
    return _asked_for_key(request)


def _asked_for_key(request: Request, *, wrong: str = "", status: int = 200) -> HTMLResponse:
    sessions = sessions_of(request)
    token = request.cookies.get(COOKIE) or sessions.fresh()
    request.scope["console"] = {"form_token": sessions.form_token(token)}
    page = html(request, "sign_in.html", status=status, wrong=wrong)
    if token != request.cookies.get(COOKIE):
        sign(request, page, token)
    return page


@console.post("/sign-in")
async def post_sign_in(request: Request, form: FormOf) -> Response:
    """Take a key; the browser gets a new token for it, and never the key."""
    sessions, key = sessions_of(request), form.get("key", "").strip()
    service = request.app.state.service
    service.rates.take_of(sender_of(request))
    try:
        await run_in_threadpool(service.keys.caller, key)
    except NoKey:
        return _asked_for_key(
            request, wrong="This key is not valid here. Copy it whole, or ask an operator.", status=401
        )
    sessions.close(request.cookies.get(COOKIE, ""))
    answer = moved(HOME)
    sign(request, answer, sessions.open(digest_of(key)))
    return answer


@console.post("/sign-out")
def post_sign_out(request: Request, form: FormOf) -> Response:
    """Forget the browser's token."""
    sessions_of(request).close(request.cookies.get(COOKIE, ""))
    answer = moved(f"{HOME}/sign-in")
    sign(request, answer, None)
    return answer


@console.get("/static/{name}")
def get_static(name: str) -> Response:
    """Return the style, the script or the picture that pages load."""
    file = next((each for each in STATIC.iterdir() if each.name == name), None)
    if file is None:
        raise Unknown("there is no such file; the pages name those there are")
    return FileResponse(file, media_type=_TYPES[PurePosixPath(name).suffix], headers={"Cache-Control": "max-age=3600"})


# --- Users -----------------------------------------------------------------------------------------------------------


@console.get("/users")
def get_users(request: Request, visitor: VisitorOf, q: Words = "", page: Number = 1) -> HTMLResponse:
    """List users by name."""
    visitor.caller.must_be("operator")
    wanted = q.casefold()
    names = [name for name in people.people_of(visitor.service).names() if wanted in name.casefold()]
    first = (page - 1) * PAGE
    return html(
        request, "users.html", names=names[first : first + PAGE], words=q, page=page, count=len(names), most=PAGE
    )


@console.get("/user")
def get_user(  # noqa: PLR0917 - FastAPI reads parameters by name
    request: Request, visitor: VisitorOf, name: Name, find: Words = "",
    was: Annotated[str, Query(max_length=1200)] = "", latest: Annotated[int, Query(ge=1, le=10_000)] = people.LATEST,
) -> HTMLResponse:  # fmt: skip
    """Show a user: history, recommendations with and without personalisation, and what is mixed."""
    service, caller = visitor.service, visitor.caller
    who = people.person(service, caller, name, latest=latest, was=was)
    found = people.find(service, who.info, find) if find else []
    gone = [] if who.info is not None else [each for each in _about(visitor, name) if each.state == "done"]
    scale = people.people_of(service).histories.terms.scale
    more: dict[str, Any] = {"find": find, "was": was, "gone": gone, "scale": scale, "latest": latest}
    return html(request, "user.html", who=who, found=found, ratings=people.ratings_of(service), **more)


def _about(visitor: Visitor, name: str) -> list[ForgetRequest]:
    """Return the forget requests about a user whom the visitor may see."""
    return visitor.service.forgetting.all(subject=subject_of(name))


@console.post("/rate")
def post_rating(visitor: VisitorOf, form: FormOf) -> Response:
    """Take a rating, and show how the recommendations moved."""
    name = field_of(form, "name")
    item, rating = field_of(form, "item"), field_of(form, "rating")
    was = people.rate(visitor.service, visitor.caller, name, item=item, rating=rating)
    return moved(f"{page_of(name, was=was)}#recommendations")


@console.get("/forget")
def get_forget(request: Request, visitor: VisitorOf, name: Name) -> HTMLResponse:
    """Ask once more before a user is forgotten, and say what goes and what stays."""
    service = visitor.service
    visitor.caller.may_read(name)
    info = None if service.users is None else people.known(service, visitor.caller, name)
    brought = service.adapters_of(name)
    if info is None and not brought:
        raise Unknown(f"nothing is known of '{name}'; there is nothing to forget")
    return html(request, "forget.html", name=name, info=info, brought=brought)


@console.post("/forget")
def post_forget(visitor: VisitorOf, form: FormOf) -> Response:
    """Forget a user, once it was confirmed, and lead to the evidence."""
    name = field_of(form, "name")
    field_of(form, "sure")
    request = visitor.service.forget(visitor.caller, name)
    return moved(f"{HOME}/forget-request?id={request.id}")


# --- Forget requests -------------------------------------------------------------------------------------------------


@console.get("/forget-requests")
def get_forget_requests(request: Request, visitor: VisitorOf, page: Number = 1) -> HTMLResponse:
    """List forget requests with their evidence."""
    found, first = visitor.service.forget_requests(visitor.caller), (page - 1) * PAGE
    shown = [(each, rows(each.evidence)) for each in found[first : first + PAGE]]
    return html(request, "forget_requests.html", shown=shown, page=page, count=len(found), most=PAGE)


@console.get("/forget-request")
def get_forget_request(
    request: Request, visitor: VisitorOf, id: Annotated[str, Query(min_length=1, max_length=64)], part: bool = False
) -> HTMLResponse:
    """Show how far a forget request is, and its evidence; `part` returns what a page brings up to date in itself."""
    found = visitor.service.forget_request(visitor.caller, id)
    template = "evidence.html" if part else "forget_request.html"
    return html(request, template, found=found, rows=rows(found.evidence))


# --- Adapters and runs -----------------------------------------------------------------------------------------------


@console.get("/adapters")
def get_adapters(request: Request, visitor: VisitorOf, page: Number = 1) -> HTMLResponse:
    """List adapters."""
    found = shelf(visitor.service, visitor.caller, first=(page - 1) * PAGE)
    return html(request, "adapters.html", adapters=found.adapters, page=page, count=found.count, most=PAGE)


@console.get("/adapter.zip")
def get_adapter(visitor: VisitorOf, name: Name) -> Response:
    """Export an adapter as a ZIP archive of a PEFT directory."""
    data = visitor.service.take(visitor.caller, name)
    held = f"attachment; filename=\"adapter.zip\"; filename*=UTF-8''{quote(f'{name}.zip', safe='')}"
    return Response(data, media_type="application/zip", headers={"Content-Disposition": held})


@console.get("/runs")
def get_runs(request: Request, visitor: VisitorOf, page: Number = 1) -> HTMLResponse:
    """List federation runs with their curves."""
    visitor.caller.must_be("operator", "auditor")
    runs = visitor.runs
    names = [] if runs is None else runs.names()
    first = (page - 1) * RUNS_SHOWN
    shown: list[Any] = [] if runs is None else [runs.shown(name) for name in names[first : first + RUNS_SHOWN]]
    place = None if runs is None else runs.place
    return html(request, "runs.html", runs=shown, place=place, page=page, count=len(names), most=RUNS_SHOWN)


@console.get("/report")
def get_report(visitor: VisitorOf, run: Name) -> Response:
    """Show a run's report, which may do nothing but be looked at."""
    visitor.caller.must_be("operator", "auditor")
    text = None if visitor.runs is None else visitor.runs.report(run)
    if text is None:
        raise Unknown("there is no such report; `lethe report RUN` writes it")
    return HTMLResponse(text.encode("utf-8", "replace"), headers={"Content-Security-Policy": REPORT})


@console.get("/{rest:path}")
def get_nothing(rest: str) -> Response:
    """Say that there is nothing at an address."""
    raise Unknown("there is no such page; the links above lead to those there are")
