"""A PostgreSQL of the tests' own, on a free port of loopback; as root it is run by another user, as it demands."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def binaries() -> Path | None:
    """Return the folder with `initdb` and `pg_ctl`, the newest version's; None where there is none."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((each for each in folders if (each / "initdb").exists() and (each / "pg_ctl").exists()), None)


class Postgres:
    """One server; `url` for SQLAlchemy."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self.programs = folder, programs
        self.as_user: dict[str, Any] = {}
        if os.geteuid() == 0:
            own = next(name for name in ("postgres", "nobody") if _known(name))
            self.as_user = {"user": own, "group": pwd.getpwnam(own).pw_gid, "extra_groups": []}
            shutil.chown(folder, own)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.url = f"postgresql+psycopg://lethe@127.0.0.1:{self.port}/postgres"
        self._run("initdb", "-D", str(folder / "data"), "-U", "lethe", "-A", "trust", "-E", "UTF8", "--no-sync")

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        log = str(self.folder / "log")
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-l", log, "-w", "-o", options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-w", "-m", "immediate", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self.programs / program), *arguments]
        done = subprocess.run(
            command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            check=False, **self.as_user,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()


def _known(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


@contextmanager
def running() -> Iterator[Postgres]:
    """Run a server until the end; there must be `binaries`."""
    programs = binaries()
    assert programs is not None
    # pytest's own folders are closed to other users.
    with tempfile.TemporaryDirectory(prefix="lethe-pg-") as place:
        Path(place).chmod(0o755)
        server = Postgres(Path(place), programs)
        server.start()
        try:
            yield server
        finally:
            server.stop()
