"""Requests to forget, from asking to the record: what commands and services call."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lora.errors import RunError
from server.forgetting import signing
from server.forgetting.asking import Accepted, Wish, accept, sweep
from server.forgetting.evidence import forgotten_again, measured
from server.forgetting.files import RequestFile
from server.forgetting.sources import of_classes
from server.forgetting.steps import Stage, steps_of
from server.forgetting.store import AFTER, BEFORE, TRAINED, Say, Store
from server.forgetting.users import subject_of
from strategies.personal.erasure import StoredUsers
from tasks.examples import Examples

if TYPE_CHECKING:
    from server.forgetting.workflow import Worker

State = Literal["waiting", "running", "stopped", "done"]


@dataclass(frozen=True)
class Status:
    """Where a request stands."""

    request: RequestFile
    state: State
    why: str | None = None
    """Why it stopped."""
    attempt: int = 1
    record: Mapping[str, Any] | None = None
    """The record, when it is done and its signature holds."""


@dataclass(frozen=True)
class Verdict:
    """What a check of a record found: findings that hold, those that do not, and what was measured again."""

    holds: tuple[str, ...]
    broken: tuple[str, ...]
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether everything that could be checked holds."""
        return not self.broken


class ForgetRequests:
    """A store's requests. Asking and looking need no worker; `working` starts one, and with it dbos."""

    def __init__(self, store: Store, *, users: StoredUsers | None = None) -> None:
        """`users` are those that this process serves; else the store's directory is opened when it is needed."""
        self.store, self.stage = store, Stage(store, users=users)

    def add(self, wish: Wish) -> Accepted:
        """Accept a wish, or find that it was accepted before.

        Raises ModelError where the base model is not the store's, RunError for a damaged store; nothing is accepted
        then.
        """
        if wish.kind != "user":
            _ = self.stage.served
        return accept(self.store, wish)

    @contextmanager
    def working(
        self, *, database: str | None = None, told: Callable[[str, str], None] | None = None, say: Say | None = None
    ) -> "Iterator[Worker]":
        """Work on the store alone while the block runs; waits for another process that does."""
        with self.store.held(say=say):
            from server.forgetting.workflow import Worker

            with self.store.accepting():
                sweep(self.store)
            worker = Worker(self.stage, database=database, told=told)
            try:
                yield worker
            finally:
                worker.close()

    def carry_out(
        self, *, database: str | None = None, told: Callable[[str, str], None] | None = None, say: Say | None = None
    ) -> None:
        """Work off everything that waits or was interrupted."""
        if self.store.unfinished():
            with self.working(database=database, told=told, say=say) as worker:
                worker.drain()

    def status(self, name: str) -> Status:
        """Return where a request stands. Raises RunError for an unknown one, or a record that was changed."""
        request, store = self.store.request(name), self.store
        state = store.state(request.id)
        if store.done(request.id):
            record = signing.read_record(store.record(request.id), public=store.about.public_key)
            return Status(request, "done", attempt=state.attempt, record=record)
        if state.stopped is not None:
            return Status(request, "stopped", why=state.stopped, attempt=state.attempt)
        first = store.unfinished()[0].id == request.id
        return Status(request, "running" if first and store.busy else "waiting", attempt=state.attempt)

    def steps(self, request: RequestFile) -> list[tuple[str, bool]]:
        """Return the steps of a request and which have left their mark."""
        store, done = self.store, self.store.done(request.id)
        held = store.manifest.of(request.id) is not None
        marks = {
            "look before": store.noted(request.id, BEFORE) is not None,
            "measure before": store.noted(request.id, BEFORE) is not None,
            "train slot": store.slot(request.id).is_file() and store.noted(request.id, TRAINED) is not None,
            "fit detector": store.detector(request.id).is_file(),
            "accept slot": held,
            "accept answer": held,
            "train adapter": held,
            "erase": store.noted(request.id, AFTER) is not None,
            "measure after": store.noted(request.id, AFTER) is not None,
            "delete request": not store.work(request.id).exists(),
            "sign record": done,
        }
        return [(step, done or marks[step]) for step in steps_of(request)]

    def verify(self, name: str, *, rows: Examples | None = None, subject: str | None = None) -> Verdict:
        """Check a record's signature, that what it tells of is still served, and measure again where that is possible.

        `rows` of the request (kept by whoever asked, or new ones) are asked about; without, rows of its classes are, as
        far as the store reaches some. `subject` is a user's or client's name, which the record knows by digest alone.
        Raises RunError where the request is unknown or not done.
        """
        status = self.status(name)
        if status.record is None:
            raise RunError(f"request {status.request.id} is {status.state}, so there is nothing to verify yet")
        check = _Check(self, status.request, status.record)
        check.say(True, f"signed by the store's key {self.store.about.public_key[:16]}")
        check.deleted()
        if subject is not None:
            check.subject(subject)
        if status.request.kind == "user":
            check.user(subject)
        else:
            check.served()
            check.measure(rows)
        return Verdict(tuple(check.holds), tuple(check.broken), check.found)


class _Check:
    """Findings about one record, as they come."""

    def __init__(self, whole: ForgetRequests, request: RequestFile, record: Mapping[str, Any]) -> None:
        self.whole, self.store, self.request, self.record = whole, whole.store, request, record
        self.holds: list[str] = []
        self.broken: list[str] = []
        self.found: dict[str, Any] = {}

    def say(self, good: bool, what: str) -> None:
        (self.holds if good else self.broken).append(what)

    def deleted(self) -> None:
        gone = not self.store.work(self.request.id).exists()
        self.say(gone, "what the request was about is deleted" if gone else "what the request was about is still there")

    def subject(self, name: str) -> None:
        same = subject_of(self.store, self.request.kind, name) == self.request.subject
        self.say(same, f"the record is {'' if same else 'not '}about that {self.request.kind}")

    def user(self, name: str | None) -> None:
        measured = self.record["measured"]
        same = measured["before"]["others"] == measured["after"]["others"]
        self.say(same, "all other users stayed as they were, bit for bit" if same else "other users were changed")
        left = measured["after"]["files_holding"]
        self.say(left == 0, f"{left} files held the name or slot afterwards")
        if name is not None:
            self._search(name)

    def _search(self, name: str) -> None:
        from server.forgetting.users import users_of

        with users_of(self.store, self.whole.stage.users) as users:
            if name in users:
                self.say(False, "the user is known: somebody of that name has come since")
            else:
                holding = users.holding([name.encode()])
                self.say(
                    not holding, f"{len(holding)} files hold the name now{': ' * bool(holding)}{', '.join(holding)}"
                )

    def served(self) -> None:
        held, done = self.store.manifest.of(self.request.id), self.record["done"]
        if held is None:
            return self.say(False, "the store does not serve the request any more")
        if held.slot is None:
            files, now = done["adapter"], self.store.manifest
            later = files != now.files
            more = "later requests were folded into the adapter, or took prototypes from beside it"
            return self.say(True, more if later else "the adapter is that of the record")
        same = (held.slot, held.detector) == (done["slot"]["sha256"], done["detector"]["sha256"])
        return self.say(same, "slot and detector are those of the record" if same else "slot or detector were replaced")

    def measure(self, rows: Examples | None) -> None:
        stage, request = self.whole.stage, self.request
        served, held = stage.served, self.store.manifest.of(request.id)
        self.say(True, "base model, adapter, slots and detectors have the digests that were accepted")
        classes = held.classes if held is not None else ()
        earlier = [each for each in self.store.manifest.held if each.request != request.id]
        evaluation = stage.sources.evaluation
        self.found = measured(served, request, held_back=None, rows=evaluation, earlier=earlier, labels=stage.labels)
        if rows is None and classes and evaluation is not None:
            rows = of_classes(evaluation, {stage.labels[name] for name in classes})
        if rows is not None and len(rows):
            self.found |= forgotten_again(served, rows) | {"asked": len(rows)}
            before = (self.record["measured"]["before"] or {}).get("forgotten")
            now = self.found["forgotten"]
            if before:
                self.say(now < before, f"accuracy on forgotten rows {now:.1%} now, {before:.1%} before the request")
