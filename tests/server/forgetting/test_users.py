"""Requests to forget a user: deleted exactly, recorded without the name, and one who came back told apart."""

from pathlib import Path

import pytest

from lora.errors import DataError, RunError
from server.forgetting.asking import wish_classes, wish_user
from server.forgetting.requests import ForgetRequests
from server.forgetting.sources import open_store
from strategies.personal.lifelong import LifelongUsers
from tests.people import known_users, small_reader


@pytest.fixture
def place(tmp_path: Path) -> Path:
    known_users(tmp_path / "users")
    return tmp_path / "users"


def test_a_user_is_forgotten_and_the_record_does_not_say_who(place: Path) -> None:
    store = open_store(place)
    requests = ForgetRequests(store)
    with pytest.raises(DataError, match="is not known"):
        wish_user(store, "nobody at all")
    name = "user-1" if "user-1" in (known := _names(place)) else known[1]
    accepted = requests.add(wish_user(store, name))
    requests.carry_out()
    record = requests.status(accepted.request.id).record
    assert record is not None
    before, after = record["measured"]["before"], record["measured"]["after"]
    assert before["events"] == 6 and before["files_holding"] >= 2
    assert after["events"] == after["files_holding"] == 0 and not after["known"]
    assert before["others"] == after["others"] and record["done"]["erased"]
    assert record["done"]["shared_weights"] == "not unlearned"
    files = [path for path in place.rglob("*") if path.is_file()]
    assert not [path for path in files if f'"{name}"'.encode() in path.read_bytes()]
    assert not (store.directory / "requests" / accepted.request.id / "work").exists()
    verdict = requests.verify(accepted.request.id, subject=name)
    assert verdict.good and any("0 files hold the name now" in line for line in verdict.holds)
    assert not requests.verify(accepted.request.id, subject="somebody").good


def _names(place: Path) -> list[str]:
    from strategies.personal.erasure import StoredUsers

    with StoredUsers(place) as stored:
        return stored.histories.names()


def test_the_same_twice_is_one_request_and_one_who_came_back_is_another(place: Path) -> None:
    requests, name = ForgetRequests(open_store(place)), _names(place)[0]
    first = requests.add(wish_user(requests.store, name))
    again = requests.add(wish_user(requests.store, name))
    assert first.new and not again.new and again.request == first.request
    requests.carry_out()
    late = requests.add(wish_user(requests.store, name))
    assert not late.new and late.request == first.request
    personal, log = small_reader()
    users = LifelongUsers(personal, log, directory=place)
    users.observe(name, log.catalogue.names[0], float(log.ratings[0]), int(log.times.max()) + 1)
    users.close()
    back = requests.add(wish_user(requests.store, name))
    assert back.new and back.request != first.request
    requests.carry_out()
    assert name not in _names(place) and len(requests.store.requests()) == 2


def test_users_in_use_elsewhere_are_not_touched(place: Path) -> None:
    store, name = open_store(place), _names(place)[0]
    served = LifelongUsers(*small_reader(), directory=place)
    try:
        with pytest.raises(RunError):
            wish_user(store, name)
    finally:
        served.close()


def test_a_store_of_users_has_no_classifier(place: Path) -> None:
    with pytest.raises(RunError, match="serves no classifier"):
        wish_classes(open_store(place), ["alarm"])
