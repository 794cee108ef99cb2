"""The classifier: trained, copied, saved and made anew."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora.errors import ModelError
from strategies.unlearning.classifier import cosine, fit, gathered, image_classifier, passes, recycled, text_classifier
from strategies.unlearning.config import FitConfig
from tasks.config import ModelConfig
from tasks.examples import Examples
from tasks.vision import VitConfig

SMALL = VitConfig(side=12, patch=6, width=16, depth=1, heads=2, inner=16)
TEXTS = Examples(("good day", "bad luck", "good food", "bad bread"), (0, 1, 0, 1))


def test_logits_are_the_heads_of_the_features_whatever_the_passes(toy: Any) -> None:
    rows = toy.splits.test
    features = toy.classifier.features(rows)
    torch.testing.assert_close(toy.classifier.logits(rows), toy.classifier.head(features))
    one = gathered(toy.classifier, rows, np.array([7]))
    with torch.no_grad():
        alone = toy.classifier.answer(one.inputs)
    torch.testing.assert_close(alone[0][0], features[7], rtol=1e-4, atol=1e-5)
    assert one.labels.tolist() == [rows.labels[7]]


def test_texts_can_be_learned_from_texts_or_tokens() -> None:
    made = text_classifier(ModelConfig(name="tiny-bert", device="cpu"), classes=2)
    before = torch.random.get_rng_state()
    steps = fit(made, TEXTS, FitConfig(epochs=30, batch=2, rate=1e-3), seed=0)
    assert steps == 60 and torch.equal(before, torch.random.get_rng_state())
    assert made.logits(TEXTS).argmax(1).tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(made.logits(made.encoder.prepared(TEXTS)), made.logits(TEXTS))
    assert not any(weight.requires_grad for weight in made.parameters())


def test_training_repeats_from_its_seed(toy: Any) -> None:
    def trained(seed: int) -> torch.Tensor:
        made = image_classifier(SMALL, classes=10)
        fit(made, toy.splits.train.take(range(40)), FitConfig(epochs=1, batch=16), seed=seed)
        return made.logits(toy.splits.test)

    assert torch.equal(trained(1), trained(1)) and not torch.equal(trained(1), trained(2))


def test_a_copy_shares_nothing_and_a_fresh_one_knows_nothing(toy: Any) -> None:
    twin, fresh = toy.classifier.copied(), toy.classifier.fresh(5)
    assert {name: value.data_ptr() for name, value in twin.state().items()}.items().isdisjoint(
        {name: value.data_ptr() for name, value in toy.classifier.state().items()}.items()
    )
    assert torch.equal(twin.logits(toy.splits.test), toy.classifier.logits(toy.splits.test))
    shared = [
        name
        for name, value in fresh.state().items()
        if value.dim() > 1 and torch.equal(value, toy.classifier.state()[name])
    ]
    assert shared == []
    assert toy.accuracy(fresh, *range(10)) < 0.3


def test_a_saved_classifier_comes_back(toy: Any, tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "vit.safetensors"
    toy.classifier.save(path)
    back = toy.classifier.fresh(3).load(path)
    assert torch.equal(back.logits(toy.splits.test), toy.classifier.logits(toy.splits.test))
    assert [each.name for each in path.parent.iterdir()] == ["vit.safetensors"]


def test_a_file_that_is_no_such_classifier_is_named(toy: Any, tmp_path: Path) -> None:
    toy.classifier.save(tmp_path / "vit")
    with pytest.raises(ModelError, match="holds another classifier"):
        image_classifier(SMALL, classes=10).load(tmp_path / "vit")
    (tmp_path / "broken").write_bytes(b"x" * 20)
    for name in ("broken", "absent"):
        with pytest.raises(ModelError, match=name):
            toy.classifier.copied().load(tmp_path / name)


@given(st.integers(1, 30), st.integers(1, 12))
def test_every_pass_has_every_row_once(count: int, size: int) -> None:
    drawn = recycled(count, size, rng=np.random.default_rng(0))
    for _ in range(2):
        rows = np.concatenate([next(drawn) for _ in range(passes(count, size))])
        assert sorted(rows.tolist()) == list(range(count))


def test_the_rate_falls_along_a_cosine() -> None:
    assert cosine(0, 10) == 1.0 and cosine(10, 10) == pytest.approx(1e-3)
    assert cosine(5, 10) == pytest.approx(0.5, abs=1e-3)
