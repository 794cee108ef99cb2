"""One small classifier of built-in digits, trained once for all tests."""

from dataclasses import dataclass

import numpy as np
import pytest

from strategies.unlearning.classifier import Classifier, fit, image_classifier
from strategies.unlearning.config import FitConfig
from strategies.unlearning.measures import Answers
from strategies.unlearning.requests import ForgetRequest
from strategies.unlearning.stream import sampled
from tasks.images import ImageSplits, builtin_images
from tasks.vision import VitConfig

SHAPE = VitConfig(side=12, patch=4, width=32, depth=3, heads=2, inner=64)


@dataclass(frozen=True)
class Toy:
    classifier: Classifier
    splits: ImageSplits

    def request(self, *classes: int, rows: int = 25) -> ForgetRequest:
        train, rest = self.splits.train, set(range(10)) - {*classes}
        forget, retain = (train.take(sampled(train, rows, classes=each, seed=0)) for each in (set(classes), rest))
        return ForgetRequest(classes, forget, retain)

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
