"""A client of the service: `Client(url, key).user("ana").recommendations()`."""

import os
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from lethe.remote_answers import (
    Adapter,
    Completion,
    Event,
    ForgetRequest,
    History,
    Observed,
    Prediction,
    Predictions,
    Rated,
    Recommendations,
    Whose,
)
from lora import errors
from lora.errors import Busy, ConfigError, DataError, Denied, LetheError, ServiceError, Unavailable, Unknown

LONGEST_WAIT = 30.0
"""Seconds between two tries at most, whatever the service asks for."""
_FIRST_WAIT = 0.2
_STATUS: dict[int, type[LetheError]] = {401: Denied, 403: Denied, 404: Unknown, 429: Busy, 503: Busy}


class Client:
    """A service at `url`, asked with an API `key`; to be closed, or used in `with`.

    Errors are those of the service: Unknown, Denied, Busy, DataError, ... with its message; Unavailable where nothing
    answers at `url`.

    | case | what happens |
    |---|---|
    | too much is waiting, or the key asks too often | tried again up to `retries` times, when the service says |
    | the connection breaks | the same, for what may be sent twice: reading, predictions, completions, events |
    | events | sent with an idempotency key, made here unless one is given: they take effect once |
    | a user is forgotten and the connection breaks | not tried again: `forget_requests` says whether it was done |
    """

    def __init__(self, url: str, key: str, *, timeout: float = 60.0, retries: int = 4) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"url '{url}' is no address of a service; give one such as http://127.0.0.1:8420")
        if not key.isascii() or not key.strip():
            raise ConfigError("the key is empty or no API key; `lethe serve` prints the operator's")
        self.retries = retries
        self._http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key.strip()}"}, timeout=timeout)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def user(self, name: str) -> "User":
        """Return one user of the service; nothing is asked yet."""
        return User(self, name)

    # --- Adapters and completions ---

    def adapters(self) -> list[Adapter]:
        """Return the adapters that the key may use."""
        return [Adapter(**each) for each in self.ask("GET", "/v1/adapters")["adapters"]]

    def bring(self, name: str, archive: bytes | Path, *, owner: str | None = None, model: str | None = None) -> Adapter:
        """Import an adapter: a ZIP archive of a PEFT directory, or the directory itself."""
        data = archive if isinstance(archive, bytes) else _zipped(archive)
        given = _given(owner=owner, model=model)
        return Adapter(**self.ask("PUT", f"/v1/adapters/{_part(name)}", params=given, content=data))

    def take(self, name: str, *, model: str | None = None) -> bytes:
        """Export an adapter, or a user's own, as a ZIP archive of a PEFT directory."""
        return self._sent("GET", f"/v1/adapters/{_part(name)}", again=True, params=_given(model=model)).content

    def drop(self, name: str) -> None:
        """Delete an adapter."""
        self._sent("DELETE", f"/v1/adapters/{_part(name)}", again=False)

    def models(self) -> list[str]:
        """Return what may be named as model: the base, adapters and users."""
        return [str(each["id"]) for each in self.ask("GET", "/v1/models")["data"]]

    def complete(self, model: str, prompt: str, **options: Any) -> Completion:
        """Go on with a text by an adapter, a user's own, or the base; `options` as OpenAI's: max_tokens, ..."""
        body = {"model": model, "prompt": prompt, **options}
        found = self.ask("POST", "/v1/completions", json=body, headers={"Lethe-User": _part(model)})
        (choice,), (whose,) = found["choices"], found["whose"]
        return Completion(choice["text"], choice["finish_reason"], Whose(**whose))

    def forget_requests(self) -> list[ForgetRequest]:
        """Return the forget requests that the key may see, the latest first."""
        return [ForgetRequest(**each) for each in self.ask("GET", "/v1/forget-requests")["forget_requests"]]

    def forget_request(self, number: str) -> ForgetRequest:
        """Return one forget request."""
        return ForgetRequest(**self.ask("GET", f"/v1/forget-requests/{_part(number)}"))

    # --- Asking ---

    def ask(self, method: str, path: str, *, again: bool = True, **more: Any) -> Any:
        """Send a request and return the JSON of its answer; `again` says whether it may be sent twice."""
        return self._sent(method, path, again=again, **more).json()

    def _sent(self, method: str, path: str, *, again: bool, **more: Any) -> httpx.Response:
        for tried in range(self.retries + 1):
            try:
                with _reached(self._http.base_url):
                    response = self._http.request(method, path, **more)
                if response.is_success:
                    return response
                raise _error_of(response)
            except (Busy, Unavailable) as error:
                # What never arrived may be sent again in any case; so may what was refused as too much.
                unsent = isinstance(error, Busy) or isinstance(error.__cause__, httpx.ConnectError)
                if tried == self.retries or not (again or unsent):
                    raise
                time.sleep(_wait(tried, error))
        raise ConfigError(f"retries={self.retries}: give 0 or more")


class User:
    """One user of a service."""

    def __init__(self, client: Client, name: str) -> None:
        self.client, self.name = client, name
        self._path = f"/v1/users/{_part(name)}"

    def observe(self, *events: Event, key: str | None = None) -> Observed:
        """Tell what the user rated, in order of time; the adapter knows of it when this returns."""
        body = {"events": [vars(event) for event in events]}
        send = {"Idempotency-Key": key or uuid.uuid4().hex}
        return Observed(**self.client.ask("POST", f"{self._path}/events", json=body, headers=send))

    def recommendations(self, count: int = 10, *, personalized: bool = True, fallback: str = "none") -> Recommendations:
        """Return the best items that the user has not rated; `fallback="cold"` answers one who is not known."""
        given = {"count": count, "personalized": personalized, "fallback": fallback}
        found = self.client.ask("GET", f"{self._path}/recommendations", params=given)
        return Recommendations(tuple(Rated(**each) for each in found["items"]), Whose(**found["whose"]))

    def likes(self, items: Sequence[str], **options: Any) -> Recommendations:
        """Return how likely the user is to like items, in their order."""
        found = self._predicted(items=[*items], **options)
        return Recommendations(tuple(Rated(**each) for each in found["items"]), Whose(**found["whose"]))

    def classify(self, texts: Sequence[str], **options: Any) -> Predictions:
        """Return the probabilities of the classes of texts."""
        return self._texts("classify", texts, options)

    def embed(self, texts: Sequence[str], **options: Any) -> Predictions:
        """Return a vector of length 1 for every text."""
        return self._texts("embed", texts, options)

    def _texts(self, kind: str, texts: Sequence[str], options: Mapping[str, Any]) -> Predictions:
        found = self._predicted(texts=[*texts], kind=kind, **options)["texts"]
        return tuple(
            Prediction(each["shares"] or {}, tuple(each["embedding"] or ()), Whose(**each["whose"])) for each in found
        )

    def _predicted(self, **body: Any) -> Any:
        return self.client.ask("POST", f"{self._path}/predictions", json=body)

    def history(self, latest: int = 100) -> History:
        """Return the adapter's version and the latest events, the last first."""
        found = self.client.ask("GET", self._path, params={"latest": latest})
        events = tuple(Event(each["item"], each["rating"], each["time"]) for each in found["history"])
        return History(found["adapter_version"], found["events"], events)

    def forget(self) -> ForgetRequest:
        """Have the user forgotten; returns the evidence."""
        return ForgetRequest(**self.client.ask("DELETE", self._path, again=False))


def _part(name: str) -> str:
    return quote(name, safe="")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _zipped(folder: Path) -> bytes:
    import io
    import zipfile

    data = io.BytesIO()
    try:
        with zipfile.ZipFile(data, "w") as archive:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                archive.write(folder / name, name)
    except OSError as error:
        raise DataError(f"{os.fspath(folder)} is no PEFT directory ({error.strerror}); give one, or a ZIP") from error
    return data.getvalue()


@contextmanager
def _reached(url: httpx.URL) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise Unavailable(
            f"the service at {url} does not answer ({type(error).__name__}); see whether `lethe serve` runs there"
        ) from error


def _wait(tried: int, error: LetheError) -> float:
    """Return the seconds until the next try: what the service asks for, or twice as long each time, never in step."""
    asked = float(getattr(error, "retry_after", 0.0))
    own = _FIRST_WAIT * float(2**tried) * random.uniform(0.5, 1.0)
    return min(LONGEST_WAIT, max(asked, own))


def _error_of(response: httpx.Response) -> LetheError:
    """Return the error that the service told of, as one of the tree."""
    try:
        told = response.json()["error"]
        kind, message = str(told["type"]), str(told["message"])
    except (ValueError, KeyError, TypeError):
        # Something before the service has answered, such as a proxy.
        kind, message = "", f"status {response.status_code} of {response.url.path}; see what answers at that address"
    found = {each.__name__: each for each in _tree(LetheError)}.get(kind) or _STATUS.get(response.status_code)
    if found is None:
        found = DataError if response.status_code < 500 else ServiceError
    if not issubclass(found, Busy):
        return found(message)
    after = response.headers.get("retry-after", "1")
    return found(message, retry_after=float(after) if after.isdigit() else 1.0)


def _tree(root: type[LetheError]) -> Iterable[type[LetheError]]:
    """Yield the errors of `lora.errors`; those that other modules add are told by the nearest of these."""
    yield root
    own: Callable[[type[LetheError]], bool] = lambda each: each.__module__ == errors.__name__  # noqa: E731
    for each in filter(own, root.__subclasses__()):
        yield from _tree(each)
