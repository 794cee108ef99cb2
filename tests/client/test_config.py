"""The `training:` section over the rounds."""

import pytest

from client.config import TrainingConfig


def test_rates_stay_unless_decay_is_asked_for() -> None:
    config = TrainingConfig(rate=0.5, head_rate=2.0)
    assert config.at(7, rounds=10) is config


def test_linear_decay_scales_both_rates_and_nothing_else() -> None:
    config = TrainingConfig(rate=0.5, head_rate=2.0, decay="linear", steps=3)
    assert config.at(1, rounds=4) == config
    last = config.at(4, rounds=4)
    assert (last.rate, last.head_rate) == pytest.approx((0.125, 0.5))
    assert last.model_copy(update={"rate": 0.5, "head_rate": 2.0}) == config
    assert TrainingConfig(rate=0.5, decay="linear").at(2, rounds=4).head_rate is None
