"""What Lethe does in place of Flower's runtime, against the Flower that is installed."""

from importlib.metadata import version

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedMedian, FedYogi

from strategies.flower import VECTOR, number, remember, remembered, tell_start, to_record


def test_the_flower_that_was_read_is_the_one_installed() -> None:
    assert version("flwr") == "1.41.0"


def test_a_record_is_one_little_endian_float32_array() -> None:
    strided = np.arange(12, dtype=">f8")[::3]
    record = to_record(strided)
    assert list(record) == [VECTOR]
    assert record[VECTOR].dtype == "float32"
    assert record[VECTOR].numpy().tolist() == [0, 3, 6, 9]
    assert b"'<f4'" in record[VECTOR].data


def test_ids_are_new_for_every_message_and_answered_by_replies() -> None:
    messages = [Message(RecordDict(), dst_node_id=1, message_type="train") for _ in range(50)]
    ids = [number(message) for message in messages]
    assert len(set(ids)) == 50
    for message, identity in zip(messages, ids, strict=True):
        assert message.metadata.message_id == identity
        assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == identity


def test_aggregators_without_memory_remember_nothing() -> None:
    for aggregator in (FedAvg(), FedMedian(), FedAvgM(), FedAdam()):
        assert remembered(aggregator) == {}
        tell_start(aggregator, np.zeros(3, dtype=np.float32))
        assert remembered(aggregator) == {}


@pytest.mark.parametrize("kind", [FedAdam, FedAdagrad, FedYogi])
def test_moments_are_taken_out_and_put_back(kind: type[FedAdam]) -> None:
    first, second = kind(), kind()
    m, v = np.arange(3, dtype=np.float32), np.ones(3, dtype=np.float32)
    remember(first, {"m": m, "v": v})
    remember(second, remembered(first))
    state = remembered(second)
    assert sorted(state) == ["m", "v"]
    assert (state["m"] == m).all() and (state["v"] == v).all()
    remember(second, {})
    assert sorted(remembered(second)) == ["m", "v"]


def test_momentum_is_taken_out_and_put_back() -> None:
    aggregator = FedAvgM(server_momentum=0.9)
    remember(aggregator, {"momentum": np.arange(3, dtype=np.float32)})
    assert remembered(aggregator)["momentum"].tolist() == [0, 1, 2]
