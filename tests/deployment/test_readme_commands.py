"""The README's path to a real federation on one host: at most six commands, each run as it is written."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lethe.spending import spent

pytestmark = pytest.mark.deployment

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().split("\n## A real federation\n")[1].split("\n## ")[0]
COMMANDS = re.findall(r"^```bash\n(.*?)^```$", SECTION, flags=re.M | re.S)[0].splitlines()
SMALL = ["federation.rounds=1", "training.steps=1", "training.batch=4", "data.max_train=120", "data.max_eval=20"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Shell:
    """Runs commands in a folder, those that end in `&` in the background, and stops the latter in the end."""

    def __init__(self, place: Path) -> None:
        self.place, self.background = place, list[subprocess.Popen[bytes]]()
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(self, command: str, *more: str) -> None:
        words = [*shlex.split(command.removesuffix("&")), *more]
        if command.endswith("&"):
            with (self.place / "log").open("ab") as log:
                self.background.append(
                    subprocess.Popen(
                        words, cwd=self.place, env=self.environment, stdout=log, stderr=log, start_new_session=True
                    )
                )
            return
        done = subprocess.run(
            words, cwd=self.place, env=self.environment, capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr + self.log()

    def log(self) -> str:
        return (self.place / "log").read_text(errors="replace")[-6000:] if (self.place / "log").exists() else ""

    def stop(self) -> list[int]:
        """Stop what runs in the background as Ctrl-C would; returns the exit codes."""
        codes = []
        for process in reversed(self.background):
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=40)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            codes.append(process.wait())
        self.background.clear()
        return codes


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path)
    yield made
    made.stop()


def strays(place: Path) -> list[str]:
    """Return the command lines of living processes that name a folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(place) in line:
                found.append(line)
    return found


def test_they_are_at_most_six() -> None:
    assert len(COMMANDS) <= 6
    assert [command.split()[0] for command in COMMANDS] == ["make", ".", *["lethe"] * (len(COMMANDS) - 2)]


def test_they_lead_to_a_trained_adapter_and_end_without_a_trace(shell: Shell) -> None:
    node_port = free_port()
    own = {"init": ["--port", str(free_port()), "--node-port", str(node_port)], "submit": SMALL}
    for command in COMMANDS:
        tool, *words = command.split()
        if tool == "lethe":  # `make install` and the activation have happened: this is that Python.
            shell.run(command, *own.get(words[1], []))
    run = shell.place / "runs" / "together"
    assert json.loads((run / "summary.json").read_text())["rounds"] == 1
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    for node in ("node-1", "node-2", "node-3"):
        (figures,) = spent(shell.place / "federation" / "nodes" / node / "state" / "ledger.sqlite", delta=1e-4)
        assert figures.epsilon > 0 and not figures.simulated
    assert strays(shell.place)
    assert shell.stop() == [0, 0]
    assert strays(shell.place) == []
