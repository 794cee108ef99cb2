"""What every door of the service answers with: the same questions give the same answers over HTTP and gRPC."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from lora.errors import DataError
from server.service import bodies
from server.service.answers import PLAIN
from server.service.arrivals import PATIENCE, all_told, told
from server.service.identity import Caller, NoKey, digest_of
from server.service.recommending import RecommendAsked, Recommended
from server.service.service import Service
from server.service.texts import TextAnswer, TextAsked
from strategies.personal.events import Event

Result = TypeVar("Result")
NO_KEY = "the request has no API key; send Authorization: Bearer KEY"


async def in_thread(call: Callable[..., Result], *given: Any, **named: Any) -> Result:
    """Run what may wait for the registry or the disk, so that the loop does not."""
    return await asyncio.to_thread(call, *given, **named)


async def caller_of(service: Service, key: str | None, *, sender: str) -> Caller:
    """Return whose key this is, and count the request; keys that have to be looked up count for the `sender` too.

    Raises NoKey, or TooMany.
    """
    if key is None:
        raise NoKey(NO_KEY)
    caller = service.keys.remembered(digest_of(key))
    if caller is None:
        service.rates.take_of(sender)
        caller = await in_thread(service.keys.caller, key)
    service.rates.take(caller.key)
    return caller


def observed(
    service: Service, caller: Caller, user: str, body: bodies.EventsBody, *, key: str | None
) -> bodies.Observed:
    """Take a user's events."""
    events = [Event(user, each.item, each.rating, each.time) for each in body.events]
    return bodies.Observed(**service.observe(caller, user, events, key=key))


def shown(service: Service, caller: Caller, user: str, *, latest: int) -> bodies.UserBody:
    """Show a user, the latest events first."""
    found = service.user(caller, user)
    titles = service.titles
    events = found.events[::-1][:latest]
    history = [
        bodies.HistoryEvent(item=e.item, title=titles.get(e.item, e.item), rating=e.rating, time=e.time) for e in events
    ]
    return bodies.UserBody(user=user, adapter_version=found.version, events=len(found.events), history=history)


async def recommendations(
    service: Service, caller: Caller, asked: RecommendAsked, *, patience: float = PATIENCE
) -> bodies.Recommendations:
    """Recommend items."""
    found: Recommended = await told(service.recommend(caller, asked), patience=patience)
    service.metrics.answered("recommend", found.provenance)
    return bodies.Recommendations(user=asked.user, items=_rated(found), whose=bodies.Whose.of(found.provenance))


def _rated(found: Recommended) -> list[bodies.RatedBody]:
    return [bodies.RatedBody(item=each.item, title=each.title, like=each.like) for each in found.items]


async def predictions(
    service: Service, caller: Caller, user: str, body: bodies.PredictionsBody, *, patience: float = PATIENCE
) -> bodies.Predictions:
    """Predict likes of items, or classify or embed texts. Raises DataError unless it is one of the two."""
    if (body.items is None) == (body.texts is None):
        raise DataError("predictions are about items or about texts; send one of the two")
    if body.items is None:
        return await _texts(service, caller, user, body, patience=patience)
    asked = RecommendAsked(user, items=tuple(body.items), personalized=body.personalized, fallback=body.fallback)
    found: Recommended = await told(service.recommend(caller, asked), patience=patience)
    service.metrics.answered("predict", found.provenance)
    return bodies.Predictions(user=user, items=_rated(found), whose=bodies.Whose.of(found.provenance))


async def _texts(
    service: Service, caller: Caller, user: str, body: bodies.PredictionsBody, *, patience: float
) -> bodies.Predictions:
    adapter = user if body.personalized else None
    texts = [TextAsked(adapter, text, body.kind, reason=PLAIN) for text in body.texts or ()]
    cold = body.fallback == "cold"
    if adapter is None or service.adapters.remembers(adapter):
        futures = service.texts(caller, user, texts, cold=cold)
    else:
        futures = await in_thread(service.texts, caller, user, texts, cold=cold)
    answers: list[TextAnswer] = await all_told(futures, patience=patience)
    return bodies.Predictions(user=user, texts=[_text(service, body.kind, each) for each in answers])


def _text(service: Service, kind: str, answer: TextAnswer) -> bodies.TextPrediction:
    service.metrics.answered(kind, answer.provenance)
    whose = bodies.Whose.of(answer.provenance)
    if kind == "embed":
        return bodies.TextPrediction(shares=None, embedding=[*answer.values], whose=whose)
    shares = dict(zip(service.labels, answer.values, strict=True))
    return bodies.TextPrediction(shares=shares, embedding=None, whose=whose)
