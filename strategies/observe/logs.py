"""Structured logs: one JSON object a line, with fields of a closed list and no other library's words."""

import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from traceback import walk_tb
from types import CodeType
from typing import Any, TypedDict, Unpack

from lora.errors import ConfigError, DataError, LetheError, nearest

LOG_VARIABLE, FILE_VARIABLE = "LETHE_LOG", "LETHE_LOG_FILE"
FORMS = ("text", "json")
ROOTS = ("lethe", "simulation", "server", "client", "strategies", "privacy", "tasks", "lora")
"""Loggers whose lines are structured. Others stay what they are: what they say may quote data."""
FILE_BYTES, FILES = 10_000_000, 5
_FRAMES, _CAUSES = 20, 5

log = logging.getLogger("lethe.observe")
events = logging.getLogger("lethe.events")
# Events are for structured logs; without those they are not for the console either.
events.addHandler(logging.NullHandler())


class Fields(TypedDict, total=False):
    """Everything that a line may hold beside time, level, logger, event and exception; all else is left out."""

    run: str
    engine: str
    federation: str
    node: str
    round: int
    rounds: int
    client: str
    step: str
    reason: str
    online: int
    wanted: int
    selected: int
    accepted: int
    refused: int
    examples: int
    seconds: float
    bytes_up: int
    bytes_down: int
    accuracy: float | None
    loss: float | None
    aggregation_error: float
    epsilon: float
    epsilon_budget: float | None
    delta: float
    unit: str
    adjacency: str
    sampling: str
    simulated: bool
    address: str


def event(name: str, *, level: int = logging.INFO, **fields: Unpack[Fields]) -> None:
    """Log one event."""
    events.log(level, "%s", name, extra={"fields": fields})


class JsonFormatter(logging.Formatter):
    """One JSON object a line.

    **Guarantee**: of an exception a line has its type and the places in the code. It has the message only where the
    error is one of Lethe's own that quote no row (see `lora.errors`), because other messages quote data.
    """

    def __init__(self, **bound: Unpack[Fields]) -> None:
        super().__init__()
        self.bound = bound
        """Fields of every line, such as the run."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": _event(record),
        }
        given: Mapping[str, Any] = getattr(record, "fields", {})
        line |= self.bound | {key: _plain(given[key]) for key in Fields.__annotations__ if key in given}
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = described(record.exc_info[1])
        return json.dumps(line, allow_nan=False)


def described(error: BaseException, *, depth: int = _CAUSES) -> dict[str, Any]:
    """Return an exception as a log may hold it: type, file:line of its frames, its causes; a message if it is safe."""
    told: dict[str, Any] = {"type": type(error).__name__, "at": _places(error)}
    if _is_safe(error):
        told["message"] = str(error)
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None and depth > 1:
        told["cause"] = described(cause, depth=depth - 1)
    return told


@contextmanager
def structured(*, form: str | None = None, file: Path | None = None, **bound: Unpack[Fields]) -> Iterator[bool]:
    """Write Lethe's own logs as JSON while the block runs; yields whether anything is written.

    LETHE_LOG=json writes to the standard error stream, LETHE_LOG_FILE=PATH to a file, both to both; `file` is for
    where the environment names none, and `form` for where there is no file either. Raises ConfigError for an unknown
    form. A file that cannot be opened is a warning, and lines go to the standard error stream.
    """
    asked, path = os.environ.get(LOG_VARIABLE), os.environ.get(FILE_VARIABLE)
    chosen = asked or form or "text"
    if chosen not in FORMS:
        raise ConfigError(f"{LOG_VARIABLE}={chosen}: there is no such form of logs{nearest(chosen, FORMS)}")
    file = Path(path) if path else file
    handlers = _handlers(file, stream=chosen == "json" and (asked is not None or file is None))
    for handler in handlers:
        handler.setFormatter(JsonFormatter(**bound))
    with _attached(handlers):
        yield bool(handlers)


def _handlers(file: Path | None, *, stream: bool) -> list[logging.Handler]:
    handlers: list[logging.Handler] = []
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(RotatingFileHandler(file, maxBytes=FILE_BYTES, backupCount=FILES, encoding="utf-8"))
        except OSError as error:
            log.warning("%s=%s cannot be written (%s); logs go to standard error", FILE_VARIABLE, file, error.strerror)
            stream = True
    return [*handlers, logging.StreamHandler()] if stream else handlers


@contextmanager
def _attached(handlers: list[logging.Handler]) -> Iterator[None]:
    """Hand the loggers of the project to these handlers alone: a second one would print what this one leaves out."""
    roots = [logging.getLogger(root) for root in ROOTS] if handlers else []
    below = [logger for root in roots for logger in _descendants(root)]
    before = [(logger, logger.level, logger.propagate, logger.handlers[:]) for logger in (*roots, *below)]
    for logger in roots:
        logger.handlers[:] = handlers
        logger.setLevel(logger.level or logging.INFO)
        logger.propagate = False
    for logger in below:
        logger.handlers.clear()
        logger.propagate = True
    try:
        yield
    finally:
        for logger, level, propagate, own in before:
            logger.handlers[:], logger.propagate = own, propagate
            logger.setLevel(level)
        for handler in handlers:
            handler.close()


def _descendants(root: logging.Logger) -> list[logging.Logger]:
    known = root.manager.loggerDict.items()
    return [found for name, found in known if isinstance(found, logging.Logger) and name.startswith(f"{root.name}.")]


def _event(record: logging.LogRecord) -> str:
    """Return the message; an exception among its arguments is told by what may be told of it."""
    if not isinstance(record.msg, str):
        return str(_told(record.msg))
    args = record.args
    if isinstance(args, Mapping):
        return record.msg % {key: _told(value) for key, value in args.items()}
    return record.msg % tuple(map(_told, args)) if args else record.msg


def _told(value: object) -> object:
    if not isinstance(value, BaseException):
        return value
    return str(value) if _is_safe(value) else type(value).__name__


def _is_safe(error: BaseException) -> bool:
    return isinstance(error, LetheError) and not isinstance(error, DataError)


def _places(error: BaseException) -> list[str]:
    frames = [(frame.f_code, line) for frame, line in walk_tb(error.__traceback__)]
    return [f"{_short(code)}:{line} {code.co_name}" for code, line in frames[-_FRAMES:]]


def _short(code: CodeType) -> str:
    """Return the file's path from where Python found it."""
    homes = [home for home in sys.path if home and code.co_filename.startswith(home.rstrip(os.sep) + os.sep)]
    return code.co_filename[len(max(homes, key=len, default="")) :].lstrip(os.sep)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
