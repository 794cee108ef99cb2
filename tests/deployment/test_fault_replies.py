"""A node that answers wrongly: what the operator sees of it, what becomes of the round, and of the global adapter.

The third node's executor is tests/deployment/crooked_executor.py, a real process that speaks the real protocol and
does wrong what a file tells it to. One long run goes through all faults, round after round.
"""

import re
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor, cat

from tasks.config import DataConfig
from tasks.data import load_splits
from tests.deployment.reply_evidence import (
    HERE,
    MARKER,
    Line,
    Submitted,
    WatchedFleet,
    arrived,
    assert_never_under_counted,
    charges,
    holding,
    refused,
    rounds,
    server_side,
)

pytestmark = pytest.mark.deployment

LABELS = load_splits(DataConfig(), kind="classification", seed=0).label_names
NODES = ("node-1", "node-2", "node-3")
WRONG = "node-3"
"""The client that does wrong; it has data of its own, and so its node's name."""
SMALL = ["model.name=tiny-bert", "data.max_train=120", "data.max_eval=20", "training.steps=2", "training.batch=8"]
OWN_DATA = 'data = "own.csv"\nown = true\n'
OWN = f"data.labels=[{', '.join(LABELS)}]"
THREE = ["federation.clients=3", "federation.min_clients=2", "federation.greeting_timeout=240"]
OPEN = [*SMALL, *THREE, "privacy.epsilon=null", "training.rate=0.5"]


class Crooked(WatchedFleet):
    """A fleet whose third executor does what a file says."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.stand_ins["executor-3"] = HERE / "crooked_executor.py"

    def environment(self, service: str | None = None) -> dict[str, str]:
        return super().environment(service) | {"LETHE_TEST_FAULT": str(self.home / "fault")}

    def misbehave(self, fault: str) -> None:
        (self.home / "fault").write_text(fault)

    def acted(self, fault: str) -> int:
        """Return how often the executor has done something wrong."""
        return (self.home / "executor-3.log").read_text().count(f"crooked: {fault}\n")

    def own_data(self, rows: Iterable[str]) -> None:
        """Give the third node data of its own, for its next start."""
        folder = self.root / "nodes" / "node-3"
        (folder / "own.csv").write_text("text,label\n" + "".join(f"{row}\n" for row in rows))
        text = (folder / "node.toml").read_text()
        (folder / "node.toml").write_text(
            re.sub(r"^partition = .*\n", 'data = "own.csv"\nown = true\n', text, flags=re.M)
        )

    def shared_data(self) -> None:
        """Let the third node hold its part of the common data again, after its next start."""
        file = self.root / "nodes" / "node-3" / "node.toml"
        file.write_text(file.read_text().replace(OWN_DATA, "partition = 2\n"))

    def again(self) -> None:
        """Restart the third node's executor, and wait until it takes messages."""
        ready = self.ready()
        self.kill("executor-3", signal.SIGTERM)
        self.start("executor-3")
        self.until(lambda: self.ready() > ready, seconds=90)

    def ready(self) -> int:
        return (self.home / "executor-3.log").read_text().count("takes messages from")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crooked]:
    made = Crooked(tmp_path_factory.mktemp("replies"))
    made.own_data(f"{MARKER} number {row},{LABELS[row % len(LABELS)]}" for row in range(40))
    try:
        made.up()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def long(fleet: Crooked) -> Iterator[Submitted]:
    """A run that goes on while the faults come and go."""
    run = Submitted(fleet, "long", *OPEN, OWN, "federation.rounds=5000", "federation.timeout=15")
    run.round_of(whole, seconds=240)
    yield run
    if run.process.poll() is None:
        fleet.lethe("stop", "long")
    fleet.misbehave("")


def whole(line: Line) -> bool:
    """Whether all three clients' updates were used in a round."""
    return bool(line["accepted"] == ["0", "1", WRONG])


CASES = {
    "nan": ("nan", "the vector holds NaN or infinite numbers"),
    "infinite": ("nan", "the vector holds NaN or infinite numbers"),
    "short": ("shape", r"vector of shape \(\d+,\), expected \(\d+,\)"),
    "foreign-frame": ("digest", "frame ffffffffffff, expected [0-9a-f]{12}"),
    "stale-frame": ("digest", "the server holds frame [0-9a-f]{12}, expected [0-9a-f]{12}; use the same model, .*"),
    "another's-name": ("error", "the reply speaks for client 0"),
    "boast": ("error", "the reply claims 1000000000 examples, the greeting said 40"),
    "replayed": ("error", r"the reply is of round \d+, this is round \d+"),
    "quoting": ("error", "ValueError; the client's own log has the details"),
    "quoting-own": ("error", "DataError; the client's own log has the details"),
    # An answer to an earlier order, sent again as it was: the SuperLink drops it, and the order is never answered.
    "resent": ("missing", "no reply within federation.timeout=15 s"),
}


@pytest.mark.parametrize("fault", CASES)
def test_a_wrong_reply_is_named_and_left_out_and_the_next_counts(fleet: Crooked, long: Submitted, fault: str) -> None:
    reason, detail = CASES[fault]
    fleet.misbehave(fault)
    line = long.round_of(lambda line: refused(line, WRONG), after=rounds(fleet, "long")[-1]["round"])
    fleet.misbehave("")
    found = refused(line, WRONG)
    assert found is not None and found[0] == reason and re.fullmatch(detail, found[1]), found
    assert line["accepted"] == ["0", "1"]
    long.round_of(whole, after=line["round"])
    fleet.until(lambda: re.search(rf"round +{line['round']}/5000 +2 of 3 clients", long.told), seconds=60)
    assert f"  refused: {WRONG} ({reason})\n" in long.told


@pytest.mark.parametrize("fault", ["twice", "twice-later", "second"])
def test_a_second_reply_to_an_order_counts_for_nothing(fleet: Crooked, long: Submitted, fault: str) -> None:
    before, acted = rounds(fleet, "long")[-1]["round"], fleet.acted(fault)
    fleet.misbehave(fault)
    fleet.until(lambda: fleet.acted(fault) > acted, seconds=120)
    fleet.misbehave("")
    last = long.round_of(whole, after=before + 2)["round"]
    lines = [each for each in rounds(fleet, "long") if before < each["round"] <= last]
    assert sum(whole(each) for each in lines) >= len(lines) - 2, lines
    # The second, a hundred times as large, was never used.
    norms = [each["update_norm"] for each in lines]
    assert max(each.get(WRONG, 0.0) for each in norms) < 20 * max(each["0"] for each in norms)


def test_no_text_of_the_node_s_data_was_ever_at_the_server(fleet: Crooked, long: Submitted) -> None:
    assert MARKER in (fleet.root / "nodes" / "node-3" / "own.csv").read_text()
    seen = server_side(fleet)
    for said in ("ValueError; the client's own log has the details", "DataError; the client's own log has the details"):
        assert any("tap" in file for file in holding(seen, said)), "the copy of what came in is not complete"
        assert any("metrics.jsonl" in file for file in holding(seen, said))
    assert holding(seen, MARKER) == []
    log = fleet.home / "executor-3.log"
    assert "cannot tokenize" not in log.read_text() and holding([log, fleet.home / "node-3.log"], MARKER) == []


def test_the_operator_ends_the_run(fleet: Crooked, long: Submitted) -> None:
    assert fleet.lethe("stop", "long").returncode == 0
    assert long.finish() == 2
    assert "run long ended as finished:stopped" in long.told


def test_a_private_run_charges_a_node_for_what_is_thrown_away(fleet: Crooked) -> None:
    fleet.misbehave("nan")
    run = Submitted(fleet, "private", *SMALL, *THREE, OWN, "privacy.delta=1e-3", "federation.rounds=3")
    assert run.finish() == 0, run.told + fleet.logs()
    fleet.misbehave("")
    assert [refused(line, WRONG) for line in rounds(fleet, "private")] == [CASES["nan"]] * 3
    assert run.told.count(f"  refused: {WRONG} (nan)\n") == 3
    assert arrived(fleet, "private") == dict.fromkeys(NODES, 3)
    assert_never_under_counted(fleet, "private", NODES)
    assert [charges(fleet, node, "private") for node in NODES] == [3, 3, 3]


def test_data_that_cannot_be_read_keep_a_node_out_and_stay_there(fleet: Crooked) -> None:
    fleet.own_data([f"a text,{LABELS[0]}", f"another text,{MARKER}"])
    fleet.again()
    run = Submitted(fleet, "unread", *OPEN, OWN, "federation.rounds=1")
    assert run.finish() == 0, run.told + fleet.logs()
    (line,) = rounds(fleet, "unread")
    assert line["selected"] == ["0", "1"]
    log = fleet.lethe("logs", "unread").stdout
    assert re.search(r"node \d+ takes no part: DataError; the client's own log has the details", log), log
    assert holding(server_side(fleet), MARKER) == []


# --- Updates that are much too large ---------------------------------------------------------------------------------

ROBUST = {
    "fedavg": "{}",
    "median": "{}",
    "trimmed-mean": "{beta: 0.34}",
    "krum": "{num_malicious_nodes: 1}",
}


def words_for(aggregator: str) -> list[str]:
    options = f"federation.aggregator_options={ROBUST[aggregator]}"
    return [*OPEN, "federation.rounds=2", f"federation.aggregator={aggregator}", options]


@pytest.fixture(scope="module")
def loud(fleet: Crooked) -> Iterator[Crooked]:
    """The fleet with common data, whose third node's updates are a hundred times too large."""
    fleet.shared_data()
    fleet.again()
    fleet.misbehave("loud")
    yield fleet
    fleet.misbehave("")


@pytest.mark.parametrize("aggregator", ROBUST)
def test_a_far_too_large_update_is_shown_and_robust_aggregators_resist_it(loud: Crooked, aggregator: str) -> None:
    """A robust aggregator takes every number from between the honest clients', or all from one of them.

    So in a round the global B moves by no more than the honest updates together, whatever the third node sends.
    """
    run = Submitted(loud, f"loud-{aggregator}", *words_for(aggregator))
    assert run.finish() == 0, run.told + loud.logs()
    lines = rounds(loud, run.name)
    for line in lines:
        assert line["accepted"] == ["0", "1", "2"] and line["refused"] == []
        assert line["update_norm"]["2"] > 20 * max(line["update_norm"][client] for client in ("0", "1"))
    honest = sum(line["update_norm"][client] for line in lines for client in ("0", "1"))
    moved = float(factors(loud.home / "runs" / run.name).norm())
    assert (moved > 5 * honest) if aggregator == "fedavg" else (0 < moved <= honest)


def factors(run: Path) -> Tensor:
    """Return all B of a run's adapter as one vector."""
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    return cat([tensors[key].flatten() for key in sorted(tensors) if "lora_B" in key])


def test_the_report_shows_the_size_of_every_client_s_updates(loud: Crooked) -> None:
    done = loud.run(["lethe", "report", str(loud.home / "runs" / "loud-fedavg")])
    assert done.returncode == 0, done.stderr
    page = (loud.home / "runs" / "loud-fedavg" / "report.html").read_text()
    assert "Norm of the updates by round" in page
