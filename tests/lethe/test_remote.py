"""The service's client against a live server: typed answers, the tree's errors, and nothing that takes effect twice."""

import io
import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from lethe import Client
from lethe.remote import User
from lethe.remote_answers import Event
from lora.errors import Busy, ConfigError, DataError, Denied, LetheError, ServiceError, Unavailable, Unknown
from server.service.adapters import NewAdapter
from tests.server.service.conftest import (  # noqa: F401 - fixtures
    Encoder,
    drawn,
    free_port,
    log,
    personal,
    site,
    site_url,
    text_encoder,
    url,
)
from tests.server.service.site import NEXT, Site

ROOT = Path(__file__).parents[2]


@pytest.fixture
def client(url: str, site: Site) -> Iterator[Client]:  # noqa: F811
    with Client(url, site.key("operator")) as opened:
        yield opened


def test_a_users_recommendations_follow_the_events(client: Client, site: Site) -> None:  # noqa: F811
    user = client.user("user-003")
    before = user.recommendations(5)
    theirs = site.get("/v1/users/user-003/recommendations", params={"count": 5})
    assert [each.item for each in before] == [each["item"] for each in theirs["items"]]
    assert before.whose.personalized and len(before) == 5 and before[0].like >= before[4].like
    event = Event(**NEXT)  # type: ignore[arg-type]
    taken = user.observe(event, key="once")
    assert user.observe(event, key="once").repeated and not taken.repeated
    history = user.history(1)
    assert history.latest == (event,) and history.adapter_version == taken.adapter_version
    assert [each.item for each in user.likes(["item-003", "item-002"])] == ["item-003", "item-002"]
    assert not client.user("nobody").recommendations(fallback="cold").whose.personalized
    assert not user.recommendations(personalized=False).whose.personalized


def test_texts_are_classified_and_embedded(client: Client, site: Site, text_encoder: Encoder) -> None:  # noqa: F811
    layout = text_encoder.learner.layout
    site.service.adapters.write(NewAdapter("zoë", drawn(layout, 1)[0], layout, "tiny-bert", 2, "zoë"))
    (found,) = client.user("zoë").classify(["a"])
    assert found.label in ("dull", "good") and sum(found.shares.values()) == pytest.approx(1) and not found.embedding
    (vector,) = client.user("zoë").embed(["a"], personalized=False)
    assert sum(each**2 for each in vector.embedding) == pytest.approx(1, abs=1e-5) and vector.label is None


def test_adapters_completions_and_forgetting(client: Client, tmp_path: Path) -> None:
    archive = client.take("user-003")
    with zipfile.ZipFile(io.BytesIO(archive)) as inside:
        inside.extractall(tmp_path / "peft")
    assert client.bring("copy", tmp_path / "peft", owner="eve", model="base").owner == "eve"
    assert [each.name for each in client.adapters()] == ["copy"] and {"base", "copy"} <= {*client.models()}
    own, copy = (client.complete(name, "14/20 The", max_tokens=6) for name in ("user-003", "copy"))
    assert own.text == copy.text and copy.whose.adapter == "copy"
    client.drop("copy")
    done = client.user("user-003").forget()
    assert done.state == "done" and client.forget_requests() == [done] == [client.forget_request(done.id)]


def test_errors_are_those_of_the_tree(client: Client, url: str, site: Site, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(Unknown, match="user 'nobody' is not known"):
        client.user("nobody").recommendations()
    with pytest.raises(DataError, match="item-00x"):
        client.user("user-001").likes(["item-00x"])
    with pytest.raises(DataError, match="count"):
        client.user("user-001").recommendations(1000)
    with pytest.raises(DataError, match="before the last event"):
        client.user("user-001").observe(Event("item-001", 3.0, 1))
    with pytest.raises(DataError, match="no PEFT directory"):
        client.bring("x", tmp_path)
    with Client(url, site.key("user-001")) as other, pytest.raises(Denied, match="does not open"):
        other.user("user-002").history()
    with Client(url, "lethe_wrong") as wrong, pytest.raises(Denied, match="not valid"):
        wrong.adapters()
    with pytest.raises(ConfigError, match="no address"):
        Client("127.0.0.1:80", "k")
    with pytest.raises(ConfigError, match="lethe serve"):
        Client(url, "")


def test_names_are_no_parts_of_paths(client: Client) -> None:
    for name in ("../user-001", "a/b", "user-001?x=1", "a b#c", "日本"):
        with pytest.raises((Unknown, DataError)):
            client.user(name).recommendations()


# --- What goes wrong on the way ---------------------------------------------------------------------------------------


class Flaky:
    """A server that answers as it is told, one answer a request: a status, or None to hang up."""

    def __init__(self, *answers: tuple[int, dict[str, str]] | None) -> None:
        self.answers, self.seen = [*answers], list[tuple[str, str | None]]()
        flaky = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                flaky.seen.append((self.command, self.headers.get("idempotency-key")))
                told = flaky.answers.pop(0)
                if told is None:
                    self.connection.close()
                    return
                status, headers = told
                good = {"user": "a", "taken": 1, "adapter_version": 1, "new": True, "repeated": False}
                wrong = {"error": {"type": "TooMany", "message": "too many; wait", "remedy": "wait"}}
                body = json.dumps(good if status == 200 else wrong).encode()
                self.send_response(status)
                for name, value in {"content-length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_DELETE = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def user(self, *, retries: int = 4) -> User:
        return Client(f"http://127.0.0.1:{self.server.server_port}", "k", retries=retries, timeout=5).user("a")


EVENT = Event("x", 1.0, 1)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr("lethe.remote.time.sleep", found.append)
    return found


def test_events_are_sent_again_under_one_key(waits: list[float]) -> None:
    flaky = Flaky((429, {"retry-after": "3"}), None, (503, {}), (200, {}))
    assert flaky.user().observe(EVENT).taken == 1
    keys = {key for _, key in flaky.seen}
    assert len(flaky.seen) == 4 and len(keys) == 1 and None not in keys
    assert waits[0] == 3.0 and all(0 < wait <= 3 for wait in waits)


def test_tries_come_to_an_end(waits: list[float]) -> None:
    with pytest.raises(Busy, match="too many") as caught:
        Flaky((429, {"retry-after": "7"}), (429, {"retry-after": "7"})).user(retries=1).observe(EVENT)
    assert caught.value.retry_after == 7.0 and waits == [7.0]
    with pytest.raises(ServiceError, match="too many"):
        Flaky((500, {})).user().observe(EVENT)
    with pytest.raises(Unavailable, match="does not answer"):
        Flaky(None).user(retries=0).observe(EVENT)


def test_forgetting_is_not_sent_twice_unless_it_was_refused(waits: list[float]) -> None:
    flaky = Flaky((503, {}), None)
    with pytest.raises(Unavailable):
        flaky.user().forget()
    assert len(flaky.seen) == 2


def test_nobody_at_the_address(free_port: int, waits: list[float]) -> None:  # noqa: F811
    with pytest.raises(Unavailable, match="lethe serve"):
        Client(f"http://127.0.0.1:{free_port}", "k", retries=2).user("a").forget()
    assert len(waits) == 2


def test_a_proxy_that_answers_is_no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    with Client("http://127.0.0.1", "k", retries=0) as client:
        for status, kind in ((502, ServiceError), (413, DataError), (404, Unknown)):
            answer = httpx.MockTransport(lambda _, s=status: httpx.Response(s, text="<html>"))  # type: ignore[misc]
            monkeypatch.setattr(client, "_http", httpx.Client(base_url="http://127.0.0.1", transport=answer))
            with pytest.raises(LetheError, match=f"status {status}") as caught:
                client.adapters()
            assert type(caught.value) is kind


def test_the_readmes_example_runs(url: str, site: Site, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    (source,) = [block.split("```")[0] for block in blocks if "import Client" in block]
    for old, new in (("http://127.0.0.1:8420", url), ("lethe_...", site.key("operator")), ("ana", "user-003")):
        assert old in source
        source = source.replace(old, new)
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_a_client_needs_neither_torch_nor_a_server() -> None:
    code = (
        "import sys; from lethe import Client; print({'torch', 'fastapi', 'pydantic', 'sqlalchemy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
