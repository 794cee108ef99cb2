"""A kill at any instant: the request ends done, exactly once, with the same slots, detectors, manifest and figures."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.forgetting.asking import accept, new_order, wish_classes, wish_client, wish_user
from server.forgetting.files import Method
from server.forgetting.sources import store_of_run
from server.forgetting.store import new_store
from strategies.unlearning.config import ForgettingConfig
from tests.people import known_users
from tests.queries import PLACES, TINY, queries, write_queries
from tests.server.forgetting.conftest import QUICK

ROOT = Path(__file__).parents[3]
# What is learned does not matter here, only that it is the same.
SHORT = QUICK.model_copy(update={"epochs": 1, "batch": 24, "replay": 5, "replay_epochs": 1, "replay_steps": 0})


def kill_everywhere(template: Path, scratch: Path, kind: str) -> list[dict[str, Any]]:
    scratch.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.server.forgetting.killing", str(template), str(scratch), kind]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(cases: list[dict[str, Any]], *, least: int) -> None:
    assert [case for case in cases if case["resumed"] != 0 or case["differs"]] == []
    assert [case["killed"] for case in cases] == [True] * (len(cases) - 1) + [False]
    assert len(cases) - 1 >= least


@pytest.fixture
def template(tmp_path: Path, parts: Path) -> Path:
    """A store with one accepted request for a class; the rows to measure by are in it, at the same distance."""
    place = tmp_path / "template"
    place.mkdir()
    write_queries(place / "rows.jsonl", queries(0, 1, 2, 3, places=PLACES[:2]))
    classifier = (TINY, parts / "adapter", 64)
    store = new_store(place / "store", classifier=classifier, evaluation=place / "rows.jsonl", config=SHORT)
    accept(store, wish_classes(store, ["alarm"], rows=queries(0)))
    return place


def test_a_kill_after_any_step_ends_done_exactly_once(template: Path, tmp_path: Path) -> None:
    check(kill_everywhere(template, tmp_path / "scratch", "steps"), least=7)


@pytest.mark.faults
def test_a_kill_at_any_write_of_o3(template: Path, tmp_path: Path) -> None:
    check(kill_everywhere(template, tmp_path / "scratch", "writes"), least=20)


@pytest.mark.faults
@pytest.mark.parametrize("method", ["gs-lora", "gs-lora++"])
def test_a_kill_at_any_write_of_gs_lora(make_run: Callable[..., Path], tmp_path: Path, method: Method) -> None:
    place = tmp_path / "template"
    place.mkdir()
    run = make_run()
    shutil.move(run, place / "run")
    store = store_of_run(place / "run", directory=place / "store", config=SHORT)
    accept(store, wish_classes(store, ["alarm"], method=method))
    check(kill_everywhere(place, tmp_path / "scratch", "writes"), least=10)


@pytest.mark.faults
def test_a_kill_at_any_write_of_a_clients_answer(parts: Path, tmp_path: Path) -> None:
    from client.forgetting import answer_order
    from tasks.models import load_base

    place = tmp_path / "template"
    place.mkdir()
    store = new_store(place / "store", classifier=(TINY, parts / "adapter", 64), config=SHORT)
    answer = answer_order(new_order(store, "clinic"), load_base(TINY, causal=False), queries(3), classes=("money",))
    accept(store, wish_client(store, "clinic", answer.to_bytes()))
    check(kill_everywhere(place, tmp_path / "scratch", "writes"), least=15)


@pytest.mark.faults
def test_a_kill_at_any_write_of_a_users_deletion(tmp_path: Path) -> None:
    place = tmp_path / "template"
    names = known_users(place / "users")
    store = new_store(place / "store", users=place / "users", config=ForgettingConfig())
    accept(store, wish_user(store, names[1]))
    check(kill_everywhere(place, tmp_path / "scratch", "writes"), least=8)
