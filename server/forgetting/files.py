"""What a forgetting store writes, as sections in JSON files: always aside, synced, and renamed."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from lora.config import Section
from lora.errors import RunError
from lora.files import write_bytes
from strategies.unlearning.config import ForgettingConfig
from tasks.config import ModelConfig

VERSION = 1
Kind = Literal["user", "class", "examples", "client"]
Method = Literal["erase", "o3", "gs-lora", "gs-lora++"]
FOLDED: tuple[Method, ...] = ("gs-lora", "gs-lora++")
"""Methods whose adapter is folded into the served one."""
S = TypeVar("S", bound=Section)


class ClassifierPart(Section):
    """The classifier that a store serves."""

    model: ModelConfig
    """The base model, as whoever made the store loads it."""
    reference: str
    """Name by which others know it."""
    base: str
    """Digest of its weights."""
    max_length: int
    """Longest input, tokens."""
    own_rank: int
    """Rank of the adapter as it was at first."""
    labels: tuple[str, ...]
    """All labels in their order."""


class StoreFile(Section):
    """`store.json`: what never changes about a store."""

    version: Literal[1] = VERSION  # type: ignore[assignment]
    identity: str
    """Random name of the store, part of every record."""
    salt: str
    """Key of all digests of names and rows: without it a record tells nothing of either."""
    public_key: str
    """Ed25519, 64 hex digits."""
    classifier: ClassifierPart | None = None
    """The classifier, if the store has one."""
    users: str | None = None
    """The directory of users, relative to the store, if it has some."""
    run: str | None = None
    """The run that it was made of, relative to the store."""
    evaluation: str | None = None
    """A file of rows that nothing was trained on, relative to the store; null: the run's test split."""
    forgetting: ForgettingConfig = ForgettingConfig()


class Held(Section):
    """What is served of one accepted request."""

    request: str
    method: Method
    classes: tuple[str, ...] = ()
    """Classes that were forgotten as a whole."""
    block: int | None = None
    """Block of the orthonormal frame."""
    slot: str | None = None
    """SHA-256 of its file."""
    detector: str | None = None
    """SHA-256 of its file."""


class Manifest(Section):
    """`manifest.json`: what is served now. Its renaming is the instant at which a request is accepted."""

    version: Literal[1] = VERSION  # type: ignore[assignment]
    adapter: str | None = None
    """Directory below `adapters/`."""
    files: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of the adapter's files."""
    held: tuple[Held, ...] = ()
    """All accepted requests that a model answers around, in order."""

    @property
    def forgotten(self) -> tuple[str, ...]:
        """Classes that were forgotten as a whole."""
        return tuple(dict.fromkeys(name for each in self.held for name in each.classes))

    def of(self, request: str) -> Held | None:
        """Return what is held of a request."""
        return next((each for each in self.held if each.request == request), None)


class RequestFile(Section):
    """`requests/ID/request.json`: what was asked, without any of it."""

    version: Literal[1] = VERSION  # type: ignore[assignment]
    id: str
    number: int
    """Place in the order of acceptance, from 1."""
    kind: Kind
    method: Method
    classes: tuple[str, ...] = ()
    """Classes that are named; of a request for examples, those of its rows."""
    rows: int = 0
    """How many rows it came with."""
    source: Literal["file", "run", "client", "users"] = "file"
    """Where the rows are from."""
    subject: str | None = None
    """Keyed digest of a user's or a client's name."""
    digest: str
    """Keyed digest of everything that was asked."""
    block: int | None = None
    """Block that a client's order reserved."""
    noise: float = 0.0
    """Noise multiplier of a client's statistics."""
    seed: int
    accepted: str
    """Time, UTC."""


class StateFile(Section):
    """`requests/ID/state.json`: how often it was begun, and why it stopped, if it did."""

    attempt: int = 1
    stopped: str | None = None


def write_section(path: Path, section: Section) -> None:
    """Write a section as JSON."""
    write_json(path, section.model_dump(mode="json"))


def read_section(path: Path, kind: type[S]) -> S:
    """Read a section. Raises RunError for a missing or damaged file."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise RunError(f"{path}: cannot be read ({first}); restore it from a backup") from error


def write_json(path: Path, value: Any) -> None:
    """Write plain values as JSON."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any:
    """Return plain values; None where there is no file. Raises RunError for a damaged one."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); restore it from a backup") from error


def sha256(path: Path) -> str:
    """Return a file's SHA-256. Raises RunError where it is missing."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); restore it from a backup") from error


def check_digest(path: Path, expected: str | None) -> Path:
    """Return the path. Raises RunError where the file is not the one that was accepted."""
    found = sha256(path)
    if found != expected:
        raise RunError(
            f"{path}: has SHA-256 {found[:12]}, and {str(expected)[:12]} was accepted: it was damaged or replaced; "
            "restore it from a backup"
        )
    return path
