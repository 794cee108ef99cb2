"""The service over HTTP: `create_app` makes the FastAPI application, with the console and what documents it all."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi import Path as InPath
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from server.console.documentation import documentation
from server.console.pages import HOME, SecureHeaders, moved
from server.console.runs import Runs
from server.console.sessions import Sessions
from server.console.site import console
from server.service import bodies, calls, completions
from server.service.edge import BodyLimit, Counted, sender_of
from server.service.identity import Caller
from server.service.peft import LARGEST
from server.service.problems import DOCUMENTED, install
from server.service.recommending import RecommendAsked
from server.service.service import Service
from server.service.tables import LONGEST_NAME

_bearer = HTTPBearer(auto_error=False, description="An API key; `lethe serve` prints the first.")


async def _service(request: Request) -> Service:
    # Not awaiting anything: a plain function would be sent to another thread and back for every request.
    found: Service = request.app.state.service
    return found


ServiceOf = Annotated[Service, Depends(_service)]


async def _caller(
    request: Request, service: ServiceOf, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Caller:
    return await calls.caller_of(service, None if given is None else given.credentials, sender=sender_of(request))


CallerOf = Annotated[Caller, Depends(_caller)]
User = Annotated[str, InPath(min_length=1, max_length=LONGEST_NAME, description="The user's name.")]
AdapterName = Annotated[str, InPath(min_length=1, max_length=LONGEST_NAME)]
Number = Annotated[str, InPath(min_length=1, max_length=64)]
Fallback = Literal["none", "cold"]


api = APIRouter(prefix="/v1", responses=DOCUMENTED)

# --- Users -----------------------------------------------------------------------------------------------------------


@api.post("/users/{user}/events", tags=["users"])
def post_events(
    user: User, body: bodies.EventsBody, service: ServiceOf, caller: CallerOf,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=256)] = None,
) -> bodies.Observed:  # fmt: skip
    """Append events of a user, all or none; the user's adapter knows of them when this returns.

    With an Idempotency-Key the same request may be sent again: it takes effect once.
    """
    return calls.observed(service, caller, user, body, key=idempotency_key)


@api.get("/users/{user}", tags=["users"])
def get_user(
    user: User, service: ServiceOf, caller: CallerOf, latest: Annotated[int, Query(ge=0, le=10_000)] = 100
) -> bodies.UserBody:
    """Show what is known of a user: the adapter's version, and the `latest` events, the last first."""
    return calls.shown(service, caller, user, latest=latest)


@api.delete("/users/{user}", tags=["users", "forgetting"])
def delete_user(user: User, service: ServiceOf, caller: CallerOf) -> bodies.Forgotten:
    """Forget a user: history, adapter, and requests that are still waiting. Returns the evidence."""
    return bodies.Forgotten.of(service.forget(caller, user))


@api.get("/users/{user}/recommendations", tags=["users"])
async def get_recommendations(  # noqa: PLR0917 - FastAPI reads parameters by name
    user: User, service: ServiceOf, caller: CallerOf, count: Annotated[int, Query(ge=1, le=100)] = 10,
    personalized: bool = True, fallback: Fallback = "none",
) -> bodies.Recommendations:  # fmt: skip
    """Recommend items that the user has not rated, best first.

    `personalized=false` shows what somebody without a history would get of them; `fallback=cold` answers a user who
    is not known in the same way, instead of 404. The answer says which it was.
    """
    asked = RecommendAsked(user, count=count, personalized=personalized, fallback=fallback)
    return await calls.recommendations(service, caller, asked)


@api.post("/users/{user}/predictions", tags=["users"])
async def post_predictions(
    user: User, body: bodies.PredictionsBody, service: ServiceOf, caller: CallerOf
) -> bodies.Predictions:
    """Predict how likely the user is to like items, or classify or embed texts with the user's adapter."""
    return await calls.predictions(service, caller, user, body)


# --- Forgetting ------------------------------------------------------------------------------------------------------


@api.post("/forget-requests", tags=["forgetting"], status_code=201)
def post_forget_request(body: bodies.ForgetBody, service: ServiceOf, caller: CallerOf) -> bodies.Forgotten:
    """Ask for a user to be forgotten; the request says how far it is."""
    return bodies.Forgotten.of(service.forget(caller, body.user))


@api.get("/forget-requests", tags=["forgetting"])
def get_forget_requests(service: ServiceOf, caller: CallerOf) -> bodies.ForgottenList:
    """List forget requests, the latest first: a user's own, or (operator, auditor) all."""
    found = service.forget_requests(caller)
    return bodies.ForgottenList(forget_requests=[bodies.Forgotten.of(each) for each in found])


@api.get("/forget-requests/{request}", tags=["forgetting"])
def get_forget_request(request: Number, service: ServiceOf, caller: CallerOf) -> bodies.Forgotten:
    """Show one forget request."""
    return bodies.Forgotten.of(service.forget_request(caller, request))


# --- Adapters --------------------------------------------------------------------------------------------------------

_ZIP: dict[str, Any] = {"application/zip": {"schema": {"type": "string", "format": "binary"}}}


@api.get("/adapters", tags=["adapters"])
def get_adapters(service: ServiceOf, caller: CallerOf) -> bodies.AdapterList:
    """List the adapters that the caller may use."""
    return bodies.AdapterList(adapters=[bodies.AdapterBody.of(info) for info in service.infos(caller)])


@api.put(
    "/adapters/{name}", tags=["adapters"], openapi_extra={"requestBody": {"required": True, "content": _ZIP}}
)  # fmt: skip
async def put_adapter(  # noqa: PLR0917 - FastAPI reads parameters by name
    name: AdapterName, request: Request, service: ServiceOf, caller: CallerOf,
    owner: Annotated[str | None, Query(min_length=1, max_length=LONGEST_NAME)] = None,
    model: Annotated[str | None, Query(max_length=LONGEST_NAME)] = None,
) -> bodies.AdapterBody:  # fmt: skip
    """Import a PEFT directory, sent as a ZIP archive; an adapter of that name and owner is replaced."""
    caller.must_be("operator")
    data = await request.body()
    info = await run_in_threadpool(service.bring, caller, name, data, owner=owner, model=model)
    return bodies.AdapterBody.of(info)


@api.get(
    "/adapters/{name}", tags=["adapters"], response_class=Response,
    responses={200: {"content": _ZIP, "description": "A ZIP archive of a PEFT directory"}},
)  # fmt: skip
def get_adapter(
    name: AdapterName, service: ServiceOf, caller: CallerOf,
    model: Annotated[str | None, Query(max_length=LONGEST_NAME)] = None,
) -> Response:  # fmt: skip
    """Export an adapter, or a user's own, as a ZIP archive of a PEFT directory."""
    return Response(service.take(caller, name, model=model), media_type="application/zip")


@api.delete("/adapters/{name}", tags=["adapters"], status_code=204)
def delete_adapter(name: AdapterName, service: ServiceOf, caller: CallerOf) -> None:
    """Delete an adapter; a user's own goes with the user."""
    service.drop(caller, name)


# --- Keys ------------------------------------------------------------------------------------------------------------


@api.post("/keys", tags=["keys"], status_code=201)
def post_key(body: bodies.KeyBody, service: ServiceOf, caller: CallerOf) -> bodies.Key:
    """Make an API key (operators only); it is shown this once."""
    caller.must_be("operator")
    return bodies.Key(key=service.keys.issue(body.role, owner=body.owner, label=body.label))


@api.get("/keys", tags=["keys"])
def get_keys(service: ServiceOf, caller: CallerOf) -> bodies.KeyList:
    """List API keys without the keys (operators and auditors)."""
    caller.must_be("operator", "auditor")
    return bodies.KeyList(keys=[bodies.KeyListed.of(info) for info in service.keys.infos()])


@api.delete("/keys/{key}", tags=["keys"], status_code=204)
def delete_key(key: Number, service: ServiceOf, caller: CallerOf) -> None:
    """Revoke an API key (operators only)."""
    caller.must_be("operator")
    service.keys.revoke(key)


# --- OpenAI's ways ---------------------------------------------------------------------------------------------------


@api.get("/models", tags=["completions"])
def get_models(service: ServiceOf, caller: CallerOf) -> bodies.ModelList:
    """List what may be named as model: the base, and the adapters that the caller may use."""
    return completions.models(service, caller)


@api.post("/completions", tags=["completions"], response_model=bodies.Completion)
async def post_completion(body: bodies.CompletionBody, service: ServiceOf, caller: CallerOf) -> Any:
    """Go on with a text, as OpenAI's clients ask for it; with `stream` as server-sent events."""
    if body.stream:
        return await completions.streamed(service, caller, body)
    return await completions.whole(service, caller, body)


# --- Operation -------------------------------------------------------------------------------------------------------

plain = APIRouter(tags=["operation"])


@plain.get("/healthz")
async def healthz() -> bodies.Health:
    """Tell that the process lives."""
    return bodies.Health(status="ok")


@plain.get("/readyz", responses={503: {"model": bodies.Health, "description": "Not ready"}})
async def readyz(service: ServiceOf, response: Response) -> bodies.Health:
    """Tell whether requests are answered: all engines run, and the registry was reached lately."""
    faults = service.faults()
    if faults:
        response.status_code = 503
    return bodies.Health(status="not ready" if faults else "ok", faults=faults)


@plain.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(service: ServiceOf) -> Response:
    """Show figures for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@plain.get("/", include_in_schema=False)
async def root() -> Response:
    """Lead people to the console."""
    return moved(HOME)


def create_app(service: Service, *, runs: Runs | None = None) -> FastAPI:
    """Return the application; the service is closed with it. The console shows `runs`, where there are any."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.close)

    app = FastAPI(
        title="Lethe", version="1", lifespan=life, summary="Personal adapters on one base model",
        description="Every answer says whose adapter it came from. Errors have one shape: `error.message` says what is "
        "wrong, `error.remedy` what to do.",
        # The pages that FastAPI would show there load scripts from another host.
        docs_url=None, redoc_url=None,
    )  # fmt: skip
    app.state.service, app.state.started = service, int(time.time())
    app.state.runs, app.state.sessions = runs, Sessions()
    install(app)
    app.include_router(api)
    app.include_router(plain)
    app.include_router(documentation)
    app.include_router(console)
    app.add_middleware(BodyLimit, larger={"/v1/adapters/": LARGEST})
    app.add_middleware(SecureHeaders)
    app.add_middleware(Counted, metrics=service.metrics)
    return app
