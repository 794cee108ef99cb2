"""Run directories: made at once with their configuration, numbered where they have no name."""

import os
import re
import shutil
from pathlib import Path

from lethe.config import RunKind, to_yaml
from lora.errors import RunError

CONFIG, METRICS, SUMMARY, REPORT = "config.yaml", "metrics.jsonl", "summary.json", "report.html"


def check_free(root: Path, run: RunKind, *, remedy: str = "") -> None:
    """Raise RunError where the run has a name and its directory exists; `remedy` says what else can be done."""
    if run.name is not None and (root / run.name).exists():
        raise _taken(root / run.name, remedy)


def new_directory(root: Path, run: RunKind, *, recipe: str, remedy: str = "") -> Path:
    """Make the run's directory with its config inside: written aside and renamed, so that no half-made run is seen.

    Raises RunError where it exists or cannot be made.
    """
    aside = root / f".new.{os.getpid()}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        (aside / CONFIG).write_text(to_yaml(run))
        directory = root / (run.name or _next_name(root, Path(recipe).stem))
        if directory.exists():
            raise _taken(directory, remedy)
        return aside.rename(directory)
    except OSError as error:
        raise RunError(
            f"no run directory can be made below {root} ({error.strerror}); name a writable place"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _next_name(root: Path, stem: str) -> str:
    taken = [int(m[1]) for p in root.iterdir() if (m := re.fullmatch(rf"{re.escape(stem)}-(\d+)", p.name))]
    return f"{stem}-{max(taken, default=0) + 1:03d}"


def _taken(directory: Path, remedy: str) -> RunError:
    return RunError(f"{directory} exists already; choose another name=…{remedy.format(name=directory.name)}")
