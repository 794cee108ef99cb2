"""What can be asked of a store, checked before it is accepted: a request that is accepted can be carried out."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from lora.errors import ConfigError, DataError, RunError, WrongUpdate, nearest
from lora.files import sync, write_bytes
from server.forgetting.files import (
    FOLDED,
    Method,
    RequestFile,
    StateFile,
    read_json,
    write_section,
)
from server.forgetting.sources import Sources
from server.forgetting.store import REQUEST, REQUESTS, STATE, WORK, Store
from server.forgetting.users import subject_of, users_of
from strategies.personal.erasure import StoredUsers
from strategies.unlearning.forgotten import Forgotten, GatedSlot, check_rows
from strategies.unlearning.remote import ForgetAnswer, ForgetOrder
from tasks.examples import Examples

ROWS, NAME, ANSWER = "rows.json", "name.txt", "answer.safetensors"


@dataclass(frozen=True)
class Wish:
    """A checked request before it is accepted: what may be told, and what is needed to carry it out."""

    kind: Literal["user", "class", "examples", "client"]
    method: Method
    content: tuple[Any, ...]
    """What tells it from others; only its keyed digest is kept."""
    work: dict[str, bytes] = field(default_factory=dict)
    """Files that are deleted when it is done."""
    about: dict[str, Any] = field(default_factory=dict)
    """Further fields of the request's file."""


@dataclass(frozen=True)
class Accepted:
    """A request that will be carried out, and whether it is this call that made it."""

    request: RequestFile
    new: bool
    again: bool = False
    """Whether it had stopped, and is begun again."""


def wish_user(store: Store, name: str, *, users: StoredUsers | None = None) -> Wish:
    """Ask for a user to be deleted. Raises DataError with the nearest name for an unknown one."""
    with users_of(store, users) as known:
        if name in known or not _forgotten_user(store, name):
            known.check(name)
        there = name in known
    # A user who came back after a request was done is another user: the number of earlier requests tells them apart.
    earlier = [each for each in store.requests() if each.subject == subject_of(store, "user", name)]
    done = sum(store.done(each.id) for each in earlier)
    round_ = done if there else max(0, done - 1)
    return Wish(
        "user",
        "erase",
        (name, round_),
        work={NAME: name.encode()},
        about={"subject": subject_of(store, "user", name), "source": "users"},
    )


def _forgotten_user(store: Store, name: str) -> bool:
    return any(each.subject == subject_of(store, "user", name) for each in store.requests())


def wish_classes(store: Store, classes: Sequence[str], *, rows: Examples | None = None, method: Method = "o3") -> Wish:
    """Ask for whole classes to be forgotten, by rows of them or by the run's own training rows.

    Raises DataError for an unknown class, rows of other classes, too few rows, or where no label would be left.
    """
    sources, labels = Sources(store), store.classifier.labels
    named = tuple(dict.fromkeys(name.strip() for name in classes if name.strip()))
    if not named:
        raise DataError("a request names no class; name at least one, such as --class travel,work")
    _check_known(named, labels)
    _check_left(store, named)
    whole = sources.of_classes(named) if rows is None else rows
    _check_labels(whole, named, labels)
    if method in FOLDED:
        _check_replay(sources, method)
    about = {"classes": named, "rows": len(whole), "source": "run" if rows is None else "file"}
    wish = Wish("class", method, (method, sorted(named), _rows(whole)), {ROWS: rows_file(whole)}, about)
    if method in FOLDED and not _known(store, wish):
        _check_not_forgotten(store, named)
    return wish


def check_method(name: str, *, whole_classes: bool = True) -> Method:
    """Return a method by name. Raises ConfigError for an unknown one, and for GS-LoRA(++) where single examples go."""
    known: tuple[Method, ...] = ("o3", *FOLDED)
    found = next((each for each in known if each == name), None)
    if found is None:
        raise ConfigError(f"--method {name}: there is no such method{nearest(name, known)}")
    if found in FOLDED and not whole_classes:
        raise ConfigError(f"--method {found} forgets whole classes; name them by --class, or use o3 for examples")
    return found


def wish_examples(store: Store, rows: Examples) -> Wish:
    """Ask for exactly these rows to be forgotten; their classes stay. Raises DataError for none or too few."""
    labels = store.classifier.labels
    if not len(rows):
        raise DataError("a request without rows forgets nothing; give some")
    check_rows(len(rows))
    found = tuple(labels[label] for label in sorted(set(rows.labels or ())))
    if len(labels) - len(set(store.manifest.forgotten)) < 2:
        raise DataError("no label but the rows' own is left to answer with; leave the rows out, or retrain")
    return Wish("examples", "o3", (_rows(rows),), {ROWS: rows_file(rows)}, {"classes": found, "rows": len(rows)})


def wish_client(store: Store, name: str, data: bytes) -> Wish:
    """Ask for what a client trained by an order to be served. Raises WrongUpdate for an answer to no order."""
    answer = ForgetAnswer.from_bytes(data)
    _check_known(answer.classes, store.classifier.labels)
    about = {"classes": answer.classes, "rows": answer.rows, "source": "client", "noise": answer.noise}
    wish = Wish(
        "client",
        "o3",
        (answer.request, name, data.hex()),
        {ANSWER: data},
        {**about, "block": answer.block, "subject": subject_of(store, "client", name)},
    )
    if _known(store, wish):
        return wish
    order = read_json(store.reservation(answer.request))
    if order is None:
        raise WrongUpdate(f"the answer is to order {answer.request}, which is not open here; make a new order")
    if order["client"] != subject_of(store, "client", name) or order["block"] != answer.block:
        raise WrongUpdate(f"order {answer.request} was made for another client or block; give the client it was for")
    _check_left(store, answer.classes)
    fitting(store, answer, store.served())
    return wish


def new_order(store: Store, client: str, *, offer: str | None = None) -> ForgetOrder:
    """Make the order that a client forgets its rows by; an open one of the client's is given again.

    Its block of the frame is the client's until the answer is served. An `offer` of the client's has an order of its
    own, whatever else the client was asked.
    """
    served, part = store.served(), store.classifier
    subject = subject_of(store, "client", client)
    asked = sum(each.subject == subject for each in store.requests())
    name = store.keyed("order", client, asked if offer is None else offer)[:12]
    return ForgetOrder(
        request=name,
        block=store.reserve(name, blocks=served.frames.blocks, client=subject),
        base=part.base,
        reference=part.reference,
        adapter=adapter_digest(store),
        classifier=store.exported(),
        own_rank=part.own_rank,
        config=store.config,
        key=store.about.public_key,
        dtype=part.model.dtype,
        forgotten=store.manifest.forgotten,
    )


def adapter_digest(store: Store) -> str:
    """Return a digest over the files of the adapter that is served now, 64 hex digits."""
    return hashlib.sha256(json.dumps(store.manifest.files, sort_keys=True).encode()).hexdigest()


def fitting(store: Store, answer: ForgetAnswer, served: Forgotten) -> GatedSlot:
    """Return what a client's answer gives to be served. Raises WrongUpdate where it was made for another adapter."""
    if answer.adapter != adapter_digest(store):
        raise WrongUpdate(
            f"the answer to order {answer.request} was trained over adapter {answer.adapter[:12]}, and "
            f"{adapter_digest(store)[:12]} is served since; make a new order for the client"
        )
    return answer.gated(answer.request, served)


def accept(store: Store, wish: Wish) -> Accepted:
    """Accept a wish durably, once: the same wish again gives the first request.

    One that had stopped is begun again. What was accepted is there as a whole after a kill at any instant, or not.
    """
    digest = store.keyed(wish.kind, *wish.content)
    with store.accepting():
        sweep(store)
        known = store.requests()
        for each in known:
            if each.digest == digest:
                return Accepted(each, new=False, again=_again(store, each))
        if wish.kind in ("class", "client"):
            # Another process may have asked for the rest since the wish was checked.
            _check_left(store, wish.about["classes"])
        request = RequestFile(
            id=digest[:12],
            number=1 + max((each.number for each in known), default=0),
            kind=wish.kind,
            method=wish.method,
            digest=digest,
            seed=store.config.seed + int(digest[:8], 16),
            accepted=now(),
            **wish.about,
        )
        _write(store, request, wish.work)
    return Accepted(request, new=True)


def sweep(store: Store) -> None:
    """Delete what a kill left of requests that were never accepted: it holds what they were about."""
    for aside in (store.directory / REQUESTS).glob(".*"):
        shutil.rmtree(aside)


def _write(store: Store, request: RequestFile, work: dict[str, bytes]) -> None:
    final = store.place(request.id)
    aside = final.with_name(f".{request.id}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        (aside / WORK).mkdir(parents=True)
        for name, data in work.items():
            write_bytes(aside / WORK / name, data, mode=0o600)
        write_section(aside / REQUEST, request)
        aside.rename(final)
        sync(store.directory / REQUESTS)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise RunError(f"{final} cannot be written ({error.strerror}); nothing was accepted: make room") from error


def _again(store: Store, request: RequestFile) -> bool:
    state = store.state(request.id)
    if state.stopped is None:
        return False
    write_section(store.place(request.id) / STATE, StateFile(attempt=state.attempt + 1))
    return True


def _check_known(classes: Sequence[str], labels: Sequence[str]) -> None:
    for name in classes:
        if name not in labels:
            raise DataError(f"class '{name}' is not among the {len(labels)} of the store{nearest(name, labels)}")


def _check_left(store: Store, classes: Sequence[str]) -> None:
    """Raise DataError where no label would be left to answer with."""
    left = set(store.classifier.labels) - set(classes) - set(store.manifest.forgotten)
    for each in store.unfinished():
        left -= set(each.classes) if each.kind in ("class", "client") else set()
    if not left:
        raise DataError(
            f"all {len(store.classifier.labels)} classes would be forgotten, and none be left to answer with; leave "
            "one out, or delete the model instead"
        )


def _known(store: Store, wish: Wish) -> bool:
    """Whether the same was asked for before."""
    return any(each.digest == store.keyed(wish.kind, *wish.content) for each in store.requests())


def _check_not_forgotten(store: Store, classes: Sequence[str]) -> None:
    """Raise DataError for a class that was forgotten: GS-LoRA has nothing left to take from it."""
    pending = {name for each in store.unfinished() if each.kind in ("class", "client") for name in each.classes}
    gone = [name for name in classes if name in store.manifest.forgotten or name in pending]
    if gone:
        raise DataError(
            f"class '{gone[0]}' is forgotten already, or asked for; leave it out, or use --method o3 for further rows"
        )


def _check_labels(rows: Examples, classes: Sequence[str], labels: Sequence[str]) -> None:
    if not len(rows):
        raise DataError(f"there is no row of {', '.join(classes)}; give some by --examples FILE")
    strange = {labels[label] for label in rows.labels or ()} - set(classes)
    if strange:
        raise DataError(
            f"rows are of class '{min(strange)}', which the request does not name; name it too, leave the rows out, or "
            "leave --class out to forget these rows alone"
        )
    check_rows(len(rows))


def _check_replay(sources: Sources, method: Method) -> None:
    """Raise RunError where no row is left to train beside the request."""
    try:
        _ = sources.splits
    except RunError as error:
        raise RunError(
            f"--method {method} needs rows of what stays: {error}; use --method o3, which needs none"
        ) from error


def _rows(rows: Examples) -> list[list[Any]]:
    return sorted([text, label] for text, label in zip(rows.texts, rows.labels or (), strict=True))


def rows_file(rows: Examples) -> bytes:
    """Return rows as the bytes of a work file."""
    return json.dumps({"texts": list(rows.texts), "labels": list(rows.labels or ())}, ensure_ascii=False).encode()


def now() -> str:
    """Return the time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
