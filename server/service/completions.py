"""Completions and models as OpenAI's clients ask for them: an adapter's or a user's name is the model's."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from lora.errors import Busy, DataError, LetheError
from server.service import bodies
from server.service.arrivals import PATIENCE, all_told
from server.service.generation import WriteAsked, Written
from server.service.identity import Caller
from server.service.problems import problem
from server.service.service import Service

_END = object()


def models(service: Service, caller: Caller) -> bodies.ModelList:
    """Return the base, and the adapters over it that the caller may name."""
    if service.writer is None:
        return bodies.ModelList(data=[])
    base, now = service.writer.name, int(time.time())
    served = service.served[base]
    found = [bodies.Model(id=base, created=now, owned_by="lethe", parent=None, root=served.reference)]
    for info in service.infos(caller):
        if info.layout == served.layout.digest:
            found.append(
                bodies.Model(id=info.name, created=int(info.changed) or now, owned_by=info.owner or "lethe",
                             parent=base, root=served.reference)
            )  # fmt: skip
    return bodies.ModelList(data=found)


def asked(service: Service, body: bodies.CompletionBody) -> list[WriteAsked]:
    """Return what an engine is asked for, a prompt each. Raises DataError for too many, or ways that do not combine."""
    prompts = body.prompts
    if not 1 <= len(prompts) <= bodies.MOST_PROMPTS or len(body.stops) > bodies.MOST_STOPS:
        raise DataError(
            f"{len(prompts)} prompts and {len(body.stops)} stop texts; send 1 to {bodies.MOST_PROMPTS} prompts and at "
            f"most {bodies.MOST_STOPS} stop texts"
        )
    if body.stream and len(prompts) > 1:
        raise DataError(f"stream=true with {len(prompts)} prompts; stream one at a time")
    base = None if service.writer is None else service.writer.name
    adapter = None if body.model == base else body.model
    return [
        WriteAsked(adapter, prompt, body.max_tokens, temperature=body.temperature, top_p=body.top_p, seed=body.seed,
                   stop=body.stops)
        for prompt in prompts
    ]  # fmt: skip


def completed(service: Service, body: bodies.CompletionBody, written: Sequence[Written]) -> bodies.Completion:
    """Return texts as a completion."""
    for each in written:
        service.metrics.answered("complete", each.provenance)
    read, wrote = sum(each.prompt_tokens for each in written), sum(len(each.tokens) for each in written)
    return bodies.Completion(
        id=_number(),
        created=int(time.time()),
        model=body.model,
        choices=[
            bodies.Choice(text=each.text, index=place, finish_reason=each.finish) for place, each in enumerate(written)
        ],
        usage=bodies.Usage(prompt_tokens=read, completion_tokens=wrote, total_tokens=read + wrote),
        whose=[bodies.Whose.of(each.provenance) for each in written],
    )


def _number() -> str:
    return f"cmpl-{secrets.token_hex(12)}"


async def whole(
    service: Service, caller: Caller, body: bodies.CompletionBody, *, patience: float = PATIENCE
) -> bodies.Completion:
    """Go on with all prompts, and return them together."""
    wanted = await run_in_threadpool(asked, service, body)
    futures = await run_in_threadpool(service.complete_all, caller, wanted)
    return completed(service, body, await all_told(futures, patience=patience))


async def pieces(
    service: Service, caller: Caller, body: bodies.CompletionBody, *, patience: float = PATIENCE
) -> AsyncIterator[dict[str, Any]]:
    """Yield the pieces of one text, the last with the end's reason, the usage and whose it is.

    Raises what `Service.complete` raises, also in the middle: a text ends where its user is forgotten. Busy where no
    piece comes within `patience` seconds.
    """
    loop, waiting = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def hand_out(piece: object) -> None:
        # Of a loop that is closed nobody hears any more.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(waiting.put_nowait, piece)

    (one,) = await run_in_threadpool(asked, service, body)
    future = await run_in_threadpool(service.complete, caller, replace(one, listener=hand_out))
    future.add_done_callback(lambda _: hand_out(_END))
    number, created = _number(), int(time.time())
    try:
        while (piece := await _next(waiting, patience)) is not _END:
            # Nothing is handed out any more once the text was ended by a request to forget.
            if not (future.done() and future.exception() is not None):
                yield _piece(body, number, created, text=str(piece), finish=None)
        written: Written = future.result()
        told = completed(service, body, [written]).model_dump()
        last = _piece(body, number, created, text="", finish=written.finish)
        yield last | {"usage": told["usage"], "whose": told["whose"]}
    finally:
        # Whoever went away before the end is not written for any longer.
        future.cancel()


async def _next(waiting: "asyncio.Queue[Any]", patience: float) -> object:
    try:
        return await asyncio.wait_for(waiting.get(), patience)
    except TimeoutError:
        raise Busy(f"no text within {patience:g} s; ask again later", retry_after=5) from None


async def streamed(service: Service, caller: Caller, body: bodies.CompletionBody) -> StreamingResponse:
    """Return a stream of server-sent events, a piece of text each; errors before the first piece are plain errors."""
    coming = pieces(service, caller, body)
    first = await anext(coming)
    return StreamingResponse(_events(first, coming), media_type="text/event-stream")


async def _events(first: dict[str, Any], coming: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    yield _event(first)
    try:
        async for piece in coming:
            yield _event(piece)
    except LetheError as error:
        yield _event(problem(type(error).__name__, str(error)))
        return
    yield "data: [DONE]\n\n"


def _piece(
    body: bodies.CompletionBody, number: str, created: int, *, text: str, finish: str | None
) -> dict[str, Any]:  # fmt: skip
    choice: Any = bodies.Choice(text=text, index=0, finish_reason=finish)
    return {"id": number, "object": "text_completion", "created": created, "model": body.model,
            "choices": [choice.model_dump()]}  # fmt: skip


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
