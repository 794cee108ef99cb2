"""The console: what every page shows, to whom, and what it does."""

import io
import re
import zipfile
from collections.abc import Callable
from html import unescape
from pathlib import Path
from urllib.parse import quote

import pytest

from server.console.shelf import named
from server.service.adapters import NewAdapter
from server.service.tables import LONGEST_NAME
from strategies.personal.events import Event
from tests.server.console.conftest import Browser
from tests.server.service.conftest import Encoder, drawn
from tests.server.service.site import Site

Visit = Callable[[str], Browser]
HOSTILE = [
    "<script>alert(1)</script>"[:LONGEST_NAME].replace("/", "|"),
    '"><img src=x onerror=alert(1)>',
    "a&b=c#d?e%2e",
]
PAGES = ["users", "user?name=user-001", "adapters", "forget-requests", "runs", "forget?name=user-001"]


def words(text: str) -> str:
    """The text of a page as it is read."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", text)).split())


# --- Users -----------------------------------------------------------------------------------------------------------


def test_a_users_page_shows_both_lists_and_whose_they_are(site: Site, visit: Visit) -> None:
    visit("user-003")
    shown = words(Browser(site).get("/console"))
    own = site.get("/v1/users/user-003/recommendations")
    plain = site.get("/v1/users/user-003/recommendations", params={"personalized": "false"})
    version = own["whose"]["adapter_version"]
    assert f"personalised adapter user-003, version {version}" in shown
    assert "not personalised asked without, for comparison" in shown
    with_, without = shown.split("Without personalisation")
    for items, place in ((own["items"], with_.split("With personalisation")[1]), (plain["items"], without)):
        spots = [place.index(each["title"]) for each in items]
        assert spots == sorted(spots) and len(spots) == len(items) > 3
        assert all(f"{100 * each['like']:.1f} %" in place for each in items)
    history = site.get("/v1/users/user-003")["history"]
    assert all(event["title"] in shown.split("History")[1] for event in history)


def test_the_gates_weights_are_those_that_mix(site: Site, visit: Visit) -> None:
    shown = words(visit("user-003").get("/console/user", name="user-003"))
    people = site.service.users
    assert people is not None
    own, cold = people.gate("user-003"), people.gate(None)
    assert own.shape == cold.shape == (len(people.personal.adapted.sites), 3)
    for number, (mine, theirs) in enumerate(zip(own.mean(0).tolist(), cold.mean(0).tolist(), strict=True), start=1):
        assert f"meta-LoRA {number} {100 * mine:.1f} % {100 * theirs:.1f} %" in shown
    assert float((own - cold).abs().max()) > 1e-4 and "The mixture is zero" not in shown


def test_a_mixture_that_is_zero_is_called_so(site: Site, visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    people = site.service.users
    assert people is not None
    slot = people.slot("user-003")
    monkeypatch.setattr(people, "slot", lambda name: 0 * slot)
    assert "The mixture is zero" in words(visit("user-003").get("/console/user", name="user-003"))


def test_a_rating_moves_the_recommendations(site: Site, visit: Visit) -> None:
    browser = visit("user-004")
    before = site.get("/v1/users/user-004/recommendations")
    wanted = before["items"][0]
    browser.get("/console/user", name="user-004", find=wanted["title"].upper())
    assert wanted["title"] in unescape(browser.text)
    browser.send("/console/rate", item=wanted["item"], rating="1")
    shown = words(browser.text)
    after = site.get("/v1/users/user-004/recommendations")
    assert after["whose"]["adapter_version"] > before["whose"]["adapter_version"]
    assert "The rating was taken" in shown and f"version {after['whose']['adapter_version']}" in shown
    ranks = {each["item"]: place for place, each in enumerate(before["items"], start=1)}
    list_ = shown.split("With personalisation")[-1].split("Without personalisation")[0]
    for place, each in enumerate(after["items"], start=1):
        moved = ranks.get(each["item"], 0) - place
        sign = (
            "new" if each["item"] not in ranks else f"up {moved}" if moved > 0 else f"down {-moved}" if moved else "="
        )
        assert re.search(rf"{re.escape(each['title'])} (▲ |▼ )?{re.escape(sign)}", list_), (each, moved, list_)
    latest = site.get("/v1/users/user-004")["history"][0]
    assert latest["item"] == wanted["item"] and latest["rating"] == 1
    browser.get("/console/user", name="user-004", find=wanted["title"])
    browser.send("/console/rate", item=wanted["item"], rating="2")
    browser.get("/console/user", name="user-004", find=wanted["title"])
    browser.send("/console/rate", status=422, item=wanted["item"], rating="a lot")
    browser.get("/console/user", name="user-004", find=wanted["title"])
    assert "out of range" in browser.send("/console/rate", status=422, item=wanted["item"], rating="99")


def test_the_first_rating_makes_a_user_known(site: Site, visit: Visit) -> None:
    browser = visit("newcomer")
    assert "Nothing is known of newcomer" in words(browser.get("/console"))
    assert "not personalised nothing is known of this user" in words(browser.text)
    browser.get("/console/user", name="newcomer", find="a")
    browser.send("/console/rate", item="item-001", rating="5")
    assert "1 event ·" in words(browser.text) and site.get("/v1/users/newcomer")["events"] == 1


def test_users_are_found_by_name(visit: Visit) -> None:
    browser = visit("operator")
    assert "12 users" in words(browser.get("/console")) and "user-011" in browser.text
    assert "1 user with" in words(browser.get("/console/users", q="R-011")) and "user-010" not in browser.text
    assert "Nobody by that name" in words(browser.get("/console/users", q="zz"))
    assert "No title has" in words(browser.get("/console/user", name="user-001", find="zzzz"))


# --- Forgetting ------------------------------------------------------------------------------------------------------


def test_forget_me_asks_once_more_and_shows_the_evidence(site: Site, visit: Visit, text_encoder: Encoder) -> None:
    layout = text_encoder.learner.layout
    site.service.adapters.write(NewAdapter("brought", drawn(layout, 1)[0], layout, "tiny-bert", 2, "user-005"))
    events = site.get("/v1/users/user-005")["events"]
    browser = visit("user-005")
    asked = words(browser.get("/console/forget", name="user-005"))
    assert f"{events} events" in asked and "brought" in asked and "weights that all users share" in asked
    assert "lacks 'sure'" in unescape(browser.send("/console/forget", status=422))
    assert site.get("/v1/users/user-005")["events"] == events
    browser.get("/console/forget", name="user-005")
    shown = words(browser.send("/console/forget", sure="yes"))
    assert "This user is gone" in shown and f"events of the history {events} 0" in shown
    assert "the user's own adapter yes no" in shown and "imported adapters 1 0" in shown
    (request,) = site.get("/v1/forget-requests", who="auditor")["forget_requests"]
    assert request["id"] in shown and request["subject"] in shown
    assert "user-005 was forgotten" in words(browser.get("/console"))
    assert request["id"] in browser.text and "not personalised" in words(browser.text)
    assert "nothing to forget" in browser.get("/console/forget", status=404, name="user-005")
    assert request["subject"] in browser.get("/console/forget-requests")


def test_a_request_that_takes_long_shows_its_progress(
    site: Site, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = visit("user-006")
    forgetting = site.service.forgetting
    monkeypatch.setattr(forgetting, "_carry_out", lambda request, user: forgetting.get(request))
    browser.get("/console/forget", name="user-006")
    browser.send("/console/forget", sure="yes")
    assert "This user is being forgotten" in words(browser.text) and "nothing yet" in browser.text
    assert '<meta http-equiv="refresh"' in browser.text and "<progress" in browser.text
    assert 'aria-live="polite"' in browser.text
    monkeypatch.undo()
    (waiting,) = forgetting.all()
    forgetting.resume()
    part = browser.get("/console/forget-request", id=waiting.id, part="true")
    assert 'data-state="done"' in part and "<html" not in part and "This user is gone" in part
    assert "refresh" not in browser.get("/console/forget-request", id=waiting.id)


# --- Runs, adapters and requests -------------------------------------------------------------------------------------


def test_runs_show_figures_curves_and_reports(visit: Visit) -> None:
    browser = visit("auditor")
    shown = words(browser.get("/console/runs"))
    assert "<b>first</b> finished" in shown and "80.5 %" in shown and "7.996" in shown and "line 3 is no JSON" in shown
    assert browser.text.count('<svg role="img"') == 2 and "<i>test" not in browser.text
    report = re.findall(r'href="(/console/report[^"]+)"', browser.text)
    assert len(report) == 1 and "<title>report" in browser.get(unescape(report[0]))
    assert browser.page is not None and "sandbox" in browser.page.headers["content-security-policy"]
    for name in ("second", "../x", "/etc/passwd"):
        assert "no such report" in browser.get("/console/report", status=404, run=name)


def test_without_runs_the_page_says_what_fills_it(site: Site, visit: Visit) -> None:
    browser = visit("operator")
    empty = type("Empty", (), {"place": "runs", "names": lambda self: []})()
    site.client.app.state.runs = empty  # type: ignore[attr-defined]
    assert "make demo" in browser.get("/console/runs")
    site.client.app.state.runs = None  # type: ignore[attr-defined]
    assert "--runs" in browser.get("/console/runs")


def test_adapters_are_listed_and_leave_as_peft_directories(
    site: Site, visit: Visit, text_encoder: Encoder, tmp_path: Path
) -> None:
    layout = text_encoder.learner.layout
    site.service.adapters.write(NewAdapter("for all", drawn(layout, 1)[0], layout, "tiny-bert", 2))
    site.service.adapters.write(NewAdapter("ann's", drawn(layout, 1)[0], layout, "tiny-bert", 2, "ann"))
    browser = visit("operator")
    shown = words(browser.get("/console/adapters"))
    assert "14 adapters" in shown and "for all" in shown and "ann's" in shown
    row = site.service.adapters.rows(["for all"])["for all"]
    assert row.digest[:12] in shown and f"{row.version} tiny-bert 2" in shown
    for name in ("user-003", "for all"):
        link = f"/console/adapter.zip?name={quote(name)}"
        assert link in browser.get("/console/adapters")
        browser.get(link)
        assert browser.page is not None
        with zipfile.ZipFile(io.BytesIO(browser.page.content)) as archive:
            assert sorted(archive.namelist()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert named(f"{tmp_path}/a/base") == "a/base" and named("org/model") == "org/model"
    own = words(visit("user-003").get("/console/adapters"))
    assert "2 adapters" in own and "ann's" not in own and "user-004" not in own
    looked = visit("auditor").get("/console/adapters")
    assert "14 adapters" in words(looked) and "adapter.zip" not in looked


# --- Who sees what ---------------------------------------------------------------------------------------------------


def test_nobody_sees_a_page_without_signing_in(site: Site) -> None:
    for page in PAGES:
        answer = site.client.get(f"/console/{page}", follow_redirects=False)
        assert answer.status_code == 303 and answer.headers["location"] == "/console/sign-in", page
    assert site.client.get("/", follow_redirects=False).headers["location"] == "/console"


@pytest.mark.parametrize(
    ("who", "seen"),
    [
        ("operator", PAGES),
        ("auditor", ["adapters", "forget-requests", "runs"]),
        ("user-001", ["user?name=user-001", "adapters", "forget-requests", "forget?name=user-001"]),
        ("user-002", ["adapters", "forget-requests"]),
    ],
)
def test_a_role_sees_its_own_pages(site: Site, visit: Visit, who: str, seen: list[str]) -> None:
    browser = visit(who)
    for page in PAGES:
        browser.get(f"/console/{page}", status=200 if page in seen else 403)


def test_another_users_things_are_not_touched(site: Site, visit: Visit) -> None:
    done = site.post("/v1/forget-requests", {"user": "user-007"})
    for who in ("user-002", "auditor"):
        browser = visit(who)
        browser.get("/console/adapters")
        token = re.findall(r'name="csrf" value="(\w+)"', browser.text)[0]
        browser.post("/console/rate", status=403, csrf=token, name="user-001", item="item-001", rating="5")
        browser.post("/console/forget", status=403, csrf=token, name="user-001", sure="yes")
        browser.get("/console/adapter.zip", status=403 if who == "auditor" else 404, name="user-001")
    assert site.get("/v1/users/user-001")["events"] == 12
    visit("user-002").get("/console/forget-request", status=404, id=done["id"])
    visit("user-002").get("/console/nowhere", status=404)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_and_titles_are_shown_and_never_run(
    site: Site, visit: Visit, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = site.service.users
    assert people is not None
    people.observe_many([Event(name, "item-001", 4.0, 2_000_000_000)])
    monkeypatch.setitem(site.service.titles, "item-001", f"Title {name}")
    browser = visit("operator")
    pages = [browser.get("/console/users"), browser.get("/console/adapters")]
    browser.get("/console/users", q=name)
    (link,) = re.findall(r'<li><a href="(/console/user\?name=[^"]+)"', browser.text)
    pages += [browser.text, browser.get(unescape(link)), browser.get("/console/user", name=name, find="title")]
    pages += [browser.get("/console/forget", name=name)]
    for page in pages:
        # What is dangerous is there as text alone: no tag and no attribute that the templates do not have.
        assert "<script>" not in page and "<img src=x" not in page and 'onerror=alert(1)>"' not in page
        assert name in unescape(page)
    assert "This user is gone" in words(browser.send("/console/forget", sure="yes"))
    assert name not in people and name not in unescape(browser.get("/console/forget-requests"))
