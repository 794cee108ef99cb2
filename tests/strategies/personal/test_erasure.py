"""Users deleted from their files: exactly, without a trace, with all others as they were."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from lora.errors import DataError, RunError
from strategies.personal.erasure import StoredUsers, is_users
from strategies.personal.lifelong import LifelongUsers
from tests.people import known_users, small_reader


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    place = tmp_path_factory.mktemp("users")
    return place / "users", known_users(place / "users")


@pytest.fixture
def users(made: tuple[Path, list[str]], tmp_path: Path) -> tuple[Path, list[str]]:
    shutil.copytree(made[0], tmp_path / "users")
    return tmp_path / "users", made[1]


def test_a_user_is_deleted_exactly_and_the_others_stay_to_the_bit(users: tuple[Path, list[str]]) -> None:
    place, names = users
    with StoredUsers(place) as stored:
        pieces, others = stored.pieces(names[1]), stored.others(names[1])
        assert len(pieces) == 2 and len(stored.holding(pieces)) >= 2 and stored.events(names[1]) > 0
        stored.forget(names[1])
        assert names[1] not in stored and stored.events(names[1]) == 0
        assert stored.holding(pieces) == [] and stored.others(names[1]) == others
        stored.forget(names[1])
        assert stored.others(names[1]) == others
    with StoredUsers(place) as again:
        assert again.holding(pieces) == [] and again.others(names[1]) == others


def test_whoever_serves_them_afterwards_answers_the_others_alike(users: tuple[Path, list[str]]) -> None:
    place, names = users
    personal, log = small_reader()
    items = np.tile(np.arange(4), (3, 1))
    stay = [names[0], *names[2:4]]
    with_all = LifelongUsers(personal, log, directory=place)
    before = with_all.logits(stay, items)
    with_all.close()
    with StoredUsers(place) as stored:
        stored.forget(names[1])
    without = LifelongUsers(personal, log, directory=place)
    try:
        assert without.names() == stay and (without.logits(stay, items) == before).all()
    finally:
        without.close()


def test_users_who_are_served_are_deleted_where_they_are_served(users: tuple[Path, list[str]]) -> None:
    place, names = users
    served = LifelongUsers(*small_reader(), directory=place)
    try:
        with pytest.raises(RunError):
            StoredUsers(place)
        stored = StoredUsers.serving(served, place)
        with stored:
            pieces = stored.pieces(names[0])
            stored.forget(names[0])
            assert stored.holding(pieces) == []
        assert served.names() == names[1:]
    finally:
        served.close()


def test_unknown_users_and_directories_are_named(users: tuple[Path, list[str]], tmp_path: Path) -> None:
    place, names = users
    with StoredUsers(place) as stored:
        with pytest.raises(DataError, match=f"did you mean '{names[0]}'"):
            stored.check(names[0] + "x")
        stored.check(names[0])
    assert is_users(place) and not is_users(tmp_path)
    with pytest.raises(RunError, match="holds no users"):
        StoredUsers(tmp_path)
    (place / "slots" / "index.sqlite").write_bytes(b"x" * 100)
    index = next(path for path in (place / "slots").iterdir() if "sqlite" in path.name)
    index.write_bytes(b"x" * 200)
    with pytest.raises(RunError, match="damaged"):
        StoredUsers(place)
