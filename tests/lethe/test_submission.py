"""Submitting: names, retries, what is said, and what the app bundle holds; the SuperLink is played by a stand-in."""

import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import get_fab_metadata, load_and_validate

from lethe import submission
from lethe.config import RunFile, from_mapping, load_run_file
from lethe.operator import Operator, RunStatus
from lethe.site import Federation, Node, Site
from lethe.submission import Journal, Submission, bundle, run_config, send_forgetting, told
from lora.errors import ConfigError, DeploymentError, RunError
from server.forgetting.collecting import Collection, collection

ROUND = {"event": "round", "round": 2, "selected": 3, "accepted": 2, "accuracy": 0.5, "epsilon": 3.25, "seconds": 1.5}
KILLED = ("finished:failed", "No heartbeat received from the task")
RAISED = ("finished:failed", "ServerApp failed with exception: too few clients")
GOOD = ("finished:completed", "")


class SuperLink(Operator):
    """Plays a SuperLink: every submitted run ends as the next of the given ends says."""

    def __init__(self, site: Site, ends: Sequence[tuple[str, str]]) -> None:
        super().__init__(site)
        self.ends, self.given = list(ends), list[dict[str, object]]()
        self.found: dict[str, RunStatus] = {}
        self.silences = 0

    def start(self, *, bundle: Path, settings: Path) -> str:
        identity = str(100 + len(self.given))
        self.given.append(tomllib.loads(settings.read_text()))
        status, details = self.ends.pop(0)
        self.found[identity] = RunStatus(identity, status, details, 61.0, 1000, 2000)
        return identity

    def run(self, identity: str) -> RunStatus:
        if self.silences:
            self.silences -= 1
            raise DeploymentError("`flwr ls lethe` failed: Connection refused")
        return self.found[identity]

    def runs(self) -> list[RunStatus]:
        return list(self.found.values())


@pytest.fixture
def site(tmp_path: Path) -> Site:
    nodes = tuple(Node(name=f"node-{number}", partition=number, port=9094 + number) for number in range(3))
    return Site(tmp_path / "federation", Federation(nodes=nodes))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(site: Site, identity: str) -> Iterator[str]:
        yield from ("INFO : Start", "{not json", json.dumps(ROUND))

    monkeypatch.setattr(submission, "log_lines", lines)
    monkeypatch.setattr(submission, "_PAUSE", 0.0)


def small(*overrides: str) -> RunFile:
    return load_run_file("quickstart", ["federation.clients=3", "federation.rounds=5", *overrides])


def submitted(site: Site, run: RunFile, *ends: tuple[str, str]) -> tuple[Submission, SuperLink, list[str]]:
    link, said = SuperLink(site, ends), list[str]()
    return Submission(site, run, "quickstart", link, said.append), link, said


def test_a_run_is_followed_to_its_end(site: Site) -> None:
    sent, link, said = submitted(site, small("name=first"), GOOD)
    assert sent.send() == "first"
    assert said == [
        "run first is number 100",
        "round 2/5  2 of 3 clients  accuracy 50.0%  epsilon 3.25  1.5 s",
        "finished after 61 s; nodes sent 1,000 bytes and were sent 2,000",
    ]
    assert link.given[0]["name"] == "first"


def forgetting(step: str, **facts: object) -> str:
    return json.dumps({"time": "now", "event": "forgetting", "step": step, **facts})


def test_a_run_that_forgets_is_followed_and_submitted_again_where_its_server_side_died(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [forgetting("ordered", client="clinic"), forgetting("refused", client="bank", reason="budget"), "{no json",
             json.dumps(ROUND), forgetting("collected", accepted=1, refused=1)]  # fmt: skip
    monkeypatch.setattr(submission, "log_lines", lambda site, identity: iter(lines))
    link, said = SuperLink(site, [KILLED, GOOD]), list[str]()
    asked = {"run": "first", "client": None, "wait": 5.0, "timeout": 60.0}
    assert send_forgetting(site, link, said.append, asked) == "forget-001"
    assert [given["name"] for given in link.given] == ["forget-001"] * 2
    assert collection(link.given[0]) == Collection(run="first", wait=5.0, timeout=60.0)
    assert said[1:4] == ["clinic  ordered", "bank  refused: budget", "1 offers served, 1 not"]
    link.ends.append(RAISED)
    with pytest.raises(DeploymentError, match="run forget-002 ended as finished:failed: ServerApp failed"):
        send_forgetting(site, link, said.append, asked)


def test_what_travels_is_the_resolved_run_file(site: Site) -> None:
    run = small("name=first", "training.rate=0.25")
    sections = json.loads(tomllib.loads(run_config(run, "first"))["job"])
    assert from_mapping({**sections, "name": "first", "simulation": run.simulation.model_dump()}) == run


def test_a_killed_server_side_is_submitted_again_under_the_same_name(site: Site) -> None:
    sent, link, said = submitted(
        site, small("name=first"), KILLED, ("finished:failed", "Task failed with unknown error."), GOOD
    )
    assert sent.send(retries=3) == "first"
    assert [given["name"] for given in link.given] == ["first"] * 3
    assert sum("submitted again" in line for line in said) == 2
    assert [entry.identity for entry in Journal(site).entries()] == ["100", "101", "102"]


@pytest.mark.parametrize(
    "details",
    [
        "Server error '500 Internal Server Error' for url 'https://127.0.0.1:8000/v1/runtime/pull-messages'",
        "[Errno 111] Connection refused",
        "Server disconnected without sending a response.",
    ],
)
def test_a_server_app_that_lost_its_superlink_is_submitted_again(site: Site, details: str) -> None:
    lost = ("finished:failed", f"ServerApp failed with exception: {details}")
    sent, link, _ = submitted(site, small("name=first"), lost, GOOD)
    assert sent.send() == "first" and len(link.given) == 2


def test_retries_have_an_end(site: Site) -> None:
    sent, link, _ = submitted(site, small("name=first"), *[KILLED] * 3)
    with pytest.raises(DeploymentError, match=r"ended as finished:failed after being submitted 3 times: No heartbeat"):
        sent.send(retries=2)
    assert len(link.given) == 3


@pytest.mark.parametrize("end", [RAISED, ("finished:stopped", "Run stopped by user.")])
def test_what_failed_by_itself_is_not_tried_again(site: Site, end: tuple[str, str]) -> None:
    sent, link, _ = submitted(site, small("name=first"), end)
    with pytest.raises(DeploymentError, match=f"run first ended as {end[0]}: {end[1]}; `lethe deploy logs first`"):
        sent.send()
    assert len(link.given) == 1


def test_a_stopped_run_tells_how_to_go_on(site: Site) -> None:
    sent, _, _ = submitted(site, small("name=first"), ("finished:stopped", ""))
    with pytest.raises(DeploymentError, match="it was stopped; submitted under the same name it goes on"):
        sent.send()


def test_a_silent_superlink_is_waited_for(site: Site) -> None:
    sent, link, said = submitted(site, small("name=first"), GOOD)
    link.silences = 3
    sent.send()
    assert said.count("the SuperLink does not answer; waiting for it") == 1


def test_a_superlink_that_stays_silent_is_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "PATIENCE", 0.05)
    sent, link, _ = submitted(site, small("name=first"), GOOD)
    link.silences = 10**9
    with pytest.raises(DeploymentError, match="Connection refused"):
        sent.send()


@pytest.mark.parametrize(
    ("end", "told"),
    [(GOOD, "run first has finished; choose another name"), (("running", ""), "`lethe deploy logs first` follows it")],
)
def test_a_name_that_is_taken_is_refused(site: Site, end: tuple[str, str], told: str) -> None:
    sent, link, _ = submitted(site, small("name=first"), end)
    sent.send(follow=False)
    with pytest.raises(RunError, match=told):
        sent.send()
    assert len(link.given) == 1


def test_a_run_that_failed_may_go_on(site: Site) -> None:
    sent, _, said = submitted(site, small("name=first"), RAISED, GOOD)
    sent.send(follow=False)
    sent.send()
    assert any("goes on from its last checkpoint" in line for line in said)


def test_names_are_made_up_and_never_twice(site: Site) -> None:
    sent, _, _ = submitted(site, small(), GOOD, GOOD)
    assert [sent.send(), sent.send()] == ["quickstart-001", "quickstart-002"]


def test_more_clients_than_nodes_are_refused_before_anything_is_sent(site: Site) -> None:
    sent, link, _ = submitted(site, load_run_file("quickstart", ["federation.clients=4"]), GOOD)
    with pytest.raises(ConfigError, match=r"has 3 nodes; add federation\.clients=3"):
        sent.send()
    assert link.given == []


def test_the_journal_finds_names_and_numbers_and_forgives_a_cut_line(site: Site) -> None:
    sent, _, _ = submitted(site, small("name=first"), GOOD)
    sent.send()
    with (site.home / "runs.jsonl").open("a") as file:
        file.write('{"name": "cut')
    journal = Journal(site)
    assert journal.find("first") == journal.find("100")
    assert journal.find("777").identity == "777"
    with pytest.raises(ConfigError, match="did you mean 'first'"):
        journal.find("frist")


def test_the_bundle_holds_no_code_and_flower_takes_it() -> None:
    with bundle() as folder:
        assert [path.name for path in folder.rglob("*")] == ["pyproject.toml"]
        config, warnings = load_and_validate(folder / "pyproject.toml")
        assert warnings == []
        assert get_fab_metadata(build_fab_from_disk(folder))[0] == "lethe/lethe"
    assert config["tool"]["flwr"]["app"]["components"] == {"serverapp": "server.app:app", "clientapp": "client.app:app"}
    assert {*config["tool"]["flwr"]["app"]["config"]} >= {*tomllib.loads(run_config(RunFile(), "x"))}
    assert not folder.exists()


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"event": "refused", "client": "2", "reason": "nan"}, "  refused: 2 (nan)"),
        ({"event": "waiting", "online": 1, "wanted": 3}, "waiting for clients: 1 of 3 are here"),
        ({"event": "resumed", "round": 4}, "resumed after round 4"),
        ({"event": "roster", "online": 3}, None),
    ],
)
def test_what_the_log_means_is_told(event: dict[str, object], words: str | None) -> None:
    assert told(json.dumps(event), rounds=5) == words
