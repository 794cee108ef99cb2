"""What crosses the wire, whole; and what never does."""

import builtins
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lora import errors
from lora.codec import Part
from lora.errors import BudgetExceeded, FrameMismatch, LetheError, WrongUpdate
from strategies.federated.wire import (
    ARRAYS,
    BUDGET,
    CONFIG,
    DECLINED,
    FRAME,
    INTERNAL,
    METRICS,
    REASONS,
    REPORT,
    TRAIN,
    WEIGHT,
    Declined,
    Order,
    Update,
    refusal,
)
from strategies.flower import VECTOR, number, take_identity, to_record

take_identity()
PARTS: tuple[Part, ...] = ("A", "B", "head")
vectors = arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32)).map(torch.from_numpy)
parts = st.lists(st.sampled_from(PARTS), unique=True).map(tuple)


def sent(content: RecordDict) -> Message:
    """Put a message's content through Flower's wire format."""
    through = recorddict_from_proto(recorddict_to_proto(content))
    return Message(through, dst_node_id=1, message_type=TRAIN)


digests = st.tuples(st.text(max_size=64), st.text(max_size=64))


@given(vectors, parts, parts, st.integers(0, 10**6), digests)
def test_an_order_arrives_as_it_was_sent(vector: Any, train: Any, send: Any, round_: int, ids: tuple[str, str]) -> None:
    frame, layout = ids
    order = Order(round=round_, vector=vector, train=train, send=send, frame=frame, layout=layout)
    found = Order.read(sent(order.content()))
    assert found.vector.numpy().tobytes() == vector.numpy().tobytes()
    assert (found.round, found.train, found.send, found.frame, found.layout) == (round_, train, send, frame, layout)


optional = st.none() | st.floats(allow_nan=False)


@given(vectors, digests, st.integers(1, 2**40), optional, optional)
def test_an_update_arrives_as_it_was_sent(
    vector: Any, ids: tuple[str, str], examples: int, loss: float | None, epsilon: float | None
) -> None:
    client, frame = ids
    update = Update(vector, client, frame, examples, loss, epsilon, round=3)
    found = Update.read(sent(update.content()))
    assert found.vector.numpy().tobytes() == vector.numpy().tobytes()
    assert (found.client, found.frame, found.examples) == (client, frame, examples)
    assert (found.loss, found.epsilon, found.round) == (loss, epsilon, 3)


def test_an_update_holds_nothing_but_what_law_four_lets_out() -> None:
    content = Update(torch.zeros(3), "0", "f", 5, loss=1.0, epsilon=2.0).content()
    found = {name: sorted(record) for name, record in content.items()}
    assert found == {ARRAYS: [VECTOR], METRICS: ["epsilon", "loss", WEIGHT], REPORT: ["client", "frame", "round"]}


def test_vectors_are_copies() -> None:
    message = Message(Update(torch.zeros(3), "0", "f", 5).content(), dst_node_id=1, message_type=TRAIN)
    Update.read(message).vector.fill_(9)
    assert not Update.read(message).vector.any()


# -- garbage -----------------------------------------------------------------------------------------------------------


def content(**changes: Any) -> RecordDict:
    whole = Update(torch.zeros(3), "0", "f", 5).content()
    for name, record in changes.items():
        if record is None:
            del whole[name]
        else:
            whole[name] = record
    return whole


def raw(data: bytes, *, stype: str = "numpy.ndarray") -> ArrayRecord:
    return ArrayRecord({VECTOR: Array(dtype="float32", shape=(3,), stype=stype, data=data)})


HUGE = (
    b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999999,), }".ljust(128) + b"\n"
)


@pytest.mark.parametrize(
    "garbage",
    [
        RecordDict(),
        content(**{ARRAYS: None}),
        content(**{METRICS: None}),
        content(**{REPORT: None}),
        content(**{ARRAYS: ArrayRecord()}),
        content(**{ARRAYS: ConfigRecord({VECTOR: 3})}),
        content(**{METRICS: MetricRecord({WEIGHT: [1, 2]})}),
        content(**{METRICS: MetricRecord({WEIGHT: float("inf")})}),
        content(**{METRICS: MetricRecord({WEIGHT: float("nan")})}),
        content(**{METRICS: MetricRecord({"loss": 1.0})}),
        content(**{METRICS: MetricRecord({WEIGHT: 1, "loss": [1.0]})}),
        content(**{REPORT: ConfigRecord({"client": "0"})}),
        content(**{ARRAYS: raw(b"")}),
        content(**{ARRAYS: raw(b"garbage")}),
        content(**{ARRAYS: raw(b"PK\x03\x04garbage")}),
        content(**{ARRAYS: raw(b"\x93NUMPY\x01\x00")}),
        content(**{ARRAYS: raw(HUGE)}),
        content(**{ARRAYS: raw(b"", stype="torch")}),
        content(**{ARRAYS: ArrayRecord({VECTOR: Array(np.array(["a", "b"]))})}),
    ],
)
def test_garbage_is_a_wrong_update_and_nothing_else(garbage: RecordDict) -> None:
    with pytest.raises(WrongUpdate, match="the reply is not an update: "):
        Update.read(Message(garbage, dst_node_id=1, message_type=TRAIN))


@given(st.binary(max_size=200), st.sampled_from([b"", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x03\x00", b"PK\x03\x04"]))
@settings(max_examples=200)
def test_any_bytes_are_a_float32_vector_or_a_wrong_update(data: bytes, magic: bytes) -> None:
    message = Message(content(**{ARRAYS: raw(magic + data)}), dst_node_id=1, message_type=TRAIN)
    try:
        read = Update.read(message).vector
    except WrongUpdate as error:
        assert str(error).startswith("the reply is not an update: ")
        return
    assert read.dtype is torch.float32


# -- refusals ----------------------------------------------------------------------------------------------------------

SECRET = "my-diary: dear Anna"
own_kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LetheError)]
foreign_kinds = [
    kind
    for kind in vars(builtins).values()
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, (UnicodeError, ExceptionGroup))
]
SPOKEN: dict[type[Exception], int] = {BudgetExceeded: BUDGET, FrameMismatch: FRAME, Declined: DECLINED}


def order() -> Message:
    message = Message(RecordDict({CONFIG: ConfigRecord()}), dst_node_id=7, message_type=TRAIN)
    number(message)
    return message


def caught(raiser: Callable[[], None]) -> Exception:
    try:
        raiser()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("kind", [*foreign_kinds, *(kind for kind in own_kinds if kind not in SPOKEN)])
def test_no_exception_text_leaves_the_node(kind: type[Exception]) -> None:
    def fail() -> None:
        try:
            raise ValueError(SECRET)
        except ValueError as error:
            raise kind(SECRET) from error

    asked = order()
    reply = refusal(caught(fail), asked)
    assert reply.has_error()
    assert reply.error == Error(INTERNAL, f"{kind.__name__}; the client's own log has the details")
    assert "diary" not in repr(reply)
    assert reply.metadata.reply_to_message_id == asked.metadata.message_id


@given(st.text(min_size=12))
def test_nothing_of_any_text_leaves_the_node(text: str) -> None:
    reply = refusal(RuntimeError(text), order())
    assert reply.error == refusal(RuntimeError("another text altogether"), order()).error


@pytest.mark.parametrize(("kind", "code"), SPOKEN.items())
def test_lethes_own_reasons_are_given_in_words(kind: type[Exception], code: int) -> None:
    class Special(kind):  # type: ignore[misc, valid-type]
        pass

    for made in (kind, Special):
        reply = refusal(made("epsilon would be 8.1, the budget is 8"), order())
        assert reply.error == Error(code, "epsilon would be 8.1, the budget is 8")


def test_every_code_has_a_name_in_the_report() -> None:
    assert REASONS == {INTERNAL: "error", DECLINED: "declined", BUDGET: "budget", FRAME: "digest"}


def test_a_record_of_the_global_vector_is_read_back() -> None:
    message = Message(
        RecordDict({ARRAYS: to_record(np.arange(3, dtype=np.float32))}), dst_node_id=1, message_type=TRAIN
    )
    with pytest.raises(WrongUpdate):
        Update.read(message)
    with pytest.raises(KeyError):
        Order.read(message)
