"""Rows that a store can reach: those of a file, and the splits of the run that it was made of."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lora.errors import ConfigError, LetheError, RunError
from server.forgetting.store import Store, new_store
from strategies.federated.job import Job
from strategies.personal.erasure import is_users
from strategies.unlearning.config import ForgettingConfig
from tasks.config import DataConfig
from tasks.data import load_splits
from tasks.examples import Examples, Splits

FOLDER = "forgetting"
"""Where the store of a run, or of users, is kept."""
_CONFIG, _ADAPTER = "config.yaml", "adapter"


def read_rows(path: Path, labels: Sequence[str], *, columns: DataConfig | None = None) -> Examples:
    """Read rows with text and label from a file, from the usual columns or those of `columns`.

    Raises DataError for a label that is not among `labels`, by line.
    """
    named = {} if columns is None else {"text": columns.text, "label": columns.label}
    config = DataConfig(path=str(path), labels=tuple(labels), **named)
    return load_splits(config, kind="classification", seed=0, own=True).train


class Sources:
    """The rows behind a store's classifier, read when first asked for."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels of the classifier."""
        return self.store.classifier.labels

    def read(self, path: Path) -> Examples:
        """Read rows from a file, which names its columns as the run's data do, if there is a run."""
        run = self.store.outside(self.store.about.run)
        columns = job_of(run).data if run is not None and (run / _CONFIG).is_file() else None
        return read_rows(path, self.labels, columns=columns)

    @cached_property
    def splits(self) -> Splits:
        """The splits of the run. Raises RunError where there is no run or its data cannot be reached from here."""
        run = self.store.outside(self.store.about.run)
        if run is None:
            raise RunError("the store was not made of a run, so there are no rows here; give them by --examples FILE")
        try:
            job = job_of(run)
            splits = load_splits(job.data, kind="classification", seed=job.seed)
        except LetheError as error:
            raise RunError(f"the rows of {run} cannot be read here ({error}); give them by --examples FILE") from error
        if splits.label_names != self.labels:
            raise RunError(f"the data of {run} have other labels than the store; give the rows by --examples FILE")
        return splits

    def of_classes(self, classes: Sequence[str]) -> Examples:
        """Return the run's training rows of some classes."""
        return of_classes(self.splits.train, {self.labels.index(name) for name in classes})

    @cached_property
    def evaluation(self) -> Examples | None:
        """Rows that nothing was trained on: the store's own, else the run's test split; None where there are none."""
        given = self.store.outside(self.store.about.evaluation)
        if given is not None:
            return self.read(given)
        try:
            return self.splits.test
        except RunError:
            return None


def of_classes(rows: Examples, classes: set[int], *, without: bool = False) -> Examples:
    """Return the rows of some classes, or those of all others."""
    labels = rows.labels or ()
    return rows.take([place for place, label in enumerate(labels) if (label in classes) != without])


def job_of(run: Path) -> Job:
    """Read what a run was about. Raises ConfigError for a damaged file."""
    try:
        return Job.model_validate(yaml.safe_load((run / _CONFIG).read_text()))
    except (OSError, ValidationError, yaml.YAMLError) as error:
        raise ConfigError(f"{run / _CONFIG}: cannot be read ({error})") from error


def find_store(place: Path) -> Path | None:
    """Return the store that is, or is kept in, a directory; None where there is none yet."""
    return next((each for each in (place, place / FOLDER) if (each / "store.json").is_file()), None)


def open_store(place: Path, *, make: bool = True) -> Store:
    """Open the store of a directory: a store, a run, or a directory of users; with `make` the latter two get one.

    Raises RunError for any other directory.
    """
    found = find_store(place)
    if found is not None:
        return Store(found)
    if not make:
        raise RunError(f"{place} has no forgetting store: nothing was asked of it yet; lethe forget add --in {place}")
    if is_users(place):
        return new_store(place / FOLDER, users=place)
    if (place / _CONFIG).is_file():
        return store_of_run(place)
    raise RunError(
        f"{place} is neither a finished run, nor a directory of users, nor a forgetting store; name one, or make a "
        f"store: lethe forget init {place} --adapter DIRECTORY"
    )


def store_of_run(
    run: Path, *, directory: Path | None = None, config: ForgettingConfig | None = None, **rest: Any
) -> Store:
    """Make the store of a finished run of classification. Raises RunError for a run of another kind."""
    tree = yaml.safe_load((run / _CONFIG).read_text())
    if isinstance(tree, dict) and tree.get("kind") == "personal":
        raise RunError(f"{run} is a personal run: name the directory of its users, where slots/ and events.sqlite are")
    job = job_of(run)
    if job.task.kind != "classification":
        raise RunError(f"{run} learned task.kind={job.task.kind}; only classifiers forget by request so far")
    if not (run / _ADAPTER / "adapter_config.json").is_file():
        raise RunError(f"{run} has no adapter yet; finish it: lethe resume {run.name}")
    parts = (job.model, run / _ADAPTER, job.task.max_length)
    return new_store(directory or run / FOLDER, classifier=parts, run=run, config=config, **rest)
