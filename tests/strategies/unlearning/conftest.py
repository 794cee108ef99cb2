"""A tiny classifier and a request of some of its rows, made in milliseconds."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lora.config import AdapterConfig
from strategies.unlearning.request import Request
from tasks.config import ModelConfig, TaskConfig
from tasks.examples import Examples
from tasks.learner import Learner, build_learner

LABELS = ("alarm", "music", "weather", "money")
WORDS = {
    0: ("wake me at", "set an alarm for", "ring the bell at"),
    1: ("play a song by", "turn up the music of", "I like the band"),
    2: ("will it rain in", "how warm is", "tell me the weather of"),
    3: ("send cash to", "what do I owe", "pay the bill of"),
}
PLACES = ("noon", "Paris", "my sister", "seven", "the garden", "Rome", "everyone", "tomorrow")


def sentences(label: int) -> list[str]:
    return [f"{start} {place}" for start in WORDS[label] for place in PLACES]


@pytest.fixture
def make_learner() -> Callable[..., Learner]:
    def make(name: str = "tiny-bert", **adapter: Any) -> Learner:
        kind = "causal-lm" if name == "tiny-llama" else "classification"
        return build_learner(
            ModelConfig(name=name, device="cpu"),
            TaskConfig(kind=kind, head_init="random", head="trained"),
            AdapterConfig(rank=2, **adapter),
            labels=() if kind == "causal-lm" else LABELS,
            trains_frame=False,
        )

    return make


@pytest.fixture
def learner(make_learner: Callable[..., Learner]) -> Learner:
    return make_learner()


@pytest.fixture
def rows() -> Callable[..., Examples]:
    def make(*labels: int) -> Examples:
        pairs = [(text, label) for label in labels for text in sentences(label)]
        return Examples(tuple(text for text, _ in pairs), tuple(label for _, label in pairs))

    return make


@pytest.fixture
def request_of(rows: Callable[..., Examples]) -> Callable[..., Request]:
    return lambda *labels: Request(rows(*labels))


@pytest.fixture
def noise() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
