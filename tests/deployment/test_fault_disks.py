"""A full disk where a node keeps its ledger: nothing that cannot be charged is drawn or sent, and room is all it takes.

The state directory is a small file system of its own, filled to the last byte; mounting it takes root, and elsewhere
the test is skipped.
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment.conftest import Fleet
from tests.deployment.evidence import (
    charges,
    executor,
    followed,
    leaks,
    records,
    refused,
    standing,
    together,
    uncharged,
)

pytestmark = pytest.mark.deployment

SEEN = "PrivacyError; the client's own log has the details"


class Disk:
    """The disk of one node's state, which can be full."""

    def __init__(self, fleet: Fleet, client: str) -> None:
        self.client = client
        self.node = f"node-{int(client) + 1}"
        self.folder = fleet.root / "nodes" / self.node / "state"
        self.folder.mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=0700", "tmpfs", str(self.folder)]
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

    def clear(self) -> None:
        """Make room again."""
        self.ballast.unlink()

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], capture_output=True, check=False)


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, Disk, Disk]]:
    """A fleet, and the disks of its first two nodes."""
    made = Fleet(tmp_path_factory.mktemp("disks"))
    first, second = Disk(made, "0"), Disk(made, "1")
    try:
        with standing(made) as up:
            yield up, first, second
    finally:
        first.close()
        second.close()


def lost(fleet: Fleet, run: str, client: str) -> list[int]:
    """Return the rounds that went without a client because of its disk."""
    numbers = [each["round"] for each in records(fleet, run)]
    return [number for number in numbers if refused(fleet, run, number).get(client, ("", ""))[1].endswith(SEEN)]


def test_a_node_with_a_full_disk_sends_nothing_until_there_is_room(disks: tuple[Fleet, Disk, Disk]) -> None:
    fleet, first, second = disks
    second.fill()  # Before it has a ledger at all.
    with followed(fleet, "full", "federation.min_clients=1", "federation.rounds=500", "federation.timeout=120") as run:
        run.rounds(lambda: len(lost(fleet, "full", "1")) >= 2, seconds=200)
        assert charges(fleet, "1", "full") == []
        second.clear()
        run.rounds(lambda: together(fleet, "full"), seconds=200)
        first.fill()  # In the midst of a run.
        run.rounds(lambda: len(lost(fleet, "full", "0")) >= 2, seconds=200)
        number = lost(fleet, "full", "0")[-1]
        assert refused(fleet, "full", number)["0"] == ("error", f"node 'node-1': {SEEN}")
        run.hears(r"refused: 0 \(error\)")
        first.clear()
        run.rounds(lambda: together(fleet, "full", after=number), seconds=200)
        run.stopped()
    for client, known in (("0", r"cannot charge"), ("1", r"cannot open")):
        paid = {number for number, _ in charges(fleet, client, "full")}
        assert paid and not paid & {*lost(fleet, "full", client)}
        told = (fleet.home / f"{executor(client)}.log").read_text()
        assert re.search(rf"{known} the privacy ledger \S+: .*nothing was charged or drawn\. Check", told), told[-3000:]
    assert uncharged(fleet, "full") == [] and leaks(fleet) == []
