"""What a node's owner wants forgotten: rows and terms, kept at the node until a signed record says that it is done."""

import json
import secrets
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from client.forgetting import Spending, answer_order
from client.job import open_ledger
from client.node import NodeSettings
from lora.config import Section
from lora.errors import ConfigError, DataError, LetheError, RunError, nearest
from lora.files import sync, write_bytes
from strategies.federated.wire import Declined
from strategies.unlearning.forgotten import check_rows
from strategies.unlearning.remote import ForgetAnswer, ForgetOrder
from strategies.unlearning.wire import Letter
from tasks.config import DataConfig, ModelConfig
from tasks.data import labelled_rows
from tasks.examples import Examples
from tasks.models import load_base

FOLDER = "forgetting"
OFFER, ROWS, ANSWER, RECORD = "offer.json", "rows.json", "answer.safetensors", "record.json"
DELTA = 1e-5

State = Literal["open", "answered", "done"]


class Offer(Section):
    """`offer.json`: the terms on which a node's owner has rows forgotten."""

    id: str
    run: str
    """Name of the run whose model learned them."""
    rows: int
    classes: tuple[str, ...] = ()
    """Classes that the rows stand for as a whole; empty for these rows alone."""
    epsilon: float | None = Field(None, gt=0)
    """Of the whole answer; null: it is not private."""
    delta: float = Field(DELTA, gt=0, lt=1)
    made: str
    """Time, UTC."""
    problem: str | None = None
    """Why the last order could not be answered. It may quote rows, and stays here."""


class Offers:
    """A node's offers, each a directory in the node's state. An order is answered by what is offered, and nothing else.

    | case | what happens |
    |---|---|
    | killed before the answer is written | trained again; a private answer is charged again, never refunded |
    | the same order again | the same answer, from its file: nothing is trained, drawn or charged |
    | an order over another adapter | another answer, charged as such |
    | the record of another answer | Declined; rows and answer stay |
    | the record, twice | taken once; the rows are gone already |
    """

    def __init__(self, settings: NodeSettings) -> None:
        self.settings, self.directory = settings, settings.state / FOLDER

    def make(
        self,
        run: str,
        examples: Path,
        *,
        classes: Sequence[str] = (),
        epsilon: float | None = None,
        delta: float | None = None,
    ) -> Offer:
        """Offer the rows of a file with text and label; they are copied here, for their owner alone.

        Raises DataError for rows that cannot be used, ConfigError where the node's policy allows no such answer.
        """
        self._check_policy(epsilon, delta)
        texts, labels = labelled_rows(DataConfig(path=str(examples)))
        check_rows(len(texts))
        if classes and (strange := sorted(set(labels) - set(classes))):
            raise DataError(
                f"{examples}: rows are of class '{strange[0]}', which --class does not name; leave them out"
            )
        offer = Offer(
            id=secrets.token_hex(6), run=run, rows=len(texts), classes=tuple(classes), epsilon=epsilon,
            delta=min(DELTA, self.settings.policy.max_delta) if delta is None else delta, made=_now(),
        )  # fmt: skip
        self._write(offer, json.dumps({"texts": texts, "labels": labels}, ensure_ascii=False).encode())
        return offer

    def all(self, run: str | None = None) -> list[Offer]:
        """Return all offers in the order of their making, or those about a run."""
        found = [self._read(path) for path in self.directory.glob(f"[!.]*/{OFFER}")]
        return sorted((each for each in found if run in (None, each.run)), key=lambda each: (each.made, each.id))

    def find(self, name: str) -> Offer:
        """Return an offer by its id or the start of it. Raises RunError that names the nearest."""
        known = {each.id: each for each in self.all()}
        found = [each for key, each in known.items() if name and key.startswith(name)]
        if len(found) != 1:
            raise RunError(f"there is no offer '{name}' in {self.directory}{nearest(name, known)}")
        return found[0]

    def state(self, offer: Offer) -> State:
        """Return where an offer stands."""
        place = self.directory / offer.id
        return "done" if (place / RECORD).is_file() else "answered" if (place / ANSWER).is_file() else "open"

    def withdraw(self, offer: Offer) -> None:
        """Delete an offer with its rows. What was sent of it stays sent, and its charge stays."""
        place = self.directory / offer.id
        aside = place.with_name(f".{offer.id}")
        place.rename(aside)
        shutil.rmtree(aside)

    def answer(self, letter: Letter, *, client: str) -> bytes:
        """Train what an offer's order asks for, or return what was made by the same order before.

        `client` is the name that the node's ledger knows its data by: what forgetting costs is added to what training
        has cost.

        Raises Declined where the node's policy or its offers allow none, else whatever training raises, which the offer
        notes.
        """
        offer = self._offered(letter)
        path = self.directory / offer.id / ANSWER
        # To the byte: the server knows an answer that it has seen before by its digest.
        kept = path.read_bytes() if path.is_file() else None
        if not letter.data:
            if kept is None:
                raise Declined(f"offer {offer.id} has no answer yet; send an order")
            return kept
        order = ForgetOrder.from_bytes(letter.data)
        if kept is not None and _is_to(ForgetAnswer.from_bytes(kept), order):
            return kept
        if self.settings.policy.private and offer.epsilon is None:
            raise Declined(f"node '{self.settings.name}' sends nothing without privacy; its owner offers by --private")
        try:
            made = self._made(offer, order, client)
        except LetheError as error:
            self._note(offer, problem=str(error))
            raise
        data = made.to_bytes()
        write_bytes(path, data, mode=0o600)
        self._note(offer, problem=None)
        return data

    def close(self, letter: Letter) -> None:
        """Keep the record of an offer's answer, and delete rows and answer. Raises Declined for any other record."""
        offer = self._offered(letter)
        place = self.directory / offer.id
        if not (place / RECORD).is_file():
            answer = place / ANSWER
            if not answer.is_file() or _served_a(letter.data) != ForgetAnswer.from_bytes(answer.read_bytes()).a:
                raise Declined(f"the record is not about the answer of offer {offer.id}; its rows are kept")
            write_bytes(place / RECORD, letter.data)
        for name in (ROWS, ANSWER):
            (place / name).unlink(missing_ok=True)
        sync(place)

    def _offered(self, letter: Letter) -> Offer:
        known = {each.id: each for each in self.all()}
        if letter.offer not in known:
            raise Declined(f"node '{self.settings.name}' offers no '{letter.offer}'")
        return known[letter.offer]

    def _made(self, offer: Offer, order: ForgetOrder, client: str) -> ForgetAnswer:
        settings, policy = self.settings, self.settings.policy
        model = {"path": str(settings.model)} if settings.model is not None else {"name": order.reference}
        device = {} if settings.device is None else {"device": settings.device}
        base = load_base(ModelConfig.model_validate(model | device), causal=False)
        spending = Spending(open_ledger(settings.ledger), client, policy.max_epsilon, offer.delta)
        rows = self._rows(offer, order.classifier.labels)
        return answer_order(order, base, rows, classes=offer.classes, spending=spending, private=offer.epsilon)

    def _rows(self, offer: Offer, labels: Sequence[str]) -> Examples:
        path = self.directory / offer.id / ROWS
        try:
            tree = json.loads(path.read_bytes())
            texts, names = tuple(map(str, tree["texts"])), tuple(map(str, tree["labels"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path}: the offered rows cannot be read ({type(error).__name__}); offer them again"
            ) from error
        places = {label: place for place, label in enumerate(labels)}
        if strange := sorted(set(names) - set(places)):
            raise DataError(
                f"label '{strange[0]}' is not among the {len(labels)} of the order{nearest(strange[0], labels)}"
            )
        return Examples(texts, tuple(places[name] for name in names))

    def _check_policy(self, epsilon: float | None, delta: float | None) -> None:
        policy, who = self.settings.policy, f"node '{self.settings.name}'"
        if policy.private and epsilon is None:
            raise ConfigError(f"{who} sends nothing without privacy (its policy); add --private EPSILON")
        if policy.max_epsilon is not None and (epsilon or 0.0) > policy.max_epsilon:
            raise ConfigError(f"--private {epsilon:g}: {who} allows an epsilon of {policy.max_epsilon:g} at most")
        if delta is not None and delta > policy.max_delta:
            raise ConfigError(f"--delta {delta:g}: {who} allows a delta of {policy.max_delta:g} at most")

    def _write(self, offer: Offer, rows: bytes) -> None:
        aside = self.directory / f".{offer.id}"
        aside.mkdir(parents=True, mode=0o700)
        write_bytes(aside / ROWS, rows, mode=0o600)
        write_bytes(aside / OFFER, offer.model_dump_json(indent=1).encode())
        aside.rename(self.directory / offer.id)
        sync(self.directory)

    def _read(self, path: Path) -> Offer:
        try:
            return Offer.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            first = str(error).splitlines()[0]
            raise RunError(f"{path}: cannot be read ({first}); delete {path.parent}, and offer again") from error

    def _note(self, offer: Offer, *, problem: str | None) -> None:
        if problem != offer.problem:
            told = offer.model_copy(update={"problem": problem})
            write_bytes(self.directory / offer.id / OFFER, told.model_dump_json(indent=1).encode())


def _is_to(answer: ForgetAnswer, order: ForgetOrder) -> bool:
    return (answer.request, answer.block, answer.adapter) == (order.request, order.block, order.adapter)


def _served_a(record: bytes) -> Any:
    """Return the digest of the A that a record says an answer was trained over; None for anything else."""
    try:
        return json.loads(record)["record"]["done"]["trained"]["a"]
    except (ValueError, KeyError, TypeError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
