"""GS-LoRA: only the adapter trains, forgetting is bounded, blocks vanish, and merging changes no answer."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.errors import DataError
from strategies.unlearning.classifier import Classifier
from strategies.unlearning.config import BudgetConfig, GsLoraConfig
from strategies.unlearning.gs_lora import GsLora, bounded_forgetting, forget_bound, holding, prototype_loss
from strategies.unlearning.measures import Answers
from strategies.unlearning.prototypes import Prototypes

BUDGET = BudgetConfig(epochs=7, batch=32)
SHORT = BudgetConfig(epochs=2, batch=32)
USUAL = {"rate": 4e-3}


def bits(classifier: Classifier) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in classifier.state().items()}


def config(**changes: Any) -> GsLoraConfig:
    return GsLoraConfig(**{**USUAL, **changes})


@pytest.fixture(scope="module")
def proposal(toy: Any) -> Any:
    return GsLora(config()).propose(toy.classifier, toy.request(8, 9), BUDGET, seed=0)


def test_classes_are_forgotten_and_the_others_stay(toy: Any, proposal: Any) -> None:
    before = [toy.accuracy(toy.classifier, *classes) for classes in ((8, 9), range(8))]
    after = [toy.accuracy(proposal, *classes) for classes in ((8, 9), range(8))]
    assert before[0] > 0.7 and after[0] <= 0.1
    assert after[1] >= before[1] - 0.05


def test_the_given_classifier_and_the_base_keep_their_bits_until_merging(toy: Any) -> None:
    before = bits(toy.classifier)
    made = GsLora(config()).propose(toy.classifier, toy.request(8), SHORT, seed=0)
    assert not made.adapted.base_moved()
    adapted = made.logits(toy.splits.test)
    assert bits(made.discard()) == before == bits(toy.classifier)
    assert not torch.equal(adapted, made.classifier.logits(toy.splits.test))


def test_merging_changes_no_answer_and_the_feed_forward_matrices_alone(toy: Any) -> None:
    made = GsLora(config()).propose(toy.classifier, toy.request(8), SHORT, seed=0)
    adapted, features = made.logits(toy.splits.test), made.features(toy.splits.test)
    merged = made.merge().model
    torch.testing.assert_close(merged.logits(toy.splits.test), adapted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged.features(toy.splits.test), features, rtol=1e-4, atol=1e-4)
    old, new = bits(toy.classifier), bits(merged)
    changed = {name for name in old if old[name] != new[name]}
    assert changed == {f"encoder.layers.{n}.mlp.{fc}.weight" for n in range(3) for fc in ("fc1", "fc2")}


def test_only_factors_of_the_feed_forward_matrices_train(proposal: Any) -> None:
    sizes = {key: tuple(factor.shape) for key, factor in proposal.factors.items()}
    assert len(sizes) == 3 * 2 * 2
    # Each block: A and B of 32 -> 64 and of 64 -> 32, at rank 8.
    assert sum(math.prod(shape) for shape in sizes.values()) == 3 * 2 * 8 * (32 + 64)
    assert not any(weight.requires_grad for weight in proposal.classifier.parameters())
    frame = proposal.adapted.frame.matrices
    moved = [
        name
        for part, name in proposal.factors
        if part == "A" and not torch.equal(frame[name], proposal.factors["A", name])
    ]
    assert len(moved) == 6


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.0, 12.0))
def test_holding_stops_where_all_forgotten_classes_together_are_unlikely_enough(seed: int, bound: float) -> None:
    logits = 4 * torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    together = logits.softmax(1)[:, [1, 3]].sum(1)
    expected = np.maximum(0, bound + np.log(together.numpy())).mean()
    found = holding(logits.requires_grad_(True), torch.tensor([1, 3]), bound)
    np.testing.assert_allclose(found.item(), expected, rtol=1e-9, atol=1e-9)
    (moved,) = torch.autograd.grad(found, logits)
    satisfied = np.log(together.detach().numpy()) < -bound
    assert not moved[torch.from_numpy(satisfied)].any()


def test_what_was_forgotten_earlier_is_less_likely_where_it_is_held(toy: Any) -> None:
    asked = toy.request(8)
    later = replace(toy.request(3), retain=asked.retain.take(np.flatnonzero(asked.retain.labels != 3)), earlier=(8,))
    rows = toy.splits.test
    left = {}
    for weight in (0.0, 1.0):
        method = GsLora(config(hold_weight=weight, sparsity=0.0))
        model = method.forget(toy.classifier, asked, BUDGET, seed=0).model
        model = method.forget(model, later, BUDGET, seed=1).model
        left[weight] = float(model.logits(rows).softmax(1)[:, 8].log().mean())
    assert left[1.0] < left[0.0] - 1


def test_every_request_gets_an_adapter_of_its_own(toy: Any) -> None:
    one, other = (GsLora(config()).propose(toy.classifier, toy.request(8), SHORT, seed=seed) for seed in (0, 1))
    assert one.adapted.frame.digest != other.adapted.frame.digest
    merged = one.merge().model
    second = GsLora(config()).forget(merged, toy.request(7), SHORT, seed=1)
    assert second.steps == toy.request(7).steps(SHORT)


def test_the_bound_is_a_multiple_of_a_guess_and_is_reached(toy: Any, proposal: Any) -> None:
    bound = forget_bound(config(bound=2.0), 10)
    assert bound == pytest.approx(2 * math.log(10))
    trace = proposal.outcome.trace
    assert trace[0]["at_bound"] < 0.5 < trace[-1]["at_bound"]
    losses = Answers.of(proposal, toy.request(8, 9).forget).losses()
    assert bound * 0.8 < np.median(losses) < bound * 3


def test_the_forget_loss_is_that_of_the_formula() -> None:
    losses = torch.tensor([1.0, 4.0, 9.0])
    assert float(bounded_forgetting(losses, 5.0, by_example=True)) == pytest.approx((4 + 1 + 0) / 3)
    assert float(bounded_forgetting(losses, 5.0, by_example=False)) == pytest.approx(5 - 14 / 3)
    assert float(bounded_forgetting(losses, 4.0, by_example=False)) == 0.0


def test_without_a_bound_that_is_reached_the_loss_goes_on_rising(toy: Any) -> None:
    far = GsLora(config(bound=40.0, sparsity=0.0)).propose(toy.classifier, toy.request(8), BUDGET, seed=0)
    near = GsLora(config(bound=2.0, sparsity=0.0)).propose(toy.classifier, toy.request(8), BUDGET, seed=0)
    assert far.outcome.trace[-1]["forget"] > 1.5 * near.outcome.trace[-1]["forget"]


@pytest.mark.parametrize(
    ("changes", "zeros", "selected"),
    [
        ({"sparsity": 0.0}, {0}, {3}),
        ({"sparsity": 3.0, "rate": 8e-3, "wait": 0.0}, {1, 2, 3}, {0, 1, 2}),
        ({"structure": "subgradient", "sparsity": 0.3, "wait": 0.0}, {0}, {1, 2, 3}),
    ],
)
def test_the_proximal_step_alone_makes_blocks_exactly_zero(
    toy: Any, changes: dict[str, Any], zeros: set[int], selected: set[int]
) -> None:
    blocks = GsLora(config(**changes)).propose(toy.classifier, toy.request(8), BUDGET, seed=0).outcome.blocks
    assert blocks is not None
    last = blocks.factors[-1]
    assert sorted(last) == ["layers.0", "layers.1", "layers.2"]
    assert list(last.values()).count(0.0) in zeros and len(blocks.selected) in selected
    assert all(last[name] > 0 for name in blocks.selected)


def test_norms_are_reported_over_time(proposal: Any) -> None:
    blocks = proposal.outcome.blocks
    assert len(blocks.factors) == len(blocks.updates) == BUDGET.epochs + 1 == len(proposal.outcome.trace) + 1
    # A starts above zero, so the group does; the update starts at zero.
    assert all(value > 0 for value in blocks.factors[0].values())
    assert not any(blocks.updates[0].values()) and all(blocks.updates[-1][name] > 0 for name in blocks.selected)


def test_the_group_lasso_shortens_the_update(toy: Any) -> None:
    def update(sparsity: float) -> float:
        made = GsLora(config(sparsity=sparsity)).propose(toy.classifier, toy.request(8), BUDGET, seed=0)
        assert made.outcome.blocks is not None
        return sum(made.outcome.blocks.updates[-1].values())

    assert update(1.0) < 0.9 * update(0.0)


def test_the_group_lasso_waits_for_the_bound(toy: Any) -> None:
    held = GsLora(config(sparsity=20.0, wait=0.0, warmup=0.0)).propose(toy.classifier, toy.request(8), SHORT, seed=0)
    waits = GsLora(config(sparsity=20.0, wait=1.0, warmup=0.0)).propose(toy.classifier, toy.request(8), SHORT, seed=0)
    assert held.outcome.blocks is not None and waits.outcome.blocks is not None
    assert held.outcome.blocks.selected == () and len(waits.outcome.blocks.selected) == 3


@pytest.mark.parametrize(("by", "count"), [("block", 3), ("adapter", 6), ("matrix", 12)])
def test_groups_can_be_smaller_than_blocks(toy: Any, by: str, count: int) -> None:
    made = GsLora(config(group=by)).propose(toy.classifier, toy.request(8), SHORT, seed=0)
    assert made.outcome.blocks is not None and len(made.outcome.blocks.factors[0]) == count


def test_what_does_not_fit_the_classifier_is_refused(toy: Any) -> None:
    request = toy.request(8)
    with pytest.raises(DataError, match="prototypes of the original model"):
        GsLora(config(prototypes=True)).forget(toy.classifier, request, SHORT, seed=0)
    object.__setattr__(request, "classes", (8, 31))
    with pytest.raises(DataError, match="class 31"):
        GsLora(config()).forget(toy.classifier, request, SHORT, seed=0)


def with_prototypes(toy: Any, *classes: int) -> Any:
    request = toy.request(*classes)
    made = Prototypes.of(toy.classifier, toy.splits.train, classes=10)
    object.__setattr__(request, "prototypes", made)
    return request


def test_prototypes_push_forgotten_features_away(toy: Any) -> None:
    request = with_prototypes(toy, 8)
    labels = torch.from_numpy(request.forget.labels)
    far = {}
    for weight in (0.0, 10.0):
        settings = config(prototypes=True, prototype_forget=weight, prototype_retain=0.0, prototype_bound=50.0)
        made = GsLora(settings).propose(toy.classifier, request, BUDGET, seed=0)
        far[weight] = float(request.prototypes.divergence(made.features(request.forget), labels))
    assert far[10.0] > 1.2 * far[0.0]


def test_prototypes_hold_retained_features(toy: Any) -> None:
    request = with_prototypes(toy, 8)
    labels = torch.from_numpy(request.retain.labels)
    far = {}
    for weight in (0.0, 30.0):
        settings = config(prototypes=True, prototype_forget=0.0, prototype_retain=weight, prototype_spread=False)
        made = GsLora(settings).propose(toy.classifier, request, BUDGET, seed=0)
        far[weight] = float(request.prototypes.divergence(made.features(request.retain), labels))
    assert far[30.0] < 0.9 * far[0.0]


def test_the_prototype_loss_is_that_of_the_formula() -> None:
    means = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]])
    prototypes = Prototypes(means, torch.tensor([True, True]), torch.tensor([0.1, 0.2]))
    gone, kept = torch.tensor([[1.0, 0.5, 0.0]]), torch.tensor([[0.0, 0.0, 2.0]])
    labels = torch.tensor([0]), torch.tensor([1])
    settings = config(prototypes=True, prototype_forget=2.0, prototype_retain=3.0, prototype_bound=0.9)
    far, near = prototypes.divergence(gone, labels[0]), prototypes.divergence(kept, labels[1])
    expected = (2 * max(0.0, 0.9 - float(far)) + 3 * max(0.0, float(near) - 0.2)) / prototypes.between()
    assert float(prototype_loss(settings, prototypes, (gone, labels[0]), (kept, labels[1]))) == pytest.approx(expected)
    plain = settings.model_copy(update={"prototype_spread": False, "prototype_bound": None})
    unit = prototypes.between()
    expected = (2 * max(0.0, unit - float(far)) + 3 * float(near)) / unit
    assert float(prototype_loss(plain, prototypes, (gone, labels[0]), (kept, labels[1]))) == pytest.approx(expected)
