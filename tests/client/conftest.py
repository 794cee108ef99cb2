"""Jobs of three clients with a tiny model and a few built-in sentences, made in milliseconds."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from client.job import ClientJob
from tasks.tokens import Tokens
from tests.sections import Sections, merge

SMALL: Sections = {
    "model": {"name": "tiny-bert"},
    "data": {"max_train": 42, "max_eval": 12},
    "adapter": {"rank": 4},
    "federation": {"clients": 3, "rounds": 2},
    "training": {"steps": 2, "batch": 6},
}
CAUSAL: Sections = {"model": {"name": "tiny-llama"}, "task": {"kind": "causal-lm"}}


@pytest.fixture
def sections() -> Callable[..., Sections]:
    """Make the sections of a small job, with changes; `causal=True` for a language model."""

    def make(*, causal: bool = False, **changes: Any) -> Sections:
        return merge(merge(SMALL, CAUSAL) if causal else SMALL, changes)

    return make


@pytest.fixture
def make_job(sections: Callable[..., Sections]) -> Callable[..., ClientJob]:
    """Make a small job, with changes."""
    return lambda **changes: ClientJob.model_validate(sections(**changes))


class Scripted:
    """A source of lots and noise that a test writes down: the same lot in every step, and the same noise (or none)."""

    secure = False

    def __init__(self, lot: list[int], *, noise: Tensor | None = None) -> None:
        self._lot, self._noise = np.asarray(lot, dtype=np.int64), noise

    def gaussian(self, size: int) -> Tensor:
        return torch.zeros(size) if self._noise is None else self._noise[:size].clone()

    def lot(self, population: int, *, rate: float) -> np.ndarray:
        return self._lot


@pytest.fixture
def scripted() -> type[Scripted]:
    return Scripted


@pytest.fixture
def tokens_of() -> Callable[[ClientJob, int], Tokens]:
    return lambda job, index: job.world.client(index)
