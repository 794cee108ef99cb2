"""The directory of a run on the server: named, held by one process at a time, and readable without it."""

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lora.errors import RunError

RUNS_VARIABLE = "LETHE_RUNS"
CONFIG, LOCK = "config.yaml", ".lock"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def run_directory(run_config: Mapping[str, Any], run_id: int) -> Path:
    """Return where a run writes: `run-dir`, else its `name` (or Flower's number) below $LETHE_RUNS or runs/.

    Raises RunError for a name that is no plain file name.
    """
    if run_config.get("run-dir"):
        return Path(str(run_config["run-dir"]))
    name = str(run_config.get("name") or f"flower-{run_id}")
    if not _NAME.fullmatch(name):
        raise RunError(f"name={name}: a run is named by letters, digits, dots, dashes and underscores, 100 at most")
    return Path(os.environ.get(RUNS_VARIABLE) or "runs") / name


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Make the directory and hold it while the block runs; the system lets go of it when the process dies.

    Raises RunError where another live process holds it, or it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(f"{directory} cannot be used ({error.strerror}); name a writable place") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        name = directory.name
        raise RunError(f"run '{name}' is going on in another process; stop it first, or take another name") from error
    finally:
        os.close(handle)


def check_unfinished(directory: Path, *, rounds: int) -> None:
    """Raise RunError where the directory holds a run that has finished all its rounds."""
    file = directory / "summary.json"
    if file.is_file() and int(json.loads(file.read_text()).get("rounds", 0)) >= rounds:
        raise RunError(f"run '{directory.name}' has finished all {rounds} rounds; take another name")


def write_config(directory: Path, sections: Any) -> None:
    """Write the run's sections beside its records, unless they are there: a report needs them, and so do readers."""
    final = directory / CONFIG
    if final.is_file():
        return
    aside = final.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text("# As it was submitted; keys that are not here have their defaults.\n" + _yaml(sections))
    aside.rename(final)


def _yaml(sections: Any) -> str:
    return str(yaml.safe_dump(sections, sort_keys=False, allow_unicode=True))
