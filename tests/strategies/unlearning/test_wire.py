"""Letters between server and node arrive as they were sent, and anything else is refused by name."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from lora.errors import WrongUpdate
from strategies.flower import take_identity
from strategies.unlearning.wire import OFFERS, ORDER, Letter, Offered, ask_offers, asked_run


def sent(content: RecordDict, kind: str = ORDER) -> Message:
    take_identity()
    return Message(content, dst_node_id=1, message_type=kind)


@given(st.text(max_size=12), st.binary(max_size=200))
def test_a_letter_arrives_as_it_was_sent(offer: str, data: bytes) -> None:
    assert Letter.read(sent(Letter(offer, data).content())) == Letter(offer, data)


@given(st.text(max_size=12), st.lists(st.text(max_size=12)), st.lists(st.text(max_size=12)))
def test_offers_arrive_as_they_were_sent(client: str, offers: list[str], answered: list[str]) -> None:
    offered = Offered(client, tuple(offers), tuple(answered))
    assert Offered.read(sent(offered.content())) == offered
    assert asked_run(sent(ask_offers(client), OFFERS)) == client


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"config": ConfigRecord({})},
        {"config": ConfigRecord({"offer": "a"}), "arrays": ArrayRecord({})},
        {"config": ConfigRecord({"offer": "a"}), "arrays": ArrayRecord({"data": Array(np.ones(3, np.float32))})},
    ],
)
def test_what_is_no_letter_is_refused(content: dict[str, Any]) -> None:
    message = sent(RecordDict(content))
    with pytest.raises(WrongUpdate, match="no letter about an offer"):
        Letter.read(message)
    with pytest.raises(WrongUpdate, match="no list of offers"):
        Offered.read(message)
    with pytest.raises(WrongUpdate, match="names no run"):
        asked_run(message)
