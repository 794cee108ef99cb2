"""The console in a real browser: by keyboard alone, at phone width, and with nothing loaded from elsewhere."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from server.service.registry import Registry
from server.service.service import Service, Writer
from strategies.personal.lifelong import LifelongUsers
from strategies.personal.personalized import Personalized
from tasks.recommendation.interactions import Interactions
from tests.lethe.test_shown_runs import write_run
from tests.server.console.browsing import FLAGS, PATIENCE, chromium, running

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.browser
DESK, PHONE = (1200, 900), (360, 740)
SIZES = [DESK, PHONE]


class Watched:
    """A page of the browser that notes errors and requests to other hosts."""

    def __init__(self, page: Any, base: str, key: str) -> None:
        self.page, self.base, self.key = page, base, key
        self.wrong: list[str] = []
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda told: self.wrong.append(told.text) if told.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith(base) or self.wrong.append(asked.url))

    def check(self) -> None:
        """Nothing went wrong so far, and the page is no wider than the window."""
        wide = self.page.evaluate("[document.scrollingElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1], f"{self.page.url} is {wide[0]} wide in a window of {wide[1]}"
        assert self.wrong == []

    def tab_to(self, words: str, *, most: int = 60) -> None:
        """Press Tab until something with those words (or that label) has the focus, visibly."""
        for _ in range(most):
            self.page.keyboard.press("Tab")
            if words in self.page.evaluate(FOCUSED):
                outline = self.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none", f"the focus on {words} is not seen"
                return
        raise AssertionError(f"{words!r} is not reached by Tab on {self.page.url}")

    def press(self, words: str) -> None:
        """Tab to something and press Enter; the next page is checked as well."""
        self.tab_to(words)
        with self.page.expect_navigation():
            self.page.keyboard.press("Enter")
        self.check()

    def sign_in(self) -> None:
        """Type the key; the field has the focus."""
        self.page.goto(f"{self.base}/console")
        self.check()
        self.page.keyboard.type(self.key)
        with self.page.expect_navigation():
            self.page.keyboard.press("Enter")
        self.check()


FOCUSED = """() => {
  const at = document.activeElement;
  const labels = at.labels ? [...at.labels].map(each => each.textContent) : [];
  // Of what holds other things, such as the page itself, only its own name counts.
  const inside = ["A", "BUTTON", "SUMMARY"].includes(at.tagName) ? at.textContent : "";
  return [...labels, at.getAttribute("aria-label") || "", inside].join(" ").replace(/\\s+/g, " ");
}"""


@pytest.fixture(scope="module")
def served(
    personal: Personalized, log: Interactions, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Service]]:
    from lethe.shown_runs import ShownRuns

    chromium()
    place = tmp_path_factory.mktemp("console")
    write_run(place / "runs" / "a-run-with-a-name-that-goes-on-and-on-and-on-and-on-and-on-and-on")
    users = LifelongUsers(personal, log, directory=place / "users")
    users.start(log)
    service = Service(
        Registry(None, place / "registry"), users=users, writer=Writer(personal.base, personal.adapted), candidates=8
    )
    with running(service, runs=ShownRuns(place / "runs")) as base:
        yield base, service


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def look(served: tuple[str, Service], browser: Any) -> Iterator[Callable[..., Watched]]:
    contexts: list[Any] = []

    def open_page(who: str, size: tuple[int, int], **more: Any) -> Watched:
        base, service = served
        user = who not in ("operator", "auditor")
        key = service.keys.issue("user" if user else who, owner=who if user else None)  # type: ignore[arg-type]
        contexts.append(browser.new_context(viewport={"width": size[0], "height": size[1]}, **more))
        return Watched(contexts[-1].new_page(), base, key)

    yield open_page
    for context in contexts:
        context.close()


def test_a_user_rates_by_keyboard_and_sees_the_list_move(look: Callable[..., Watched]) -> None:
    at = look("user-003", PHONE)
    at.sign_in()
    first = at.page.locator(".items .title").first.inner_text()
    assert at.page.locator(".items").count() == 2 and at.page.locator("#gate").count() == 1
    at.tab_to("Skip to the content")
    at.page.keyboard.press("Enter")
    at.tab_to("Title")
    at.page.keyboard.type(first)
    with at.page.expect_navigation():
        at.page.keyboard.press("Enter")
    at.check()
    at.tab_to("Rating")
    at.page.keyboard.press("End")
    at.press("Rate")
    assert at.page.get_by_text("The rating was taken").is_visible()
    assert at.page.locator(".move").count() > 0
    assert first not in at.page.locator(".items").first.inner_text()
    at.press("Sign out")
    assert at.page.url.endswith("/console/sign-in")


@pytest.mark.parametrize(("size", "who"), [(PHONE, "user-004"), (DESK, "user-005")])
def test_forget_me_by_keyboard(look: Callable[..., Watched], size: tuple[int, int], who: str) -> None:
    at = look(who, size)
    at.sign_in()
    at.press("Forget me")
    at.tab_to("to be forgotten")
    at.page.keyboard.press("Space")
    at.press("Forget me")
    assert at.page.get_by_role("heading", name="This user is gone").is_visible()
    assert at.page.get_by_role("row", name="events of the history 12 0").is_visible()
    at.page.goto(f"{at.base}/console")
    at.check()
    assert at.page.get_by_text(f"{who} was forgotten").is_visible()


def test_progress_is_followed_without_loading_the_page_anew(
    look: Callable[..., Watched], served: tuple[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    forgetting: Any = served[1].forgetting
    with monkeypatch.context() as patch:
        patch.setattr(forgetting, "_carry_out", lambda request, user: forgetting.get(request))
        at = look("user-006", PHONE)
        at.sign_in()
        at.press("Forget me")
        at.tab_to("to be forgotten")
        at.page.keyboard.press("Space")
        at.press("Forget me")
    assert at.page.get_by_role("heading", name="This user is being forgotten").is_visible()
    at.page.evaluate("window.stayed = true")
    forgetting.resume()
    at.page.get_by_role("heading", name="This user is gone").wait_for()
    assert at.page.evaluate("window.stayed") is True
    at.check()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_operator_reaches_every_view_by_keyboard(look: Callable[..., Watched], size: Any, scheme: str) -> None:
    at = look("operator", size, color_scheme=scheme)
    at.sign_in()
    at.press("user-001")
    assert at.page.get_by_role("heading", name="user-001").is_visible()
    at.press("Adapters")
    assert at.page.get_by_role("link", name="ZIP of user-001").is_visible()
    at.press("Forget requests")
    at.press("Federation runs")
    assert at.page.locator("figure svg").count() == 2
    at.page.goto(f"{at.base}/docs")
    at.check()
    ink, ground = at.page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    assert (sum(map(int, ink[4:-1].split(","))) > sum(map(int, ground[4:-1].split(",")))) == (scheme == "dark")


def test_pages_work_without_scripts(look: Callable[..., Watched]) -> None:
    at = look("user-007", PHONE, java_script_enabled=False)
    at.page.goto(f"{at.base}/console")
    at.page.get_by_label("API key").fill(at.key)
    at.page.get_by_role("button", name="Sign in").click()
    at.page.get_by_role("link", name="Forget me").click()
    at.page.get_by_role("checkbox").check()
    at.page.get_by_role("button", name="Forget me").click()
    assert at.page.get_by_role("heading", name="This user is gone").is_visible()
    assert at.wrong == []


def test_a_report_can_be_read_and_runs_nothing(look: Callable[..., Watched]) -> None:
    at = look("auditor", PHONE)
    at.sign_in()
    at.press("Federation runs")
    at.press("Report of a-run")
    assert at.page.locator("figure").count() > 2
    assert at.wrong == []


def test_what_a_name_means_to_do_does_not_happen(look: Callable[..., Watched], served: tuple[str, Service]) -> None:
    name = '"><img src=x onerror=alert(1)>'
    people = served[1].users
    assert people is not None
    people.observe(name, "item-001", 4.0, 2_000_000_000)
    at = look("operator", PHONE)
    at.page.on("dialog", lambda box: (at.wrong.append("a script ran"), box.dismiss()))
    at.sign_in()
    at.press("onerror")
    assert at.page.get_by_role("heading", name=name).is_visible()
    at.check()


def test_the_watch_notices_what_is_wrong(look: Callable[..., Watched]) -> None:
    """The checks can fail: a wide page, an error and another host are noticed."""
    at = look("operator", PHONE)
    at.sign_in()
    at.page.evaluate("document.querySelector('main').insertAdjacentHTML('beforeend', '<pre>' + 'x'.repeat(900))")
    with pytest.raises(AssertionError, match="wide"):
        at.check()
    at.page.reload()
    at.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=\\'http://localhost:9/x.png\\'>')")
    at.page.wait_for_timeout(500)
    assert at.wrong
