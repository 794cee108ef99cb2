"""Answers that replace what is to be forgotten."""

import random
from collections import Counter

import pytest

from lora.errors import DataError
from strategies.unlearning.objectives import REFUSALS, RandomLabels, Refusals
from tasks.examples import Examples

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
