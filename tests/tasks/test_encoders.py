"""Encoders: one feature a row, whatever the passes, and clear words for rows of another kind."""

import numpy as np
import pytest
import torch

from lora.errors import ConfigError, DataError
from tasks.config import ModelConfig
from tasks.encoders import Encoder, ImageEncoder, Rows, TextEncoder, labels_of
from tasks.examples import Examples
from tasks.heads import pool
from tasks.images import builtin_images
from tasks.models import load_base
from tasks.vision import VitConfig, build_vit

TEXTS = Examples(("a word", "some more words here", "x"), (0, 1, 1))
SHAPE = VitConfig(side=8, patch=4, width=16, depth=2, heads=2, inner=16)


def text() -> TextEncoder:
    encoder = TextEncoder(load_base(ModelConfig(name="tiny-bert", device="cpu"), causal=False))
    encoder.module.eval()
    return encoder


@torch.no_grad()
def whole(encoder: Encoder, rows: Rows) -> torch.Tensor:
    prepared = encoder.prepared(rows)
    found = torch.empty(len(rows), encoder.width)
    for places in encoder.divided(prepared):
        found[torch.from_numpy(places)] = encoder.features(encoder.gathered(prepared, places))
    return found


@torch.no_grad()
def test_texts_become_pooled_states_and_padding_changes_nothing() -> None:
    encoder = text()
    tokens = encoder.prepared(TEXTS)
    features = whole(encoder, TEXTS)
    for place in range(len(TEXTS)):
        one = encoder.gathered(tokens, np.array([place]))
        states = encoder.base.model(input_ids=one.input_ids).last_hidden_state
        torch.testing.assert_close(features[place], pool(states, one, "mean")[0], rtol=1e-4, atol=1e-5)
    assert encoder.prepared(tokens) is tokens


def test_rows_of_like_length_are_encoded_together_with_equal_features_and_gradients() -> None:
    encoder = text()
    texts = Examples((*TEXTS.texts, "x", "many " * 40, "y", "a longer one " * 12), (0, 1, 1, 0, 1, 0, 1))
    batch = encoder.gathered(encoder.prepared(texts), np.arange(len(texts)))
    calls = []
    hook = encoder.module.register_forward_pre_hook(lambda *_: calls.append(1))
    weights = list(encoder.module.requires_grad_(True).parameters())
    apart = encoder.features(batch)
    hook.remove()
    assert len(calls) > 1
    states = encoder.base.model(input_ids=batch.input_ids, attention_mask=batch.mask).last_hidden_state
    whole_batch = pool(states, batch, "mean")
    torch.testing.assert_close(apart, whole_batch, rtol=1e-4, atol=1e-5)
    found = (torch.autograd.grad(each.square().mul(0.5 + each.detach()).sum(), weights, allow_unused=True)
             for each in (apart, whole_batch))  # fmt: skip
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_images_become_their_class_token() -> None:
    images = builtin_images(train=300, validation=10, test=10, side=8).train
    encoder = ImageEncoder.drawn(SHAPE, seed=0)
    features = whole(encoder, images)
    scaled = torch.from_numpy(images.pixels).double().div(127.5).sub(1).float()
    torch.testing.assert_close(features, encoder.model(pixel_values=scaled).last_hidden_state[:, 0])
    assert sum(len(places) for places in encoder.divided(images)) == 300


def test_a_copy_has_weights_of_its_own() -> None:
    for encoder in (text(), ImageEncoder.drawn(SHAPE, seed=0)):
        twin = encoder.copied()
        with torch.no_grad():
            next(twin.module.parameters()).add_(1.0)
        pairs = zip(encoder.module.parameters(), twin.module.parameters(), strict=True)
        assert [bool(torch.equal(one, other)) for one, other in pairs].count(False) == 1


def test_rows_of_another_kind_are_refused() -> None:
    images = builtin_images(train=10, validation=10, test=10, side=12).train
    with pytest.raises(DataError, match="text encoder was given Images"):
        text().prepared(images)
    with pytest.raises(DataError, match="image encoder was given Examples"):
        ImageEncoder.drawn(SHAPE, seed=0).prepared(TEXTS)
    with pytest.raises(DataError, match=r"\[1, 12, 12\], but the model takes \[1, 8, 8\]"):
        ImageEncoder.drawn(SHAPE, seed=0).prepared(images)
    with pytest.raises(DataError, match="no labels"):
        labels_of(Examples(("a",)))


def test_a_vision_transformer_is_drawn_from_its_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two, other = (build_vit(SHAPE, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("changes", "key"), [({"patch": 3}, "vit.patch=3"), ({"heads": 5}, "vit.heads=5")])
def test_a_shape_that_does_not_divide_is_refused(changes: dict[str, int], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        build_vit(SHAPE.model_copy(update=changes), seed=0)
