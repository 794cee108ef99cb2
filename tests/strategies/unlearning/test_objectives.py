"""Answers that replace what is to be forgotten."""

import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from lora.errors import DataError
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.objectives import REFUSALS, RandomLabels, Refusals, own_runner_up, runner_up
from tasks.examples import Examples
from tasks.learner import Learner
from tests.queries import fit_head

ROWS = Examples(tuple(f"text {i}" for i in range(600)), tuple(i % 3 for i in range(600)))


def test_random_labels_are_uniform_over_what_is_left() -> None:
    drawn = RandomLabels(range(7), avoid={1, 2})(ROWS, random.Random(0))
    count = Counter(drawn.labels)
    assert drawn.texts == ROWS.texts and set(count) == {0, 3, 4, 5, 6}
    assert all(80 <= each <= 160 for each in count.values())
    again = RandomLabels(range(7), avoid={1, 2})
    assert again(ROWS, random.Random(0)) == drawn and again(ROWS, random.Random(1)) != drawn
    assert set(RandomLabels(range(7))(ROWS, random.Random(0)).labels or ()) == set(range(7))


def test_one_class_is_a_refusal() -> None:
    assert set(RandomLabels([6])(ROWS, random.Random(0)).labels or ()) == {6}


def test_nothing_left_to_answer_is_refused() -> None:
    with pytest.raises(DataError, match=r"all 3 labels are to be forgotten.*leave one out"):
        RandomLabels(range(3), avoid=range(3))(ROWS, random.Random(0))


def test_refusals_keep_the_prompts() -> None:
    asked = Examples(("a", "b", "c") * 40, prompts=("who?", "what?", "why?") * 40)
    refused = Refusals()(asked, random.Random(0))
    assert refused.prompts == asked.prompts and set(refused.texts) <= set(REFUSALS)
    assert len(set(refused.texts)) > 6
    with pytest.raises(DataError, match=r"have none; set data\.prompt"):
        Refusals()(ROWS, random.Random(0))


def test_examples_whose_classes_stay_never_get_their_own_label() -> None:
    drawn = RandomLabels(range(4), avoid={3}, own=True)(ROWS, random.Random(0)).labels or ()
    assert all(new not in (old, 3) for new, old in zip(drawn, ROWS.labels or (), strict=True))
    with pytest.raises(DataError, match="only a row's own label is left"):
        RandomLabels(range(3), avoid={1, 2}, own=True)(ROWS, random.Random(0))


def test_the_next_best_label_of_examples_is_the_best_but_their_own(
    make_learner: Callable[..., Learner], rows: Callable[..., Examples]
) -> None:
    learner, both = make_learner(), rows(2, 3)
    values, request = fit_head(learner, rows(0, 1, 2, 3)), AuditedRequest(both)
    labels = np.asarray(own_runner_up(learner, request, model=values, avoid=[0]).labels)
    alone = [runner_up(learner, AuditedRequest(both), model=values, avoid=[0, own]).labels for own in (2, 3)]
    for row in request.used:
        own = both.labels[row] if both.labels else None
        assert labels[row] == alone[0 if own == 2 else 1][row] and labels[row] not in (own, 0)
    assert (labels[request.held_back] == np.asarray(both.labels)[request.held_back]).all()
    assert request.audit.report()["foreign"] == 0
