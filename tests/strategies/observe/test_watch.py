"""A small run, watched: what the endpoint and the logs say is what metrics.jsonl says, and no more."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

import client.app
import server.app
from client.job import ClientJob, open_ledger
from lora.errors import FederationError, LetheError
from privacy.accounting import Event
from privacy.ledger import Charge, Ledger
from simulation.grid import SequentialGrid
from strategies.federated.wire import EVALUATE, GREET, REASONS, TRAIN
from strategies.observe import watch
from strategies.observe.exporter import METRICS_VARIABLE, Address, exported
from strategies.observe.logs import FILE_VARIABLE
from strategies.observe.watch import answered, charged, node_meters, watched_node, watched_run

Sections = dict[str, Any]
Tamper = Callable[[int, Message], Message | None]
SECRET = "patient 4711 has the flu"


def scraped(address: Address) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = urlopen(f"http://{address.host}:{address.port}/metrics", timeout=5).read().decode()
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def read(samples: Mapping[Any, float], name: str, **labels: str) -> float:
    (found,) = [v for (key, had), v in samples.items() if key == name and labels.items() <= dict(had).items()]
    return found


class Watched:
    """A run in this process: its records, its log, and what the endpoint said at every record."""

    def __init__(self, tree: Sections, directory: Path, tamper: Tamper | None = None) -> None:
        self.directory, self.samples = directory, [{}]
        config = {"job": json.dumps(tree)}
        clients = tree["federation"]["clients"]
        self.ledger = directory / "ledger.sqlite"
        open_ledger.cache_clear()
        grid = SequentialGrid(clients=clients, run_config=config, ledger=self.ledger, tamper=tamper)
        app = server.app.build(config, directory=directory, engine="sequential")
        self.play = lambda: app(grid, Context(1, 0, {}, RecordDict(), {}))

    def lines(self, kind: str) -> list[Sections]:
        found = [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]
        return [line for line in found if line["kind"] == kind]


@pytest.fixture
def watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: Callable[..., Sections]
) -> Callable[..., Watched]:
    """Play a run with metrics and a log; the endpoint is read at its last record."""
    monkeypatch.setenv(METRICS_VARIABLE, "127.0.0.1:0")
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "log.jsonl"))

    def make(tamper: Tamper | None = None, **changes: Any) -> Watched:
        run = Watched(sections(**changes), tmp_path, tamper)
        tell = watch.RunWatch.__call__

        def heard(self: watch.RunWatch, record: Mapping[str, Any]) -> None:
            tell(self, record)
            (started,) = [line for line in logged(tmp_path) if line["event"] == "metrics"]
            run.samples.append(scraped(Address.read(started["address"])))

        monkeypatch.setattr(watch.RunWatch, "__call__", heard)
        run.play()
        return run

    return make


def logged(directory: Path) -> list[Sections]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def spoil(node: int, reply: Message) -> Message | None:
    """Lose the updates of client 2, and answer for client 1 with an error."""
    if reply.metadata.message_type != TRAIN or node == 0:
        return reply
    if node == 2:
        return None
    error = Message(Error(100, "ValueError; the client's own log has the details"), reply_to=reply)
    error.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
    return error


def test_the_endpoint_says_what_metrics_jsonl_says(watched: Callable[..., Watched]) -> None:
    run = watched(privacy={"epsilon": 8.0, "delta": 1e-2})
    rounds, samples = run.lines("round"), run.samples[-1]
    last = rounds[-1]
    assert len(rounds) == 3
    exact = {
        "rounds_planned": 3,
        "round": 3,
        "rounds_finished": 3,
        "last_round_timestamp_seconds": last["time"],
        "clients_online": 3,
        "clients_wanted": 1,
        "clients_selected": 3,
        "clients_accepted": 3,
        "upload_bytes_total": sum(line["bytes_up"] for line in rounds),
        "download_bytes_total": sum(line["bytes_down"] for line in rounds),
        "validation_accuracy_ratio": last["accuracy"],
        "validation_loss": last["loss"],
        "aggregation_error": last["aggregation_error"],
    }
    assert {name: read(samples, f"lethe_server_{name}") for name in exact} == exact
    for name in "012":
        assert read(samples, "lethe_server_updates_total", client=name) == 3
    for step in last["seconds"]:
        total = sum(line["seconds"][step] for line in rounds)
        assert read(samples, "lethe_server_step_seconds_sum", step=step) == pytest.approx(total)
        assert read(samples, "lethe_server_step_seconds_count", step=step) == 3


def test_every_epsilon_is_shown_with_its_meaning(watched: Callable[..., Watched]) -> None:
    run = watched(privacy={"epsilon": 8.0, "delta": 1e-2})
    meaning = {
        "delta": "0.01",
        "unit": "example",
        "adjacency": "add/remove one",
        "sampling": "poisson",
        "simulated": "true",
    }
    spent = max(run.lines("round")[-1]["epsilon"].values())
    assert read(run.samples[-1], "lethe_server_epsilon_max", **meaning) == spent
    assert read(run.samples[-1], "lethe_server_epsilon_budget", **meaning) == 8.0
    registry = node_meters().registry
    for name in "012":
        labels = {"client": name, "ledger": str(run.ledger), **meaning}
        assert registry.get_sample_value("lethe_node_epsilon", labels) == pytest.approx(
            Ledger(run.ledger).epsilon(name, delta=1e-2)
        )
    (line, *_) = [each for each in logged(run.directory) if each["event"] == "charged"]
    assert {key: line[key] for key in ("delta", "unit", "simulated", "epsilon_budget")} == {
        "delta": 1e-2,
        "unit": "example",
        "simulated": True,
        "epsilon_budget": 8.0,
    }


def test_refusals_are_counted_by_client_and_reason(watched: Callable[..., Watched]) -> None:
    run = watched(spoil, federation={"timeout": 0.05, "rounds": 2})
    refused = [each for line in run.lines("round") for each in line["refused"]]
    assert [(each["client"], each["reason"]) for each in refused] == [("1", "error"), ("2", "missing")] * 2
    for name, reason in (("1", "error"), ("2", "missing")):
        assert read(run.samples[-1], "lethe_server_refusals_total", client=name, reason=reason) == 2
    assert read(run.samples[-1], "lethe_server_clients_accepted") == 1
    told = [line for line in logged(run.directory) if line["event"] == "refused"]
    assert [(line["level"], line["client"], line["reason"]) for line in told] == [
        ("warning", "1", "error"),
        ("warning", "2", "missing"),
    ] * 2


def test_a_round_that_runs_is_shown_before_it_ends(watched: Callable[..., Watched]) -> None:
    run = watched()
    seen = [(read(each, "lethe_server_round"), read(each, "lethe_server_rounds_finished")) for each in run.samples[1:]]
    assert seen == [(0, 0), (0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (3, 3)]


def test_a_log_line_of_a_round_has_its_figures(watched: Callable[..., Watched]) -> None:
    run = watched()
    told = [line for line in logged(run.directory) if line["event"] == "round"]
    for line, record in zip(told, run.lines("round"), strict=True):
        assert (line["run"], line["engine"], line["logger"]) == (run.directory.name, "sequential", "lethe.events")
        assert {key: line[key] for key in ("round", "bytes_up", "bytes_down", "accuracy", "loss")} == {
            key: record[key] for key in ("round", "bytes_up", "bytes_down", "accuracy", "loss")
        }
        assert (line["selected"], line["accepted"], line["refused"]) == (3, 3, 0)
        assert line["seconds"] == pytest.approx(sum(record["seconds"].values()))
        assert "epsilon" not in line


def test_the_node_counts_what_it_answered(watched: Callable[..., Watched]) -> None:
    run = watched(training={"min_examples": 1})
    value = node_meters().registry.get_sample_value
    numbers = sum(line["bytes_up"] for line in run.lines("round"))
    orders = 9
    header = 128  # of the NumPy format in which Flower carries an array
    assert value("lethe_node_upload_bytes_total") == numbers + orders * header
    assert value("lethe_node_download_bytes_total") == numbers + orders * header
    for name in "012":
        assert value("lethe_node_rounds_trained_total", {"client": name}) == 3
        assert value("lethe_node_examples", {"client": name}) == 14
    assert value("lethe_node_round") == 3
    assert [value("lethe_node_step_seconds_count", {"step": step}) for step in ("greet", "train")] == [3, 9]
    (last,) = [line["time"] for line in run.lines("end")]
    assert value("lethe_node_last_order_timestamp_seconds") == pytest.approx(last, abs=60)


def test_a_run_that_fails_says_why_in_its_log(watched: Callable[..., Watched], tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="declined"):
        watched(training={"min_examples": 1000})
    last = logged(tmp_path)[-1]
    assert (last["level"], last["event"], last["exception"]["type"]) == ("error", "failed", "FederationError")
    assert "federation.min_clients=1 are needed" in last["exception"]["message"]


def test_an_exception_with_data_leaves_the_node_neither_as_a_reply_nor_as_a_log_line(
    watched: Callable[..., Watched],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def break_down(*_: Any, **__: Any) -> None:
        raise RuntimeError(SECRET) from ValueError(SECRET)

    replies: list[Message] = []
    monkeypatch.setattr(client.app, "run", break_down)
    with pytest.raises(FederationError):
        watched(lambda _, reply: replies.append(reply) or reply)
    (line, *_) = [each for each in logged(tmp_path) if each["logger"] == "lethe.client"]
    assert line["exception"]["type"] == "RuntimeError"
    assert line["exception"]["at"][-1].endswith("break_down")
    assert any(place.startswith("client/app.py:") for place in line["exception"]["at"])
    assert line["exception"]["cause"] == {"type": "ValueError", "at": []}
    errors = [reply.error.reason for reply in replies if reply.has_error()]
    assert errors == ["RuntimeError; the client's own log has the details"] * 3
    assert node_meters().registry.get_sample_value("lethe_node_refusals_total", {"reason": "error"}) == 3
    for text in ((tmp_path / "log.jsonl").read_text(), (tmp_path / "metrics.jsonl").read_text(), caplog.text):
        assert SECRET not in text
    assert SECRET not in "".join(capfd.readouterr())


def test_no_texts_or_labels_are_in_metrics_and_logs(
    watched: Callable[..., Watched], sections: Callable[..., Sections]
) -> None:
    run = watched()
    splits = ClientJob.model_validate(sections()).world.splits
    log = (run.directory / "log.jsonl").read_text()
    labels = " ".join(part for _, had in run.samples[-1] for pair in had for part in pair)
    for word in (*splits.label_names, *splits.train.texts):
        assert word not in log
        assert word not in labels


def greet(content: RecordDict | None = None, kind: str = GREET) -> Message:
    return Message(content or RecordDict(), dst_node_id=1, message_type=kind)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"config": ConfigRecord({"round": "three"})}),
        RecordDict({"config": ConfigRecord({})}),
        RecordDict({"report": ConfigRecord({"client": [1]}), "metrics": ConfigRecord({"num-examples": "many"})}),
    ],
)
def test_a_message_that_makes_no_sense_is_counted_and_raises_nothing(content: RecordDict) -> None:
    message = greet(content, TRAIN)
    answered(message, Message(content, reply_to=message), seconds=0.5)
    value = node_meters().registry.get_sample_value
    assert value("lethe_node_step_seconds_count", {"step": "train"}) == 1
    assert value("lethe_node_round") == 0


@pytest.mark.parametrize("code", [*REASONS, 0, 4000])
def test_refusals_of_a_node_have_the_reasons_of_the_wire(code: int) -> None:
    message = greet(kind=EVALUATE)
    answered(message, Message(Error(code, SECRET), reply_to=message), seconds=0.1)
    reason = REASONS.get(code, "error")
    assert node_meters().registry.get_sample_value("lethe_node_refusals_total", {"reason": reason}) == 1


def test_a_refused_charge_leaves_the_epsilon_as_it_was(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    charges = [Charge("0", Event(0.5, 1.0, 1), f"round {number}", 3.0, 1e-2) for number in range(20)]
    for charge in charges:
        charged(ledger.path, [charge], ledger.charge_many([charge]))
    assert {charge.client for charge in charges} == {"0"}
    registry: CollectorRegistry = node_meters().registry
    (sample,) = [s for family in registry.collect() if family.name == "lethe_node_epsilon" for s in family.samples]
    assert 0 < sample.value <= 3.0
    assert sample.value == pytest.approx(ledger.epsilon("0", delta=1e-2))


def test_a_node_is_watched_where_its_settings_say(tmp_path: Path) -> None:
    with exported(CollectorRegistry(), Address(0)) as free:
        assert free is not None
    file = tmp_path / "node.jsonl"
    with watched_node(node="clinic", federation="north", port=free.port, file=file) as address:
        assert address == free
        answered(greet(), greet(), seconds=0.25)
        samples = scraped(address)
    assert read(samples, "lethe_node_info", node="clinic", federation="north") == 1
    assert read(samples, "lethe_node_step_seconds_sum", step="greet") == 0.25
    first, second = [json.loads(line) for line in file.read_text().splitlines()]
    assert (first["event"], first["address"]) == ("node", f"127.0.0.1:{free.port}")
    assert (second["event"], second["node"], second["federation"], second["step"]) == (
        "answered",
        "clinic",
        "north",
        "greet",
    )


def test_a_run_that_nobody_watches_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LetheError), watched_run(run="first", engine="cohort") as heard:
        heard({"kind": "roster", "time": 1.0, "round": 1, "online": 2})
        logging.getLogger("lethe.events").warning("refused")
        raise LetheError("the end")
    assert capfd.readouterr() == ("", "")
