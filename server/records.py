"""What a run leaves behind: metrics as JSON lines, and a summary."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lora.errors import RunError
from strategies.observe.logs import LOG_VARIABLE

log = logging.getLogger("lethe.server")

METRICS, SUMMARY = "metrics.jsonl", "summary.json"


class Records:
    """The records of one run directory; listeners are called with each record as it is written.

    Watchers hear besides what is only told: where a run stands now, which no line of it needs to keep.

    **Guarantee**: after a kill or a full disk at any instant, every line that a later write leaves before its own is
    whole; numbers that are not finite are written as null, because JSON has no others.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self.watchers: list[Callable[[dict[str, Any]], None]] = []

    def write(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Append one line to metrics.jsonl. Raises RunError when the disk is full or the directory is gone."""
        record = {"kind": kind, "time": round(time.time(), 3), **fields}
        path = self.directory / METRICS
        with _reported(path):
            _append(path, _json(record).encode() + b"\n")
        for listener in (*self.listeners, *self.watchers):
            listener(record)
        return record

    def tell(self, kind: str, **fields: Any) -> None:
        """Tell the watchers something that is not worth a line."""
        for watcher in self.watchers:
            watcher({"kind": kind, "time": round(time.time(), 3), **fields})

    def rounds(self) -> set[int]:
        """Return the numbers of the rounds that have a line."""
        path = self.directory / METRICS
        with _reported(path):
            lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        found = [json.loads(line) for line in lines]
        return {int(line["round"]) for line in found if line["kind"] == "round"}

    def summarise(self, summary: dict[str, Any]) -> Path:
        """Write summary.json aside and rename it. Raises RunError when the disk is full or the directory is gone."""
        final = self.directory / SUMMARY
        aside = final.with_suffix(f".{os.getpid()}.tmp")
        with _reported(final):
            try:
                aside.write_text(_json(summary, indent=1) + "\n")
                aside.rename(final)
            finally:
                aside.unlink(missing_ok=True)
        return final


@contextmanager
def printed(records: Records) -> Iterator[None]:
    """Print where a run stands while the block plays it, for whoever follows it; structured logs say so themselves."""
    if os.environ.get(LOG_VARIABLE) == "json":
        yield
        return
    logger, handler = logging.getLogger("lethe.server"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    records.listeners.append(_say)
    try:
        yield
    finally:
        records.listeners.remove(_say)
        logger.removeHandler(handler)
        logger.setLevel(level)


def _say(record: dict[str, Any]) -> None:
    if record["kind"] == "resumed":
        log.info("goes on after round %d", record["round"])
    if record["kind"] != "round":
        return
    score = "" if record["accuracy"] is None else f", accuracy {record['accuracy']:.4f}"
    refused = "".join(f"; {each['client']}: {each['reason']} ({each['detail']})" for each in record["refused"])
    usable, asked = len(record["accepted"]), len(record["selected"])
    log.info("round %d: %d of %d clients%s%s", record["round"], usable, asked, score, refused)


def _append(path: Path, line: bytes) -> None:
    """Add a line, in place of whatever part of a line a kill has left at the end, or not at all."""
    with path.open("a+b") as file:
        whole = _whole(file)
        file.truncate(whole)
        try:
            file.write(line)
            file.flush()
        except OSError:
            os.ftruncate(file.fileno(), whole)
            raise


def _whole(file: BinaryIO) -> int:
    """Return the length of the file's whole lines."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    if file.read() == b"\n":
        return end
    file.seek(0)
    return file.read().rfind(b"\n") + 1


def _json(value: Any, *, indent: int | None = None) -> str:
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}); make room and resume") from error
