"""What HTTP carries: requests that are checked to the last field, and answers as documented."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from server.service.adapters import AdapterInfo
from server.service.answers import Provenance
from server.service.forgetting import ForgetRequest
from server.service.identity import KeyInfo
from server.service.tables import LONGEST_NAME
from strategies.personal.events import LATEST

Name = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_NAME)]
ItemName = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Text = Annotated[str, StringConstraints(max_length=100_000)]
MOST_EVENTS, MOST_ITEMS, MOST_TEXTS, MOST_PROMPTS, MOST_STOPS = 1000, 200, 64, 16, 4


class Request(BaseModel):
    """A request's body: a field that is not known is an error, and a number is no text."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Answer(BaseModel):
    """An answer's body."""

    model_config = ConfigDict(frozen=True)


class Problem(Answer):
    """What went wrong, and what to do about it."""

    type: str
    """The kind of the error, such as DataError."""
    message: str
    remedy: str | None
    """The part of the message that says what to do."""


class ProblemBody(Answer):
    """The one shape of all errors."""

    error: Problem


class EventBody(Request):
    """A user rated an item at a time, in whole seconds since 1970."""

    item: ItemName
    rating: float
    time: int = Field(ge=-LATEST, le=LATEST)


class EventsBody(Request):
    """Events of one user in order of time."""

    events: list[EventBody] = Field(min_length=1, max_length=MOST_EVENTS)


class Observed(Answer):
    """Events were taken; the user's adapter has a new version."""

    user: str
    taken: int
    adapter_version: int
    new: bool
    """Whether the user was not known before."""
    repeated: bool
    """Whether this answers a request that was sent before with the same Idempotency-Key."""


class Whose(Answer):
    """Whose answer this is: never another user's, and never the base model's without saying so."""

    adapter: str | None
    adapter_version: int | None
    gate: dict[str, float]
    personalized: bool
    reason: str

    @classmethod
    def of(cls, told: Provenance) -> "Whose":
        """Return it as HTTP carries it."""
        return cls(
            adapter=told.adapter, adapter_version=told.version, gate=dict(told.gate), personalized=told.personalized,
            reason=told.reason,
        )  # fmt: skip


class RatedBody(Answer):
    """An item, and the probability that the user likes it."""

    item: str
    title: str
    like: float


class Recommendations(Answer):
    """Items, best first."""

    user: str
    items: list[RatedBody]
    whose: Whose


class PredictionsBody(Request):
    """Items (how likely a like is) or texts (classes or embeddings); one of the two."""

    items: list[ItemName] | None = Field(None, min_length=1, max_length=MOST_ITEMS)
    texts: list[Text] | None = Field(None, min_length=1, max_length=MOST_TEXTS)
    kind: Literal["classify", "embed"] = "classify"
    """What is wanted of texts."""
    personalized: bool = True
    fallback: Literal["none", "cold"] = "none"


class TextPrediction(Answer):
    """Class probabilities by label, or an embedding of length 1."""

    shares: dict[str, float] | None
    embedding: list[float] | None
    whose: Whose


class Predictions(Answer):
    """Likes of items in the order asked for, or predictions of texts in theirs."""

    user: str
    items: list[RatedBody] | None = None
    whose: Whose | None = None
    """Whose the likes are; texts say it each."""
    texts: list[TextPrediction] | None = None


class HistoryEvent(Answer):
    """An event as it is kept."""

    item: str
    title: str
    rating: float
    time: int


class UserBody(Answer):
    """What is known of a user, the latest events first."""

    user: str
    adapter_version: int
    events: int
    history: list[HistoryEvent]


class Forgotten(Answer):
    """A request to forget, as it stands."""

    id: str
    subject: str
    """SHA-256 of the user's name; the name itself is not kept once it is done."""
    state: Literal["accepted", "done", "failed"]
    evidence: dict[str, Any]
    created: float
    finished: float | None

    @classmethod
    def of(cls, told: ForgetRequest) -> "Forgotten":
        """Return it as HTTP carries it."""
        return cls(**vars(told))


class ForgottenList(Answer):
    """Requests to forget, the latest first."""

    forget_requests: list[Forgotten]


class ForgetBody(Request):
    """Who is to be forgotten."""

    user: Name


class AdapterBody(Answer):
    """An adapter without its numbers."""

    name: str
    owner: str | None
    version: int
    base: str
    rank: int
    state: str

    @classmethod
    def of(cls, info: AdapterInfo) -> "AdapterBody":
        """Return it as HTTP carries it."""
        return cls(name=info.name, owner=info.owner, version=info.version, base=info.base, rank=info.rank,
                   state=info.state)  # fmt: skip


class AdapterList(Answer):
    """The adapters that the caller may use."""

    adapters: list[AdapterBody]


class KeyBody(Request):
    """A key to be made: for one user's data (role user, with the owner), or for all (operator, auditor)."""

    role: Literal["user", "operator", "auditor"]
    owner: Name | None = None
    label: Annotated[str, StringConstraints(max_length=LONGEST_NAME)] = ""


class Key(Answer):
    """A new key; it is shown this once."""

    key: str


class KeyListed(Answer):
    """A key without the key."""

    id: str
    role: str
    owner: str | None
    label: str
    created: float
    revoked: float | None

    @classmethod
    def of(cls, info: KeyInfo) -> "KeyListed":
        """Return it as HTTP carries it."""
        return cls(**vars(info))


class KeyList(Answer):
    """All keys, the oldest first."""

    keys: list[KeyListed]


class StreamOptions(Request):
    """What OpenAI's clients may ask of a stream."""

    include_usage: bool = True
    include_obfuscation: bool = False


class CompletionBody(Request):
    """A completion as OpenAI's clients ask for it; `model` is an adapter's or a user's name, or the base model's."""

    model: Name
    prompt: Text | list[Text] = Field(min_length=1)
    max_tokens: int = Field(16, ge=1, le=4096)
    temperature: float = Field(0.0, ge=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] | None = None
    stream: bool = False
    n: Literal[1] = 1
    user: str | None = None
    """Ignored: the adapter is chosen by `model`."""
    stream_options: StreamOptions | None = None
    """Ignored: a stream's last piece always has the usage."""
    # What clients send along unasked is taken at the value at which it changes nothing, and refused at any other.
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    logprobs: None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    frequency_penalty: float = Field(0.0, ge=0, le=0)
    presence_penalty: float = Field(0.0, ge=0, le=0)
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str]:
        """The prompts as a list."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts; empty ones stop nothing."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(each for each in given if each)


class Choice(Answer):
    """One continuation."""

    text: str
    index: int
    finish_reason: Literal["stop", "length"] | None
    logprobs: None = None


class Usage(Answer):
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(Answer):
    """A completion as OpenAI's clients read it; `whose` says whose adapter wrote each choice."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None
    whose: list[Whose]


class Model(Answer):
    """A model as OpenAI's clients list it; an adapter's `parent` is its base."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    parent: str | None
    root: str


class ModelList(Answer):
    """The models that the caller may name."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(Answer):
    """Whether the process lives, or whether it answers."""

    status: Literal["ok", "not ready"]
    faults: list[str] = []
