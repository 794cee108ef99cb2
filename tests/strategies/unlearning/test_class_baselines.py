"""Every baseline does what its name says, on the same rows and steps, and leaves the given classifier alone."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, rel_entr, softmax

from lora.errors import ConfigError, DataError
from strategies.unlearning.class_baselines import (
    OBJECTIVES,
    Drawn,
    ElasticWeights,
    GradientAscent,
    GradientDifference,
    NegativePreference,
    RandomLabels,
    Scrub,
    baseline,
)
from strategies.unlearning.classifier import Classifier, gathered
from strategies.unlearning.config import BudgetConfig
from strategies.unlearning.gs_lora import bounded_forgetting
from strategies.unlearning.measures import Answers

BUDGET = BudgetConfig(epochs=5, batch=32)
RATES = {"gradient ascent": 2e-4, "gradient difference": 3e-4, "retrain": 3e-3}
HOLDS = {"gradient ascent": False, "retrain": False}


def rate(name: str) -> float:
    return RATES.get(name, 5e-4)


@pytest.mark.parametrize("name", [*OBJECTIVES, "retrain"])
def test_a_baseline_forgets_on_a_copy(toy: Any, name: str) -> None:
    request = toy.request(8)
    before = {key: value.clone() for key, value in toy.classifier.state().items()}
    made = baseline(name, rate=rate(name)).forget(toy.classifier, request, BUDGET, seed=0)
    assert all(torch.equal(value, before[key]) for key, value in toy.classifier.state().items())
    assert made.method == name and made.steps == request.steps(BUDGET) and made.cpu_s > 0
    assert toy.accuracy(made.model, 8) < toy.accuracy(toy.classifier, 8) - 0.3
    if HOLDS.get(name, True):
        rest = [label for label in range(10) if label != 8]
        # Those without a bound cost the rest much; the ascent alone leaves little of it.
        assert toy.accuracy(made.model, *rest) > 0.5
    assert not any(weight.requires_grad for weight in made.model.parameters())


def test_retraining_starts_from_nothing_and_never_sees_the_class(toy: Any) -> None:
    made = baseline("retrain", rate=3e-3).forget(toy.classifier, toy.request(8), BudgetConfig(epochs=1), seed=4).model
    fresh, trained = toy.classifier.fresh(4).state(), toy.classifier.state()
    for name, value in made.state().items():
        # One pass moves no weight far from where it was drawn, and none of them from the trained classifier's.
        if value.dim() > 1 and value.std() > 0:
            near = float((value - fresh[name]).norm() / value.norm())
            assert near < 0.5 < float((value - trained[name]).norm() / value.norm())
    assert toy.accuracy(made, 8) == 0.0


def drawn(toy: Any, request: Any, *, student: Classifier | None = None, progress: float = 0.0) -> Drawn:
    student = student or toy.classifier
    places = np.array([3, 0, 5])
    return Drawn(
        student, gathered(student, request.forget, places), gathered(student, request.retain, places), progress
    )


def moved(toy: Any) -> Classifier:
    """Return a classifier near the given one."""
    student: Classifier = toy.classifier.copied()
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=source))
    return student


def only(losses: Iterator[torch.Tensor]) -> float:
    (loss,) = list(losses)
    return float(loss)


def parts(toy: Any, request: Any, student: Classifier) -> tuple[Any, Any]:
    """Return the mean losses on the drawn rows to forget and to retain."""
    places = [3, 0, 5]
    asked = (Answers.of(student, rows.take(places)).losses() for rows in (request.forget, request.retain))
    gone, kept = asked
    return gone, kept.mean()


def test_ascent_and_difference_are_those_of_the_formulas(toy: Any) -> None:
    request, student = toy.request(8), moved(toy)
    gone, kept = parts(toy, request, student)
    step = drawn(toy, request, student=student)
    assert only(GradientAscent(toy.classifier, request, 0).losses(step)) == pytest.approx(-gone.mean(), rel=1e-4)
    found = only(GradientDifference(toy.classifier, request, 0).losses(step))
    assert found == pytest.approx(kept - gone.mean(), rel=1e-4)


def test_npo_is_that_of_the_formula(toy: Any) -> None:
    request, student = toy.request(8), moved(toy)
    gone, kept = parts(toy, request, student)
    before = Answers.of(toy.classifier, request.forget.take([3, 0, 5])).losses()
    ratio = np.exp(-gone) / np.exp(-before)
    expected = 2 / 0.1 * np.mean(np.log(1 + ratio**0.1)) + kept
    found = only(NegativePreference(toy.classifier, request, 0).losses(drawn(toy, request, student=student)))
    assert found == pytest.approx(expected, rel=1e-4)


def test_other_labels_are_never_the_requests_own(toy: Any) -> None:
    request = toy.request(8, 9)
    made = RandomLabels(toy.classifier, request, 0)
    assert len(made.labels) == len(request.forget)
    assert set(made.labels.tolist()) <= set(range(8)) and len(set(made.labels.tolist())) > 4
    logits = log_softmax(toy.classifier.logits(request.forget.take([3, 0, 5])).double().numpy(), axis=1)
    _, kept = parts(toy, request, toy.classifier)
    expected = -logits[np.arange(3), made.labels[[3, 0, 5]].numpy()].mean() + kept
    assert only(made.losses(drawn(toy, request))) == pytest.approx(expected, rel=1e-4)


def test_scrub_goes_away_from_the_teacher_first_and_then_stays_near(toy: Any) -> None:
    request, student = toy.request(8), moved(toy)
    made = Scrub(toy.classifier, request, 0)
    away, near = (float(loss) for loss in made.losses(drawn(toy, request, student=student)))

    def divergence(rows: Any) -> float:
        teacher, own = (softmax(m.logits(rows).double().numpy(), axis=1) for m in (toy.classifier, student))
        return float(rel_entr(teacher, own).sum(1).mean())

    _, kept = parts(toy, request, student)
    assert away == pytest.approx(-divergence(request.forget.take([3, 0, 5])), rel=1e-3)
    assert near == pytest.approx(divergence(request.retain.take([3, 0, 5])) + kept, rel=1e-3)
    assert only(made.losses(drawn(toy, request, student=student, progress=0.9))) == pytest.approx(near)


def test_ewc_anchors_by_the_squared_gradient_of_every_row(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ElasticWeights, "rows", 64)
    request = toy.request(8, rows=7)
    student = toy.classifier.copied()
    made = ElasticWeights(student, request, 0)
    rows = toy.classifier.copied().training(dropout=False)
    squares = torch.zeros_like(rows.head.bias)
    for place in range(len(request.retain)):
        one = gathered(rows, request.retain, np.array([place]))
        loss = F.cross_entropy(rows.answer(one.inputs)[1], one.labels)
        squares += torch.autograd.grad(loss, rows.head.bias)[0].square()
    torch.testing.assert_close(made.fisher[-1], squares / len(request.retain), rtol=1e-4, atol=1e-9)
    gone, kept = parts(toy, request, student)
    free = kept + float(bounded_forgetting(torch.from_numpy(gone), made.bound, by_example=True))
    assert only(made.losses(drawn(toy, request, student=student))) == pytest.approx(free, rel=1e-4)
    with torch.no_grad():
        student.head.bias.add_(0.5)
    gone, kept = parts(toy, request, student)
    free = kept + float(bounded_forgetting(torch.from_numpy(gone), made.bound, by_example=True))
    anchor = 0.5 * made.strength * 0.25 * float(made.fisher[-1].sum())
    assert anchor > 0
    assert only(made.losses(drawn(toy, request, student=student))) == pytest.approx(free + anchor, rel=1e-3)


def test_an_unknown_baseline_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'SCRUB'"):
        baseline("SCRUBB")


@pytest.mark.parametrize("name", ["SCRUB", "retrain"])
def test_a_class_that_the_classifier_lacks_is_refused(toy: Any, name: str) -> None:
    request = toy.request(8)
    object.__setattr__(request, "classes", (8, 40))
    with pytest.raises(DataError, match="class 40"):
        baseline(name).forget(toy.classifier, request, BUDGET, seed=0)
