"""The gate: weights, requests beside users in one batch, and detection in the same pass."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lora.bank import Bank
from lora.errors import ModelError
from lora.gate import Gate
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.class_statistics import Shape
from strategies.unlearning.detector import Detector, Detectors, DetectorSettings, fit_detector
from strategies.unlearning.encoder import SharedEncoder
from strategies.unlearning.frames import OrthogonalFrames
from strategies.unlearning.gate import ForgettingGate, GatedLearner, SamePass, SecondLook
from strategies.unlearning.o3 import Slot, slot_bank
from tasks.examples import Examples
from tasks.learner import Learner
from tasks.tokens import Batch


def detector(
    learner: Learner, examples: Examples, *, layers: tuple[int, ...], values: Tensor | None = None
) -> Detector:
    factors = None if values is None else learner.layout.views(values)
    encoder = SharedEncoder(learner.adapted, layers=layers, factors=factors)
    request = AuditedRequest(examples)
    settings = DetectorSettings(shape=Shape(shrinkage=0.5), folds=0)
    return fit_detector(encoder, request, request.tokens(learner.task), settings=settings)


def slots(learner: Learner, count: int, *, sites: slice = slice(None)) -> Bank:
    chosen = learner.adapted.sites[sites]
    frames = OrthogonalFrames(chosen, rank=2, beside=learner.adapted.frame)
    made = [Slot.fresh(chosen, frames.block(index)) for index in range(count)]
    generator = torch.Generator().manual_seed(3)
    for slot in made:
        slot.values[slot.layout.span("B")] = 0.3 * torch.randn(slot.layout.length("B"), generator=generator)
    return slot_bank(made)


def users(learner: Learner, count: int) -> Bank:
    generator = torch.Generator().manual_seed(4)
    return Bank(learner.layout, 0.1 * torch.randn(count, learner.layout.size, generator=generator))


def batch_of(learner: Learner, examples: Examples) -> Batch:
    tokens = learner.task.tokenize(examples)
    return max((batch for _, batch in learner.batches([(tokens, row) for row in range(len(tokens))])), key=len)


@pytest.fixture
def gate(learner: Learner, rows: Callable[..., Examples]) -> ForgettingGate:
    made = Detectors([detector(learner, rows(label), layers=(1, 2)) for label in (2, 3)])
    return ForgettingGate(made, slots(learner, 2))


def test_weights_follow_the_mode(gate: ForgettingGate, learner: Learner, rows: Callable[..., Examples]) -> None:
    features = SharedEncoder(learner.adapted, layers=(1, 2)).features(batch_of(learner, rows(0, 1, 2, 3)))
    distances = gate.detectors.distances(features)
    modes = {
        mode: ForgettingGate(gate.detectors, gate.slots, mode).weights(features) for mode in ("hard", "soft", "cut")
    }
    for place, each in enumerate(gate.detectors.each):
        near = distances[:, place] <= each.threshold
        assert near.any() and not near.all()
        assert torch.equal(modes["hard"][:, place], near.float())
        torch.testing.assert_close(modes["soft"][:, place], each.weight(distances[:, place]).float())
        assert (modes["cut"][~near, place] == 0).all() and (modes["cut"][near, place] > 0.119).all()
    assert modes["soft"].min() >= 0.119
    assert (ForgettingGate(gate.detectors, gate.slots, "always").weights(features) == 1).all()


@pytest.mark.parametrize("weighting", ["hard", "cut"])
def test_a_row_that_no_request_is_near_to_is_answered_bit_by_bit_as_without_gate(
    weighting: str, gate: ForgettingGate, learner: Learner, rows: Callable[..., Examples]
) -> None:
    batch = batch_of(learner, rows(0, 1, 2, 3))
    gate = ForgettingGate(gate.detectors, gate.slots, weighting)  # type: ignore[arg-type]
    encoder = SharedEncoder(learner.adapted, layers=(1, 2))
    bank = users(learner, 5)
    values = bank.mix(Gate.rows(torch.arange(len(batch)) % 5))
    hit = gate.weights(encoder.features(batch)).sum(1) > 0
    assert hit.any() and not hit.all()
    with torch.no_grad():
        without = learner.answers(values, batch).loss
    gated = GatedLearner(learner, encoder, gate).answers(values, batch).loss
    assert torch.equal(gated[~hit], without[~hit])
    assert (gated[hit] != without[hit]).all()


def test_a_hit_loads_its_own_slot_and_no_other(
    gate: ForgettingGate, learner: Learner, rows: Callable[..., Examples]
) -> None:
    batch = batch_of(learner, rows(2))
    features = SharedEncoder(learner.adapted, layers=(1, 2)).features(batch)
    weights = gate.weights(features)
    only = (weights[:, 0] > 0) & (weights[:, 1] == 0)
    assert only.any()
    overlay, alone = gate.overlay(features), ForgettingGate(Detectors(gate.detectors.each[:1]), slots(learner, 1))
    assert overlay is not None
    values = learner.start()
    with torch.no_grad():
        both = learner.answers(values, batch, overlay=overlay).loss
        first = learner.answers(values, batch, overlay=alone.overlay(features)).loss
    torch.testing.assert_close(both[only], first[only], atol=1e-6, rtol=1e-6)


def test_with_the_carried_adapter_any_hit_loads_everything(
    gate: ForgettingGate, learner: Learner, rows: Callable[..., Examples]
) -> None:
    carried = ForgettingGate(gate.detectors, slots(learner, 1))
    assert carried.carried and not gate.carried
    features = SharedEncoder(learner.adapted, layers=(1, 2)).features(batch_of(learner, rows(0, 1, 2, 3)))
    weights = carried.mixture(features).weights
    assert weights is not None
    assert torch.equal(weights[:, 0], gate.weights(features).amax(1))


def test_no_hit_costs_no_overlay(gate: ForgettingGate) -> None:
    far = torch.nn.functional.normalize(-torch.stack([torch.ones(2, 32)] * 3), dim=2)
    strict = Detectors([replace(each, threshold=-1e9) for each in gate.detectors.each])
    assert replace(gate, detectors=strict).overlay(far) is None


@pytest.mark.parametrize("users_count", [0, 3])
def test_detection_in_the_same_pass_answers_as_a_separate_one(
    users_count: int, learner: Learner, rows: Callable[..., Examples]
) -> None:
    upper = slice(len(learner.adapted.sites) // 2, None)
    model = learner.start()
    found = Detectors([detector(learner, rows(label), layers=(1,), values=model) for label in (2, 3)])
    gate = ForgettingGate(found, slots(learner, 2, sites=upper))
    batch = batch_of(learner, rows(0, 1, 2, 3))
    values = model if not users_count else model.repeat(len(batch), 1)
    encoder = SharedEncoder(learner.adapted, layers=(1,), factors=learner.layout.views(model))
    separate = GatedLearner(learner, encoder, gate).answers(values, batch).loss
    same = SamePass(learner, gate)
    calls: list[int] = []
    hook = learner.adapted.base.register_forward_hook(lambda *_: calls.append(1))
    together = same.answers(values, batch).loss
    hook.remove()
    assert len(calls) == 1
    torch.testing.assert_close(together, separate, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        plain = learner.answers(values, batch).loss
    assert (plain != together).any() and (plain == together).any()
    same.close()
    with torch.no_grad():
        assert torch.equal(learner.answers(values, batch).loss, plain)


@pytest.mark.parametrize("users_count", [0, 3])
def test_a_second_look_answers_as_a_separate_pass_and_keeps_all_other_rows_to_the_bit(
    users_count: int, learner: Learner, rows: Callable[..., Examples]
) -> None:
    model = learner.start()
    found = Detectors([detector(learner, rows(label), layers=(1, 2), values=model) for label in (2, 3)])
    gate = ForgettingGate(found, slots(learner, 2))
    batch = batch_of(learner, rows(0, 1, 2, 3))
    values = model if not users_count else model.repeat(len(batch), 1)
    encoder = SharedEncoder(learner.adapted, layers=(1, 2), factors=learner.layout.views(model))
    separate = GatedLearner(learner, encoder, gate).answers(values, batch)
    second = SecondLook(learner, gate)
    passed: list[int] = []
    hook = learner.adapted.base.register_forward_hook(
        lambda module, inputs, output: passed.append(len(output.last_hidden_state))
    )
    looked = second.answers(values, batch)
    hook.remove()
    caught = (gate.weights(encoder.features(batch)) != 0).any(1)
    assert passed[0] == len(batch) and passed[1:] == [int(caught.sum())] and not caught.all()
    torch.testing.assert_close(looked.loss, separate.loss, atol=1e-5, rtol=1e-5)
    assert looked.guess is not None and separate.guess is not None
    assert torch.equal(looked.guess, separate.guess)
    with torch.no_grad():
        plain = learner.answers(values, batch).loss
    assert torch.equal(looked.loss[~caught], plain[~caught])
    assert (looked.loss[caught] != plain[caught]).all()
    second.close()
    with torch.no_grad():
        assert torch.equal(learner.answers(values, batch).loss, plain)


def test_a_second_look_at_nothing_is_one_pass(learner: Learner, rows: Callable[..., Examples]) -> None:
    found = Detectors([replace(detector(learner, rows(2), layers=(2,)), threshold=-1e9)])
    second = SecondLook(learner, ForgettingGate(found, slots(learner, 1)))
    calls: list[int] = []
    hook = learner.adapted.base.register_forward_hook(lambda *_: calls.append(1))
    second.answers(learner.start(), batch_of(learner, rows(0, 2)))
    hook.remove()
    second.close()
    assert len(calls) == 1


def test_what_cannot_work_is_refused(gate: ForgettingGate, learner: Learner, rows: Callable[..., Examples]) -> None:
    with pytest.raises(ModelError, match=r"unlearning\.gate=hrad is unknown; did you mean 'hard'"):
        ForgettingGate(gate.detectors, gate.slots, "hrad")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="2 detectors for 3 slots"):
        ForgettingGate(gate.detectors, slots(learner, 3))
    with pytest.raises(ModelError, match="layers 1 to 1"):
        SamePass(learner, gate)
    embedded = ForgettingGate(Detectors([detector(learner, rows(3), layers=(0,))]), slots(learner, 1))
    with pytest.raises(ModelError, match=r"layers 1 to 2 of an encoder, not layers \[0\]; detect in a separate pass"):
        SecondLook(learner, embedded)
    low = ForgettingGate(Detectors([detector(learner, rows(3), layers=(1,))]), slots(learner, 1))
    with pytest.raises(ModelError, match=r"layer\.0\.attention.*below layer 1.*separate pass"):
        SamePass(learner, low)
