"""Forgetting stores over a tiny classifier, made anew for every test from files that are made once."""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.forgetting.requests import ForgetRequests
from server.forgetting.sources import store_of_run
from server.forgetting.store import Store, new_store
from strategies.federated.job import Job
from strategies.unlearning.config import ForgettingConfig
from tests.queries import LABELS, TINY, export_classifier, queries, write_queries

QUICK = ForgettingConfig(rank=2, epochs=5, least_steps=0, batch=10, rate=0.01, folds=0)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `adapter/`, and `rows.jsonl` that nothing was trained on."""
    place = tmp_path_factory.mktemp("classifier")
    export_classifier(place / "adapter")
    write_queries(place / "rows.jsonl", queries(0, 1, 2, 3))
    return place


@pytest.fixture(autouse=True)
def _same_salt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every store has the same salt here, so that requests draw the same numbers in every run."""
    stores = iter(range(100))
    fixed, drawn = {8: lambda: f"{next(stores):016x}", 32: lambda: "5a" * 32}, secrets.token_hex
    monkeypatch.setattr(secrets, "token_hex", lambda size: fixed[size]() if size in fixed else drawn(size))


@pytest.fixture
def store(tmp_path: Path, parts: Path) -> Store:
    made = (TINY, parts / "adapter", 64)
    return new_store(tmp_path / "store", classifier=made, evaluation=parts / "rows.jsonl", config=QUICK)


@pytest.fixture
def bare(tmp_path: Path, parts: Path) -> Store:
    """A store without any rows to measure by."""
    return new_store(tmp_path / "bare", classifier=(TINY, parts / "adapter", 64), config=QUICK)


@pytest.fixture
def requests(store: Store) -> ForgetRequests:
    return ForgetRequests(store)


@pytest.fixture
def make_run(tmp_path: Path, parts: Path) -> Callable[..., Path]:
    """Make the directory of a finished run on the questions."""

    def make(**sections: Any) -> Path:
        run = tmp_path / "run"
        run.mkdir()
        data = {"path": str(parts / "rows.jsonl"), "labels": list(LABELS), "holdout": 0.2}
        job = Job.model_validate({"model": TINY.model_dump(mode="json"), "data": data, **sections})
        (run / "config.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
        export_classifier(run / "adapter")
        return run

    return make


@pytest.fixture
def of_run(make_run: Callable[..., Path]) -> Store:
    return store_of_run(
        make_run(), config=QUICK.model_copy(update={"replay": 5, "replay_epochs": 2, "replay_steps": 0})
    )
