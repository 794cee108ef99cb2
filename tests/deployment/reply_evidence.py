"""What the tests of faults look at: a run's records, the nodes' ledgers, and all that the server ever had of a node."""

import base64
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from privacy.ledger import Ledger
from tests.deployment.conftest import Fleet

HERE = Path(__file__).parent
MARKER = "Quellenhof4471"
"""A word of a node's data that must never be seen outside of the node."""
TAP = "LETHE_TEST_TAP"

Line = dict[str, Any]


class WatchedFleet(Fleet):
    """A fleet whose SuperLink keeps a copy of all that nodes send, and whose services may be played by a stand-in.

    `stand_ins` names, by service, the script that is started with the service's own arguments.
    """

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.stand_ins = {"superlink": HERE / "tapped_superlink.py"}
        self.tap = home / "tap"

    def argv(self, service: str) -> list[str]:
        words = super().argv(service)
        if service not in self.stand_ins:
            return words
        options = words[3:] if words[1] == "-m" else words[1:]
        return [sys.executable, str(self.stand_ins[service]), *options]

    def environment(self, service: str | None = None) -> dict[str, str]:
        return super().environment(service) | ({TAP: str(self.tap)} if service == "superlink" else {})


class Submitted:
    """`lethe deploy submit` in the background; `told` is what the operator sees of it."""

    def __init__(self, fleet: Fleet, name: str, *words: str) -> None:
        self.fleet, self.name, self.file = fleet, name, fleet.home / f"submit-{name}.txt"
        command = ["lethe", "deploy", "submit", "quickstart", f"name={name}", *words, "--site", str(fleet.root)]
        with self.file.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=fleet.home, env=fleet.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    @property
    def told(self) -> str:
        return self.file.read_text()

    def finish(self, *, seconds: float = 300) -> int:
        """Wait for the command's end and return its exit code."""
        self.fleet.until(lambda: self.process.poll() is not None, seconds=seconds)
        return int(self.process.returncode)

    def round_of(self, wanted: Callable[[Line], object], *, after: int = 0, seconds: float = 120) -> Line:
        """Wait for a round after `after` of which something is true, and return its record."""

        def found() -> list[Line]:
            ended = self.process.poll()
            lines = [each for each in rounds(self.fleet, self.name) if each["round"] > after and wanted(each)]
            assert lines or ended is None, self.told + self.fleet.logs()
            return lines

        self.fleet.until(found, seconds=seconds)
        return found()[0]


def records(fleet: Fleet, run: str, kind: str) -> list[Line]:
    """Return the lines of one kind in a run's metrics.jsonl."""
    file = fleet.home / "runs" / run / "metrics.jsonl"
    text = file.read_text() if file.is_file() else ""
    return [each for line in text.split("\n")[:-1] if (each := json.loads(line))["kind"] == kind]


def rounds(fleet: Fleet, run: str) -> list[Line]:
    """Return the records of the rounds that a run has finished."""
    return records(fleet, run, "round")


def refused(line: Line, client: str) -> tuple[str, str] | None:
    """Return reason and detail for which a client's reply was not used in a round."""
    return next(((each["reason"], each["detail"]) for each in line["refused"] if each["client"] == client), None)


# --- The ledgers -----------------------------------------------------------------------------------------------------


def charges(fleet: Fleet, node: str, run: str) -> int:
    """Return how many rounds of a run a node's ledger was charged for."""
    file = fleet.root / "nodes" / node / "state" / "ledger.sqlite"
    return sum(f"/{run}: round " in row.purpose for row in Ledger(file).rows()) if file.is_file() else 0


def arrived(fleet: WatchedFleet, run: str) -> Counter[str]:
    """Return how many updates of each node the SuperLink received for a run, used or not; copies count once."""
    (number,) = {entry["identity"] for entry in journal(fleet) if entry["name"] == run}
    names = fleet.operator.names()
    pushed = {
        (names[each["node"]], each["message"])
        for each in map(json.loads, Path(f"{fleet.tap}.jsonl").read_text().splitlines())
        if each["run"] == number and each["type"] == "train" and not each["error"]
    }
    return Counter(node for node, _ in pushed)


def journal(fleet: Fleet) -> list[Line]:
    """Return what was submitted from this site."""
    return [json.loads(line) for line in (fleet.site.home / "runs.jsonl").read_text().splitlines()]


def assert_never_under_counted(fleet: WatchedFleet, run: str, nodes: Iterable[str]) -> None:
    """Law 2: every private update that reached the server was charged before."""
    seen = arrived(fleet, run)
    assert seen, "no update of this run was seen at all"
    for node in nodes:
        assert charges(fleet, node, run) >= seen[node], (node, seen)


# --- What the server had ---------------------------------------------------------------------------------------------


def server_side(fleet: Fleet) -> list[Path]:
    """Return the files of all that the server received, stored and logged, and of all that the operator was told."""
    services = ("superlink", "superexec", "proxy")
    places = [fleet.root / "superlink", fleet.root / "home", fleet.home / "runs", fleet.home / "proxy"]
    places += [fleet.home / "flower" / service for service in services]
    files = [each for place in places if place.is_dir() for each in place.rglob("*") if each.is_file()]
    files += [fleet.home / f"{service}.log" for service in services]
    files += [*fleet.home.glob("submit-*.txt"), *fleet.home.glob("tap*")]
    return [file for file in files if file.is_file()]


def holding(files: Iterable[Path], word: str) -> list[str]:
    """Return the files that hold a word, in clear or in base64."""
    pattern = re.compile(b"|".join(map(re.escape, _forms(word))))
    return [str(file) for file in files if pattern.search(file.read_bytes())]


def _forms(word: str) -> list[bytes]:
    """A word as it is, in UTF-16, and within base64 at each of the three places in a group."""
    raw = word.encode()
    forms = [raw, word.encode("utf-16-le")]
    for shift in range(3):
        first, last = (shift * 8 + 5) // 6, (shift + len(raw)) * 8 // 6
        forms.append(base64.b64encode(b"\0" * shift + raw)[first:last])
    return forms
