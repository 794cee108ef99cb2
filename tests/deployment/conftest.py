"""A whole fleet on free loopback ports: the very command lines of docker-compose.yml, their paths and names mapped."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from lethe.cli import main
from lethe.operator import Operator, healthy
from lethe.processes import container_proxy_settings
from lethe.site import LOOPBACK, Site, open_site

ROOT = Path(__file__).parents[2]
QUIET = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
NODES = ("node-1", "node-2", "node-3")
NGINX = shutil.which("nginx")


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


class Fleet:
    """SuperLink with its executor and proxy, and three nodes of two processes each: TLS, authentication, secrets.

    Processes have the names of the compose file's services. Without nginx, nodes dial the SuperLink itself.
    """

    def __init__(self, home: Path, *, hosts: Sequence[str] = ()) -> None:
        self.home, self.root = home, home / "federation"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
        self.link, self.gate, *self.ports = free_ports(2 + len(NODES))
        words = ["init", "--site", str(self.root), "--port", str(self.link)]
        words += ["--proxy", "--proxy-port", str(self.gate)] if NGINX else ["--no-proxy"]
        words += [word for host in (*LOOPBACK, *hosts) for word in ("--host", host)]
        assert main(["deploy", *words]) == 0
        self.site: Site = open_site(self.root)
        self.operator = Operator(self.site)
        self._write_proxy()

    def _write_proxy(self) -> None:
        folder = self.home / "proxy"
        folder.mkdir()
        text = container_proxy_settings()
        assert text == (ROOT / "docker" / "proxy.conf").read_text()
        text = self.mapped(text, service="proxy").replace(" /tmp/", f" {folder}/")
        (self.root / "superlink" / "proxy.conf").write_text(text)

    # --- Commands ----------------------------------------------------------------------------------------------------

    def mapped(self, text: str, *, service: str) -> str:
        """Put this host's places into what the compose file says of a service."""
        pairs = {
            "superlink:8000": f"127.0.0.1:{self.link}",
            "proxy:8443": f"127.0.0.1:{self.gate if NGINX else self.link}",
            "0.0.0.0:8443": f"127.0.0.1:{self.gate}",
            "localhost:8000": f"localhost:{self.link}",
            **{f"{node}:9094": f"127.0.0.1:{port}" for node, port in zip(NODES, self.ports, strict=True)},
            **self.secrets(service),
            "/site": str(self.root),
            "/runs": str(self.home / "runs"),
            "/tmp/flower": str(self.home / "flower" / service),
        }
        if service in NODES:
            pairs["127.0.0.1:9094"] = f"127.0.0.1:{self.port(service)}"
        for old, new in pairs.items():
            text = new if text == old else text.replace(old, new)
        return text

    def secrets(self, service: str) -> dict[str, str]:
        """Return where the files are that a service sees below /run/secrets."""
        found = {}
        for secret in self.compose["services"][service].get("secrets", ()):
            file = self.compose["secrets"][secret["source"]]["file"]
            found[f"/run/secrets/{secret['target']}"] = file.replace("${LETHE_SITE:-./federation}", str(self.root))
        return found

    def port(self, service: str) -> int:
        """Return the port on which a service listens here."""
        return {"superlink": self.link, **dict(zip(NODES, self.ports, strict=True))}[service]

    def argv(self, service: str) -> list[str]:
        words = [self.mapped(word, service=service) for word in self.compose["services"][service]["command"]]
        for number, word in enumerate(words[:-1]):
            if word == "--host":
                words[number + 1] = "127.0.0.1"
            elif word == "--port":
                words[number + 1] = str(self.port(service))
        return words

    def environment(self, service: str | None = None) -> dict[str, str]:
        given = self.compose["services"][service]["environment"] if service and service != "proxy" else {}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        own = {key: self.mapped(str(value), service=str(service)) for key, value in given.items()}
        return {**os.environ, **QUIET, "PATH": path, "LETHE_RUNS": str(self.home / "runs"), **own}

    # --- Processes ---------------------------------------------------------------------------------------------------

    def start(self, service: str) -> subprocess.Popen[bytes]:
        """Start a service of the compose file."""
        with (self.home / f"{service}.log").open("ab") as log:
            self.processes[service] = subprocess.Popen(
                self.argv(service),
                cwd=self.home,
                env=self.environment(service),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.processes[service]

    def up(self) -> None:
        """Start everything, as the compose file orders it, and wait until all nodes are online."""
        self.start("superlink")
        self.until(lambda: healthy(f"127.0.0.1:{self.link}", self.site.ca), seconds=90)
        done = self.run(self.argv("register"), service="register")
        assert done.returncode == 0, done.stderr
        services = ["superexec", *(["proxy"] if NGINX else []), *NODES, *(f"executor-{n}" for n in (1, 2, 3))]
        for service in services:
            self.start(service)
        self.until(lambda: self.online() == len(NODES), seconds=120)

    def online(self) -> int:
        return sum(node["status"] == "online" for node in self.operator.nodes())

    def kill(self, service: str, number: int = signal.SIGKILL) -> None:
        """End a process and its group."""
        process = self.processes.pop(service)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        """End all that was started here, and whatever that has started."""
        for process in reversed(self.processes.values()):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for service in list(self.processes):
            self.kill(service, signal.SIGTERM)
        end = time.monotonic() + 10
        while self.mine() and time.monotonic() < end:
            time.sleep(0.5)
        for process in self.mine():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def mine(self, *, words: str = "") -> list[int]:
        """Return the processes whose environment or command names this fleet's folder, and `words` in their command."""
        return [process for process in processes(str(self.home)) if words in command_of(process)]

    def until(self, done: Callable[[], object], *, seconds: float) -> None:
        """Wait for something; show all logs when it does not come. Looks that take long are made less often."""
        end = time.monotonic() + seconds
        while True:
            begun = time.monotonic()
            if done():
                return
            assert time.monotonic() < end, self.logs()
            time.sleep(max(0.5, 2 * (time.monotonic() - begun)))

    def logs(self) -> str:
        return "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in self.home.glob("*.log"))

    # --- The operator ------------------------------------------------------------------------------------------------

    def run(self, argv: Sequence[str], *, service: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = self.environment(service)
        return subprocess.run(
            argv, cwd=self.home, env=environment, capture_output=True, text=True, timeout=500, check=False
        )

    def lethe(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `lethe deploy …` on this fleet's site."""
        return self.run(["lethe", "deploy", *words, "--site", str(self.root)])

    def submit(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.lethe("submit", *words)

    def summary(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.home / "runs" / name / "summary.json").read_text()))

    def settle(self, node: str, settings: Mapping[str, Any]) -> None:
        """Change a node's own settings, for its next start."""
        file = self.root / "nodes" / node / "node.toml"
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
        file.write_text(lines + file.read_text())


def command_of(process: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def processes(folder: str) -> list[int]:
    """Return the living processes, but this one, that have a folder in their command or environment."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            known = (place / "cmdline").read_bytes() + (place / "environ").read_bytes()
            if folder.encode() in known and int(place.name) != os.getpid():
                found.append(int(place.name))
    return found


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet that is up, for the tests of one file; a test that breaks something mends it."""
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    try:
        made.up()
        yield made
    finally:
        made.close()


@pytest.fixture
def resting_fleet(tmp_path: Path) -> Iterator[Fleet]:
    """A fleet of which nothing runs yet, for one test."""
    made = Fleet(tmp_path)
    try:
        yield made
    finally:
        made.close()
