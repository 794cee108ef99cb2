"""kill -9 under write load: whatever was acknowledged is there afterwards, and nothing is there in half."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from lethe import Client
from lethe.remote_answers import Event
from lora.errors import ServiceError
from server.service.forgetting import subject_of
from tests.lethe.test_serve import Played, played

__all__ = ["played"]
pytestmark = pytest.mark.faults
PAUSES = (0.4, 0.9, 1.7)
"""Seconds of load before each kill."""


@contextmanager
def serving(run: Path, data: Path) -> Iterator[tuple["subprocess.Popen[str]", Client]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", "import sys; from lethe.cli import main; sys.exit(main())", "serve"]
    command += ["--run", str(run), "--port", port, "--data", str(data)]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[2], env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        lines = iter(server.stdout.readline, "")
        key = next(line for line in lines if line.startswith("operator's key")).split()[-1]
        client = Client(f"http://127.0.0.1:{port}", key, retries=0)
        try:
            _listening(port)
            yield server, client
        finally:
            client.close()
            server.kill()


def _listening(port: str) -> None:
    for _ in range(600):
        try:
            httpx.get(f"http://127.0.0.1:{port}/readyz").raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise AssertionError("the service does not listen")


class Writers:
    """Threads that write until the service is gone; each keeps what was acknowledged, and what was on its way."""

    def __init__(self, client: Client, *, first: int) -> None:
        self.client, self.first = client, first
        self.taken: dict[str, list[Event]] = {}
        self.forgotten: list[str] = []
        self.on_the_way: dict[str, Event | None] = {}
        self.wrong: list[str] = []
        self.threads = [threading.Thread(target=self._rate, args=(n,)) for n in range(3)]
        self.threads.append(threading.Thread(target=self._forget))
        for thread in self.threads:
            thread.start()

    def _rate(self, number: int) -> None:
        """One user, event after event."""
        user, turn = f"writer-{self.first}-{number}", 0
        self.taken[user] = []
        try:
            while True:
                turn += 1
                event = Event(str(turn % 2 + 1), 3.0, turn)
                self.on_the_way[user] = event
                seen = self.client.user(user).observe(event)
                if seen.taken != 1 or seen.repeated:
                    self.wrong.append(f"{seen}")
                self.taken[user].append(event)
                self.on_the_way[user] = None
        except ServiceError:
            return
        except Exception as error:
            self.wrong.append(f"{error}")

    def _forget(self) -> None:
        """One user after another, who comes and is forgotten."""
        try:
            for turn in range(1_000_000):
                user = self.client.user(f"guest-{self.first}-{turn}")
                user.observe(Event("1", 3.0, turn))
                self.on_the_way["guest"] = Event("1", 3.0, turn)
                user.forget()
                self.forgotten.append(user.name)
        except ServiceError:
            return


def test_nothing_acknowledged_is_lost_and_nothing_half_is_seen(played: Played, tmp_path: Path) -> None:
    past: list[Writers] = []
    for turn, pause in enumerate((*PAUSES, None)):
        with serving(played.run, tmp_path / "data") as (server, client):
            for writers in past:
                _checked(client, writers)
            if pause is None:
                break
            past.append(Writers(client, first=turn))
            time.sleep(pause)
            server.send_signal(signal.SIGKILL)
            for thread in past[-1].threads:
                thread.join(60)
    assert all(any(writers.taken.values()) for writers in past) and any(writers.forgotten for writers in past)


def _checked(client: Client, writers: Writers) -> None:
    assert writers.wrong == []
    for user, events in writers.taken.items():
        if not events:
            continue
        history = client.user(user).history(latest=10_000)
        found, lost = [*reversed(history.latest)], [event for event in events if event not in history.latest]
        assert lost == [] and len(found) == history.events
        # Beyond what was acknowledged there is at most the one that was on its way, whole.
        assert found[len(events) :] in ([], [writers.on_the_way[user]])
        answer = client.user(user).recommendations(2)
        assert answer.whose.adapter == user and answer.whose.adapter_version == history.adapter_version
    done = {each.subject: each.state for each in client.forget_requests()}
    assert all(done[subject_of(user)] == "done" for user in writers.forgotten)
    assert set(done.values()) <= {"done"}
