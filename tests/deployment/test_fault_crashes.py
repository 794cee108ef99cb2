"""Processes that die or dawdle in the midst of a private round: what is seen, what goes on, what was charged.

An executor is caught between its charge and its answer by freezing it there (SIGSTOP), so that every kill hits a round
that is open, and a charge whose noise may have been drawn.
"""

import os
import signal
from collections.abc import Iterator

import pytest

from tests.deployment.conftest import Fleet
from tests.deployment.evidence import (
    GONE,
    MARKER,
    charges,
    events,
    followed,
    frozen_training,
    leaks,
    records,
    refused,
    standing,
    tended,
    thaw,
    together,
    uncharged,
)

pytestmark = pytest.mark.deployment

ALL = "federation.min_clients=3"
ANY = "federation.min_clients=1"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with standing(Fleet(tmp_path_factory.mktemp("crashes"))) as up:
        yield up


def rounds_charged(fleet: Fleet, client: str, run: str) -> list[int]:
    return [number for number, _ in charges(fleet, client, run)]


def test_a_killed_executor_and_a_killed_supernode_are_named_and_taken_back(fleet: Fleet) -> None:
    with followed(fleet, "mortal", ANY, "federation.rounds=500", "federation.timeout=240") as run:
        run.rounds(lambda: together(fleet, "mortal"), seconds=200)
        number = frozen_training(fleet, ["0", "1"])
        fleet.kill("executor-1")
        fleet.kill("node-2")
        thaw(fleet, "1")
        fleet.start("executor-1")
        run.rounds(lambda: tended(fleet, "node-2") and together(fleet, "mortal", after=number), seconds=300)
        assert refused(fleet, "mortal", number) == {
            "0": ("error", "node 'node-1': ClientApp stopped responding."),
            "1": ("error", f"node 'node-2': {GONE}"),
        }
        run.hears(rf"round +{number}/500  1 of 3 clients")
        assert "refused: 0 (error)" in run.told and "refused: 1 (error)" in run.told
        run.stopped()
    # What was charged stays charged, though nothing of it arrived; the orphan's answer went nowhere.
    assert number in rounds_charged(fleet, "0", "mortal") and number in rounds_charged(fleet, "1", "mortal")
    assert "a message was lost" in (fleet.home / "executor-2.log").read_text()
    assert uncharged(fleet, "mortal") == [] and leaks(fleet) == []


def test_a_killed_server_app_is_submitted_again_and_its_round_is_charged_twice(fleet: Fleet) -> None:
    with followed(fleet, "headless", ALL, "federation.rounds=5") as run:
        run.rounds(lambda: together(fleet, "headless"), seconds=200)
        number = frozen_training(fleet, ["0"])
        (app,) = fleet.mine(words="flwr-serverapp")
        os.kill(app, signal.SIGKILL)
        thaw(fleet, "0")
        assert run.ended() == 0, run.told + fleet.logs()
        assert "run headless lost its server side (No heartbeat received from the task); submitted again" in run.told
        assert f"resumed after round {number - 1}" in run.told and "round 5/5" in run.told
    assert [each["round"] for each in records(fleet, "headless")] == [1, 2, 3, 4, 5]
    assert rounds_charged(fleet, "0", "headless").count(number) == 2
    assert uncharged(fleet, "headless") == [] and leaks(fleet) == []


def test_a_killed_superlink_interrupts_a_run_and_does_not_end_it(fleet: Fleet) -> None:
    with followed(fleet, "steady", ALL, "federation.rounds=5") as run:
        run.rounds(lambda: together(fleet, "steady"), seconds=200)
        frozen_training(fleet, ["0"])
        assert leaks(fleet) == []  # Updates of this very round lie in the database now.
        fleet.kill("superlink")
        thaw(fleet, "0")
        run.hears("the SuperLink does not answer; waiting for it")
        fleet.start("superlink")
        assert run.ended() == 0, run.told + fleet.logs()
        assert "submitted again" not in run.told and "round 5/5" in run.told
    assert [each["accepted"] for each in records(fleet, "steady")] == [["0", "1", "2"]] * 5
    assert records(fleet, "steady", "resumed") == []
    assert uncharged(fleet, "steady") == [] and leaks(fleet) == []


def test_a_slow_node_is_missed_and_its_late_answer_is_used_by_nobody(fleet: Fleet) -> None:
    with followed(fleet, "patient", ANY, "federation.rounds=500", "federation.timeout=15") as run:
        run.rounds(lambda: together(fleet, "patient"), seconds=200)
        number = frozen_training(fleet, ["2"])
        run.rounds(lambda: records(fleet, "patient")[-1]["round"] >= number, seconds=120)
        thaw(fleet, "2")
        run.rounds(lambda: together(fleet, "patient", after=number), seconds=200)
        late = [each for each in events(fleet, "2", "answered") if each.get("step") == "train"]
        reason, detail = refused(fleet, "patient", number)["2"]
        assert (reason, detail) == ("missing", "node 'node-3': no reply within federation.timeout=15 s")
        run.hears(r"refused: 2 \(missing\)")
        run.stopped()
    assert number in [each["round"] for each in late]
    assert number in rounds_charged(fleet, "2", "patient")
    assert uncharged(fleet, "patient") == [] and leaks(fleet) == []


def test_a_leak_would_be_seen(fleet: Fleet) -> None:
    planted = fleet.home / "runs" / "note.txt"
    planted.write_text(f"a text: {MARKER}")
    assert leaks(fleet) == ["runs/note.txt"]
    planted.unlink()
    assert MARKER in (fleet.root / "nodes" / "node-1" / "data.csv").read_text()
