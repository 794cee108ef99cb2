"""What is refused when it is asked for, and that nothing is accepted then."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora.errors import ConfigError, DataError, ModelError, RunError
from server.forgetting import asking
from server.forgetting.asking import accept, check_method, wish_classes, wish_examples, wish_user
from server.forgetting.requests import ForgetRequests
from server.forgetting.sources import read_rows
from server.forgetting.store import Store
from tests.queries import LABELS, PLACES, queries, write_queries


def nothing_accepted(store: Store) -> bool:
    return not store.requests() and not list((store.directory / "requests").iterdir())


@pytest.mark.parametrize(
    ("classes", "labels", "says"),
    [
        (["alarms"], (0,), "class 'alarms' is not among the 4 of the store; did you mean 'alarm'"),
        ([], (0,), "names no class"),
        ([" ", ""], (0,), "names no class"),
        (LABELS, (0, 1, 2, 3), "all 4 classes would be forgotten"),
        (["alarm"], (), "no row of alarm"),
        (["alarm"], (0, 1), "rows are of class 'music', which the request does not name"),
    ],
)
def test_classes_that_cannot_be_forgotten(store: Store, classes: Any, labels: tuple[int, ...], says: str) -> None:
    with pytest.raises(DataError, match=says):
        wish_classes(store, classes, rows=queries(*labels))
    assert nothing_accepted(store)


def test_requests_that_wait_count_towards_everything(store: Store) -> None:
    accept(store, wish_classes(store, LABELS[:3], rows=queries(0, 1, 2)))
    with pytest.raises(DataError, match="all 4 classes would be forgotten"):
        wish_classes(store, LABELS[3:], rows=queries(3))


def test_the_rest_that_two_ask_for_at_once_is_refused_to_the_second(store: Store) -> None:
    first = wish_classes(store, LABELS[:3], rows=queries(0, 1, 2))
    second = wish_classes(store, LABELS[2:], rows=queries(2, 3))
    accept(store, first)
    with pytest.raises(DataError, match="all 4 classes would be forgotten"):
        accept(store, second)
    assert len(store.requests()) == 1


def test_gs_lora_forgets_a_class_once(of_run: Store) -> None:
    wish = wish_classes(of_run, ["alarm"], method="gs-lora")
    accept(of_run, wish)
    # The same again is the same request; other rows of the class are not.
    assert not accept(of_run, wish_classes(of_run, ["alarm"], method="gs-lora")).new
    with pytest.raises(
        DataError, match="class 'alarm' is forgotten already, or asked for; leave it out, or use --meth"
    ):
        wish_classes(of_run, ["music", "alarm"], method="gs-lora")
    accept(of_run, wish_classes(of_run, ["alarm"], rows=queries(0)))


@pytest.mark.parametrize(("rows", "says"), [(0, "without rows"), (1, "1 rows is too"), (7, "7 rows is too")])
def test_too_few_examples(store: Store, rows: int, says: str) -> None:
    with pytest.raises(DataError, match=says):
        wish_examples(store, queries(0).take(range(rows)))
    wish_examples(store, queries(0).take(range(8)))


def test_a_file_with_other_labels_names_the_line(tmp_path: Path) -> None:
    path = write_queries(tmp_path / "rows.jsonl", queries(0, places=PLACES[:1]))
    path.write_text(path.read_text() + json.dumps({"text": "x", "label": "sport"}) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl.*4.*sport"):
        read_rows(path, LABELS)


def test_without_a_run_rows_have_to_be_given(store: Store) -> None:
    with pytest.raises(RunError, match="give them by --examples"):
        wish_classes(store, ["alarm"])
    with pytest.raises(RunError, match="use --method o3, which needs none"):
        wish_classes(store, ["alarm"], rows=queries(0), method="gs-lora")


def test_a_run_whose_data_are_gone_is_named(of_run: Store, parts: Path) -> None:
    run = of_run.outside(of_run.about.run)
    assert run is not None
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(parts / "rows.jsonl"), str(run / "gone.jsonl")))
    with pytest.raises(RunError, match=r"gone\.jsonl.*--examples FILE"):
        wish_classes(of_run, ["alarm"])


@pytest.mark.parametrize(
    ("name", "whole", "says"),
    [("o4", True, "did you mean 'o3'"), ("gs-lora", False, "forgets whole classes")],
)
def test_methods(name: str, whole: bool, says: str) -> None:
    assert check_method("gs-lora") == "gs-lora" and check_method("o3", whole_classes=False) == "o3"
    with pytest.raises(ConfigError, match=says):
        check_method(name, whole_classes=whole)


def test_a_store_of_a_classifier_has_no_users(store: Store) -> None:
    with pytest.raises(RunError, match="has no users"):
        wish_user(store, "ada")


def test_a_base_model_that_changed_is_refused_before_anything_is_accepted(store: Store) -> None:
    path = store.directory / "store.json"
    path.write_text(path.read_text().replace(store.classifier.base, "0" * 64))
    changed = Store(store.directory)
    with pytest.raises(ModelError, match=r"was made with 000000000000.*restore it, or make a new store"):
        ForgetRequests(changed).add(wish_classes(changed, ["alarm"], rows=queries(0)))
    assert nothing_accepted(store)


def test_a_damaged_adapter_is_named(store: Store) -> None:
    path = store.directory / "adapters" / "first" / "head.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(RunError, match=r"head\.safetensors: has SHA-256 .* damaged or replaced"):
        ForgetRequests(store).add(wish_classes(store, ["alarm"], rows=queries(0)))


def test_what_a_kill_left_of_asking_is_swept_away(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def kill(path: Path, section: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(asking, "write_section", kill)
        with pytest.raises(Killed):
            accept(store, wish_classes(store, ["alarm"], rows=queries(0)))
    (left,) = (store.directory / "requests").iterdir()
    assert b"wake me" in (left / "work" / "rows.json").read_bytes() and not store.requests()
    accepted = accept(store, wish_classes(store, ["money"], rows=queries(3)))
    assert [path.name for path in (store.directory / "requests").iterdir()] == [accepted.request.id]
