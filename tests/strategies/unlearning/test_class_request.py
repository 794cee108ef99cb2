"""Requests that contradict themselves are refused with what to do."""

from collections.abc import Callable
from typing import Any

import pytest

from lora.errors import DataError
from strategies.unlearning.class_request import ClassRequest, Tracing
from strategies.unlearning.config import BudgetConfig


def rows(toy: Any, *classes: int) -> Any:
    train = toy.splits.train
    return train.take([i for i, label in enumerate(train.labels) if label in classes][:20])


BAD: dict[str, Callable[[Any], ClassRequest]] = {
    "names no class": lambda toy: ClassRequest((), rows(toy, 1), rows(toy, 2)),
    "no row of the classes": lambda toy: ClassRequest((1,), rows(toy), rows(toy, 2)),
    "nothing would stay": lambda toy: ClassRequest((1,), rows(toy, 1), rows(toy)),
    "does not name": lambda toy: ClassRequest((1,), rows(toy, 1, 3), rows(toy, 2)),
    "is to be forgotten": lambda toy: ClassRequest((1,), rows(toy, 1), rows(toy, 1, 2)),
    "holds rows of class 3": lambda toy: ClassRequest((1,), rows(toy, 1), rows(toy, 2, 3), earlier=(3,)),
    "class 1 was forgotten by an earlier": lambda toy: ClassRequest((1,), rows(toy, 1), rows(toy, 2), earlier=(1,)),
}


@pytest.mark.parametrize("message", BAD)
def test_a_request_that_contradicts_itself_is_refused(toy: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        BAD[message](toy)


def test_a_class_that_the_classifier_lacks_is_named(toy: Any) -> None:
    request = ClassRequest((9, 12), rows(toy, 9), rows(toy, 2))
    request.check(13)
    with pytest.raises(DataError, match="class 12 is not among the classifier's 10"):
        request.check(10)


def test_steps_are_passes_over_the_replay_sample(toy: Any) -> None:
    request = ClassRequest((1,), rows(toy, 1), rows(toy, 2, 3))
    assert len(request.retain) == 20
    assert request.steps(BudgetConfig(epochs=3, batch=8)) == 9


def test_a_trace_has_the_mean_of_every_pass() -> None:
    traced = Tracing(2)
    assert [traced.add(loss=value) for value in (1.0, 3.0, 5.0)] == [False, True, False]
    assert traced.trace == [{"loss": 2.0}]
