"""The service over gRPC: the calls of `personal.proto`, with the keys, limits, answers and errors of HTTP."""

import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any, Literal, TypeVar

import grpc
from google.protobuf.message import Message
from pydantic import Field, ValidationError

from lora.errors import LetheError
from server.service import bodies, calls, completions, personal_pb2, personal_pb2_grpc
from server.service.arrivals import PATIENCE
from server.service.edge import LARGEST_BODY
from server.service.identity import Caller
from server.service.problems import TOO_LARGE, faults, problem, status_of
from server.service.recommending import RecommendAsked
from server.service.service import Service

log = logging.getLogger("lethe.service")

pb: Any = personal_pb2
ERROR = "lethe-error-bin"
"""The trailing metadata with an error's JSON."""
MAY_BE_LARGE = {"ImportAdapter"}
_CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ALREADY_EXISTS,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
Body = TypeVar("Body", bound=bodies.Request)


class _User(bodies.Request):
    user: bodies.Name


class _Events(bodies.EventsBody, _User):
    idempotency_key: Annotated[str, Field(min_length=1, max_length=256)] | None = None


class _Shown(_User):
    latest: int = Field(100, ge=0, le=10_000)


class _Recommend(_User):
    count: int = Field(10, ge=1, le=100)
    personalized: bool = True
    fallback: Literal["none", "cold"] = "none"


class _Predict(bodies.PredictionsBody, _User):
    pass


class _Number(bodies.Request):
    id: Annotated[str, Field(min_length=1, max_length=64)]


class _Adapter(bodies.Request):
    name: bodies.Name
    model: bodies.Name | None = None


class _Import(_Adapter):
    archive: bytes
    owner: bodies.Name | None = None


@dataclass(frozen=True)
class _Ask:
    """One call: who calls, what with, and how long they wait."""

    service: Service
    caller: Caller
    request: Message
    patience: float

    def body(self, kind: type[Body]) -> Body:
        """Return the request, checked as HTTP checks it. Raises ValidationError."""
        return kind.model_validate(_plain(self.request))


def _plain(message: Message) -> dict[str, Any]:
    """Return the fields that were given."""
    return {field.name: _value(value) for field, value in message.ListFields()}


def _value(value: Any) -> Any:
    if isinstance(value, Message):
        return _plain(value)
    return value if isinstance(value, str | bytes | int | float) else [_value(each) for each in value]


def _filled(kind: Any, answer: bodies.Answer) -> Any:
    """Return an answer of HTTP as a message of the same fields."""
    return kind(**answer.model_dump())


def _forgotten(answer: bodies.Forgotten) -> Any:
    given = answer.model_dump(exclude={"evidence"})
    found = pb.Forgotten(**given)
    found.evidence.update(answer.evidence)
    return found


def _unary(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Wrap a call: the caller is known, the call is counted, and what it raises is told as HTTP tells it."""

    @wraps(method)
    async def run(self: "Calls", request: Message, context: Any) -> Any:
        with _Counting(self.service, method.__name__) as count:
            try:
                return await method(self, await self.ask(method.__name__, request, context))
            except Exception as error:
                refusal = _Refusal.of(error)
            count.status = refusal.status
        await refusal.tell(context)

    return run


def _stream(method: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    @wraps(method)
    async def run(self: "Calls", request: Message, context: Any) -> AsyncIterator[Any]:
        with _Counting(self.service, method.__name__) as count:
            try:
                async for piece in method(self, await self.ask(method.__name__, request, context)):
                    yield piece
                return
            except Exception as error:
                refusal = _Refusal.of(error)
            count.status = refusal.status
        await refusal.tell(context)

    return run


class Calls(personal_pb2_grpc.PersonalServicer):
    """The calls of `personal.proto` on a service; `Door` serves them."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def ask(self, name: str, request: Message, context: Any) -> _Ask:
        """Return a call with its caller. Raises NoKey, TooMany, or _TooLarge."""
        size = request.ByteSize()
        if size > LARGEST_BODY and name not in MAY_BE_LARGE:
            raise _TooLarge(f"the request has more than {LARGEST_BODY} bytes; send less at a time")
        left = context.time_remaining()
        # A peer is `ipv4:ADDRESS:PORT`.
        sender = context.peer().rpartition(":")[0]
        caller = await calls.caller_of(self.service, _key(context), sender=sender)
        return _Ask(self.service, caller, request, PATIENCE if left is None else min(PATIENCE, left))

    # --- Users ---

    @_unary
    async def PostEvents(self, ask: _Ask) -> Any:
        """Append events of a user."""
        body = ask.body(_Events)
        key = body.idempotency_key
        return _filled(
            pb.Observed, await calls.in_thread(calls.observed, ask.service, ask.caller, body.user, body, key=key)
        )

    @_unary
    async def GetUser(self, ask: _Ask) -> Any:
        """Show a user."""
        body = ask.body(_Shown)
        found = await calls.in_thread(calls.shown, ask.service, ask.caller, body.user, latest=body.latest)
        return _filled(pb.User, found)

    @_unary
    async def Recommend(self, ask: _Ask) -> Any:
        """Recommend items."""
        body = ask.body(_Recommend)
        asked = RecommendAsked(body.user, count=body.count, personalized=body.personalized, fallback=body.fallback)
        found = await calls.recommendations(ask.service, ask.caller, asked, patience=ask.patience)
        return _filled(pb.Recommendations, found)

    @_unary
    async def Predict(self, ask: _Ask) -> Any:
        """Predict likes of items, or classes or embeddings of texts."""
        body = ask.body(_Predict)
        found = await calls.predictions(ask.service, ask.caller, body.user, body, patience=ask.patience)
        return _filled(pb.Predictions, found)

    # --- Forgetting ---

    @_unary
    async def Forget(self, ask: _Ask) -> Any:
        """Forget a user."""
        found = await calls.in_thread(ask.service.forget, ask.caller, ask.body(_User).user)
        return _forgotten(bodies.Forgotten.of(found))

    @_unary
    async def ListForgetRequests(self, ask: _Ask) -> Any:
        """List forget requests, the latest first."""
        found = await calls.in_thread(ask.service.forget_requests, ask.caller)
        return pb.ForgottenList(forget_requests=[_forgotten(bodies.Forgotten.of(each)) for each in found])

    @_unary
    async def GetForgetRequest(self, ask: _Ask) -> Any:
        """Show one forget request."""
        found = await calls.in_thread(ask.service.forget_request, ask.caller, ask.body(_Number).id)
        return _forgotten(bodies.Forgotten.of(found))

    # --- Adapters ---

    @_unary
    async def ListAdapters(self, ask: _Ask) -> Any:
        """List the adapters that the caller may use."""
        found = await calls.in_thread(ask.service.infos, ask.caller)
        return pb.AdapterList(adapters=[_filled(pb.Adapter, bodies.AdapterBody.of(info)) for info in found])

    @_unary
    async def ImportAdapter(self, ask: _Ask) -> Any:
        """Import a PEFT directory as a ZIP archive."""
        ask.caller.must_be("operator")
        body = ask.body(_Import)
        bring = ask.service.bring
        info = await calls.in_thread(bring, ask.caller, body.name, body.archive, owner=body.owner, model=body.model)
        return _filled(pb.Adapter, bodies.AdapterBody.of(info))

    @_unary
    async def ExportAdapter(self, ask: _Ask) -> Any:
        """Export an adapter as a ZIP archive of a PEFT directory."""
        body = ask.body(_Adapter)
        return pb.Archive(archive=await calls.in_thread(ask.service.take, ask.caller, body.name, model=body.model))

    @_unary
    async def DeleteAdapter(self, ask: _Ask) -> Any:
        """Delete an adapter."""
        await calls.in_thread(ask.service.drop, ask.caller, ask.body(_Adapter).name)
        return pb.Deleted()

    # --- Completions ---

    @_unary
    async def ListModels(self, ask: _Ask) -> Any:
        """List what may be named as model."""
        return _filled(pb.ModelList, await calls.in_thread(completions.models, ask.service, ask.caller))

    @_unary
    async def Complete(self, ask: _Ask) -> Any:
        """Go on with texts."""
        body = ask.body(bodies.CompletionBody)
        found = await completions.whole(ask.service, ask.caller, body, patience=ask.patience)
        return pb.Completion(**found.model_dump(exclude={"choices": {"__all__": {"logprobs"}}}))

    @_stream
    async def StreamCompletion(self, ask: _Ask) -> AsyncIterator[Any]:
        """Go on with one text, a piece at a time."""
        body = ask.body(bodies.CompletionBody).model_copy(update={"stream": True})
        async for piece in completions.pieces(ask.service, ask.caller, body, patience=ask.patience):
            for choice in piece["choices"]:
                del choice["logprobs"]
            yield pb.CompletionPiece(**piece)


def _key(context: Any) -> str | None:
    given = dict(context.invocation_metadata() or ()).get("authorization", "")
    scheme, _, key = given.partition(" ") if isinstance(given, str) else ("", "", "")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


class _TooLarge(Exception):
    """A request has more bytes than it may."""


@dataclass(frozen=True)
class _Refusal:
    """An error on its way out: the status of HTTP, and the JSON that HTTP answers with."""

    status: int
    body: dict[str, Any]
    retry_after: int | None = None

    @classmethod
    def of(cls, error: Exception) -> "_Refusal":
        if isinstance(error, LetheError):
            status = status_of(error)
            wait = max(1, math.ceil(getattr(error, "retry_after", 1.0))) if status in (429, 503) else None
            return cls(status, problem(type(error).__name__, str(error)), wait)
        if isinstance(error, ValidationError):
            return cls(422, problem("RequestError", faults(error.errors())))
        if isinstance(error, _TooLarge):
            return cls(413, problem(TOO_LARGE, str(error)))
        log.error("a call failed", exc_info=error)
        told = "something went wrong here, which is in the log; ask again, or report it"
        return cls(500, problem("InternalError", told))

    async def tell(self, context: Any) -> None:
        trailing: list[tuple[str, str | bytes]] = [(ERROR, json.dumps(self.body).encode())]
        if self.retry_after is not None:
            trailing.append(("retry-after", str(self.retry_after)))
        code = _CODES.get(self.status, grpc.StatusCode.INTERNAL)
        await context.abort(code, self.body["error"]["message"], tuple(trailing))


class _Counting:
    """Counts a call and times it, as HTTP's requests are."""

    def __init__(self, service: Service, name: str) -> None:
        self._metrics, self._route, self.status = service.metrics, f"/{SERVICE}/{name}", 200
        self._began = time.perf_counter()

    def __enter__(self) -> "_Counting":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # Whoever hangs up, or whose deadline passes, has no answer: 499, as proxies write it.
        status = self.status if kind is None else 499
        self._metrics.requests.labels("gRPC", self._route, str(status)).inc()
        self._metrics.seconds.labels(self._route).observe(time.perf_counter() - self._began)


SERVICE: str = pb.DESCRIPTOR.services_by_name["Personal"].full_name
