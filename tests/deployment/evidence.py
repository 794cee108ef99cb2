"""What fault tests look at: who saw what, what was charged for it, and whether data got out.

Every node of a fleet from `standing` has data of its own, with MARKER in each text. MARKER must never be found in
anything that the server's side holds.
"""

import csv
import json
import os
import re
import secrets
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from privacy.ledger import Ledger, Row
from tasks.builtin import builtin_tables
from tests.deployment.conftest import NODES, Fleet

MARKER = f"zq{secrets.token_hex(8)}"
"""Stands in every text that a node holds, and nowhere else."""
NAMES = dict(enumerate(NODES))
"""Nodes by the number of their partition, which is their client's name."""
SMALL = (
    *("model.name=tiny-bert", "data.max_train=240", "data.max_eval=30", "training.steps=8", "training.batch=16"),
    *("federation.clients=3", "federation.greeting_timeout=200"),
    *("privacy.epsilon=null", "privacy.noise_multiplier=1.0", "privacy.delta=1e-4"),
)
"""A private run without a budget, because the runs of one file share their ledgers; a round takes a second or two."""
GONE = (
    "Error: Node Unavailable — The destination node failed to report a heartbeat within 2 "
    "\N{MULTIPLICATION SIGN} its expected interval."
)
"""What the SuperLink answers for a node that it has not heard of for a minute."""
PATIENCE = 15.0
"""Seconds for which a frozen executor waits for the others of its round; Flower gives it up after 60."""


@contextmanager
def standing(fleet: Fleet) -> Iterator[Fleet]:
    """Bring a fleet up whose nodes hold marked data of their own, and close it in the end."""
    try:
        for node in NODES:
            plant(fleet.root / "nodes" / node / "data.csv")
            fleet.settle(node, {"data": "data.csv"})
        fleet.up()
        yield fleet
    finally:
        fleet.close()


def plant(file: Path) -> None:
    """Write built-in training rows with MARKER in every text."""
    columns = builtin_tables("classification", seed=0)["train"].columns
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(("text", "label"))
        rows = zip(columns["text"], columns["label"], strict=True)
        writer.writerows((f"{MARKER} {text}", label) for text, label in rows)


# --- The server's side -----------------------------------------------------------------------------------------------


def leaks(fleet: Fleet, marker: str = MARKER) -> list[str]:
    """Return the files of operator and server that hold a marker, in names or content: database, runs, all logs."""
    ours = {f"{kind}.log" for kind in (*NODES, *(f"executor-{number}" for number in (1, 2, 3)))}
    own = {fleet.root / "nodes", *(fleet.home / "flower" / name.removesuffix(".log") for name in ours)}
    found = []
    for folder, inner, files in os.walk(fleet.home):
        inner[:] = [name for name in inner if Path(folder) / name not in own]
        for name in files:
            path = Path(folder) / name
            if path.parent == fleet.home and name in ours:
                continue
            with suppress(FileNotFoundError):  # A file of the database's journal comes and goes.
                if marker in str(path.relative_to(fleet.home)) or marker.encode() in path.read_bytes():
                    found.append(str(path.relative_to(fleet.home)))
    return found


def records(fleet: Fleet, run: str, kind: str = "round") -> list[dict[str, Any]]:
    """Return the whole lines of a run's metrics.jsonl of a kind."""
    file = fleet.home / "runs" / run / "metrics.jsonl"
    text = file.read_text() if file.is_file() else ""
    return [each for line in text.split("\n")[:-1] if (each := json.loads(line))["kind"] == kind]


def together(fleet: Fleet, run: str, *, after: int = 0) -> bool:
    """Whether a round after the given one was made of all three clients' updates."""
    return any(each["round"] > after and each["accepted"] == ["0", "1", "2"] for each in records(fleet, run))


def refused(fleet: Fleet, run: str, number: int) -> dict[str, tuple[str, str]]:
    """Return reason and detail by client of those that a round went without."""
    (found,) = [each for each in records(fleet, run) if each["round"] == number]
    return {each["client"]: (each["reason"], each["detail"]) for each in found["refused"]}


class Followed:
    """A `lethe deploy submit` that runs while the test goes on; what it says is in `told`."""

    def __init__(self, fleet: Fleet, run: str, *words: str) -> None:
        self.fleet, self.run, self.file = fleet, run, fleet.home / f"submit-{run}.log"
        argv = ["lethe", "deploy", "submit", "quickstart", f"name={run}", *SMALL, *words, "--site", str(fleet.root)]
        with self.file.open("ab") as log:
            self.process = subprocess.Popen(
                argv,
                cwd=fleet.home,
                env=fleet.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def told(self) -> str:
        """Everything said so far."""
        return self.file.read_text(errors="replace")

    def hears(self, pattern: str, *, seconds: float = 120) -> None:
        """Wait for a line."""
        self.fleet.until(lambda: re.search(pattern, self.told), seconds=seconds)

    def rounds(self, done: Callable[[], object], *, seconds: float) -> None:
        """Wait for something that happens while the run goes on."""
        self.fleet.until(lambda: done() or self._over(), seconds=seconds)

    def ended(self, *, seconds: float = 300) -> int:
        """Wait for the end; returns the exit code."""
        self.fleet.until(lambda: self.process.poll() is not None, seconds=seconds)
        return int(self.process.returncode)

    def stopped(self) -> None:
        """End a run that has shown what it was to show, as its operator would."""
        done = self.fleet.lethe("stop", self.run)
        assert done.returncode == 0, done.stderr
        assert self.ended() == 2
        assert f"run {self.run} ended as finished:stopped" in self.told, self.told

    def close(self) -> None:
        """Make an end of the command, and of the run where a failed test has left it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.fleet.lethe("stop", self.run)

    def _over(self) -> bool:
        assert self.process.poll() is None, self.told + self.fleet.logs()
        return False


@contextmanager
def followed(fleet: Fleet, run: str, *words: str) -> Iterator[Followed]:
    """Submit a run of the small private kind, with more words, and follow it while the block runs."""
    made = Followed(fleet, run, *words)
    try:
        yield made
    finally:
        made.close()


# --- The nodes' side -------------------------------------------------------------------------------------------------


def executor(client: str) -> str:
    """Return the service that trains for a client."""
    return f"executor-{int(client) + 1}"


def events(fleet: Fleet, client: str, name: str) -> list[dict[str, Any]]:
    """Return what the executor of a client has logged under a name."""
    found = []
    for line in (fleet.home / f"{executor(client)}.log").read_text(errors="replace").splitlines():
        with suppress(ValueError):
            each = json.loads(line)
            if each.get("event") == name:
                found.append(each)
    return found


def charges(fleet: Fleet, client: str, run: str) -> list[tuple[int, Row]]:
    """Return what a node's ledger has of a run: the round's number with each charge."""
    stem = f"{fleet.site.federation.name}/{run}: round "
    found = [row for row in _ledger(fleet, client) if row.purpose.startswith(stem)]
    assert not any(row.simulated for row in found)
    return [(int(row.purpose.removeprefix(stem)), row) for row in found]


def uncharged(fleet: Fleet, run: str) -> list[str]:
    """Return every update that the server used, or that a node sent, without a charge for it; what must be empty."""
    used = Counter((client, each["round"]) for each in records(fleet, run) for client in each["accepted"])
    assert used, "the run has used no update, so there is nothing to check"
    wrong = []
    for client in map(str, NAMES):
        paid = Counter(number for number, row in charges(fleet, client, run) if row.client == client)
        for (name, number), count in used.items():
            if name == client and paid[number] < count:
                wrong.append(f"client {client}, round {number}: {count} updates were used, {paid[number]} are charged")
        sent = sum(each.get("step") == "train" for each in events(fleet, client, "answered"))
        total = len(_ledger(fleet, client))
        if sent > total:
            wrong.append(f"client {client}: {sent} updates were sent, {total} are charged, over all runs")
    return wrong


def frozen_training(fleet: Fleet, clients: Sequence[str], *, seconds: float = 120) -> int:
    """Freeze executors in the midst of one round, charged and not yet answered; returns the round's number.

    Each is frozen as soon as its log says that it was charged. Where an answer was faster, the next round is taken.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if _frozen(fleet, clients, until=end) and not any(_answered(fleet, client) for client in clients):
            numbers = {_round(fleet, client) for client in clients}
            if len(numbers) == 1:
                return numbers.pop()
        for client in clients:
            thaw(fleet, client)
    raise AssertionError(f"no round caught {clients} in training\n{fleet.logs()}")


def _frozen(fleet: Fleet, clients: Sequence[str], *, until: float) -> bool:
    """Freeze each executor at its next charge; whether all were caught.

    Who was charged for a round just before the look began is charged again only in the next, which cannot come while
    another is frozen in this one. So none waits longer than PATIENCE for the rest, well before Flower gives it up.
    """
    marks = {client: len(events(fleet, client, "charged")) for client in clients}
    waiting = set(clients)
    while waiting and time.monotonic() < until:
        for client in sorted(waiting):
            if len(events(fleet, client, "charged")) > marks[client]:
                os.kill(fleet.processes[executor(client)].pid, signal.SIGSTOP)
                if len(waiting) == len(clients):
                    until = min(until, time.monotonic() + PATIENCE)
                waiting.remove(client)
        time.sleep(0.01)
    return not waiting


def thaw(fleet: Fleet, client: str) -> None:
    """Let a frozen executor go on."""
    os.kill(fleet.processes[executor(client)].pid, signal.SIGCONT)


def tended(fleet: Fleet, service: str) -> bool:
    """Start a process again where it is not running, as its supervisor would; a SuperNode is refused at first."""
    process = fleet.processes.get(service)
    if process is None or process.poll() is not None:
        fleet.start(service)
    return True


def _answered(fleet: Fleet, client: str) -> bool:
    """Whether the executor's last word on training is an answer, and no charge."""
    lines = (fleet.home / f"{executor(client)}.log").read_text(errors="replace").splitlines()
    told = [line for line in lines if '"charged"' in line or ('"answered"' in line and '"train"' in line)]
    return not told or '"charged"' not in told[-1]


def _round(fleet: Fleet, client: str) -> int:
    """Return the round that a client was charged for last."""
    return int(_ledger(fleet, client)[-1].purpose.rpartition(" ")[2])


def _ledger(fleet: Fleet, client: str) -> list[Row]:
    file = fleet.root / "nodes" / NAMES[int(client)] / "state" / "ledger.sqlite"
    whole = file.exists() and file.stat().st_size  # A full disk leaves an empty file, which a look would try to fill.
    return Ledger(file).rows() if whole else []
