"""Completions and models as OpenAI's clients ask for them: an adapter's or a user's name is the model's."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from lora.errors import DataError, LetheError
from server.service import bodies
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


async def streamed(
    service: Service, caller: Caller, body: bodies.CompletionBody, wanted: Sequence[WriteAsked]
) -> StreamingResponse:
    """Return a stream of server-sent events, a piece of text each; errors before the first piece are plain errors."""
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def hand_out(piece: object) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, piece)

    (one,) = wanted
    heard = WriteAsked(**{**vars(one), "listener": hand_out})
    future = await run_in_threadpool(service.complete, caller, heard)
    future.add_done_callback(lambda _: hand_out(_END))
    first = await pieces.get()
    if first is _END and future.exception() is not None:
        raise future.exception() or LetheError()
    events = _events(service, body, future, first, pieces)
    return StreamingResponse(events, media_type="text/event-stream")


async def _events(
    service: Service, body: bodies.CompletionBody, future: "Future[Any]", first: object, pieces: "asyncio.Queue[Any]"
) -> AsyncIterator[str]:
    number, created, piece = _number(), int(time.time()), first
    try:
        while piece is not _END:
            # Nothing is handed out any more once the text was ended by a request to forget.
            if not (future.done() and future.exception() is not None):
                yield _event(_piece(body, number, created, text=str(piece), finish=None))
            piece = await pieces.get()
        error = future.exception()
        if error is not None:
            yield _event(problem(type(error).__name__, str(error)))
            return
        written: Written = future.result()
        whole = completed(service, body, [written]).model_dump()
        last = _piece(body, number, created, text="", finish=written.finish)
        yield _event(last | {"usage": whole["usage"], "whose": whole["whose"]})
        yield "data: [DONE]\n\n"
    finally:
        # Whoever went away before the end is not written for any longer.
        future.cancel()


def _piece(
    body: bodies.CompletionBody, number: str, created: int, *, text: str, finish: str | None
) -> dict[str, Any]:  # fmt: skip
    choice: Any = bodies.Choice(text=text, index=0, finish_reason=finish)
    return {"id": number, "object": "text_completion", "created": created, "model": body.model,
            "choices": [choice.model_dump()]}  # fmt: skip


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
