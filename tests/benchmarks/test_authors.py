"""Questions to the small causal model of TOFU's authors: answers in a batch are those of each question alone."""

from dataclasses import replace

import pytest
import torch

from benchmarks import authors
from benchmarks.authors import Training, greedy
from lora.config import AdapterConfig
from strategies.unlearning.detector import Detectors
from strategies.unlearning.gate import ForgettingGate
from strategies.unlearning.o3 import Slot, slot_bank, slot_layout
from strategies.unlearning.private_detector import _joined, _Layer, _statistics
from tasks.config import ModelConfig, TaskConfig
from tasks.learner import Learner, build_learner


@pytest.fixture
def learner() -> Learner:
    config = ModelConfig(name="tiny-llama", device="cpu", dtype="float32")
    return build_learner(config, TaskConfig(kind="causal-lm"), AdapterConfig(rank=2), labels=(), trains_frame=False)


def gate(learner: Learner) -> ForgettingGate:
    """Return one of two slots of random numbers."""
    layout = slot_layout(learner.adapted.sites, rank=2)
    source = torch.Generator().manual_seed(0)
    slots = [Slot(layout, torch.randn(layout.size, generator=source)) for _ in range(2)]
    means = _statistics(torch.tensor([9.0]), torch.ones(1, 4), least=1)
    one = _joined((0,), [_Layer(means, 0.5, 0.1, 0.1)])
    return ForgettingGate(Detectors([one, one]), slot_bank(slots))


def test_answers_in_a_batch_are_those_of_every_question_alone(
    learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authors, "ANSWER", 12)
    prompts = [list(range(5, 5 + length)) for length in (3, 17, 8, 30)]
    mixing, weights = gate(learner), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.5], [0.0, 0.0]])

    def alone(row: int, weights: torch.Tensor | None) -> list[int]:
        own = None if weights is None else weights[row : row + 1]
        return greedy(learner, prompts[row : row + 1], None if own is None else mixing, own, together=1)[0]

    plain = [alone(row, None) for row in range(4)]
    mixed = [alone(row, weights) for row in range(4)]
    assert len(set(map(tuple, plain))) == 4, "answers that are all the same would show nothing"
    assert [one == other for one, other in zip(plain, mixed, strict=True)] == [True, False, False, True]
    assert greedy(learner, prompts, None, None, together=4) == plain
    assert greedy(learner, prompts, mixing, weights, together=4) == mixed
    assert greedy(learner, prompts, mixing, weights, together=3) == mixed


def test_a_model_of_another_shape_has_a_folder_of_its_own() -> None:
    usual = Training()
    others = [replace(usual, width=256), replace(usual, layers=4), replace(usual, batch=16), replace(usual, rate=1e-3)]
    others += [replace(usual, epochs=3), replace(usual, device="cuda")]
    assert usual.key == "20"
    assert len({usual.key, *(each.key for each in others)}) == 7
    assert replace(usual, device="cuda").key == replace(usual, device="cuda:0").key
