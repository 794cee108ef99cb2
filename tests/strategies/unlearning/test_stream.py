"""Streams: requests come in order, leave nothing for later ones, and are measured to the end."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora.errors import DataError
from strategies.unlearning.class_request import ClassRequest, Outcome
from strategies.unlearning.classifier import Classifier
from strategies.unlearning.config import BudgetConfig, GsLoraConfig
from strategies.unlearning.gs_lora import GsLora
from strategies.unlearning.prototypes import Prototypes
from strategies.unlearning.stream import Line, Moment, Report, SampleConfig, requests, run, sampled
from tasks.images import Images

SEQUENCE = ((8, 9), (3,), (5,))
BUDGET = BudgetConfig()


class Cut:
    """Forgets by cutting classes out of the head, and can bring the first request back."""

    name = "cut"

    def __init__(self, *, undo_at: int = 0) -> None:
        self.asked: list[tuple[int, ...]] = []
        self.given: list[Classifier] = []
        self.undo_at = undo_at

    def forget(
        self, classifier: Classifier, request: ClassRequest, budget: BudgetConfig, *, seed: int
    ) -> Outcome[Classifier]:
        self.asked.append(request.classes)
        self.given.append(classifier)
        made = classifier.copied()
        with torch.no_grad():
            made.head.bias[list(request.classes)] -= 1e6
            if len(self.asked) == self.undo_at:
                made.head.bias[list(self.asked[0])] += 1e6
        return Outcome(made, self.name, steps=0, cpu_s=0.0)


def asked(toy: Any, config: SampleConfig | None = None, sequence: Sequence[Any] = SEQUENCE) -> list[ClassRequest]:
    return list(requests(toy.splits.train, sequence, config or SampleConfig(forget=6, replay=4), classes=10))


def test_requests_come_in_order_with_rows_of_what_is_left(toy: Any) -> None:
    made = asked(toy)
    assert [each.classes for each in made] == [(8, 9), (3,), (5,)]
    gone: set[int] = set()
    for each in made:
        assert set(each.earlier) == gone
        gone |= set(each.classes)
        assert set(each.gone) == gone
        labels, counts = np.unique(each.retain.labels, return_counts=True)
        assert set(labels.tolist()) == set(range(10)) - gone and set(counts.tolist()) == {4}
        labels, counts = np.unique(each.forget.labels, return_counts=True)
        assert tuple(labels.tolist()) == each.classes and set(counts.tolist()) == {6}


def test_missing_classes_have_no_replay_row(toy: Any) -> None:
    for each in asked(toy, SampleConfig(missing=(0, 1))):
        assert not np.isin([0, 1], each.retain.labels).any()


def test_prototypes_of_forgotten_classes_are_in_no_later_request(toy: Any) -> None:
    prototypes = Prototypes.of(toy.classifier, toy.splits.train, classes=10)
    made = list(requests(toy.splits.train, SEQUENCE, SampleConfig(), classes=10, prototypes=prototypes))
    known = [set(np.flatnonzero(each.prototypes.known.numpy()).tolist()) for each in made if each.prototypes]
    assert known == [set(range(10)), set(range(8)), set(range(8)) - {3}]


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (((8,), (8, 9)), "class 8, which an earlier one"),
        ((tuple(range(10)),), "leaves no class"),
        (((8,), ()), "no class"),
    ],
)
def test_a_stream_that_cannot_be_is_refused(toy: Any, sequence: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        asked(toy, sequence=sequence)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 6), st.integers(0, 3))
def test_a_sample_has_up_to_so_many_rows_of_every_class_and_fewer_are_the_first_of_more(
    labels: list[int], count: int, seed: int
) -> None:
    rows = Images(np.zeros((len(labels), 1, 1, 1), dtype=np.uint8), np.array(labels))
    chosen = sampled(rows, count, classes=range(4), seed=seed)
    for label in range(5):
        expected = 0 if label == 4 else min(count, labels.count(label))
        assert int(np.sum(rows.labels[chosen] == label)) == expected
    assert set(sampled(rows, count - 1, classes=range(4), seed=seed).tolist()) <= set(chosen.tolist())
    assert sorted(set(chosen.tolist())) == chosen.tolist()


def test_every_request_is_measured_at_every_later_time(toy: Any) -> None:
    method, seen = Cut(), list[Moment]()
    report = run(
        toy.classifier, method, asked(toy), unseen=toy.splits.test, budget=BUDGET, seed=0, on_moment=seen.append
    )
    assert method.asked == [(8, 9), (3,), (5,)] and method.given[0] is toy.classifier
    assert [(line.time, line.request) for line in report.lines] == [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)]
    assert all(line.seen == line.unseen == 0.0 for line in report.lines)
    assert [moment.time for moment in seen] == [1, 2, 3]
    last = report.moments[-1].standing
    remaining = [0, 1, 2, 4, 6, 7]
    cut = report.moments[-1].outcome.model
    assert last.acc_r == pytest.approx(toy.accuracy(cut, *remaining))
    assert last.acc_r_before == pytest.approx(toy.accuracy(toy.classifier, *remaining))
    assert last.acc_f_before == pytest.approx(toy.accuracy(toy.classifier, 5))
    assert (last.acc_f, last.acc_o) == (0.0, 0.0) and math.isnan(last.acc_m)
    assert report.worst_forget_accuracy == 0.0


def test_each_request_starts_where_the_one_before_has_ended(toy: Any) -> None:
    method = Cut()
    run(toy.classifier, method, asked(toy), unseen=toy.splits.test, budget=BUDGET, seed=0)
    cut = [set(np.flatnonzero(given.head.bias.numpy() < -1e5).tolist()) for given in method.given]
    assert cut == [set(), {8, 9}, {8, 9, 3}]


def test_a_request_that_a_later_one_undoes_is_seen_at_the_end(toy: Any) -> None:
    report = run(toy.classifier, Cut(undo_at=3), asked(toy), unseen=toy.splits.test, budget=BUDGET, seed=0)
    first = [line for line in report.lines if line.request == 1]
    assert [line.unseen == 0.0 for line in first] == [True, True, False]
    assert report.worst_forget_accuracy == max(first[-1].seen, first[-1].unseen) > 0.7
    assert report.moments[-1].standing.acc_o > 0.4
    assert report.at_end() == (first[-1], *(line for line in report.lines[-2:]))


def test_a_report_sums_up_its_moments(toy: Any) -> None:
    report = run(toy.classifier, Cut(), asked(toy), unseen=toy.splits.test, budget=BUDGET, seed=0)
    stands = [moment.standing for moment in report.moments]
    assert report.mean_h == pytest.approx(np.mean([each.h for each in stands]))
    assert report.worst_utility_loss == max(each.utility_loss for each in stands)
    assert isinstance(report, Report) and isinstance(report.lines[0], Line)


def test_gs_lora_forgets_a_stream_to_its_end(toy: Any) -> None:
    made = asked(toy, SampleConfig(forget=25, replay=25), sequence=((8, 9), (3,)))
    budget = BudgetConfig(epochs=7, batch=32)
    report = run(toy.classifier, GsLora(GsLoraConfig(rate=4e-3)), made, unseen=toy.splits.test, budget=budget, seed=0)
    assert report.worst_forget_accuracy <= 0.15
    assert report.worst_utility_loss <= 6 and report.mean_h > 0.75
