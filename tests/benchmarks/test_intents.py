"""The benchmarks of gated forgetting ask the model as training and serving do."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.intents import logits_of
from lora.config import AdapterConfig
from tasks.config import ModelConfig, TaskConfig
from tasks.learner import Learner, build_learner
from tests.queries import LABELS, queries


@pytest.fixture
def learner() -> Learner:
    model = ModelConfig(name="tiny-bert", device="cpu", dtype="float32")
    task = TaskConfig(kind="classification", head_init="random", head="trained")
    return build_learner(model, task, AdapterConfig(rank=2), labels=LABELS, trains_frame=False)


def test_logits_are_those_that_the_model_is_trained_and_served_by(learner: Learner) -> None:
    source = torch.Generator().manual_seed(0)
    # A head with a bias: scaling features then changes more than the length of the logits.
    values = torch.randn(learner.layout.size, generator=source)
    tokens = learner.task.tokenize(queries(0, 1, 2, 3))
    world: Any = SimpleNamespace(learner=learner, model=values, corpus=SimpleNamespace(names=LABELS))
    found = logits_of(world, tokens, np.arange(len(tokens)), None)
    scores = learner.score(values, tokens)
    losses = torch.nn.functional.cross_entropy(found, torch.from_numpy(np.asarray(tokens.labels)))
    assert losses.item() == pytest.approx(scores.loss, rel=1e-5)
    assert found.std(0).min() > 1e-3
