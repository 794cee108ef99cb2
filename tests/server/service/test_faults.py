"""What the service stands on fails: a full disk, a database that is away, a kill in the middle of writing."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from server.service.http import create_app
from server.service.identity import RateLimits
from server.service.registry import Registry
from server.service.service import Service, Writer
from strategies.personal.lifelong import LifelongUsers
from strategies.personal.personalized import Personalized
from tasks.recommendation.interactions import Interactions
from tests.server.service.conftest import Encoder
from tests.server.service.postgres import Postgres
from tests.server.service.site import NEXT, Site, good, problem


class Disk:
    """A small file system of its own; mounting it takes root, and elsewhere the test is skipped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("a small file system cannot be mounted here")

    @property
    def ballast(self) -> Path:
        return self.folder / "ballast"

    def fill(self) -> None:
        """Leave no byte free."""
        with self.ballast.open("ab", buffering=0) as file:
            for size in (65536, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    pass


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    yield made
    subprocess.run(["umount", "-l", str(made.folder)], check=True)


def opened(
    personal: Personalized, log: Interactions, encoder: Encoder, folder: Path, url: str | None = None
) -> Service:
    users = LifelongUsers(personal, log, directory=folder / "users")
    if not len(users):
        users.start(log)
    return Service(
        Registry(url, folder / "registry"), users=users, learner=encoder.learner,
        writer=Writer(personal.base, personal.adapted), rates=RateLimits(rate=1e6, burst=10**6), candidates=8,
    )  # fmt: skip


def test_with_a_full_disk_nothing_is_half_taken_and_room_is_all_it_takes(
    personal: Personalized, log: Interactions, text_encoder: Encoder, disk: Disk
) -> None:
    service = opened(personal, log, text_encoder, disk.folder)
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        site = Site(service, client)
        site.key("user-001")
        archive = good_zip(site, "user-002")
        before = site.get("/v1/users/user-001")
        disk.fill()
        asks: list[tuple[str, str, dict[str, Any]]] = [
            ("POST", "/v1/users/user-001/events", {"json": {"events": [NEXT]}}),
            ("POST", "/v1/users/somebody/events", {"json": {"events": [NEXT]}}),
            ("POST", "/v1/keys", {"json": {"role": "auditor"}}),
            ("PUT", "/v1/adapters/new", {"content": archive, "params": {"model": "base"}}),
        ]
        for method, path, more in asks:
            assert "room" in problem(site.ask(method, path, **more), 503) or path == "/v1/keys"
        # What needs no room goes on, as it was.
        assert site.get("/v1/users/user-001") == before
        assert site.get("/v1/users/user-001/recommendations")["whose"]["personalized"]
        problem(site.ask("GET", "/v1/users/somebody"), 404)
        disk.ballast.unlink()
        for method, path, more in asks:
            good(site.ask(method, path, **more))
        assert site.get("/v1/users/user-001")["events"] == before["events"] + 1
    again = opened(personal, log, text_encoder, disk.folder)
    assert again.users is not None and len(again.users.history("somebody")) == 1
    again.close()


def good_zip(site: Site, user: str) -> bytes:
    response = site.ask("GET", f"/v1/adapters/{user}")
    assert response.status_code == 200
    return response.content


@pytest.mark.parametrize("registry_url", ["postgresql"], indirect=True)
def test_while_the_database_is_away_it_says_so_and_goes_on_when_it_is_back(  # noqa: PLR0917 - fixtures
    personal: Personalized, log: Interactions, text_encoder: Encoder, tmp_path: Path, postgres: Postgres,
    registry_url: str,
) -> None:  # fmt: skip
    service = opened(personal, log, text_encoder, tmp_path, registry_url)
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        site = Site(service, client)
        assert site.get("/v1/users/user-001/recommendations")["whose"]["personalized"]
        postgres.stop()
        try:
            until(lambda: site.ask("GET", "/readyz", who="").status_code == 503)
            assert site.get("/healthz", who="")["status"] == "ok"
            time.sleep(1.1)
            for path in ("/v1/users/user-001/recommendations", "/v1/adapters", "/v1/forget-requests"):
                response = site.ask("GET", path)
                assert "does not answer" in problem(response, 503) and response.headers["retry-after"]
            problem(site.ask("DELETE", "/v1/users/user-001"), 503)
        finally:
            postgres.start()
        until(lambda: site.ask("GET", "/readyz", who="").status_code == 200)
        assert site.get("/v1/users/user-001/recommendations")["whose"]["adapter"] == "user-001"
        assert good(site.ask("DELETE", "/v1/users/user-001"))["state"] == "done"


def until(true: Any, *, within: float = 20.0) -> None:
    end = time.monotonic() + within
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
