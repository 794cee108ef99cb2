"""The service of tests/server/service, looked at through its console."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from html import unescape
from typing import Any

import pytest
from httpx import Response

from server.console.runs import RunShown
from tests.server.service.conftest import log, personal, postgres, site, site_url, text_encoder
from tests.server.service.site import Site

__all__ = ["log", "personal", "postgres", "site", "site_url", "text_encoder"]

CHART = '<figure><figcaption>Accuracy</figcaption><div class="plot"><svg role="img"></svg></div></figure>'


class SomeRuns:
    """Two runs: one that is whole, with a name that means harm, and one that is damaged."""

    place = "runs"

    def names(self) -> list[str]:
        return ["<b>first</b>", "second"]

    def shown(self, name: str) -> RunShown:
        if name == "second":
            return RunShown(name, fault="line 3 is no JSON")
        figures = [("Accuracy", "80.5 %", "<i>test</i> split"), ("Epsilon, at most", "7.996", "delta 1e-4")]
        return RunShown(name, finished=True, facts=["ffa-lora"], figures=figures, charts=[CHART, CHART], report=True)

    def report(self, name: str) -> str | None:
        return "<!doctype html><title>report</title><style>p{color:red}</style>" if name == "<b>first</b>" else None


@dataclass
class Browser:
    """Somebody without JavaScript: follows links and sends forms as pages give them."""

    site: Site
    page: Response | None = None

    @property
    def text(self) -> str:
        assert self.page is not None
        return self.page.text

    def get(self, path: str, *, status: int = 200, **params: Any) -> str:
        self.page = self.site.client.get(path, params=params or None)
        assert self.page.status_code == status, self.page.text
        return self.page.text

    def send(self, action: str, *, status: int = 200, **fields: str) -> str:
        """Send the form with that action which the present page has."""
        forms = re.findall(rf'<form method="post" action="{re.escape(action)}".*?</form>', self.text, flags=re.S)
        assert forms, f"the page has no form for {action}"
        hidden = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', forms[0])
        return self.post(action, status=status, **{name: unescape(value) for name, value in hidden} | fields)

    def post(self, action: str, *, status: int = 200, **fields: str) -> str:
        self.page = self.site.client.post(action, data=fields)
        assert self.page.status_code == status, self.page.text
        return self.page.text


@pytest.fixture
def visit(site: Site) -> Callable[[str], Browser]:
    """Signs somebody in by role or by name; one at a time, since they share the client's cookies."""
    site.client.app.state.runs = SomeRuns()  # type: ignore[attr-defined]

    def sign_in(who: str) -> Browser:
        site.client.cookies.clear()
        browser = Browser(site)
        browser.get("/console/sign-in")
        browser.send("/console/sign-in", key=site.key(who))
        return browser

    return sign_in
