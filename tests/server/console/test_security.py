"""The console's door: sessions, forms of other places, headers, and what pages may load."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from server.console.pages import COOKIE, STATIC, TEMPLATES
from server.console.sessions import Sessions
from tests.server.console.conftest import Browser
from tests.server.service.site import Site

Visit = Callable[[str], Browser]
FORM = {"content-type": "application/x-www-form-urlencoded"}


def test_the_key_stays_out_of_the_browser(site: Site, visit: Visit) -> None:
    key = site.key("user-001")
    site.client.get("/console/sign-in")
    before = site.client.cookies[COOKIE]
    token = re.findall(r'name="csrf" value="(\w+)"', site.client.get("/console/sign-in").text)[0]
    answer = site.client.post("/console/sign-in", data={"csrf": token, "key": f" {key} "}, follow_redirects=False)
    assert answer.status_code == 303 and answer.headers["location"] == "/console"
    (cookie,) = answer.headers.get_list("set-cookie")
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Path=/console" in cookie and "Secure" not in cookie
    assert site.client.cookies[COOKIE] != before, "a token from before signing in must not become a session"
    assert key not in cookie and key not in site.client.get("/console").text
    assert key not in str(vars(site.client.app.state.sessions))  # type: ignore[attr-defined]


def test_over_tls_the_cookie_is_for_tls_alone(site: Site) -> None:
    answer = site.client.get("https://localhost/console/sign-in")
    assert "Secure" in answer.headers["set-cookie"]


@pytest.mark.parametrize("key", ["", "lethe_wrong", "lethe_" + "x" * 500, "ü\x00"])
def test_a_wrong_key_opens_nothing(site: Site, key: str) -> None:
    browser = Browser(site)
    browser.get("/console/sign-in")
    browser.send("/console/sign-in", status=401, key=key)
    assert "not valid here" in browser.text
    assert site.client.get("/console/adapters", follow_redirects=False).status_code == 303


def test_signing_out_and_revoking_end_a_session(site: Site, visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = visit("user-001")
    token = site.client.cookies[COOKIE]
    browser.get("/console/adapters")
    browser.send("/console/sign-out")
    site.client.cookies.set(COOKIE, token, path="/console")
    assert site.client.get("/console/adapters", follow_redirects=False).status_code == 303
    visit("user-001").get("/console/adapters")
    (listed,) = [each for each in site.service.keys.infos() if each.owner == "user-001"]
    site.service.keys.revoke(listed.id)
    assert site.client.get("/console/adapters", follow_redirects=False).status_code == 303


def test_a_form_of_another_place_changes_nothing(site: Site, visit: Visit) -> None:
    browser = visit("user-001")
    browser.get("/console/user", name="user-001")
    fields = {"name": "user-001", "item": "item-001", "rating": "5", "sure": "yes"}
    mine = re.findall(r'name="csrf" value="(\w+)"', browser.text)[0]
    other = Sessions().form_token(site.client.cookies[COOKIE])
    for action in ("rate", "forget", "sign-out", "sign-in"):
        for token in ({}, {"csrf": ""}, {"csrf": other}, {"csrf": mine[:-1]}, {"csrf": "é"}):
            assert site.client.post(f"/console/{action}", data=fields | token).status_code == 403, (action, token)
    assert site.get("/v1/users/user-001")["events"] == 12
    site.client.cookies.clear()
    assert site.client.post("/console/sign-in", data={"key": site.key("operator"), "csrf": mine}).status_code == 403


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"{}", {"content-type": "application/json"}),
        (b"x", {}),
        (b"\xff\xfe", FORM),
        (b"&".join([b"a=1"] * 50), FORM),
    ],
)
def test_what_is_no_form_is_refused(site: Site, visit: Visit, body: bytes, headers: dict[str, str]) -> None:
    visit("user-001")
    answer = site.client.post("/console/rate", content=body, headers=headers)
    assert answer.status_code == 422 and "That did not work" in answer.text


def test_every_answer_has_the_headers(site: Site, visit: Visit) -> None:
    visit("operator")
    pages = ["", "/users", "/user?name=user-001", "/nowhere", "/user", "/sign-in", "/adapter.zip?name=nobody"]
    paths = ["/docs", "/console/static/console.css", *(f"/console{each}" for each in pages)]
    for path in paths:
        headers = site.client.get(path, follow_redirects=False).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy, path
        assert "unsafe" not in policy and "script-src 'self'" in policy, path
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "same-origin", path
        stored = headers["cache-control"]
        assert stored == ("max-age=3600" if "static" in path else "no-store"), path
    assert "content-security-policy" not in site.client.get("/healthz").headers
    large = site.client.post("/console/rate", content=b"x" * 2_000_000)
    assert large.status_code == 413 and "content-security-policy" in large.headers


def test_pages_have_nothing_that_the_policy_forbids() -> None:
    for name in TEMPLATES.list_templates():
        source = (Path(str(TEMPLATES.loader.searchpath[0])) / name).read_text()  # type: ignore[union-attr]
        assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?! src=)|javascript:", source), name
        assert "//" not in re.sub(r"\{#.*?#\}", "", source).replace("</", ""), f"{name} names another host"
        assert len(re.findall(r"\|\s*safe", source)) == (name == "runs.html"), f"{name} leaves something unescaped"
    assert TEMPLATES.autoescape is True
    assert not re.search(r"url\(|@import|http", (STATIC / "console.css").read_text())


def test_static_files_are_those_there_are(site: Site) -> None:
    for file in STATIC.iterdir():
        assert site.client.get(f"/console/static/{file.name}").content == file.read_bytes()
    for name in ("..%2fpages.py", "%2e%2e/pages.py", "nothing.css"):
        assert site.client.get(f"/console/static/{name}").status_code == 404


def test_who_asks_too_often_is_told_so_on_a_page(site: Site, visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    visit("operator")
    monkeypatch.setattr(site.service.rates, "burst", 1)
    monkeypatch.setattr(site.service.rates, "rate", 0.1)
    codes = [site.client.get("/console/adapters") for _ in range(3)]
    assert codes[-1].status_code == 429 and int(codes[-1].headers["retry-after"]) >= 1
    assert "What to do: wait" in codes[-1].text
