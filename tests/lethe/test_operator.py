"""Flower's own commands in the operator's name: what is asked, and what is made of the answers of a stand-in."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lethe import credentials, operator
from lethe.operator import Operator, healthy
from lethe.processes import Command
from lethe.site import Federation, Node, Site, write_node
from lora.errors import DeploymentError

NODES = (Node(name="north", partition=0), Node(name="south", partition=1, port=9095))
RUN = {"run-id": "7", "status": "finished:failed", "status-details": "N/A", "elapsed": 3.5}
RUN |= {"network-traffic": {"inbound-bytes": 10, "outbound-bytes": 20, "total-bytes": 30}}


class Flower:
    """Answers `flwr` commands as the SuperLink would, and remembers them."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.registered: dict[str, str] = {}
        self.status: dict[str, str] = {}

    def __call__(self, command: Command) -> dict[str, Any]:
        words = command.argv[1:]
        self.asked.append(words)
        if words[:2] == ("supernode", "list"):
            return {"nodes": [{"node-id": int(key), "status": status} for key, status in self.status.items()]}
        if words[:2] == ("supernode", "register"):
            key = Path(words[2]).read_text()
            if key in self.registered:
                raise DeploymentError("`flwr supernode register` failed: [code: 23] Public key already in use.")
            self.registered[key] = identity = str(500 + len(self.registered))
            self.status[identity] = "registered"
            return {"node-id": int(identity)}
        if words[:2] == ("supernode", "unregister"):
            self.status[words[2]] = "unregistered"
        return {"runs": [RUN]}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path / "site", Federation(nodes=NODES))
    for node in NODES:
        write_node(site, node, keys=credentials.node_key(), secret=credentials.secret())
    return site


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> Flower:
    made = Flower()
    monkeypatch.setattr(operator, "_answer", made)
    return made


def test_registering_is_done_once(site: Site, flower: Flower) -> None:
    assert Operator(site).register(NODES) == ["north", "south"]
    assert Operator(site).register(NODES) == []
    assert Operator(site).names() == {"500": "north", "501": "south"}
    assert sum(words[1] == "register" for words in flower.asked) == 2


def test_a_superlink_that_lost_its_database_hears_all_keys_again(site: Site, flower: Flower) -> None:
    Operator(site).register(NODES)
    flower.registered.clear()
    flower.status.clear()
    assert Operator(site).register(NODES) == ["north", "south"]


def test_a_key_that_the_superlink_knows_is_no_error(site: Site, flower: Flower) -> None:
    Operator(site).register(NODES)
    (site.home / "nodes.json").unlink()
    assert Operator(site).register(NODES) == []


def test_unregistering_takes_the_node_that_was_meant(site: Site, flower: Flower) -> None:
    Operator(site).register(NODES)
    assert Operator(site).unregister("south")
    assert flower.status == {"500": "registered", "501": "unregistered"}
    assert not Operator(site).unregister("south")


def test_a_node_that_may_still_be_let_in_is_not_called_removed(site: Site, flower: Flower) -> None:
    Operator(site).register(NODES)
    (site.home / "nodes.json").unlink()
    with pytest.raises(DeploymentError, match="may be any of the nodes 500, 501"):
        Operator(site).unregister("south")


def test_a_new_key_is_registered_under_the_old_name(site: Site, flower: Flower) -> None:
    Operator(site).register(NODES)
    (site.node_folder("south") / "auth.pub").write_bytes(credentials.node_key().public)
    assert Operator(site).register(NODES) == ["south"]
    assert Operator(site).names()["502"] == "south"


def test_runs_are_read(site: Site, flower: Flower) -> None:
    (run,) = Operator(site).runs()
    assert run.finished and not run.completed
    assert (run.identity, run.details, run.bytes_in, run.bytes_out) == ("7", "", 10, 20)


def script(tmp_path: Path, text: str, *, code: int = 0) -> Command:
    return Command("flwr", (sys.executable, "-c", f"import sys; sys.stdout.write({text!r}); sys.exit({code})"))


def test_an_answer_is_found_behind_flowers_words(tmp_path: Path) -> None:
    answer = operator._answer(script(tmp_path, 'Using SuperLink: x\n{"success": true, "runs": []}'))
    assert answer["runs"] == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            json.dumps({"success": False, "error-message": "Using SuperLink\n\n[code: 23] no"}),
            r"failed: .*\[code: 23\] no",
        ),
        ("\x1b[31m│ Connection refused │\x1b[0m", "failed: Connection refused"),
        ("", "no reason given"),
        ("{broken", "broken"),
    ],
)
def test_a_failure_says_why_in_one_line(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match=told) as caught:
        operator._answer(script(tmp_path, text, code=1))
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_a_command_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "_TIMEOUT", 0.2)
    with pytest.raises(DeploymentError, match="did not finish"):
        operator._answer(Command("flwr", (sys.executable, "-c", "import time; time.sleep(9)")))


def test_nobody_there_is_not_healthy(site: Site) -> None:
    signer = credentials.authority("x")
    credentials.write_new(site.ca, signer.public)
    assert not healthy("127.0.0.1:1", site.ca)
    assert not healthy("127.0.0.1:1", site.root / "missing")
