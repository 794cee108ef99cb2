"""The steps of requests in PostgreSQL, for two stores in one database; skipped where PostgreSQL is not installed."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.forgetting.asking import wish_classes
from server.forgetting.requests import ForgetRequests
from server.forgetting.store import Store
from tests.queries import queries

FOLDERS = [*os.environ.get("PATH", "").split(os.pathsep), *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
PG_CTL = shutil.which("pg_ctl", path=os.pathsep.join(FOLDERS))


def own_user() -> list[str]:
    """Return what to put before a command so that it does not run as root, which PostgreSQL refuses."""
    if os.geteuid() != 0:
        return []
    names = {entry.pw_name for entry in pwd.getpwall()}
    return ["runuser", "-u", "postgres" if "postgres" in names else "nobody", "--"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    if PG_CTL is None:
        pytest.skip("PostgreSQL is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    place = Path(tempfile.mkdtemp(prefix="pg"))
    place.chmod(0o777)
    options = f"-p {port} -h 127.0.0.1 -k '' -c fsync=off"
    made = [str(Path(PG_CTL).with_name("initdb")), "-D", f"{place}/data", "-U", "lethe", "--auth=trust", "--no-sync"]
    started = [PG_CTL, "-D", f"{place}/data", "-o", options, "-l", f"{place}/log", "-w", "start"]
    for command in (made, started):
        subprocess.run([*own_user(), *command], check=True, capture_output=True, cwd=place)
    yield f"postgresql://lethe@127.0.0.1:{port}/requests"
    stopped = [PG_CTL, "-D", f"{place}/data", "-m", "immediate", "stop"]
    subprocess.run([*own_user(), *stopped], check=False, capture_output=True, cwd=place)
    shutil.rmtree(place, ignore_errors=True)


def test_two_stores_keep_their_steps_in_one_database(store: Store, bare: Store, url: str) -> None:
    # The same words in both stores, whose salt is the same here: they must not meet.
    for each in (store, bare):
        requests = ForgetRequests(each)
        accepted = requests.add(wish_classes(each, ["alarm"], rows=queries(0)))
        requests.carry_out(database=url)
        assert requests.status(accepted.request.id).state == "done"
        assert not (each.directory / "requests.sqlite").exists()
    requests = ForgetRequests(store)
    late = requests.add(wish_classes(store, ["money"], rows=queries(3)))
    requests.carry_out(database=url)
    assert requests.status(late.request.id).state == "done"
