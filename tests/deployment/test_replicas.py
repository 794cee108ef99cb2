"""The service as replicas of a Ray Serve deployment, started on loopback: every user is with one, and survives it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from lethe import Client
from lethe.remote_answers import Event
from lora.errors import LetheError, Unknown
from server.service.parts import part_of
from tests.deployment.conftest import QUIET, free_ports
from tests.lethe.test_serve import Played, played
from tests.lethe.test_served_classifier import run
from tests.queries import LABELS

__all__ = ["played", "run"]
pytest.importorskip("ray.serve")
pytestmark = pytest.mark.deployment
START = 300.0
"""Seconds that Ray, two replicas and their models may take to start on a busy machine."""


@pytest.fixture
def free_port() -> int:
    return free_ports(1)[0]


class Fleet:
    """A running `lethe serve --replicas 2`."""

    def __init__(self, process: "subprocess.Popen[str]", url: str, key: str) -> None:
        self.process, self.url, self.key = process, url, key

    def replicas(self) -> list[int]:
        """The processes of both replicas, looked for until both are there: a killed one is started anew."""
        end = time.monotonic() + START
        while True:
            titles = _titles(self.process.pid)
            found = [pid for pid, title in titles.items() if "ServeReplica" in title]
            if len(found) == 2:
                return found
            assert time.monotonic() < end and self.process.poll() is None, titles
            time.sleep(0.2)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers={"Authorization": f"Bearer {self.key}", **headers}, timeout=60)


@contextmanager
def serving(folder: Path, port: int, *words: str) -> Iterator[Fleet]:
    command = [sys.executable, "-c", "import sys; from lethe.cli import main; sys.exit(main())", "serve", *words]
    command += ["--replicas", "2", "--port", str(port)]
    # What else needs memory on this machine is no reason for Ray to kill replicas.
    own = {"PYTHONUNBUFFERED": "1", "RAY_memory_monitor_refresh_ms": "0"}
    environment = os.environ | QUIET | own
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=Path(__file__).parents[2], env=environment, stdout=out, stderr=subprocess.STDOUT, text=True
        )
    try:
        eventually(lambda: "console:" in log.read_text() or process.poll() is not None, within=START)
        assert process.poll() is None, log.read_text()
        key = next(line for line in log.read_text().splitlines() if line.startswith("operator's key")).split()[-1]
        yield Fleet(process, f"http://127.0.0.1:{port}", key)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    except BaseException as error:
        error.add_note(log.read_text())
        raise
    finally:
        for each in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
            each.kill()
        process.kill()
        process.wait()


def _titles(parent: int) -> dict[int, str]:
    """Return what each process below `parent` calls itself. Any may end, or be renaming itself, while it is read."""
    titles: dict[int, str] = {}
    for each in psutil.Process(parent).children(recursive=True):
        with suppress(psutil.Error):
            titles[each.pid] = " ".join(each.cmdline()[:1])
    return titles


def eventually(true: Callable[[], bool], *, within: float) -> None:
    end = time.monotonic() + within
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_divided_users_are_answered_where_they_are_also_after_a_kill(
    played: Played, tmp_path: Path, free_port: int
) -> None:
    with serving(tmp_path, free_port, "--run", str(played.run), "--data", str(tmp_path / "data")) as fleet:
        client = Client(fleet.url, fleet.key, retries=8)
        names = [f"new-{number}" for number in range(8)]
        assert {part_of(name, 2) for name in names} == {0, 1}
        for name in names:
            seen = client.user(name).observe(Event("1", 4.0, 10), Event("2", 2.0, 11))
            assert seen.new and seen.taken == 2
        _answered(client, names)
        # Each part counts its own users, whichever replica Ray's proxy comes to first.
        parts = [fleet.get(f"/metrics?part={number}").text for number in (0, 1)]
        counted = [sum(part_of(name, 2) == number for name in names) for number in (0, 1)]
        assert [_count(text) for text in parts] == [float(count) for count in counted]
        assert client.complete(names[0], "4/5", max_tokens=2).whose.adapter == names[0]
        with pytest.raises(Unknown, match="not known"):
            client.user("nobody").history()
        assert client.user(names[7]).forget().state == "done"
        before = fleet.replicas()
        os.kill(before[0], signal.SIGKILL)
        _answered(client, names[:7])
        assert before[0] not in fleet.replicas()
        with pytest.raises(Unknown):
            client.user(names[7]).history()
        client.close()
    # One process cannot take what two have divided.
    command = [sys.executable, "-c", "import sys; from lethe.cli import main; sys.exit(main())", "serve"]
    done = subprocess.run(
        [*command, "--run", str(played.run), "--data", str(tmp_path / "data"), "--port", str(free_port)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "--replicas 2" in done.stderr


def _answered(client: Client, names: list[str]) -> None:
    """Everybody has their events and their own answers, at the latest once a killed replica is back."""
    for name in names:
        end = time.monotonic() + START
        while True:
            try:
                history, found = client.user(name).history(), client.user(name).recommendations(2)
                break
            except LetheError:
                assert time.monotonic() < end
                time.sleep(0.5)
        assert history.events == 2 and found.whose.adapter == name and found.whose.personalized


def _count(text: str) -> float:
    found = [line for line in text.splitlines() if line.startswith("lethe_answers_total") and "recommend" in line]
    return float(found[0].split()[-1]) if found else 0.0


def test_a_classifiers_replicas_share_adapters(run: Path, tmp_path: Path, free_port: int) -> None:
    with serving(tmp_path, free_port, "--run", str(run)) as fleet:
        client = Client(fleet.url, fleet.key)
        (found,) = client.user("ada").classify(["wake me at noon"], fallback="cold")
        assert max(found.shares, key=found.shares.__getitem__) == LABELS[0] and not found.whose.personalized
        assert len(fleet.replicas()) == 2
        assert client.adapters() == []
        client.close()
