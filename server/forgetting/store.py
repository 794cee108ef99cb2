"""A forgetting store: one served model, the requests that were made of it, and one process at a time to work on it."""

import fcntl
import hashlib
import hmac
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from lora.errors import ModelError, RunError, nearest
from server.forgetting import signing
from server.forgetting.files import (
    ClassifierPart,
    Manifest,
    RequestFile,
    StateFile,
    StoreFile,
    check_digest,
    read_json,
    read_section,
    sha256,
    write_json,
    write_section,
)
from strategies.unlearning.config import ForgettingConfig
from strategies.unlearning.detector import Detector
from strategies.unlearning.forgotten import Forgotten, GatedSlot, load_slot
from strategies.unlearning.frames import next_block
from tasks.config import ModelConfig
from tasks.exported import ExportedClassifier
from tasks.models import BaseModel, load_base, weights_digest

STORE, MANIFEST, KEY = "store.json", "manifest.json", "key.pem"
ADAPTERS, SLOTS, DETECTORS, REQUESTS, RECORDS, RESERVED = (
    "adapters",
    "slots",
    "detectors",
    "requests",
    "records",
    "reserved",
)
WORK, REQUEST, STATE, BEFORE, TRAINED, AFTER = (
    "work",
    "request.json",
    "state.json",
    "before.json",
    "trained.json",
    "after.json",
)
PROTOTYPES = "prototypes"
"""How the file begins that lies beside the adapter of a request by GS-LoRA(++): class means of the model before the
first such request. Its name ends with the request that it was written for."""
_FIRST = "first"
_POLL = 0.2

Say = Callable[[str], None]


class Store:
    """The directory of a store. Reading needs no lock; `held` is for whoever works on requests."""

    def __init__(self, directory: Path) -> None:
        """Open a store. Raises RunError where there is none."""
        self.directory = directory
        if not (directory / STORE).is_file():
            raise RunError(f"{directory} is no forgetting store (no {STORE}); make one: lethe forget init {directory}")
        self.about = read_section(directory / STORE, StoreFile)

    @property
    def manifest(self) -> Manifest:
        """What is served now."""
        return read_section(self.directory / MANIFEST, Manifest)

    @property
    def classifier(self) -> ClassifierPart:
        """The classifier's part. Raises RunError for a store without one."""
        if self.about.classifier is None:
            raise RunError(f"{self.directory} serves no classifier, only users; name a store with one, or --user NAME")
        return self.about.classifier

    @property
    def config(self) -> ForgettingConfig:
        """How it forgets."""
        return self.about.forgetting

    def outside(self, path: str | None) -> Path | None:
        """Return a path that the store notes relative to itself."""
        return None if path is None else (self.directory / path).resolve()

    def keyed(self, *parts: Any) -> str:
        """Return a digest that nobody can guess at without the store's salt, 64 hex digits."""
        text = json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()
        return hmac.new(bytes.fromhex(self.about.salt), text, hashlib.sha256).hexdigest()

    # --- Requests ----------------------------------------------------------------------------------------------------

    def place(self, request: str) -> Path:
        """Return the directory of a request."""
        return self.directory / REQUESTS / request

    def work(self, request: str) -> Path:
        """Return the directory of what is to be forgotten, while a request needs it."""
        return self.place(request) / WORK

    def record(self, request: str) -> Path:
        """Return the file of a request's record."""
        return self.directory / RECORDS / f"{request}.json"

    def slot(self, request: str) -> Path:
        """Return the file of a request's slot."""
        return self.directory / SLOTS / f"{request}.safetensors"

    def detector(self, request: str) -> Path:
        """Return the file of a request's detector."""
        return self.directory / DETECTORS / f"{request}.safetensors"

    def requests(self) -> list[RequestFile]:
        """Return all accepted requests in order."""
        found = [read_section(path, RequestFile) for path in (self.directory / REQUESTS).glob(f"[!.]*/{REQUEST}")]
        return sorted(found, key=lambda each: each.number)

    def request(self, name: str) -> RequestFile:
        """Return a request by its id or the start of it. Raises RunError for an unknown or ambiguous one."""
        known = {each.id: each for each in self.requests()}
        found = [each for key, each in known.items() if key.startswith(name)] if name else []
        if len(found) == 1:
            return found[0]
        if found:
            raise RunError(f"'{name}' begins {len(found)} requests: {', '.join(each.id for each in found)}; say more")
        raise RunError(f"there is no request '{name}' in {self.directory}{nearest(name, known)}")

    def state(self, request: str) -> StateFile:
        """Return how often a request was begun, and why it stopped."""
        path = self.place(request) / STATE
        return read_section(path, StateFile) if path.is_file() else StateFile()

    def done(self, request: str) -> bool:
        """Whether a request has its record."""
        return self.record(request).is_file()

    def unfinished(self) -> list[RequestFile]:
        """Return the requests that wait or were interrupted, in order; not those that stopped."""
        open_ones = [each for each in self.requests() if not self.done(each.id)]
        return [each for each in open_ones if self.state(each.id).stopped is None]

    def noted(self, request: str, name: str) -> Any:
        """Return what a step wrote down; None where it has not."""
        return read_json(self.place(request) / name)

    # --- The classifier ----------------------------------------------------------------------------------------------

    def base(self) -> BaseModel:
        """Load the base model. Raises ModelError where its weights are not those that the store was made with."""
        part = self.classifier
        base = load_base(part.model, causal=False)
        found = weights_digest(base.model)
        if found != part.base:
            raise ModelError(
                f"the base model {part.reference} has digest {found[:12]}, and the store {self.directory} was made "
                f"with {part.base[:12]}: slots and detectors are of that one; restore it, or make a new store"
            )
        return base

    def exported(self) -> ExportedClassifier:
        """Read the adapter that is served now. Raises RunError for a damaged file."""
        manifest = self.manifest
        if manifest.adapter is None:
            raise RunError(f"{self.directory} has no adapter; make the store again")
        directory = self.directory / ADAPTERS / manifest.adapter
        for name, digest in sorted(manifest.files.items()):
            check_digest(directory / name, digest)
        return ExportedClassifier.read(directory, max_length=self.classifier.max_length)

    def served(self, base: BaseModel | None = None) -> Forgotten:
        """Load what is served now: the classifier with the slots and detectors of all accepted requests.

        Raises ModelError for another base model, RunError for a damaged file.
        """
        learner, values = self.exported().over(base or self.base())
        bare = Forgotten(learner, values, self.config, self.classifier.own_rank)
        return bare.beside(*self.gated(bare))

    def gated(self, bare: Forgotten) -> list[GatedSlot]:
        """Load slots and detectors of all accepted requests. Raises RunError for a damaged file."""
        found = []
        for each in self.manifest.held:
            if each.slot is not None:
                block, slot = load_slot(check_digest(self.slot(each.request), each.slot), frames=bare.frames)
                detector = Detector.load(check_digest(self.detector(each.request), each.detector))
                found.append(GatedSlot(each.request, block, slot, detector))
        return found

    def reservation(self, name: str) -> Path:
        """Return the file that keeps a block of the frame for a request, or for an order to a client."""
        return self.directory / RESERVED / f"{name}.json"

    def reserve(self, name: str, *, blocks: int, **about: str) -> int:
        """Return the block of a request or order: the one that it was given before, else the least used one."""
        with self.accepting():
            kept = read_json(self.reservation(name))
            if kept is None:
                kept = {**about, "block": next_block(self._blocks(), blocks=blocks)}
                write_json(self.reservation(name), kept)
        return int(kept["block"])

    def _blocks(self) -> list[int]:
        """Return the blocks of accepted requests and the reserved ones."""
        used = {each.request: each.block for each in self.manifest.held if each.block is not None}
        kept = {path.stem: read_json(path) for path in sorted((self.directory / RESERVED).glob("[!.]*.json"))}
        return [*used.values(), *(int(each["block"]) for name, each in kept.items() if each and name not in used)]

    # --- Locks -------------------------------------------------------------------------------------------------------

    @contextmanager
    def held(self, *, say: Say | None = None, wait: bool = True) -> Iterator[None]:
        """Work on the store alone; waits for another process, saying so once. Raises RunError with `wait` off."""
        with self._locked(".lock", say=say, wait=wait):
            yield

    @contextmanager
    def accepting(self) -> Iterator[None]:
        """Accept a request alone: a moment, also while another process works."""
        with self._locked(".accept", say=None, wait=True):
            yield

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Take what a federation's nodes offer alone: two would order the same of one node, and pay twice."""
        with self._locked(".collect", say=None, wait=True):
            yield

    @property
    def busy(self) -> bool:
        """Whether some process works on the store."""
        try:
            with self._locked(".lock", say=None, wait=False):
                return False
        except RunError:
            return True

    @contextmanager
    def _locked(self, name: str, *, say: Say | None, wait: bool) -> Iterator[None]:
        handle = os.open(self.directory / name, os.O_RDWR | os.O_CREAT, 0o600)
        told = False
        try:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not wait:
                        message = f"another process works on {self.directory}; wait for it, or stop it"
                        raise RunError(message) from None
                if say is not None and not told:
                    say(f"another process works on {self.directory}; waiting for it")
                    told = True
                time.sleep(_POLL)
            yield
        finally:
            os.close(handle)

    @cached_property
    def key(self) -> signing.Key:
        """The store's private key. Raises RunError for a missing or damaged one."""
        return signing.read_key(self.directory / KEY, public=self.about.public_key)


def new_store(
    directory: Path,
    *,
    classifier: tuple[ModelConfig, Path, int] | None = None,
    users: Path | None = None,
    run: Path | None = None,
    evaluation: Path | None = None,
    config: ForgettingConfig | None = None,
) -> Store:
    """Make a store: written aside and renamed. `classifier` is base model, exported adapter and longest input.

    Raises RunError where the directory exists, ModelError for an adapter that does not fit its base.
    """
    if directory.exists():
        raise RunError(f"{directory} exists already; name another directory, or go on with the store in it")
    config = config or ForgettingConfig()
    aside = directory.with_name(f".{directory.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    for name in (ADAPTERS, SLOTS, DETECTORS, REQUESTS, RECORDS, RESERVED):
        (aside / name).mkdir(parents=True)
    try:
        public = signing.new_key(aside / KEY)
        part = None if classifier is None else _copied(aside, *classifier, config=config)
        about = StoreFile(
            identity=secrets.token_hex(8),
            salt=secrets.token_hex(32),
            public_key=public,
            classifier=part,
            users=_relative(users, directory),
            run=_relative(run, directory),
            evaluation=_relative(evaluation, directory),
            forgetting=config,
        )
        write_section(aside / STORE, about)
        (aside / STORE).chmod(0o600)
        write_section(aside / MANIFEST, Manifest() if part is None else _first_manifest(aside))
        aside.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Store(directory)


def _copied(
    aside: Path, model: ModelConfig, adapter: Path, max_length: int, *, config: ForgettingConfig
) -> ClassifierPart:
    """Copy the adapter into the store, and note what it stands on."""
    exported = ExportedClassifier.read(adapter, max_length=max_length)
    base = load_base(model, causal=False)
    digest, reference = weights_digest(base.model), base.reference
    learner, values = exported.over(base)
    # A rank of which no block fits is refused now, not at the first request.
    _ = Forgotten(learner, values, config, exported.rank).frames
    learner.adapted.detach()
    shutil.copytree(adapter, aside / ADAPTERS / _FIRST)
    # A precision that the machine chooses would be another model on another machine.
    precision = str(base.placement.dtype).removeprefix("torch.")
    return ClassifierPart(
        model=model.model_copy(update={"dtype": precision}),
        reference=reference,
        base=digest,
        max_length=max_length,
        own_rank=exported.rank,
        labels=exported.labels,
    )


def _first_manifest(aside: Path) -> Manifest:
    return Manifest(adapter=_FIRST, files=adapter_digests(aside / ADAPTERS / _FIRST))


def adapter_digests(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of an adapter."""
    return {path.name: sha256(path) for path in sorted(directory.iterdir()) if path.is_file()}


def _relative(path: Path | None, store: Path) -> str | None:
    return None if path is None else os.path.relpath(path.resolve(), store.resolve())
