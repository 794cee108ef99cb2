"""Parts: every user is in one, one process holds it, and requests find the way to it."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.errors import Busy, DataError, RunError, Unknown
from server.service.generation import WriteAsked
from server.service.identity import Caller
from server.service.parts import CONSOLE, PART, WHOLE, Part, about, check_division, hold, order, part_of
from server.service.recommending import RecommendAsked
from server.service.registry import Registry
from server.service.service import Service, Writer
from strategies.personal.events import Event
from strategies.personal.lifelong import LifelongUsers
from strategies.personal.personalized import Personalized
from tasks.recommendation.interactions import Interactions

OPERATOR = Caller("k", "operator", None)
NAMES = st.text(min_size=1, max_size=20)


@given(NAMES, st.integers(1, 9))
def test_a_user_is_in_one_part_for_ever(user: str, of: int) -> None:
    assert [number for number in range(of) if Part(number, of).has(user)] == [part_of(user, of)]
    assert WHOLE.has(user)


def test_parts_are_about_equal_and_never_change() -> None:
    count = Counter(part_of(f"user-{number}", 4) for number in range(4000))
    assert all(900 < size < 1100 for size in count.values())
    assert [part_of(name, 7) for name in ("ada", "zoë", "用户")] == [5, 1, 1]


def scope(path: str, query: str = "", **headers: str) -> dict[str, Any]:
    sent = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"path": path, "query_string": query.encode(), "headers": sent}


@pytest.mark.parametrize(
    ("asked", "whom"),
    [
        (scope("/v1/users/zoë"), "zoë"),
        (scope("/v1/users/a b/recommendations"), "a b"),
        (scope("/v1/adapters/ada"), "ada"),
        (scope("/v1/completions", lethe_user="zo%C3%AB"), "zoë"),
        (scope("/v1/users/ada", lethe_user="bob"), "bob"),
        (scope("/v1/completions"), None),
        (scope("/v1/users/"), None),
        (scope("/v1/adapters"), None),
        (scope("/healthz"), None),
        (scope("/metrics"), None),
        (scope("/metrics", "part=1"), f"{PART}1"),
        (scope("/console/user", "name=ada"), CONSOLE),
        ({}, None),
    ],
)
def test_a_request_says_whom_it_is_about(asked: dict[str, Any], whom: str | None) -> None:
    assert about(asked) == whom


def test_divided_users_are_asked_for_where_they_are() -> None:
    replicas = {"a": Part(0, 3), "b": Part(1, 3), "c": Part(2, 3)}
    for user in map(str, range(50)):
        assert order(user, replicas) == [["abc"[part_of(user, 3)]]]
    assert order(f"{PART}1", replicas) == [["b"]] and order(CONSOLE, replicas) == order(CONSOLE, replicas)
    # A replica that is starting has told nothing yet: any other one says so.
    starting = {"a": Part(0, 3), "b": Part(-1, 1), "c": Part(2, 3)}
    lost = next(user for user in map(str, range(50)) if part_of(user, 3) == 1)
    assert len(order(lost, starting)[0]) == 1 and order(lost, {}) == [[]]
    assert len(order(None, replicas)[0]) == 2


def test_a_replica_that_comes_moves_only_the_users_that_it_gets() -> None:
    few = dict.fromkeys("abc", WHOLE)
    users = [f"user-{number}" for number in range(600)]
    before, after = ({user: order(user, each)[0][0] for user in users} for each in (few, {**few, "d": WHOLE}))
    moved = [user for user in users if before[user] != after[user]]
    assert {after[user] for user in moved} == {"d"} and 100 < len(moved) < 200
    assert sorted(name for names in order("ada", few) for name in names) == ["a", "b", "c"]


HOLDER = """
import sys, time
from pathlib import Path
from server.service.parts import hold
print(hold(Path(sys.argv[1]), 2).part.number, flush=True)
time.sleep(60)
"""


def test_a_part_has_one_holder_and_is_free_again_after_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "0\n"
        held = hold(tmp_path, 2)
        assert held.part == Part(1, 2)
        with pytest.raises(RunError, match="all 2 parts"):
            hold(tmp_path, 2, patience=0.3)
        other.kill()
        other.wait()
        again = hold(tmp_path, 2, patience=5)
        assert again.part == Part(0, 2)
        held.close()
        again.close()


def test_users_stay_divided_as_they_are(tmp_path: Path) -> None:
    check_division(tmp_path, 4)
    (tmp_path / "users-1-of-4").mkdir()
    check_division(tmp_path, 4)
    with pytest.raises(RunError, match=r"among 4 replicas .* not 2; serve with --replicas 4"):
        check_division(tmp_path, 2)
    with pytest.raises(RunError, match="not 1"):
        check_division(tmp_path, 1)
    other = tmp_path / "whole"
    (other / "users").mkdir(parents=True)
    with pytest.raises(RunError, match="--replicas 1"):
        check_division(other, 3)


@pytest.fixture
def halves(personal: Personalized, log: Interactions, tmp_path: Path, request: pytest.FixtureRequest) -> list[Service]:
    """Two services that divide the users between them."""
    services = []
    for part in (Part(0, 2), Part(1, 2)):
        users = LifelongUsers(personal, log, directory=tmp_path / part.folder)
        users.start(log, among=part.has)
        registry = Registry(None, tmp_path / "registry")
        writer = Writer(personal.base, personal.adapted)
        services.append(Service(registry, users=users, writer=writer, candidates=8, part=part))
        request.addfinalizer(services[-1].close)
    return services


def test_halves_have_everybody_once_and_answer_for_nobody_else(halves: list[Service], log: Interactions) -> None:
    names = [set(each.users.names()) for each in halves if each.users is not None]
    assert names[0] | names[1] == set(log.user_names) and not names[0] & names[1]
    own, other = min(names[0]), min(names[1])
    first = halves[0]
    assert first.recommend(OPERATOR, RecommendAsked(own)).result(60).provenance.adapter == own
    asks: list[Callable[[], object]] = [
        lambda: first.recommend(OPERATOR, RecommendAsked(other, fallback="cold")),
        lambda: first.user(OPERATOR, other),
        lambda: first.observe(OPERATOR, other, [Event(other, "item-001", 4.0, 2_000_000_000)]),
        lambda: first.complete(OPERATOR, WriteAsked(other, "12/20")),
        lambda: first.bring(OPERATOR, other, b"", owner=None, model=None),
        lambda: first.forget(OPERATOR, other),
    ]
    for ask in asks:
        with pytest.raises(Busy, match="another replica"):
            ask()
    assert len(halves[1].user(OPERATOR, other).events) == 12
    with pytest.raises(Unknown):
        first.user(OPERATOR, next(name for name in map(str, range(99)) if Part(0, 2).has(name)))
    with pytest.raises(DataError, match="nothing"):
        first.recommend(OPERATOR, RecommendAsked(own, items=("nothing",))).result(60)


def test_a_request_that_was_cut_off_is_carried_out_where_the_user_is(halves: list[Service]) -> None:
    first, second = halves
    assert second.users is not None
    user, forgetting = second.users.names()[0], second.forgetting
    erasers = forgetting._erasers  # type: ignore[attr-defined]

    def killed(_: str) -> Any:
        raise SystemExit

    forgetting._erasers = (killed,)  # type: ignore[attr-defined]
    with pytest.raises(SystemExit):
        second.forget(second.keys.caller(second.keys.issue("operator")), user)
    forgetting._erasers = erasers  # type: ignore[attr-defined]
    assert first.forgetting.resume() == 0 and user in second.users
    assert second.forgetting.resume() == 1 and user not in second.users
    (done,) = first.forget_requests(OPERATOR)
    assert done.state == "done" and done.evidence["events"] == 12
