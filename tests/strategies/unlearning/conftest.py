"""A tiny text classifier with a request of some of its rows, and one of built-in digits, trained once for all tests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from lora.config import AdapterConfig
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.class_request import ClassRequest
from strategies.unlearning.classifier import Classifier, fit, image_classifier
from strategies.unlearning.config import FitConfig
from strategies.unlearning.measures import Answers
from strategies.unlearning.stream import sampled
from tasks.config import ModelConfig, TaskConfig
from tasks.examples import Examples
from tasks.images import ImageSplits, builtin_images
from tasks.learner import Learner, build_learner
from tasks.vision import VitConfig
from tests.queries import LABELS, queries


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
    return queries


@pytest.fixture
def request_of(rows: Callable[..., Examples]) -> Callable[..., AuditedRequest]:
    return lambda *labels: AuditedRequest(rows(*labels))


@pytest.fixture
def noise() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


SHAPE = VitConfig(side=12, patch=4, width=32, depth=3, heads=2, inner=64)


@dataclass(frozen=True)
class Toy:
    classifier: Classifier
    splits: ImageSplits

    def request(self, *classes: int, rows: int = 25) -> ClassRequest:
        train, rest = self.splits.train, set(range(10)) - {*classes}
        forget, retain = (train.take(sampled(train, rows, classes=each, seed=0)) for each in (set(classes), rest))
        return ClassRequest(classes, forget, retain)

    def accuracy(self, model: Classifier, *classes: int) -> float:
        return Answers.of(model, self.splits.test).accuracy(classes)


@pytest.fixture(scope="session")
def toy() -> Toy:
    splits = builtin_images(train=800, validation=100, test=300, side=12)
    classifier = image_classifier(SHAPE, classes=10)
    fit(classifier, splits.train, FitConfig(epochs=18, batch=32, rate=3e-3, head_rate=3e-3), seed=0)
    made = Toy(classifier, splits)
    assert made.accuracy(classifier, *range(10)) > 0.8
    assert np.isfinite(classifier.logits(splits.test).numpy()).all()
    return made
