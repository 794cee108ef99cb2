"""What a node's owner wants forgotten: rows and terms, kept at the node until a signed record says that it is done."""

import fcntl
import hashlib
import json
import logging
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from client.forgetting import Spending, answer_order
from client.job import open_ledger
from client.node import NodeSettings
from lora.config import Section
from lora.errors import BudgetExceeded, ConfigError, DataError, LetheError, ModelError, RunError, WrongUpdate, nearest
from lora.files import sync, write_bytes
from strategies.federated.wire import Declined
from strategies.unlearning.forgotten import check_rows
from strategies.unlearning.remote import ForgetAnswer, ForgetOrder
from strategies.unlearning.signature import verified
from strategies.unlearning.wire import Letter
from tasks.config import DataConfig, ModelConfig
from tasks.data import labelled_rows
from tasks.examples import Examples
from tasks.models import BaseModel, load_base, weights_digest

log = logging.getLogger("lethe.client")

FOLDER = "forgetting"
OFFER, ROWS, ANSWER, RECORD = "offer.json", "rows.json", "answer.safetensors", "record.json"
DELTA = 1e-5
RECORD_BYTES = 2**20
"""Most bytes of a record that are kept."""

State = Literal["open", "answered", "done"]


class Offer(Section):
    """`offer.json`: the terms on which a node's owner has rows forgotten, and what has become of them."""

    id: str
    run: str
    """Name of the run whose model learned them."""
    rows: int
    classes: tuple[str, ...] = ()
    """Classes that the rows stand for as a whole; empty for these rows alone."""
    epsilon: float | None = Field(None, gt=0)
    """Of one answer; null: it is not private."""
    delta: float = Field(DELTA, gt=0, lt=1)
    answers: int = Field(1, ge=1)
    """How many private answers are trained and charged at most."""
    begun: int = 0
    """How many answers were begun; noted before anything is charged."""
    made: str
    """Time, UTC."""
    key: str | None = None
    """The public key that came with the order of the answer that is kept."""
    problem: str | None = None
    """Why the last order could not be answered. It may quote rows, and stays here."""


class Offers:
    """A node's offers, each a directory in the node's state. An order is answered by what is offered, and nothing else.

    **Guarantee** (of an offer with an epsilon): whatever a coordinator sends, what leaves of its rows is at most
    `answers` private answers, each of that epsilon at the offer's delta and charged before its noise is drawn; refusals
    depend on the offer's public terms (how many rows, which classes) and on what was charged alone.

    | case | what happens |
    |---|---|
    | killed before the answer is written | trained and charged again, as far as `answers` and the budget allow |
    | the same order again | the same answer, from its file: nothing is trained, drawn or charged |
    | an order over another adapter, or another order | another answer, charged as such, within `answers` |
    | a base model, label or policy that does not fit | Declined before any row is read |
    | anything else that goes wrong | Declined without a reason; the offer notes it, for its owner |
    | a record whose signature or answer is another | Declined; rows and answer stay |
    | killed while the record is taken | rows and answer are deleted by whatever looks next |
    | a damaged offer | left out and named in the log; `withdraw` deletes it |
    """

    def __init__(self, settings: NodeSettings) -> None:
        self.settings, self.directory = settings, settings.state / FOLDER

    # --- The owner's side --------------------------------------------------------------------------------------------

    def make(
        self,
        run: str,
        examples: Path,
        *,
        classes: Sequence[str] = (),
        epsilon: float | None = None,
        delta: float | None = None,
        answers: int = 1,
    ) -> Offer:
        """Offer the rows of a file with text and label; they are copied here, for their owner alone.

        Raises DataError for rows that cannot be used, ConfigError for terms that the node's policy does not allow.
        """
        self._check_terms(classes, epsilon, delta, answers)
        texts, labels = labelled_rows(DataConfig(path=str(examples)))
        check_rows(len(texts))
        if classes and (strange := sorted(set(labels) - set(classes))):
            raise DataError(
                f"{examples}: rows are of class '{strange[0]}', which --class does not name; leave them out"
            )
        offer = Offer(
            id=secrets.token_hex(6), run=run, rows=len(texts), classes=tuple(classes), epsilon=epsilon,
            delta=min(DELTA, self.settings.policy.max_delta) if delta is None else delta, answers=answers, made=_now(),
        )  # fmt: skip
        self._write(offer, json.dumps({"texts": texts, "labels": labels}, ensure_ascii=False).encode())
        return offer

    def all(self, run: str | None = None) -> list[Offer]:
        """Return all offers in the order of their making, or those about a run; finishes what a kill has cut short."""
        found = []
        for path in self.directory.glob(f"[!.]*/{OFFER}"):
            try:
                found.append(Offer.model_validate_json(path.read_bytes()))
            except (OSError, ValidationError):
                log.warning("%s cannot be read; `lethe forget offers --withdraw %s` deletes it", path, path.parent.name)
        for offer in found:
            if self.state(offer) == "done":
                self._delete_rows(offer)
        return sorted((each for each in found if run in (None, each.run)), key=lambda each: (each.made, each.id))

    def find(self, name: str) -> Offer:
        """Return an offer by its id or the start of it. Raises RunError that names the nearest."""
        known = {each.id: each for each in self.all()}
        return known[self._named(name, known)]

    def state(self, offer: Offer) -> State:
        """Return where an offer stands."""
        place = self.directory / offer.id
        return "done" if (place / RECORD).is_file() else "answered" if (place / ANSWER).is_file() else "open"

    def withdraw(self, name: str) -> None:
        """Delete an offer with its rows, damaged or not. What was sent of it stays sent, and its charge stays.

        Raises RunError for an unknown one.
        """
        place = self.directory / self._named(name, [path.name for path in self.directory.glob("[!.]*")])
        with self._alone():
            place.rename(place.with_name(f".{place.name}"))
            sync(self.directory)
            self._sweep()

    def _named(self, name: str, known: Sequence[str] | dict[str, Offer]) -> str:
        found = [each for each in known if name and each.startswith(name)]
        if len(found) != 1:
            raise RunError(f"there is no offer '{name}' in {self.directory}{nearest(name, known)}")
        return found[0]

    # --- The coordinator's side --------------------------------------------------------------------------------------

    def answer(self, letter: Letter, *, client: str) -> bytes:
        """Train what an offer's order asks for, or return what was made by the same order before.

        `client` is the name that the node's ledger knows its data by: what forgetting costs is added to what training
        has cost. Raises Declined, and BudgetExceeded where the ledger has not enough left.
        """
        offer = self._offered(letter)
        if self.state(offer) == "done":
            raise Declined(f"offer {offer.id} is done")
        path = self.directory / offer.id / ANSWER
        # To the byte: the server knows an answer that it has seen before by its digest.
        kept = path.read_bytes() if path.is_file() else None
        if not letter.data:
            if kept is None:
                raise Declined(f"offer {offer.id} has no answer yet; send an order")
            return kept
        order = ForgetOrder.from_bytes(letter.data)
        if kept is not None and _is_to(kept, order):
            return kept
        try:
            data = self._made(offer, order, client)
        except Exception as error:
            # What it says, and which kind it is, may tell of rows: the owner is told, the coordinator is not.
            log.exception("offer %s could not be answered", offer.id)
            self._note(offer.id, problem=f"{type(error).__name__}: {error}")
            if isinstance(error, (BudgetExceeded, Declined)):
                raise
            raise Declined(
                f"offer {offer.id} could not be answered; `lethe forget offers` at the node says why"
            ) from None
        write_bytes(path, data, mode=0o600)
        self._note(offer.id, problem=None, key=order.key)
        return data

    def close(self, letter: Letter) -> None:
        """Keep the signed record of an offer's answer, and delete rows and answer. Raises Declined for any other."""
        offer = self._offered(letter)
        place = self.directory / offer.id
        if self.state(offer) != "done":
            if not self._is_its_record(offer, letter.data):
                raise Declined(f"the record is not about the answer of offer {offer.id}; its rows are kept")
            write_bytes(place / RECORD, letter.data)
        self._delete_rows(offer)

    def _offered(self, letter: Letter) -> Offer:
        known = {each.id: each for each in self.all()}
        if letter.offer not in known:
            raise Declined(f"node '{self.settings.name}' offers no '{letter.offer}'")
        return known[letter.offer]

    def _made(self, offer: Offer, order: ForgetOrder, client: str) -> bytes:
        """Check everything that is public, note that an answer is begun, and train it."""
        self._check_order(offer, order)
        base = self._base(order)
        self._note(offer.id, begun=offer.begun + 1)
        spending = Spending(open_ledger(self.settings.ledger), client, self.settings.policy.max_epsilon, offer.delta)
        rows = self._rows(offer, order.classifier.labels)
        made = answer_order(order, base, rows, classes=offer.classes, spending=spending, private=offer.epsilon)
        return made.to_bytes()

    def _check_order(self, offer: Offer, order: ForgetOrder) -> None:
        name, labels = self.settings.name, order.classifier.labels
        if self.settings.policy.private and offer.epsilon is None:
            raise Declined(f"node '{name}' sends nothing without privacy; its owner offers by --private")
        if offer.epsilon is not None and offer.begun >= offer.answers:
            raise Declined(
                f"offer {offer.id} allows {offer.answers} private answers, and as many were begun; its owner offers "
                "again, or by a larger --answers"
            )
        if unknown := sorted(set(offer.classes) - set(labels)):
            raise Declined(
                f"offer {offer.id} is of class '{unknown[0]}', which is not among the {len(labels)} of the order"
                f"{nearest(unknown[0], labels)}"
            )

    def _base(self, order: ForgetOrder) -> BaseModel:
        """Load the base model of an order. Raises Declined for a path that a coordinator names, or another model."""
        settings, policy = self.settings, self.settings.policy
        if settings.model is None and Path(order.reference).exists() and not policy.job_paths:
            raise Declined(
                f"node '{settings.name}' opens no file because an order names it ('{order.reference}'); its operator "
                "sets model in node.toml, or policy.job_paths=true"
            )
        model = {"path": str(settings.model)} if settings.model is not None else {"name": order.reference}
        device = {} if settings.device is None else {"device": settings.device}
        try:
            base = load_base(ModelConfig.model_validate({**model, **device, "dtype": order.dtype}), causal=False)
        except (ModelError, ValidationError) as error:
            raise Declined(f"node '{settings.name}' cannot load {order.reference} in {order.dtype}") from error
        found = weights_digest(base.model)
        if found != order.base:
            raise Declined(f"node '{settings.name}' has base model {found[:12]}, the order is for {order.base[:12]}")
        return base

    def _rows(self, offer: Offer, labels: Sequence[str]) -> Examples:
        path = self.directory / offer.id / ROWS
        try:
            tree = json.loads(path.read_bytes())
            texts, names = tuple(map(str, tree["texts"])), tuple(map(str, tree["labels"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: the offered rows cannot be read ({type(error).__name__}); offer again") from error
        places = {label: place for place, label in enumerate(labels)}
        if strange := sorted(set(names) - set(places)):
            raise DataError(
                f"label '{strange[0]}' is not among the {len(labels)} of the order{nearest(strange[0], labels)}"
            )
        return Examples(texts, tuple(places[name] for name in names))

    def _is_its_record(self, offer: Offer, data: bytes) -> bool:
        """Whether it is a record of the answer that is kept, signed by the key that came with the answer's order."""
        answer = self.directory / offer.id / ANSWER
        if not answer.is_file() or offer.key is None or len(data) > RECORD_BYTES:
            return False
        try:
            record = verified(json.loads(data), public=offer.key, who="the record")
            return bool(record["done"]["trained"]["answer"] == hashlib.sha256(answer.read_bytes()).hexdigest())
        except (LetheError, ValueError, KeyError, TypeError, RecursionError):
            return False

    # --- Files -------------------------------------------------------------------------------------------------------

    def _check_terms(self, classes: Sequence[str], epsilon: float | None, delta: float | None, answers: int) -> None:
        policy, who = self.settings.policy, f"node '{self.settings.name}'"
        if epsilon is not None and not 0 < epsilon < math.inf:
            raise ConfigError(f"--private {epsilon:g}: give an epsilon above 0, such as 8")
        if delta is not None and not 0 < delta < 1:
            raise ConfigError(f"--delta {delta:g}: give a delta between 0 and 1, such as 1e-5")
        if answers < 1:
            raise ConfigError(f"--answers {answers}: give at least 1")
        if policy.private and epsilon is None:
            raise ConfigError(f"{who} sends nothing without privacy (its policy); add --private EPSILON")
        if policy.max_epsilon is not None and epsilon is not None and epsilon > policy.max_epsilon:
            raise ConfigError(f"--private {epsilon:g}: {who} allows an epsilon of {policy.max_epsilon:g} at most")
        if delta is not None and delta > policy.max_delta:
            raise ConfigError(f"--delta {delta:g}: {who} allows a delta of {policy.max_delta:g} at most")
        if epsilon is not None and not classes:
            # Which labels its rows have would else show in whether an order can be answered.
            raise ConfigError("--private needs --class: the classes of the rows are public in a private answer")

    def _write(self, offer: Offer, rows: bytes) -> None:
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._alone():
            self._sweep()
            aside = self.directory / f".{offer.id}"
            try:
                aside.mkdir(mode=0o700)
                write_bytes(aside / ROWS, rows, mode=0o600)
                write_bytes(aside / OFFER, offer.model_dump_json(indent=1).encode())
                aside.rename(self.directory / offer.id)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
            sync(self.directory)

    def _note(self, name: str, **update: str | int | None) -> None:
        path = self.directory / name / OFFER
        told = Offer.model_validate_json(path.read_bytes())
        write_bytes(path, told.model_copy(update=update).model_dump_json(indent=1).encode())

    def _delete_rows(self, offer: Offer) -> None:
        place, left = self.directory / offer.id, 0
        for name in (ROWS, ANSWER):
            left += (place / name).exists()
            (place / name).unlink(missing_ok=True)
        if left:
            sync(place)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Change which offers there are alone: a moment."""
        handle = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _sweep(self) -> None:
        """Delete what a kill left of offers that were being made or withdrawn: it holds rows."""
        for aside in self.directory.glob(".*/"):
            shutil.rmtree(aside)


def _is_to(data: bytes, order: ForgetOrder) -> bool:
    """Whether an answer is one to this order; a damaged one is to none."""
    try:
        answer = ForgetAnswer.from_bytes(data)
    except WrongUpdate:
        return False
    return (answer.request, answer.block, answer.adapter) == (order.request, order.block, order.adapter)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
