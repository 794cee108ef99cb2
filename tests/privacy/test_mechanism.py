"""Scale and cost of the Gaussian mechanism."""

import math

import pytest
import torch
from scipy import stats

from privacy.accounting import Event
from privacy.mechanism import Mechanism
from privacy.randomness import SecureRandomness, SeededRandomness


@pytest.mark.parametrize(("clip", "head_clip", "sensitivity"), [(2.0, None, 2.0), (3.0, 4.0, 5.0), (0.5, 1.2, 1.3)])
def test_sensitivity_is_the_root_of_sums(clip: float, head_clip: float | None, sensitivity: float) -> None:
    mechanism = Mechanism(clip, head_clip, noise_multiplier=1.5)
    assert mechanism.sensitivity == pytest.approx(sensitivity)
    assert mechanism.deviation == pytest.approx(1.5 * sensitivity)


def test_noise_has_the_stated_law() -> None:
    mechanism = Mechanism(0.3, 0.4, noise_multiplier=1.7)
    drawn = mechanism.noise(100_000, SecureRandomness()).double().numpy()
    assert stats.kstest(drawn, "norm", args=(0, 1.7 * 0.5)).pvalue > 1e-7
    assert drawn.var() == pytest.approx((1.7 * 0.5) ** 2, rel=6 * math.sqrt(2 / 100_000))


def test_steps_share_no_noise() -> None:
    mechanism = Mechanism(1.0, None, noise_multiplier=1.0)
    steps = torch.stack([mechanism.noise(50_000, SecureRandomness()) for _ in range(4)]).double()
    correlation = torch.corrcoef(steps) - torch.eye(4)
    assert float(correlation.abs().max()) < 6 / 50_000**0.5


def test_noise_scales_the_source() -> None:
    mechanism = Mechanism(2.0, None, noise_multiplier=0.5)
    assert torch.equal(mechanism.noise(100, SeededRandomness(1)), SeededRandomness(1).gaussian(100))


def test_event_names_the_noise_that_is_drawn() -> None:
    assert Mechanism(1.0, 1.0, 1.1).event(rate=0.25, steps=3) == Event(0.25, 1.1, 3)
