"""The two records between a client and a server: read back as they were, and refused when anything differs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.errors import WrongUpdate
from strategies.unlearning import remote
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.config import ForgettingConfig
from strategies.unlearning.forgotten import Forgotten, GatedSlot
from strategies.unlearning.o3 import Slot
from strategies.unlearning.remote import ForgetAnswer, ForgetOrder
from tasks.exported import ExportedClassifier
from tasks.models import load_base
from tests.queries import TINY, export_classifier, queries


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[ForgetOrder, ForgetAnswer, Forgotten]:
    place = export_classifier(Path(tmp_path_factory.mktemp("remote")) / "adapter")
    classifier = ExportedClassifier.read(place, max_length=32)
    config = ForgettingConfig(rank=2)
    order = ForgetOrder(
        "one", 0, "b" * 64, "tiny-bert", "a" * 64, classifier, classifier.rank, config, "c" * 64, forgotten=("alarm",)
    )
    served = order.over(load_base(TINY, causal=False))
    slot = Slot.fresh(served.sites, served.frames.block(0))
    slot.values[slot.layout.span("B")] = 0.5
    detector = served.fit_detector(AuditedRequest(queries(3), seed=0))
    gated = GatedSlot("one", 0, slot, detector)
    digest = served.frames.block(0).digest
    return order, ForgetAnswer.of(order, gated, digest=digest, classes=("money",), rows=24), served


def test_an_order_is_read_back_as_it_was(records: Any) -> None:
    order, _, _ = records
    back = ForgetOrder.from_bytes(order.to_bytes())
    assert (back.config, back.forgotten, back.classifier.labels) == (order.config, ("alarm",), order.classifier.labels)
    for name, a in order.classifier.a.items():
        assert torch.equal(back.classifier.a[name], a) and torch.equal(
            back.classifier.b[name], order.classifier.b[name]
        )


def test_an_answer_is_read_back_as_it_was_and_serves_the_same_weights(records: Any) -> None:
    _, answer, served = records
    back = ForgetAnswer.from_bytes(answer.to_bytes())
    assert torch.equal(back.b, answer.b) and back.detector.about() == answer.detector.about()
    assert back.classes == ("money",) and (back.rows, back.block, back.a) == (24, 0, answer.a)
    mine, theirs = (served.beside(each.gated("one", served)).asked(queries(0, 3)) for each in (answer, back))
    assert torch.equal(mine.weights, theirs.weights) and (mine.weights > 0).any()
    assert mine.guess.tolist() == theirs.guess.tolist()


def damaged(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def renumbered(data: bytes) -> bytes:
    return data.replace(rb"\"version\": 1", rb"\"version\": 2")


def renamed(data: bytes) -> bytes:
    return data.replace(rb"\"request\": \"one\"", rb"\"request\": \"two\"")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (damaged, "damaged on its way"),
        (renamed, "damaged on its way"),
        (renumbered, "of version 2"),
        (lambda data: data[: len(data) // 2], "not a forgetting"),
        (lambda data: b"", "not a forgetting"),
        (lambda data: b"{}", "not a forgetting"),
    ],
)
def test_anything_else_is_refused(records: Any, change: Callable[[bytes], bytes], says: str) -> None:
    for record in records[:2]:
        data = change(record.to_bytes())
        assert data != record.to_bytes()
        with pytest.raises(WrongUpdate, match=says):
            type(record).from_bytes(data)


def test_an_order_is_no_answer(records: Any) -> None:
    order, answer, _ = records
    with pytest.raises(WrongUpdate, match="a forgetting order of"):
        ForgetAnswer.from_bytes(order.to_bytes())
    with pytest.raises(WrongUpdate, match="a forgetting answer of"):
        ForgetOrder.from_bytes(answer.to_bytes())


def test_a_record_without_its_fields_is_refused(records: Any) -> None:
    _, answer, _ = records
    tensors, about = remote._opened("answer", answer.to_bytes())
    for name in ("block", "a", "adapter", "detector", "rows"):
        less = {key: value for key, value in about.items() if key not in (name, "version", "kind")}
        with pytest.raises(WrongUpdate, match="cannot be read"):
            ForgetAnswer.from_bytes(remote._sealed("answer", tensors, less))
    assert json.dumps(about)
