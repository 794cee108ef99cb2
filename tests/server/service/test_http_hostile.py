"""HTTP for callers who should not, and for what no client should send."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from server.service.forgetting import subject_of
from server.service.identity import RateLimits
from tests.server.service.site import NEXT, Site, good, problem

# --- Who may what ----------------------------------------------------------------------------------------------------


@pytest.fixture
def site_url(registry_url: str | None) -> str | None:
    """Everything here is the same over SQLite and PostgreSQL."""
    return registry_url


KEYS = [None, "Bearer", "Bearer ", "Bearer wrong", "Basic eDp5", "Bearer lethe_ключ", "x" * 9000]


@pytest.mark.parametrize("key", KEYS)
def test_without_a_valid_key_nothing_is_told(site: Site, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": key.encode()}
    response = site.client.get("/v1/users/user-001", headers=headers)
    problem(response, 401)
    assert response.headers["www-authenticate"] == "Bearer"


def test_a_users_key_opens_own_data_only(site: Site) -> None:
    theirs = "/v1/users/user-002"
    body = {"json": {"items": ["item-001"]}}
    asked: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", theirs, {}), ("DELETE", theirs, {}), ("GET", f"{theirs}/recommendations", {}),
        ("POST", f"{theirs}/events", {"json": {"events": [NEXT]}}), ("POST", f"{theirs}/predictions", body),
        ("POST", "/v1/forget-requests", {"json": {"user": "user-002"}}), ("GET", "/v1/keys", {}),
        ("POST", "/v1/keys", {"json": {"role": "operator"}}), ("DELETE", "/v1/keys/x", {}),
        ("PUT", "/v1/adapters/x", {"content": b""}), ("DELETE", "/v1/adapters/x", {}),
        ("GET", "/v1/users/nobody", {}),
    ]  # fmt: skip
    for method, path, more in asked:
        problem(site.ask(method, path, who="user-001", **more), 403)
    for method, path, more in asked[:6]:
        problem(site.ask(method, path, who="auditor", **more), 403)
    problem(site.ask("GET", "/v1/adapters/user-002", who="auditor"), 403)
    body = {"model": "user-002", "prompt": "The", "max_tokens": 2}
    problem(site.ask("POST", "/v1/completions", json=body, who="auditor"), 403)
    assert site.get("/v1/keys", who="auditor")["keys"]
    assert site.get(theirs, who="user-002")["user"] == "user-002"


def test_an_operator_makes_and_revokes_keys(site: Site) -> None:
    made = site.post("/v1/keys", {"role": "user", "owner": "user-004", "label": "phone"})["key"]
    headers = {"Authorization": f"Bearer {made}"}
    assert site.client.get("/v1/users/user-004", headers=headers).status_code == 200
    (listed,) = [key for key in site.get("/v1/keys")["keys"] if key["label"] == "phone"]
    assert made not in json.dumps(listed)
    assert site.ask("DELETE", f"/v1/keys/{listed['id']}").status_code == 204
    problem(site.client.get("/v1/users/user-004", headers=headers), 401)
    problem(site.ask("POST", "/v1/keys", json={"role": "user"}), 422)


def test_who_asks_too_often_is_told_when_to_come_back(site: Site) -> None:
    site.service.rates = RateLimits(rate=0.5, burst=2)
    codes = [site.ask("GET", "/v1/models", who="user-001").status_code for _ in range(3)]
    last = site.ask("GET", "/v1/models", who="user-001")
    assert codes[:2] == [200, 200] and last.status_code == 429 and 1 <= int(last.headers["retry-after"]) <= 2
    assert site.ask("GET", "/v1/models", who="user-002").status_code == 200


def test_who_guesses_keys_is_stopped_before_the_registry_is_asked(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert site.ask("GET", "/v1/models", who="user-001").status_code == 200
    site.service.rates, looked = RateLimits(rate=0.5, burst=3), list[str]()
    ask = site.service.keys._asked

    def listen(digest: str) -> Any:
        looked.append(digest)
        return ask(digest)

    monkeypatch.setattr(site.service.keys, "_asked", listen)
    guesses = [{"Authorization": f"Bearer lethe_{number}"} for number in range(5)]
    codes = [site.client.get("/v1/models", headers=guess).status_code for guess in guesses]
    assert codes == [401, 401, 401, 429, 429] and len(looked) == 3
    # A key that is known goes on asking.
    assert site.ask("GET", "/v1/models", who="user-001").status_code == 200


# --- Bad input -------------------------------------------------------------------------------------------------------


def test_a_name_that_no_database_holds_is_the_callers_mistake(site: Site) -> None:
    for name in ("a\x00b", "\x00"):
        problem(site.ask("POST", "/v1/forget-requests", json={"user": name}), 404, 422)
        problem(site.ask("GET", f"/v1/users/{quote(name)}"), 404, 422)
        problem(site.ask("POST", f"/v1/users/{quote(name)}/predictions", json={"texts": ["a"]}), 404, 422)
        problem(site.ask("POST", f"/v1/users/{quote(name)}/events", json={"events": [NEXT]}), 422)
        problem(site.ask("POST", "/v1/completions", json={"model": name, "prompt": "x"}), 404, 422)
        problem(site.ask("DELETE", f"/v1/adapters/{quote(name)}"), 404, 422)


def test_large_bodies_are_cut_off(site: Site) -> None:
    path = "/v1/users/user-001/events"
    assert "1048576" in problem(site.ask("POST", path, content=b"x" * 10_000_000), 413)

    def endless() -> Iterator[bytes]:
        for _ in range(200):
            yield b"x" * 65_536

    assert "1048576" in problem(site.ask("POST", path, content=endless()), 413)
    problem(site.ask("PUT", "/v1/adapters/x", content=b"x" * 2_000_000), 422)


def one(fields: bytes) -> bytes:
    return b'{"events": [{' + fields + b"}]}"


BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"x"',
    b"\xff\xfe",
    b"[" * 5000,
    b'{"events": []}',
    b'{"events": {}}',
    b'{"events": [1]}',
    one(b'"item": 7, "rating": 4, "time": 1'),
    one(b'"item": "item-001", "rating": "4", "time": 1'),
    one(b'"item": "item-001", "rating": NaN, "time": 1'),
    one(b'"item": "item-001", "rating": 1e999, "time": 1'),
    one(b'"item": "item-001", "rating": 4, "time": 1.5'),
    one(b'"item": "item-001", "rating": 4, "time": 1e30'),
    one(b'"item": "item-001", "rating": 4, "time": 99999999999999999999999'),
    one(b'"item": "item-001", "rating": 4, "time": 2000000000, "more": 1'),
    one(b'"item": "\\ud800", "rating": 4, "time": 2000000000'),
    one(b'"item": "item-001", "rating": 5.5, "time": 2000000000'),
]


@pytest.mark.parametrize("body", BODIES)
def test_malformed_bodies_are_refused_and_change_nothing(site: Site, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    problem(site.ask("POST", "/v1/users/user-001/events", content=body, headers=headers), 400, 422)
    assert site.get("/v1/users/user-001")["events"] == 12


@pytest.mark.parametrize(
    "name", ["%2e%2e", "..%2f..%2fetc%2fpasswd", "a%00b", "x" * 129, "%20", "a%0ab", "%ff", "a%5cb"]
)
def test_names_that_are_none_are_refused(site: Site, name: str) -> None:
    response = site.ask("POST", f"/v1/users/{name}/events", json={"events": [NEXT]})
    assert response.status_code in (404, 405, 422) and response.json()["error"]["remedy"]


@pytest.mark.parametrize("name", ["zoë", "用户", "🦊", "O'Brien; DROP TABLE adapters", "a b", "Ünïcödé.name@host"])
def test_names_of_any_script_work_everywhere(site: Site, name: str) -> None:

    path = f"/v1/users/{quote(name, safe='')}"
    assert site.post(f"{path}/events", {"events": [NEXT]}, who=name)["user"] == name
    assert site.get(f"{path}/recommendations", who=name)["whose"]["adapter"] == name
    forgotten = good(site.ask("DELETE", path, who=name))
    assert forgotten["state"] == "done" and forgotten["subject"] == subject_of(name)


def test_what_is_not_there_has_the_same_shape(site: Site) -> None:
    assert "openapi" in problem(site.ask("GET", "/v1/nothing"), 404)
    problem(site.ask("PATCH", "/v1/models"), 405)
    problem(site.ask("GET", "/v1/users/user-001/recommendations", params={"count": "many"}), 422)


def test_what_breaks_inside_stays_inside(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise RuntimeError("a private text")

    monkeypatch.setattr(site.service.users, "logits", breaks)
    assert "private" not in problem(site.ask("GET", "/v1/users/user-001/recommendations"), 500)
    monkeypatch.setattr(site.service.users, "history", breaks)
    assert "private" not in problem(site.ask("GET", "/v1/users/user-001"), 500)
