"""The losses of the detector's encoder against naive formulas, and its training."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from lora.frame import Frame
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.contrastive import (
    ContrastiveSettings,
    entropy_loss,
    layer_mean,
    mask_tokens,
    mlm_loss,
    train_encoder,
)
from strategies.unlearning.encoder import SharedEncoder
from strategies.unlearning.o3 import Slot
from tasks.learner import Learner
from tasks.tokens import IGNORED


def test_the_entropy_loss_is_the_formula(noise: torch.Generator) -> None:
    views = [torch.randn(4, 6, generator=noise) for _ in range(3)]
    keys = [torch.randn(4, 6, generator=noise) for _ in range(3)]
    total = 0.0
    for view, key in zip(views, keys, strict=True):
        for i in range(4):
            raw = [math.exp(float(view[i] @ key[j])) for j in range(4)]
            delta = [value / sum(raw) for value in raw]
            total -= sum(d * math.log(d) for d in delta) / 4
    assert float(entropy_loss(views, keys)) == pytest.approx(total, rel=1e-4)


def test_the_entropy_loss_names_no_positive(noise: torch.Generator) -> None:
    """InfoNCE would change when the keys are put in another order."""
    view, key = torch.randn(5, 6, generator=noise), torch.randn(5, 6, generator=noise)
    torch.testing.assert_close(entropy_loss([view], [key]), entropy_loss([view], [key.flip(0)]))
    assert float(entropy_loss([view * 0], [key])) == pytest.approx(math.log(5), rel=1e-5)


def test_the_mlm_loss_is_the_formula(noise: torch.Generator) -> None:
    states, embeddings = torch.randn(2, 3, 4, generator=noise), torch.randn(9, 4, generator=noise)
    labels = torch.tensor([[IGNORED, 5, IGNORED], [2, IGNORED, 8]])
    losses = []
    for row, place, token in ((0, 1, 5), (1, 0, 2), (1, 2, 8)):
        logits = [float(states[row, place] @ word) for word in embeddings]
        losses.append(math.log(sum(map(math.exp, logits))) - logits[token])
    assert float(mlm_loss(states, labels, embeddings)) == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert float(mlm_loss(states, torch.full((2, 3), IGNORED), embeddings)) == 0.0


def test_means_leave_padding_out(noise: torch.Generator) -> None:
    states, mask = torch.randn(2, 5, 3, generator=noise), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = layer_mean(states, mask)
    torch.testing.assert_close(found[0], states[0, :3].mean(0))
    torch.testing.assert_close(found[1], states[1].mean(0))


def test_masking_hides_the_share_that_it_says(learner: Learner, request_of: Callable[..., AuditedRequest]) -> None:
    request = request_of(0, 1, 2, 3)
    batch = request.batch(request.tokens(learner.task), range(96), pad=learner.pad)
    shown, labels = mask_tokens(batch, learner.base.tokenizer, share=0.15, source=np.random.default_rng(0))
    real, chosen = batch.mask.bool(), labels != IGNORED  # type: ignore[union-attr]
    assert 0.12 < chosen[real].float().mean() < 0.18 and not chosen[~real].any()
    assert torch.equal(labels[chosen], batch.input_ids[chosen])
    assert torch.equal(shown[~chosen], batch.input_ids[~chosen])
    # A byte tokenizer has no mask token: nine tenths of the chosen ones become random bytes.
    assert 0.8 < (shown != batch.input_ids)[chosen].float().mean() < 0.97


def test_a_mask_token_is_used_where_there_is_one(learner: Learner, request_of: Callable[..., AuditedRequest]) -> None:
    class Tokenizer:
        all_special_ids = (0, 1, 2)
        mask_token_id = 258

        def __len__(self) -> int:
            return 259

    request = request_of(0, 1, 2, 3)
    batch = request.batch(request.tokens(learner.task), range(96), pad=learner.pad)
    shown, labels = mask_tokens(batch, Tokenizer(), share=0.5, source=np.random.default_rng(0))
    chosen = labels != IGNORED
    assert (shown[chosen] == 258).float().mean() == pytest.approx(0.8, abs=0.05)
    assert (shown == batch.input_ids)[chosen].float().mean() == pytest.approx(0.1, abs=0.04)


@pytest.mark.parametrize("part", ["entropy", "mlm"])
def test_training_lowers_the_loss_that_is_on(
    part: str, learner: Learner, request_of: Callable[..., AuditedRequest]
) -> None:
    request = request_of(0, 1)
    tokens = request.tokens(learner.task)
    sites = learner.adapted.sites
    start = Slot.fresh(sites, Frame.draw(sites, rank=2, seed=1))
    settings = ContrastiveSettings(epochs=4, batch=10, rate=0.01, weight_decay=0.0)
    settings = replace(settings, entropy=part == "entropy", mlm=part == "mlm")
    made = train_encoder(learner.adapted, learner.base, request, tokens, start=start, settings=settings)
    losses = getattr(made, part)
    assert losses[-1] < losses[0] and start.values.abs().sum() < made.slot.values.abs().sum()
    assert request.audit.report()["foreign"] == 0 and set(request.audit.rows) == set(request.used.tolist())
    plain = SharedEncoder(learner.adapted, layers=(1, 2))
    own = SharedEncoder(learner.adapted, layers=(1, 2), factors=made.slot.layout.views(made.slot.values))
    batch = request.batch(tokens, range(6), pad=learner.pad)
    assert (plain.features(batch) - own.features(batch)).abs().max() > 1e-3
