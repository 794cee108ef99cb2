"""The steps of a request. Each can be repeated: what is there already is kept, and files appear whole or not at all."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora.errors import RunError
from lora.files import write_bytes
from server.export import export
from server.forgetting import evidence, signing
from server.forgetting.asking import ANSWER, NAME, ROWS, fitting, now
from server.forgetting.files import (
    Held,
    Manifest,
    RequestFile,
    check_digest,
    sha256,
    write_json,
    write_section,
)
from server.forgetting.sources import Sources
from server.forgetting.store import (
    ADAPTERS,
    AFTER,
    BEFORE,
    MANIFEST,
    PROTOTYPES,
    TRAINED,
    Store,
    adapter_digests,
)
from server.forgetting.users import users_of
from strategies.personal.erasure import StoredUsers
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.class_request import ClassRequest
from strategies.unlearning.classifier import Classifier
from strategies.unlearning.detector import Detector
from strategies.unlearning.folding import SERVED, SERVED_PLUS, forget_classes, plain
from strategies.unlearning.forgotten import Forgotten, GatedSlot, load_slot, save_slot
from strategies.unlearning.o3 import Unlearned
from strategies.unlearning.prototypes import Prototypes
from strategies.unlearning.remote import ForgetAnswer
from strategies.unlearning.stream import sampled
from tasks.examples import Examples
from tasks.exported import ExportedClassifier

PROTOTYPE_ROWS = 100
"""Most rows of a class that its prototype is the mean of."""


class Stage:
    """A store at work: the model in memory, and the steps that move a request on."""

    def __init__(self, store: Store, *, users: StoredUsers | None = None) -> None:
        self.store, self.users = store, users
        self.sources = Sources(store)
        self._served: tuple[Manifest, Forgotten] | None = None

    @property
    def served(self) -> Forgotten:
        """The classifier as the manifest says, loaded again where that has changed."""
        manifest = self.store.manifest
        if self._served is None or self._served[0] != manifest:
            self._served = (manifest, self.store.served())
        return self._served[1]

    @cached_property
    def labels(self) -> Mapping[str, int]:
        """Place of every label."""
        return {name: place for place, name in enumerate(self.store.classifier.labels)}

    def run(self, step: str, request: RequestFile) -> None:
        """Carry out one step of a request."""
        _ACTIONS[step](self, request)

    def stop(self, request: RequestFile, why: str) -> None:
        """Note why a request cannot go on, and remove what it left that is not served."""
        state = self.store.state(request.id)
        if self.store.manifest.of(request.id) is None:
            self.store.slot(request.id).unlink(missing_ok=True)
            self.store.detector(request.id).unlink(missing_ok=True)
            self.store.reservation(request.id).unlink(missing_ok=True)
        write_section(self.store.place(request.id) / "state.json", state.model_copy(update={"stopped": why}))

    def audited(self, request: RequestFile) -> AuditedRequest:
        """Read the rows of a request; divided in the same way every time. Raises RunError where they were changed."""
        path = self.store.work(request.id) / ROWS
        try:
            tree = json.loads(path.read_bytes())
            rows = Examples(tuple(tree["texts"]), tuple(int(label) for label in tree["labels"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: the request's rows cannot be read ({type(error).__name__}); ask again") from error
        if len(rows) != request.rows:
            raise RunError(f"{path}: holds {len(rows)} rows, and {request.rows} were accepted; ask again")
        return AuditedRequest(rows, seed=request.seed)

    def before(self, request: RequestFile) -> Forgotten:
        """Return what was served before a request, whether it has been accepted into the gate or not."""
        served = self.served
        return replace(served, requests=tuple(each for each in served.requests if each.request != request.id))


Action = Callable[[Stage, RequestFile], None]


def steps_of(request: RequestFile) -> tuple[str, ...]:
    """Return the steps of a request in order."""
    if request.kind == "user":
        return ("look before", "erase", "delete request", "sign record")
    made = {
        "client": ("accept answer",),
        "o3": ("train slot", "fit detector", "accept slot"),
        "gs-lora": ("train adapter",),
        "gs-lora++": ("train adapter",),
    }["client" if request.kind == "client" else request.method]
    return ("measure before", *made, "measure after", "delete request", "sign record")


# --- A classifier's requests -----------------------------------------------------------------------------------------


def _measure_before(stage: Stage, request: RequestFile) -> None:
    place = stage.store.place(request.id) / BEFORE
    if not place.is_file():
        write_json(place, _measured(stage, request, stage.before(request)))


def _measure_after(stage: Stage, request: RequestFile) -> None:
    place = stage.store.place(request.id) / AFTER
    if not place.is_file():
        write_json(place, _measured(stage, request, stage.served))


def _measured(stage: Stage, request: RequestFile, served: Forgotten) -> dict[str, Any]:
    held_back = None
    if request.kind != "client":
        audited = stage.audited(request)
        held_back = audited.examples.take(audited.held_back)
    manifest = stage.store.manifest
    others = [each for each in manifest.held if each.request != request.id]
    return evidence.measured(
        served, request, held_back=held_back, rows=stage.sources.evaluation, earlier=others, labels=stage.labels
    )


def _avoid(stage: Stage, request: RequestFile) -> set[int]:
    """Return the labels that are no answers any more."""
    own = request.classes if request.kind == "class" else ()
    return {stage.labels[name] for name in (*own, *stage.store.manifest.forgotten)}


def _train_slot(stage: Stage, request: RequestFile) -> None:
    store = stage.store
    if store.slot(request.id).is_file():
        return
    began, served, audited = time.process_time(), stage.before(request), stage.audited(request)
    block = store.reserve(request.id, blocks=served.frames.blocks)
    whole = request.kind == "class"
    made = served.train_slot(audited, block=block, avoid=_avoid(stage, request), whole_classes=whole, seed=request.seed)
    told = _trained(made, audited, cpu_s=time.process_time() - began)
    write_json(store.place(request.id) / TRAINED, {**told, "block": block})
    # The detector is made next; until then a slot has none.
    save_slot(store.slot(request.id), GatedSlot(request.id, block, made.slot, _NO_DETECTOR), frames=served.frames)


_NO_DETECTOR: Any = None


def _trained(made: Unlearned, audited: AuditedRequest, *, cpu_s: float) -> dict[str, Any]:
    losses = {"loss_first": made.losses[0], "loss_last": made.losses[-1]}
    return {"steps": made.steps, **losses, "cpu_s": round(cpu_s, 3), "audit": audited.audit.report()}


def _fit_detector(stage: Stage, request: RequestFile) -> None:
    path, audited = stage.store.detector(request.id), stage.audited(request)
    if path.is_file():
        return
    made = stage.before(request).fit_detector(audited)
    told = (stage.store.noted(request.id, TRAINED) or {}) | {"detector_audit": audited.audit.report()}
    write_json(stage.store.place(request.id) / TRAINED, told)
    made.save(path)


def _accept_slot(stage: Stage, request: RequestFile) -> None:
    if stage.store.manifest.of(request.id) is None:
        _hold(stage, request, request.classes if request.kind == "class" else ())
    _sweep(stage.store)
    stage.store.reservation(request.id).unlink(missing_ok=True)


def _accept_answer(stage: Stage, request: RequestFile) -> None:
    store, path = stage.store, stage.store.work(request.id) / ANSWER
    try:
        data = path.read_bytes()
        answer = ForgetAnswer.from_bytes(data)
    except OSError as error:
        raise RunError(f"{path}: the client's answer cannot be read ({error.strerror}); ask again") from error
    if store.manifest.of(request.id) is None:
        served = stage.before(request)
        gated = fitting(store, answer, served)
        gated.detector.save(store.detector(request.id))
        save_slot(store.slot(request.id), gated, frames=served.frames)
        told = {
            "block": gated.block, "a": answer.a, "answer": hashlib.sha256(data).hexdigest(),
            "statistics_noise": answer.noise, "privacy": _claimed(answer),
        }  # fmt: skip
        write_json(store.place(request.id) / TRAINED, told)
        _hold(stage, request, answer.classes)
    _sweep(store)
    store.reservation(answer.request).unlink(missing_ok=True)


def _claimed(answer: ForgetAnswer) -> dict[str, object] | None:
    """Return what a private answer claims, by its client's word: nobody else can check it."""
    if answer.epsilon is None:
        return None
    return {
        "epsilon": answer.epsilon, "delta": answer.delta, "unit": "row", "adjacency": "add/remove one",
        "sampling": "Poisson lots for the slot, all rows for the statistics", "claimed_by": "client",
    }  # fmt: skip


def _hold(stage: Stage, request: RequestFile, classes: tuple[str, ...]) -> None:
    """Serve a request's slot from now on: one renaming of the manifest."""
    store, manifest = stage.store, stage.store.manifest
    block, _ = load_slot(store.slot(request.id), frames=stage.served.frames)
    Detector.load(store.detector(request.id))
    held = Held(
        request=request.id,
        method="o3",
        classes=classes,
        block=block,
        slot=sha256(store.slot(request.id)),
        detector=sha256(store.detector(request.id)),
    )
    files = _without_prototypes(stage, request, classes or request.classes)
    update = {"held": (*manifest.held, held), "files": files}
    write_section(store.directory / MANIFEST, manifest.model_copy(update=update))


def _without_prototypes(stage: Stage, request: RequestFile, classes: Sequence[str]) -> Mapping[str, str]:
    """Write the prototypes anew without those of some classes, also where single rows of them are to be forgotten.

    Returns the adapter's files as the manifest will name them.
    """
    store, files = stage.store, stage.store.manifest.files
    known = _kept_prototypes(store)
    if known is None or not classes:
        return files
    place = store.directory / ADAPTERS / str(store.manifest.adapter)
    return {
        **_others(files),
        **_write_prototypes(place, request, known.without({stage.labels[each] for each in classes})),
    }


def _others(files: Mapping[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if not name.startswith(PROTOTYPES)}


def _write_prototypes(place: Path, request: RequestFile, prototypes: Prototypes) -> dict[str, str]:
    path = place / f"{PROTOTYPES}-{request.id}.safetensors"
    write_bytes(path, prototypes.to_bytes())
    return {path.name: sha256(path)}


def _sweep(store: Store) -> None:
    """Remove adapters, and prototypes, that the manifest names no longer."""
    manifest = store.manifest
    for old in (store.directory / ADAPTERS).iterdir():
        if old.name != manifest.adapter:
            shutil.rmtree(old)
    for path in (store.directory / ADAPTERS / str(manifest.adapter)).glob(f"{PROTOTYPES}*"):
        if path.name not in manifest.files:
            path.unlink()


def _train_adapter(stage: Stage, request: RequestFile) -> None:
    """Forget by GS-LoRA or GS-LoRA++, and serve the new adapter from now on; the one before is removed."""
    store, manifest = stage.store, stage.store.manifest
    if manifest.of(request.id) is None:
        began, exported, config = time.process_time(), store.exported(), store.config
        classifier = plain(exported, store.base())
        asked = _class_request(stage, request, classifier)
        made = forget_classes(
            exported,
            classifier,
            asked,
            config=SERVED_PLUS if request.method == "gs-lora++" else SERVED,
            epochs=config.replay_epochs,
            least_steps=config.replay_steps,
            seed=request.seed % 2**32,
        )
        told = {"rank": made.rank, "replay_rows": len(asked.retain), "cpu_s": round(time.process_time() - began, 3)}
        write_json(store.place(request.id) / TRAINED, told)
        _fold(stage, request, made, asked)
    _sweep(store)


def _fold(stage: Stage, request: RequestFile, made: ExportedClassifier, asked: ClassRequest) -> None:
    """Serve an adapter that a request was folded into: one renaming of the manifest."""
    store, manifest = stage.store, stage.store.manifest
    place = store.directory / ADAPTERS / request.id
    learner, values = made.over(store.base())
    export(learner, values, place, labels=made.labels)
    if asked.prototypes is not None:
        _write_prototypes(place, request, asked.prototypes.without(asked.gone))
    held = Held(request=request.id, method=request.method, classes=request.classes)
    update = {"adapter": request.id, "files": adapter_digests(place), "held": (*manifest.held, held)}
    write_section(store.directory / MANIFEST, manifest.model_copy(update=update))


def _class_request(stage: Stage, request: RequestFile, classifier: Classifier) -> ClassRequest:
    audited, train, config = stage.audited(request), stage.sources.splits.train, stage.store.config
    earlier = tuple(sorted(stage.labels[name] for name in stage.store.manifest.forgotten))
    classes = tuple(sorted(stage.labels[name] for name in request.classes))
    staying = set(stage.labels.values()) - {*earlier, *classes}
    replay = train.take(sampled(train, config.replay, classes=staying, seed=config.seed))
    used = audited.examples.take(audited.used)
    known = _kept_prototypes(stage.store)
    if known is None:
        others = train.take(sampled(train, PROTOTYPE_ROWS, classes=staying, seed=config.seed))
        rows = Examples((*others.texts, *used.texts), (*(others.labels or ()), *(used.labels or ())))
        known = Prototypes.of(classifier, rows, classes=classifier.classes)
    return ClassRequest(classes, used, replay, prototypes=known, earlier=earlier)


def _kept_prototypes(store: Store) -> Prototypes | None:
    """Return the class means of the model before the first request by GS-LoRA(++); None where this is the first."""
    manifest = store.manifest
    for name, digest in manifest.files.items():
        if name.startswith(PROTOTYPES):
            return Prototypes.load(check_digest(store.directory / ADAPTERS / str(manifest.adapter) / name, digest))
    return None


# --- A user's request ------------------------------------------------------------------------------------------------


def _name(stage: Stage, request: RequestFile) -> str:
    path = stage.store.work(request.id) / NAME
    try:
        name = path.read_text()
    except OSError as error:
        raise RunError(f"{path}: whom the request is about cannot be read ({error.strerror}); ask again") from error
    return name


def _look_before(stage: Stage, request: RequestFile) -> None:
    store = stage.store
    if (store.place(request.id) / BEFORE).is_file():
        return
    name = _name(stage, request)
    with users_of(store, stage.users) as users:
        pieces = users.pieces(name)
        # What is searched for afterwards is itself to be forgotten: it goes with the request.
        write_json(store.work(request.id) / "pieces.json", [piece.hex() for piece in pieces])
        found = {"events": users.events(name), "files_holding": len(users.holding(pieces)), "pieces": len(pieces)}
        write_json(store.place(request.id) / BEFORE, {**found, "others": users.others(name)})


def _erase(stage: Stage, request: RequestFile) -> None:
    store = stage.store
    if (store.place(request.id) / AFTER).is_file():
        return
    name = _name(stage, request)
    pieces = [bytes.fromhex(each) for each in json.loads((store.work(request.id) / "pieces.json").read_bytes())]
    with users_of(store, stage.users) as users:
        users.forget(name)
        found = {"events": users.events(name), "files_holding": len(users.holding(pieces)), "known": name in users}
        write_json(store.place(request.id) / AFTER, {**found, "others": users.others(name)})


# --- Both ------------------------------------------------------------------------------------------------------------


def _delete_request(stage: Stage, request: RequestFile) -> None:
    shutil.rmtree(stage.store.work(request.id), ignore_errors=True)
    if stage.store.work(request.id).exists():
        raise RunError(f"{stage.store.work(request.id)} cannot be deleted; check who owns it, and ask again")


def _sign_record(stage: Stage, request: RequestFile) -> None:
    store = stage.store
    if store.done(request.id):
        return
    before, after = store.noted(request.id, BEFORE), store.noted(request.id, AFTER)
    record = {
        "version": 1,
        "store": store.about.identity,
        "request": request.id,
        "number": request.number,
        "asked": _asked(request),
        "done": _done(stage, request),
        "measured": {"before": before, "after": after},
        "times": {"accepted": request.accepted, "done": now()},
        "software": _software(),
    }
    signing.write_record(store.record(request.id), record, key=store.key)


def _asked(request: RequestFile) -> dict[str, Any]:
    asked: dict[str, Any] = {"kind": request.kind, "method": request.method}
    if request.kind in ("user", "client"):
        asked["subject"] = request.subject
    if request.kind != "user":
        asked |= {"classes": list(request.classes), "rows": request.rows, "rows_from": request.source}
    return asked


def _done(stage: Stage, request: RequestFile) -> dict[str, Any]:
    store, held = stage.store, stage.store.manifest.of(request.id)
    told: dict[str, Any] = {"attempts": store.state(request.id).attempt, "request_deleted": True}
    if held is None:
        # Meta-LoRAs, routers and recommenders learned from everybody; they stay as they are.
        return told | {"erased": True, "shared_weights": "not unlearned"}
    part = store.classifier
    told |= {
        "base": part.base,
        "trained": store.noted(request.id, TRAINED),
        "forgets_whole_classes": list(held.classes),
    }
    if held.slot is None:
        return told | {"adapter": store.manifest.files}
    served = next(each for each in stage.served.requests if each.request == request.id)
    detector = {"sha256": held.detector, "numbers": served.detector.numbers, "threshold": served.detector.threshold}
    a = stage.served.frames.block(served.block).digest
    return told | {"slot": {"sha256": held.slot, "block": held.block, "a": a}, "detector": detector}


def _software() -> dict[str, str]:
    found = {}
    for name in ("lethe", "torch", "transformers", "dbos"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "source tree"
    return found


_ACTIONS: Mapping[str, Action] = {
    "look before": _look_before,
    "erase": _erase,
    "measure before": _measure_before,
    "train slot": _train_slot,
    "fit detector": _fit_detector,
    "accept slot": _accept_slot,
    "accept answer": _accept_answer,
    "train adapter": _train_adapter,
    "measure after": _measure_after,
    "delete request": _delete_request,
    "sign record": _sign_record,
}
