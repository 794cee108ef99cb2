"""The service: what people and programs may ask, whatever carries the question (HTTP now, others later).

Every method takes the caller first and decides what they may see; nothing here knows of HTTP.
"""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from lora.errors import ConfigError, DataError, ModelError, ServiceError, Unknown
from lora.model import AdaptedModel
from server.service.adapters import READY, AdapterInfo, Adapters, NewAdapter, RegistrySource
from server.service.answers import COLD
from server.service.engine import Batches, Engine, Limits
from server.service.forgetting import Deletions, Evidence, ForgetRequest, Forgetting, subject_of
from server.service.generation import WriteAsked, Writing
from server.service.identity import Caller, Keys, RateLimits, check_name
from server.service.metrics import Metrics
from server.service.once import Once
from server.service.parts import WHOLE, Part
from server.service.peft import Served, packed, unpacked
from server.service.recommending import CANDIDATES, RecommendAsked, Recommending
from server.service.registry import Registry
from server.service.sources import BankSource, Sources
from server.service.texts import Gates, TextAsked, Texts
from server.service.warm import Source, Warm, WarmSlots, missing
from server.service.watch import Watch
from strategies.personal.events import Event
from strategies.personal.lifelong import LifelongUsers
from tasks.learner import Learner
from tasks.models import BaseModel

WARM = Warm()
BASE_OF = "/"
"""What the owner of a request to the base model begins with, and no name does."""


@dataclass(frozen=True)
class Writer:
    """A decoder that goes on with texts: the base, adapted, by the name that callers give as model."""

    base: BaseModel
    adapted: AdaptedModel
    name: str = "base"


@dataclass(frozen=True)
class UserInfo:
    """What is known of a user: the slot's version and the events, oldest first."""

    user: str
    version: int
    events: tuple[Event, ...]


class Service:
    """Users, adapters and engines over one registry.

    `users` gives recommendations, `learner` predictions about texts, `writer` completions; at least one is needed.
    `blank` is the learner's vector that answers for nobody in particular, `gates` what forget requests add to texts.
    Where users with histories are divided among replicas, `part` says which are here; others are Busy, never new.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        users: LifelongUsers | None = None,
        learner: Learner | None = None,
        blank: Tensor | None = None,
        gates: Gates | None = None,
        writer: Writer | None = None,
        limits: Limits | None = None,
        rates: RateLimits | None = None,
        candidates: int = CANDIDATES,
        warm: Warm = WARM,
        forgetting: Forgetting | None = None,
        part: Part = WHOLE,
    ) -> None:
        if users is None and learner is None and writer is None:
            raise ConfigError("a service without users, learner or writer answers nothing; give at least one")
        self.registry, self.users, self.learner, self.writer = registry, users, learner, writer
        self.part = WHOLE if users is None else part
        self.adapters, self.keys, self.once = Adapters(registry), Keys(registry), Once(registry)
        self.rates, self.metrics = rates or RateLimits(), Metrics()
        self.served: dict[str, Served] = {}
        self.engines: dict[str, Engine[Any]] = {}
        self._warm: list[WarmSlots] = []
        self._closed = False
        self._naming = threading.Lock()
        """Held while a name is looked at and then taken, by a user or an adapter."""
        self.adapters.recover()
        self._start(limits or Limits(), candidates=candidates, warm=warm)
        if learner is not None:
            self._start_texts(learner, limits or Limits(), warm=warm, gates=gates, blank=blank)
        self.watch = Watch(registry, self._doubt)
        self.forgetting = forgetting or Deletions(registry, self._erasers(), knows=self._knows, mine=self.part.has)
        self.forgetting.resume()

    def _start(self, limits: Limits, *, candidates: int, warm: Warm) -> None:
        if self.users is not None:
            self._engine("recommending", Batches(Recommending(self.users, candidates=candidates)), limits)
        if self.writer is not None:
            self._start_writing(self.writer, limits, warm=warm)

    def _start_texts(
        self, learner: Learner, limits: Limits, *, warm: Warm, gates: Gates | None, blank: Tensor | None
    ) -> None:
        own = Served("texts", learner.adapted, learner.layout, learner.base.reference, "FEATURE_EXTRACTION")
        kept = self._kept(own, RegistrySource(self.adapters, own.layout), warm)
        worker = Batches(Texts(learner, kept, rows=limits.rows, gates=gates, blank=blank))
        self._engine("texts", worker, limits)

    def _start_writing(self, writer: Writer, limits: Limits, *, warm: Warm) -> None:
        from strategies.personal.slots import UserSlots

        layout = UserSlots.of(writer.adapted).layout
        own = Served(writer.name, writer.adapted, layout, writer.base.reference, "CAUSAL_LM")
        sources: list[Source] = [RegistrySource(self.adapters, layout)]
        if self.users is not None and self.users.slots.layout.digest == layout.digest:
            sources.insert(0, BankSource(self.users.slots))
        kept = self._kept(own, Sources(*sources), warm)
        worker = Writing(writer.base, writer.adapted, kept, rows=limits.rows)
        self._engine("writing", worker, limits)

    def _kept(self, served: Served, source: Source, warm: Warm) -> WarmSlots:
        self.served[served.name] = served
        device = next(served.adapted.base.parameters()).device
        kept = WarmSlots(source, rows=warm.rows, dtype=warm.dtype, device=device)
        # What is not there yet stays from its first use on.
        kept.hold(warm.pinned)
        self._warm.append(kept)
        self.metrics.follow_warm("texts" if served.name == "texts" else "writing", kept)
        return kept

    def _engine(self, name: str, worker: Any, limits: Limits) -> None:
        self.engines[name] = Engine(worker, limits, name=name)
        self.metrics.follow(self.engines[name])

    def _doubt(self) -> None:
        self.adapters.doubt()
        for kept in self._warm:
            kept.doubt()
        writing = self.engines.get("writing")
        for name in set() if writing is None else writing.owners:
            # A text that is being written has a copy of the slot; another process may have forgotten whose it is.
            here = name.startswith(BASE_OF) or (self.users is not None and name in self.users)
            if not here and self.adapters.known(name) is None:
                self._retire(name)

    def close(self) -> None:
        """Finish what runs, end what waits, and close the files; once is enough."""
        if self._closed:
            return
        self._closed = True
        for engine in self.engines.values():
            engine.close()
        self.watch.close()
        if self.users is not None:
            self.users.close()
        self.registry.close()

    def faults(self) -> list[str]:
        """Return why the service is not ready; nothing where it is."""
        found = [f"engine {name} has stopped" for name, engine in self.engines.items() if not engine.alive]
        return found if self.watch.reached else [*found, "the registry does not answer"]

    # --- Users ---

    def _people(self) -> LifelongUsers:
        if self.users is None:
            raise Unknown("this service has no users with histories; start it with a personal run")
        return self.users

    def _people_with(self, user: str) -> LifelongUsers:
        people = self._people()
        self.part.check(user)
        return people

    def observe(self, caller: Caller, user: str, events: Sequence[Event], *, key: str | None = None) -> dict[str, Any]:
        """Take a user's events, all or none; equal `key`s take effect once. Returns the slot's new version.

        Raises EventRefused for a wrong event, DataError for a name that an adapter has, or a key that was used.
        """
        caller.may_read(user)
        people = self._people_with(user)
        check_name(user, what="user")

        def act() -> dict[str, Any]:
            with self._naming:
                known = self.adapters.infos(names=[user])
                if user not in people and any(info.layout == people.slots.layout.digest for info in known):
                    raise DataError(f"an adapter is named '{user}'; delete it, or choose another name for the user")
                seen = people.observe_many(events)
            return {"user": user, "taken": len(events), "adapter_version": seen.versions[user], "new": user in seen.new}

        def done() -> dict[str, Any] | None:
            if user not in people or not {*events} <= {*people.history(user)}:
                return None
            return {"user": user, "taken": len(events), "adapter_version": people.version(user), "new": False}

        if key is None:
            return act() | {"repeated": False}
        body = json.dumps([[e.item, e.rating, e.time] for e in events])
        answer, again = self.once.run(key, owner=user, body=body, act=act, done=done)
        return answer | {"repeated": again}

    def user(self, caller: Caller, user: str) -> UserInfo:
        """Return what is known of a user. Raises Unknown."""
        caller.may_read(user)
        people = self._people_with(user)
        with people.steady():
            if user not in people:
                raise Unknown(f"user '{user}' is not known; send an event of the user first")
            return UserInfo(user, people.version(user), tuple(people.history(user)))

    def recommend(self, caller: Caller, asked: RecommendAsked) -> "Future[Any]":
        """Return a `Recommended` to come."""
        caller.may_read(asked.user)
        self._people_with(asked.user)
        return self.engines["recommending"].submit(asked.user, asked)

    def texts(
        self, caller: Caller, user: str, asked: Sequence[TextAsked], *, cold: bool = False
    ) -> "list[Future[Any]]":
        """Return a `TextAnswer` to come for every text.

        Raises Unknown for a user without an adapter, unless `cold` has the base model answer then.
        """
        caller.may_read(user)
        if self.learner is None:
            raise Unknown("this service predicts nothing about texts; ask about items, or serve an encoder")
        for name in {each.adapter for each in asked} - {None}:
            try:
                self._may_answer_as(caller, user, str(name))
            except Unknown:
                if not cold:
                    raise
                asked = [replace(each, adapter=None, reason=COLD) for each in asked]
        futures = _all_or_none(lambda each: self.engines["texts"].submit(user, each), asked)
        with _given_up(futures):
            for name in {each.adapter for each in asked} - {None}:
                self._may_answer_as(caller, user, str(name))
        return futures

    def _may_answer_as(self, caller: Caller, user: str, name: str) -> None:
        """Raise Unknown unless the adapter is the user's, or nobody's in particular: a name alone says nothing."""
        if self._may_use(caller, name, self.served["texts"]).owner not in (None, user):
            raise missing(name)

    @cached_property
    def titles(self) -> dict[str, str]:
        """Titles of items by name."""
        catalogue = self._people().histories.terms.catalogue
        return dict(zip(catalogue.names, catalogue.titles, strict=True))

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes of texts, in the order of their probabilities."""
        return () if self.learner is None else tuple(self.learner.labels)

    # --- Adapters and completions ---

    def _may_use(self, caller: Caller, name: str, served: Served | None) -> AdapterInfo:
        """Return an adapter (of one model) that the caller may use.

        Raises Unknown alike for one that is not there and for another's, Denied for auditors, who see lists alone.
        """
        caller.must_be("user", "operator")
        there = self.adapters.known(name)
        found = [] if there is None or not _visible(caller, there) else [there]
        own = self._own_slot(caller, name)
        for info in found if own is None else [own, *found]:
            if served is None or info.layout == served.layout.digest:
                return info
        self.part.check(name)
        raise missing(name)

    def _own_slot(self, caller: Caller, name: str) -> AdapterInfo | None:
        """Return a user's slot as an adapter, where it is one that completes."""
        if self.users is None or self.writer is None or (caller.role == "user" and caller.owner != name):
            return None
        slots, served = self.users.slots, self.served[self.writer.name]
        place = slots.rows.find(name)
        if place is None or slots.layout.digest != served.layout.digest:
            return None
        rank = served.adapted.frame.rank
        return AdapterInfo(name, name, place[1], served.reference, slots.layout.digest, rank, READY, 0.0)

    def complete(self, caller: Caller, asked: WriteAsked) -> "Future[Any]":
        """Return a `Written` to come; `asked.adapter` None is the base model. Raises Unknown for another's adapter."""
        if self.writer is None:
            raise Unknown("this service writes no texts; serve a decoder")
        served = self.served[self.writer.name]
        if asked.adapter is None:
            return self.engines["writing"].submit(f"{BASE_OF}{caller.key}", asked)
        self._may_use(caller, asked.adapter, served)
        future = self.engines["writing"].submit(asked.adapter, asked)
        with _given_up([future]):
            # Between look and submission the name may have gone to somebody else; from here on that ends the request.
            self._may_use(caller, asked.adapter, served)
        return future

    def complete_all(self, caller: Caller, asked: Sequence[WriteAsked]) -> "list[Future[Any]]":
        """Return a `Written` to come for every one, as `complete` does; where one is refused, all are."""
        return _all_or_none(lambda each: self.complete(caller, each), asked)

    def infos(self, caller: Caller) -> list[AdapterInfo]:
        """Return the adapters that the caller may use, and their own slot."""
        found = [info for info in self.adapters.infos() if _visible(caller, info)]
        own = None if caller.owner is None else self._own_slot(caller, caller.owner)
        return found if own is None else [own, *found]

    def bring(self, caller: Caller, name: str, data: bytes, *, owner: str | None, model: str | None) -> AdapterInfo:
        """Write an adapter from a ZIP of a PEFT directory, new or in place of the one of that name and owner."""
        caller.must_be("operator")
        check_name(name, what="adapter")
        self.part.check(name)
        if owner is not None:
            check_name(owner, what="owner")
        served = self._model(model)
        slot = unpacked(served, data)
        rank = served.adapted.frame.rank
        with self._naming:
            if self._follows(name, served.layout.digest):
                raise DataError(f"a user is named '{name}', whose adapter follows from events; choose another name")
            self.adapters.write(NewAdapter(name, slot, served.layout, served.reference, rank, owner))
        return self.adapters.info(name)

    def _model(self, name: str | None) -> Served:
        if not self.served:
            raise Unknown("this service has no model that adapters can be brought to")
        if name is None and len(self.served) > 1:
            raise DataError(f"there are several models: {', '.join(sorted(self.served))}; say which by model")
        found = self.served.get(name or next(iter(self.served)))
        if found is None:
            raise Unknown(f"there is no model '{name}'; there are {', '.join(sorted(self.served))}")
        return found

    def _follows(self, name: str, layout: str) -> bool:
        """Return whether an adapter of that name and layout follows from a user's events."""
        return self.users is not None and name in self.users and self.users.slots.layout.digest == layout

    def take(self, caller: Caller, name: str, *, model: str | None = None) -> bytes:
        """Return an adapter (of one model) as a ZIP of a PEFT directory."""
        info = self._may_use(caller, name, None if model is None else self._model(model))
        served = next((each for each in self.served.values() if each.layout.digest == info.layout), None)
        if served is None:
            raise ModelError(f"adapter '{name}' is of a model that is not served; serve it to export the adapter")
        if self.users is not None and self._follows(name, info.layout):
            return packed(served, self.users.slot(name))
        return packed(served, self.adapters.read(name)[0])

    def drop(self, caller: Caller, name: str) -> None:
        """Delete an adapter. Raises Unknown, also for a user's slot, which goes with the user."""
        caller.must_be("operator")
        self.adapters.remove(name)
        self._retire(name)

    # --- Forgetting ---

    def forget(self, caller: Caller, user: str) -> ForgetRequest:
        """Delete what is kept of a user. Raises Unknown where nothing is."""
        caller.may_read(user)
        self.part.check(user)
        done = self.forgetting.ask(user, asked_by=caller.key)
        self.metrics.forgotten.inc()
        return done

    def forget_requests(self, caller: Caller) -> list[ForgetRequest]:
        """Return the requests that the caller may see: a user's own, or all."""
        return self.forgetting.all(subject=None if caller.owner is None else subject_of(caller.owner))

    def forget_request(self, caller: Caller, request: str) -> ForgetRequest:
        """Return one request. Raises Unknown alike for one that is not there or is another's."""
        found = self.forgetting.get(request)
        if caller.owner is not None and found.subject != subject_of(caller.owner):
            raise Unknown("there is no such forget request; the list of requests has their ids")
        return found

    def adapters_of(self, user: str) -> list[AdapterInfo]:
        """Return what answers as a user beside their slot: adapters that are theirs, and nobody's of their name."""
        named = [info for info in self.adapters.infos(names=[user]) if info.owner is None]
        return [*self.adapters.infos(owner=user), *named]

    def _knows(self, user: str) -> bool:
        return (self.users is not None and user in self.users) or bool(self.adapters_of(user))

    def _erasers(self) -> list[Any]:
        return [self._erase_person, self._erase_adapters, self._erase_keys, self._erase_running, self._left]

    def _erase_person(self, user: str) -> Evidence:
        if self.users is None or user not in self.users:
            return {"events": 0, "slot": False}
        events = len(self.users.history(user))
        self.users.forget(user)
        return {"events": events, "slot": True}

    def _erase_adapters(self, user: str) -> Evidence:
        names = [info.name for info in self.adapters_of(user)]
        if names:
            self.adapters.remove(*names)
        for name in names:
            self._retire(name)
        return {"adapters": len(names)}

    def _erase_keys(self, user: str) -> Evidence:
        return {"idempotency_keys": self.once.forget(user)}

    def _erase_running(self, user: str) -> Evidence:
        return {"requests_ended": self._retire(user)}

    def _left(self, user: str) -> Evidence:
        """Look, once all is deleted, whether it is."""
        known = self.users is not None and user in self.users
        return {
            "left": {
                "events": len(self.users.history(user)) if known and self.users is not None else 0,
                "slot": self.users is not None and user in self.users.slots,
                "adapters": len(self.adapters_of(user)),
                # A second pass says how much the first has left.
                "idempotency_keys": self.once.forget(user),
                "requests_ended": self._retire(user),
            }
        }

    def _retire(self, name: str) -> int:
        error = Unknown("this was forgotten while the request waited; there is nothing to answer with any more")
        return sum(engine.retire(name, error) for engine in self.engines.values())


def _visible(caller: Caller, info: AdapterInfo) -> bool:
    return caller.role != "user" or info.owner is None or info.owner == caller.owner


@contextmanager
def _given_up(futures: "Sequence[Future[Any]]") -> Iterator[None]:
    """Give accepted requests up where what follows raises."""
    try:
        yield
    except ServiceError:
        for future in futures:
            future.cancel()
        raise


def _all_or_none(submit: "Callable[[Any], Future[Any]]", asked: Sequence[Any]) -> "list[Future[Any]]":
    """Have every request accepted; where one is refused, those that were accepted before it are given up."""
    futures: list[Future[Any]] = []
    with _given_up(futures):
        for each in asked:
            futures.append(submit(each))
    return futures
