"""The directory of a store: made whole or not at all, checked when it is read, and worked on by one at a time."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora.errors import ConfigError, ModelError, RunError
from server.forgetting import files
from server.forgetting.asking import wish_classes
from server.forgetting.requests import ForgetRequests
from server.forgetting.sources import find_store, open_store, store_of_run
from server.forgetting.store import Store, new_store
from strategies.unlearning.forgotten import load_slot
from tests.queries import TINY, queries


def test_a_directory_that_exists_is_left_alone(store: Store, parts: Path) -> None:
    with pytest.raises(RunError, match="exists already"):
        new_store(store.directory, classifier=(TINY, parts / "adapter", 64))


def test_a_store_that_cannot_be_made_leaves_nothing(tmp_path: Path, parts: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError):
        new_store(tmp_path / "store", classifier=(TINY, tmp_path / "empty", 64))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_keys_and_salt_are_the_owners(store: Store) -> None:
    modes = {name: (store.directory / name).stat().st_mode & 0o777 for name in ("key.pem", "store.json")}
    assert modes == {"key.pem": 0o600, "store.json": 0o600}


def test_a_run_gets_its_store_at_the_first_request(make_run: Any) -> None:
    run = make_run()
    with pytest.raises(RunError, match="nothing was asked of it yet"):
        open_store(run, make=False)
    made = open_store(run)
    assert find_store(run) == made.directory == run / "forgetting"
    assert open_store(run).about == made.about == open_store(made.directory).about


@pytest.mark.parametrize(
    ("tree", "error", "says"),
    [
        ({"kind": "personal"}, RunError, "personal run"),
        ({"task": {"kind": "causal-lm"}}, RunError, "only classifiers forget"),
        ({"model": {"name": 3}}, ConfigError, "cannot be read"),
    ],
)
def test_runs_of_another_kind(make_run: Any, tree: Any, error: type[Exception], says: str) -> None:
    run = make_run()
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(error, match=says):
        store_of_run(run)


def test_other_directories_are_named(tmp_path: Path, make_run: Any) -> None:
    with pytest.raises(RunError, match="neither a finished run"):
        open_store(tmp_path)
    run = make_run()
    (run / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(RunError, match="lethe resume run"):
        open_store(run)


def test_one_process_works_at_a_time(store: Store) -> None:
    assert not store.busy
    with store.held():
        assert store.busy
        with pytest.raises(RunError), store.held(wait=False):
            pass
    with ForgetRequests(store).working(), pytest.raises(RunError, match="open in this process already"):
        from server.forgetting.workflow import Worker

        Worker(ForgetRequests(store).stage)


def test_a_damaged_slot_and_detector_are_named(store: Store) -> None:
    requests = ForgetRequests(store)
    accepted = requests.add(wish_classes(store, ["alarm"], rows=queries(0)))
    requests.carry_out()
    for path in (store.slot(accepted.request.id), store.detector(accepted.request.id)):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(RunError, match=f"{path.name}: has SHA-256"):
            store.served()
        path.unlink()
        with pytest.raises(RunError, match="restore it from a backup"):
            store.served()
        path.write_bytes(whole)
    with pytest.raises(ModelError, match="not a slot's file"):
        load_slot(store.detector(accepted.request.id), frames=requests.stage.served.frames)


def test_unknown_and_ambiguous_requests(store: Store) -> None:
    with pytest.raises(RunError, match="no request 'abc'"):
        store.request("abc")
    requests = ForgetRequests(store)
    first = requests.add(wish_classes(store, ["alarm"], rows=queries(0))).request
    assert store.request(first.id[:5]) == first
    with pytest.raises(RunError, match=f"did you mean '{first.id}'"):
        store.request(first.id[:-1] + "z")
    with pytest.raises(RunError):
        store.request("")


def test_blocks_are_given_once_to_requests_and_orders(store: Store) -> None:
    assert [store.reserve(name, blocks=3) for name in ("a", "b", "a", "c")] == [0, 1, 0, 2]
    # When all are taken, the least used is shared.
    assert store.reserve("d", blocks=3) in (0, 1, 2)
    store.reservation("b").unlink()
    assert store.reserve("e", blocks=4) == 1


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_json(tmp_path / "x.json", 1)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        files.write_json(tmp_path / "x.json", 2)
    assert files.read_json(tmp_path / "x.json") == 1


def test_a_database_that_cannot_be_reached_is_named_without_its_password(store: Store) -> None:
    requests = ForgetRequests(store)
    requests.add(wish_classes(store, ["alarm"], rows=queries(0)))
    with pytest.raises(RunError, match="the database cannot keep requests") as failed:
        requests.carry_out(database="postgresql://lethe:secret@127.0.0.1:9/none?connect_timeout=1")
    assert "secret" not in str(failed.value)
    assert not store.busy
