"""Ratings of a personal run: who was asked to be forgotten, in a store or of a service, is left out."""

from pathlib import Path

import numpy as np
import pytest

from lethe.cli import main
from lethe.config import OwnRatingsConfig, PersonalRun
from lethe.ratings import asked_to_forget, load_ratings
from lora.errors import DataError, RunError
from server.forgetting.asking import accept, wish_user
from server.forgetting.requests import ForgetRequests
from server.forgetting.sources import open_store
from server.service.forgetting import Deletions
from server.service.registry import Registry
from tests.people import known_users


@pytest.fixture
def users(tmp_path: Path) -> Path:
    """A directory of users with a store, in which one user was forgotten and another waits to be."""
    place = tmp_path / "users"
    names = known_users(place)
    store = open_store(place)
    ForgetRequests(store).add(wish_user(store, names[1]))
    ForgetRequests(store).carry_out()
    accept(store, wish_user(store, names[3]))
    return place


def leaving_out(place: Path) -> PersonalRun:
    return PersonalRun(ratings=OwnRatingsConfig.model_validate({"forgotten": str(place)}))


def test_nobody_is_left_out_unless_a_store_is_named() -> None:
    log, left_out = load_ratings(PersonalRun())
    assert left_out == 0 and len(log.user_names) == 120


def test_who_was_asked_to_be_forgotten_has_no_row_and_the_rest_is_the_same(users: Path) -> None:
    whole, _ = load_ratings(PersonalRun())
    log, left_out = load_ratings(leaving_out(users))
    gone = {"user-001", "user-003"}
    assert left_out == 2 and set(whole.user_names) - set(log.user_names) == gone
    rows = np.array([whole.user_names[user] not in gone for user in whole.users])
    for name in ("items", "ratings", "times"):
        assert np.array_equal(getattr(log, name), getattr(whole, name)[rows])
    assert [log.user_names[user] for user in log.users] == [whole.user_names[user] for user in whole.users[rows]]
    assert log.catalogue == whole.catalogue and (log.like_from, log.scale) == (whole.like_from, whole.scale)


def test_a_services_folder_tells_of_its_own_requests_and_of_the_stores_of_its_users(users: Path) -> None:
    # As `lethe serve` has it: the registry in the folder, the users and their store below.
    folder = users.parent
    registry = Registry(None, folder)
    Deletions(registry, [lambda user: {"events": 1}], knows=lambda user: True).ask("user-007", asked_by=None)
    for place, gone in ((folder, {1, 3, 7}), (users, {1, 3, 7}), (users / "forgetting", {1, 3})):
        asked = asked_to_forget([str(place)])
        assert {number for number in range(20) if asked(f"user-{number:03}")} == gone
    both = asked_to_forget([str(users / "forgetting"), str(folder)])
    assert both("user-001") and both("user-007") and not both("user-002")


def test_a_file_that_is_no_registry_is_named_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "registry.sqlite").write_bytes(b"")
    with pytest.raises(RunError, match=r"registry\.sqlite: no registry of a service"):
        asked_to_forget([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["registry.sqlite"]
    assert (tmp_path / "registry.sqlite").read_bytes() == b""


def test_a_place_where_nobody_can_be_forgotten_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"ratings.forgotten=.*elsewhere.*neither a forgetting store nor a service"):
        load_ratings(leaving_out(tmp_path / "elsewhere"))
    assert not (tmp_path / "elsewhere").exists()


def test_a_run_in_which_nobody_is_left_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lethe.ratings.asked_to_forget", lambda places: lambda name: True)
    with pytest.raises(DataError, match="none of the 120 users is left"):
        load_ratings(leaving_out(Path("everybody")))


def test_the_command_leaves_them_out_and_names_a_wrong_place(
    users: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(users.parent)
    assert main(["personalize", "movielens", "ratings.forgotten=nowhere"]) == 2
    told = capsys.readouterr().err
    assert "ratings.forgotten=nowhere" in told and not (users.parent / "runs").exists()
