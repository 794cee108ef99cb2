"""The round driver: bad replies are named and survived, the laws are checked, and records are whole."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from lora.errors import CheckpointError, FederationError, LetheError
from privacy.ledger import Ledger
from server.checkpoint import Checkpoints
from simulation.grid import SequentialGrid
from strategies.federated.wire import ARRAYS, EVALUATE, METRICS, REPORT, TRAIN
from strategies.flower import to_record

Change = Callable[[Message], Message | None]
Make = Callable[..., Any]
PRIVATE = {"privacy": {"epsilon": 8.0, "delta": 1e-4}}


def at(index: int, change: Change, *, kind: str = TRAIN) -> Callable[[int, Message], Message | None]:
    """Tamper with one client's replies to orders of a kind, in every round."""
    return lambda who, reply: change(reply) if (who, reply.metadata.message_type) == (index, kind) else reply


def with_vector(reply: Message, vector: np.ndarray) -> Message:
    reply.content[ARRAYS] = to_record(vector)
    return reply


def vector_of(reply: Message) -> np.ndarray:
    arrays: Any = reply.content[ARRAYS]
    return np.array(arrays["vector"].numpy())


def with_value(reply: Message, record: str, **values: Any) -> Message:
    for key, value in values.items():
        reply.content[record][key] = value
    return reply


def poisoned(reply: Message) -> Message:
    vector = vector_of(reply)
    vector[3] = np.nan
    return with_vector(reply, vector)


def emptied(reply: Message) -> Message:
    reply.content = RecordDict({})
    return reply


def swapped(reply: Message) -> Message:
    reply.content = RecordDict({ARRAYS: ConfigRecord({"vector": 1}), METRICS: MetricRecord({}), REPORT: ConfigRecord()})
    return reply


def torn_array(reply: Message) -> Message:
    reply.content[ARRAYS] = ArrayRecord({"vector": Array("float32", (3,), "numpy.ndarray", b"")})
    return reply


def lost(reply: Message) -> Message:
    """A node that died: Flower answers in its place, from node 1."""
    reply.metadata.__dict__["_src_node_id"] = 1
    answer: Any = Message
    found: Message = answer(Error(8, "Node Unavailable"), metadata=reply.metadata)
    return found


BAD: dict[str, tuple[Change, str, str]] = {
    "missing": (lambda reply: None, "missing", "federation.timeout=0.1 s"),
    "lost node": (lost, "error", "Node Unavailable"),
    "nan": (poisoned, "nan", "NaN"),
    "infinite": (lambda reply: with_vector(reply, vector_of(reply) * np.float32(np.inf)), "nan", "infinite"),
    "too short": (lambda reply: with_vector(reply, vector_of(reply)[:-1]), "shape", "expected"),
    "too many dimensions": (lambda reply: with_vector(reply, vector_of(reply)[None]), "shape", "expected"),
    "wrong digest": (lambda reply: with_value(reply, REPORT, frame="0" * 64), "digest", "000000"),
    "speaks for another": (lambda reply: with_value(reply, REPORT, client="3"), "error", "speaks for client 3"),
    "no examples": (lambda reply: with_value(reply, METRICS, **{"num-examples": 0}), "error", "0 examples"),
    "empty": (emptied, "error", "not an update"),
    "other records": (swapped, "error", "not an update"),
    "torn array": (torn_array, "error", "not an update"),
}


@pytest.fixture(scope="module")
def without_client_1(tmp_path_factory: pytest.TempPathFactory, small_federation: Make) -> torch.Tensor:
    """The result of the same run when client 1 never answers."""
    silent = small_federation(tmp_path_factory.mktemp("silent"), at(1, lambda reply: None))
    silent.run()
    found = Checkpoints(silent.directory / "checkpoints").latest()
    assert found is not None
    return found.vector


@pytest.mark.parametrize("case", BAD)
def test_a_bad_reply_is_named_in_every_round_and_the_others_go_on(
    federation: Make, without_client_1: torch.Tensor, case: str
) -> None:
    change, reason, detail = BAD[case]
    bad = federation(at(1, change))
    summary = bad.run()
    for line in bad.lines("round"):
        assert line["selected"] == ["0", "1", "2", "3"]
        assert line["accepted"] == ["0", "2", "3"]
        assert set(line["train_loss"]) == set(line["update_norm"]) == {"0", "2", "3"}
        (refused,) = line["refused"]
        assert (refused["client"], refused["reason"], detail in refused["detail"]) == ("1", reason, True)
    assert [(each["round"], each["client"], each["reason"]) for each in summary["refused"]] == [
        (1, "1", reason),
        (2, "1", reason),
    ]
    assert summary["rounds"] == 2
    # Nothing of the bad reply went into the result: it is as if the client had not answered.
    found = Checkpoints(bad.directory / "checkpoints").latest()
    assert found is not None
    assert torch.equal(found.vector, without_client_1)


@pytest.mark.parametrize("case", BAD)
def test_too_few_usable_replies_end_the_run_with_their_reasons(federation: Make, case: str) -> None:
    change, reason, detail = BAD[case]
    with pytest.raises(FederationError) as caught:
        federation(at(1, change), federation={"min_clients": 4}).run()
    text = str(caught.value)
    assert "round 1: 3 usable replies, federation.min_clients=4" in text
    assert f"1: {reason}" in text
    assert detail in text


def test_all_kinds_of_bad_replies_at_once(federation: Make) -> None:
    changes = dict(enumerate([poisoned, emptied, lost]))

    def tamper(index: int, reply: Message) -> Message | None:
        return changes[index](reply) if index in changes and reply.metadata.message_type == TRAIN else reply

    summary = federation(tamper, federation={"rounds": 1}).run()
    named = {each["client"]: each["reason"] for each in summary["refused"]}
    assert named == {"0": "nan", "1": "error", "2": "error"}


def test_an_exception_in_a_client_is_named_by_its_type_alone(federation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import client.app

    fit_one = client.app.fit_one

    def fail(job: Any, place: Any, order: Any) -> Any:
        if place.index == 2:
            raise RuntimeError("row 17 reads: the patient has measles")
        return fit_one(job, place, order)

    monkeypatch.setattr(client.app, "fit_one", fail)
    each = federation()
    summary = each.run()
    assert [(r["client"], r["reason"]) for r in summary["refused"]] == [("2", "error")] * 2
    assert "RuntimeError" in summary["refused"][0]["detail"]
    assert "measles" not in (each.directory / "metrics.jsonl").read_text()


def test_a_client_with_too_few_examples_is_named_as_declined(federation: Make) -> None:
    each = federation(seed=50)
    world = each.driver().world
    vars(world)["shares"] = [(), (0,), tuple(range(2, 18)), tuple(range(18, 36))]
    summary = each.run()
    declined = [(r["client"], r["reason"]) for r in summary["refused"] if r["round"] == 1]
    assert declined == [("0", "declined"), ("1", "declined")]
    assert "training.min_examples=2" in summary["refused"][0]["detail"]


class Echo(SequentialGrid):
    """Delivers every reply twice, and replies of earlier rounds again."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.delivered = [*getattr(self, "delivered", []), *super().pull_messages(message_ids)]
        return [*self.delivered, *self.delivered]


def test_replies_that_come_twice_or_again_count_once(federation: Make) -> None:
    echo, plain = federation(kind=Echo), federation()
    echo.directory, plain.directory = echo.directory / "echo", plain.directory / "plain"
    for each in (echo, plain):
        each.directory.mkdir()
    assert echo.run()["refused"] == []
    plain.run()
    assert [line["accepted"] for line in echo.lines("round")] == [["0", "1", "2", "3"]] * 2
    assert torch.equal(
        Checkpoints(echo.directory / "checkpoints").latest().vector,  # type: ignore[union-attr]
        Checkpoints(plain.directory / "checkpoints").latest().vector,  # type: ignore[union-attr]
    )


# --- Selection -------------------------------------------------------------------------------------------------------


def test_a_poisson_round_for_which_nobody_is_drawn_changes_nothing(federation: Make) -> None:
    each = federation(federation={"sampling": "poisson", "fraction": 0.15, "rounds": 8, "min_clients": 1})
    summary = each.run()
    lines = each.lines("round")
    empty = [line for line in lines if not line["selected"]]
    assert 0 < len(empty) < 8
    assert summary["rounds"] == 8
    for line in empty:
        assert (line["accepted"], line["refused"], line["bytes_up"], line["bytes_down"]) == ([], [], 0, 0)
    by_round = {line["round"]: line for line in lines}
    for line in empty[1:]:
        assert line["loss"] == by_round[line["round"] - 1]["loss"]


def test_fixed_sampling_draws_the_share_of_clients(federation: Make) -> None:
    each = federation(federation={"sampling": "fixed", "fraction": 0.5, "rounds": 4})
    each.run()
    drawn = [tuple(line["selected"]) for line in each.lines("round")]
    assert {len(names) for names in drawn} == {2}
    assert len(set(drawn)) > 1


# --- Laws ------------------------------------------------------------------------------------------------------------


def test_a_base_model_that_moves_ends_the_run(federation: Make) -> None:
    each = federation(seed=52)
    driver = each.driver()
    parameter = next(driver.learner.base.model.parameters())

    def tamper(index: int, reply: Message) -> Message:
        with torch.no_grad():
            parameter.add_(0.0)
        return reply

    each.tamper = tamper
    with pytest.raises(LetheError, match="frozen base model was written to"):
        each.run()
    assert Checkpoints(each.directory / "checkpoints").latest() is None


def test_a_frame_that_moves_ends_the_run(federation: Make) -> None:
    each = federation(seed=53)
    frame = each.driver().learner.adapted.frame

    def tamper(index: int, reply: Message) -> Message:
        if index == 3 and reply.metadata.message_type == TRAIN:
            next(iter(frame.matrices.values()))[0, 0] += 1e-7
        return reply

    each.tamper = tamper
    with pytest.raises(LetheError, match="frame A changed"):
        each.run()


def test_training_that_moves_nothing_is_an_error(federation: Make) -> None:
    each = federation()
    start = each.driver().learner.start().numpy()

    def tamper(index: int, reply: Message) -> Message:
        return with_vector(reply, start) if reply.metadata.message_type == TRAIN else reply

    each.tamper = tamper
    with pytest.raises(LetheError, match="B did not move"):
        each.run()


def test_an_adapter_without_effect_is_an_error(federation: Make) -> None:
    each = federation()
    tiny = each.driver().learner.start()
    tiny[each.driver().learner.layout.span("B")] = 1e-30

    def tamper(index: int, reply: Message) -> Message:
        return with_vector(reply, tiny.numpy()) if reply.metadata.message_type == TRAIN else reply

    each.tamper = tamper
    with pytest.raises(LetheError, match="answers as before"):
        each.run()


# --- What is reported ------------------------------------------------------------------------------------------------

KEYS = {
    "rounds",
    "clients",
    "accuracy_initial",
    "accuracy_final",
    "loss_final",
    "epsilon_max",
    "delta",
    "unit",
    "sampling",
    "frame_digest_start",
    "frame_digest_end",
    "bytes_up_per_client_round",
    "bytes_down_per_client_round",
    "bytes_up_plain_lora",
    "aggregation_error",
    "wall_s",
    "adapter_path",
    "stopped",
    "refused",
}


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("strategy", ["ffa-lora", "lora", "rolora"])
def test_the_summary_says_what_happened(federation: Make, strategy: str, private: bool) -> None:
    changes = PRIVATE if private else {}
    each = federation(**changes, task={"head": "frozen"}, federation={"strategy": strategy})
    driver = each.driver()
    summary = driver.run()
    learner, world = driver.learner, driver.world
    assert summary.keys() >= KEYS
    assert (summary["rounds"], summary["clients"], summary["stopped"]) == (2, 4, None)
    vector = Checkpoints(each.directory / "checkpoints").latest().vector  # type: ignore[union-attr]
    scores = learner.score(vector, world.test)
    assert (summary["accuracy_final"], summary["loss_final"]) == (scores.accuracy, scores.loss)
    assert summary["accuracy_initial"] == learner.score(learner.start(), world.test).accuracy
    assert (summary["frame_digest_start"] == summary["frame_digest_end"]) == (strategy == "ffa-lora")
    if strategy == "lora":
        # Both factors move, and the mean of products is not the product of means.
        assert summary["aggregation_error"] > 1e-4
        assert summary["bytes_up_per_client_round"] == summary["bytes_up_plain_lora"]
    else:
        assert summary["aggregation_error"] < 1e-6
        # Every adapted matrix of the tiny model is square but for the feed-forward pair, whose A's and B's mirror.
        assert summary["bytes_up_per_client_round"] * 2 == summary["bytes_up_plain_lora"]
    if private:
        assert (summary["unit"], summary["sampling"], summary["delta"]) == ("example", "poisson", 1e-4)
        spent = [Ledger(each.ledger).epsilon(str(index), delta=1e-4) for index in range(4)]
        assert summary["epsilon_max"] == pytest.approx(max(spent))
        assert max(spent) <= summary["epsilon_budget"] == 8.0
    else:
        assert summary["epsilon_max"] is summary["unit"] is summary["sampling"] is summary["delta"] is None


def test_lines_say_what_was_sent_and_what_the_run_is_about(federation: Make) -> None:
    each = federation()
    each.about = {"engine": "sequential", "clients": [{"client": "0", "examples": 10}], "privacy": None}
    summary = each.run()
    (start,) = each.lines("start")
    assert (start["engine"], start["clients"], start["privacy"]) == ("sequential", each.about["clients"], None)
    assert start["test_accuracy"] == summary["accuracy_initial"]
    for line in each.lines("round"):
        assert line["bytes_up"] == 4 * summary["bytes_up_per_client_round"]
        assert line["bytes_down"] == 4 * summary["bytes_down_per_client_round"]
        assert set(line["seconds"]) == {"train", "aggregate", "evaluate", "checkpoint"}
    assert [line["kind"] for line in each.lines()] == ["start", "round", "round", "end"]
    assert each.lines("end")[0]["accuracy_final"] == summary["accuracy_final"]


def test_a_private_run_writes_epsilon_and_no_losses_of_clients(federation: Make) -> None:
    each = federation(**PRIVATE)
    each.run()
    for line in each.lines("round"):
        assert "train_loss" not in line
        assert set(line["epsilon"]) == {"0", "1", "2", "3"}
    assert each.lines("end")[0]["client_accuracy"] is None


def test_evaluation_and_checkpoints_come_at_their_intervals_and_at_the_end(federation: Make) -> None:
    each = federation(server={"evaluate_every": 2, "checkpoint_every": 3, "keep": 5}, federation={"rounds": 5})
    each.run()
    assert [line["round"] for line in each.lines("round") if line["loss"] is not None] == [2, 4, 5]
    saved = sorted(path.name for path in (each.directory / "checkpoints").iterdir())
    assert saved == ["round-00003", "round-00005"]


def test_clients_are_asked_for_their_own_accuracy_where_the_run_says_so(federation: Make) -> None:
    def odd(index: int, reply: Message) -> Message | None:
        if reply.metadata.message_type != EVALUATE or index in (0, 2):
            return reply
        return emptied(reply) if index == 1 else None

    each = federation(odd, federation={"evaluate_clients": True})
    driver = each.driver()
    driver.run()
    found = each.lines("end")[0]["client_accuracy"]
    vector = Checkpoints(each.directory / "checkpoints").latest().vector  # type: ignore[union-attr]
    assert found == {name: driver.learner.score(vector, driver.world.client(int(name))).accuracy for name in "02"}


# --- Resume ----------------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    pass


def stop_at(driver: Any, kind: str, number: int) -> None:
    """Stop the run, as a kill would, in place of writing the line of a round."""
    write = driver.records.write

    def stopping(written: str, **fields: Any) -> Any:
        if (written, fields.get("round")) == (kind, number):
            raise Stopped
        return write(written, **fields)

    driver.records.write = stopping


@pytest.mark.parametrize("private", [False, True])
def test_the_summary_of_a_resumed_run_covers_the_rounds_before(federation: Make, private: bool) -> None:
    changes = PRIVATE if private else {}
    each = federation(at(1, poisoned), **changes, federation={"rounds": 2, "aggregator": "fedadam"})
    driver = each.driver()
    stop_at(driver, "round", 2)
    with pytest.raises(Stopped):
        driver.run()
    assert [line["round"] for line in each.lines("round")] == [1]
    summary = each.run()
    # Round 2 had its checkpoint and lost its line: the line is made up for, and nothing is trained again.
    assert [(line["kind"], line.get("round")) for line in each.lines()] == [
        ("start", None),
        ("round", 1),
        ("round", 2),
        ("resumed", 2),
        ("end", None),
    ]
    assert [(each["round"], each["reason"]) for each in summary["refused"]] == [(1, "nan"), (2, "nan")]
    assert summary["aggregation_error"] == max(line["aggregation_error"] for line in each.lines("round")) > 0
    if private:
        assert summary["epsilon_max"] == pytest.approx(max(Ledger(each.ledger).epsilon(c, delta=1e-4) for c in "023"))
        assert {row.purpose for row in Ledger(each.ledger).rows()} == {"round 1", "round 2"}
    else:
        assert summary["epsilon_max"] is None


@pytest.mark.parametrize(
    "change",
    [{"training": {"rate": 0.7}}, {"federation": {"rounds": 9}}, {"seed": 9}, {"adapter": {"alpha": 3.0}}],
)
def test_a_checkpoint_of_another_config_is_refused_with_the_key_named(federation: Make, change: dict[str, Any]) -> None:
    federation(federation={"rounds": 2}).run()
    key = next(f"{name}.{next(iter(value))}" if isinstance(value, dict) else name for name, value in change.items())
    with pytest.raises(CheckpointError, match=key):
        federation(**change).run()


def test_what_the_result_does_not_depend_on_may_change_before_a_resume(federation: Make) -> None:
    driver = federation().driver()
    stop_at(driver, "round", 2)
    with pytest.raises(Stopped):
        driver.run()
    assert federation(server={"keep": 1}, federation={"timeout": 5.0}).run()["rounds"] == 2
