"""An exported classifier is read back as it answered, and files that are none are named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora.errors import ModelError
from server.export import export
from tasks.config import ModelConfig
from tasks.exported import CARD, HEAD, ExportedClassifier
from tasks.models import load_base, weights_digest
from tests.queries import LABELS, TINY, export_classifier, queries, tiny_learner


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return export_classifier(tmp_path / "adapter")


def test_it_answers_as_it_did(tmp_path: Path) -> None:
    first = tiny_learner()
    own = first.start() + 0.05 * torch.randn(first.layout.size, generator=torch.Generator().manual_seed(0))
    exported = ExportedClassifier.read(export(first, own, tmp_path / "adapter", labels=LABELS), max_length=64)
    learner, values = exported.over(load_base(TINY, causal=False))
    tokens = learner.task.tokenize(queries(0, 3))
    for _, batch in learner.batches([(tokens, row) for row in range(len(tokens))]):
        now, before = learner.answers(values, batch), first.answers(own, batch)
        torch.testing.assert_close(now.loss, before.loss, atol=1e-5, rtol=1e-5)
        assert before.loss.std() > 0.01
    assert exported.labels == LABELS and exported.rank == 2


def test_files_that_are_none_are_named(place: Path, tmp_path: Path) -> None:
    card, head = (place / CARD).read_text(), (place / HEAD).read_bytes()
    for text, says in [
        ("{", "no lethe.json"),
        ("{}", "names no labels"),
        (card.replace('"mean"', '"sum"'), "pooling=sum"),
    ]:
        (place / CARD).write_text(text)
        with pytest.raises(ModelError, match=says):
            ExportedClassifier.read(place, max_length=64)
    (place / CARD).write_text(json.dumps(json.loads(card) | {"labels": ["a", "b", "c"]}))
    with pytest.raises(ModelError, match="4 rows for 3 labels"):
        ExportedClassifier.read(place, max_length=64)
    (place / CARD).write_text(card)
    (place / HEAD).write_bytes(head[:20])
    with pytest.raises(ModelError, match=r"no head\.safetensors"):
        ExportedClassifier.read(place, max_length=64)
    save_file({"weight": torch.zeros(4, 7), "bias": torch.zeros(4)}, place / HEAD)
    with pytest.raises(ModelError, match="need"):
        ExportedClassifier.read(place, max_length=64).over(load_base(TINY, causal=False))


def test_weights_have_a_digest_of_names_shapes_and_numbers() -> None:
    one, same = (load_base(TINY, causal=False).model for _ in range(2))
    digest = weights_digest(one)
    assert digest == weights_digest(same)
    last = list(same.parameters())[-1]
    last.data.view(-1)[-1] += 1e-3
    assert weights_digest(same) != digest
    assert weights_digest(load_base(ModelConfig(name="tiny-bert", dtype="bfloat16"), causal=False).model) != digest
