"""The privacy section becomes a plan, or an error that says what would fit."""

import pytest

from lora.errors import PrivacyError
from privacy.accounting import Event, epsilon
from privacy.config import PrivacyConfig
from privacy.plan import assumptions, plan_for


def test_epsilon_alone_is_calibrated_for_the_whole_run() -> None:
    plan = plan_for(PrivacyConfig(epsilon=4.0), population=500, lot=25, steps=40, trains_head=False)
    assert (plan.rate, plan.lot, plan.steps, plan.budget) == (0.05, 25.0, 40, 4.0)
    assert 4.0 * 0.998 <= plan.epsilon <= 4.0
    assert plan.mechanism.head_clip is None and plan.mechanism.sensitivity == 1.0


def test_noise_alone_has_no_budget_and_a_cost() -> None:
    plan = plan_for(PrivacyConfig(noise_multiplier=1.5), population=500, lot=25, steps=40, trains_head=False)
    assert plan.budget is None and plan.mechanism.noise_multiplier == 1.5
    assert plan.epsilon == epsilon([Event(0.05, 1.5, 40)], delta=1e-5)
    assert plan.event(5) == Event(0.05, 1.5, 5)


def test_a_trained_head_has_a_bound_of_its_own() -> None:
    config = PrivacyConfig(noise_multiplier=1.0, clip=3.0, head_clip=4.0)
    plan = plan_for(config, population=100, lot=10, steps=1, trains_head=True)
    assert plan.mechanism.sensitivity == 5.0 and plan.mechanism.deviation == 5.0


@pytest.mark.parametrize(("population", "lot", "rate"), [(10, 32, 1.0), (32, 32, 1.0), (1, 1, 1.0), (64, 32, 0.5)])
def test_a_lot_never_exceeds_the_population(population: int, lot: int, rate: float) -> None:
    plan = plan_for(PrivacyConfig(noise_multiplier=2.0), population=population, lot=lot, steps=1, trains_head=False)
    assert plan.rate == rate and plan.lot == min(population, lot)


def test_a_budget_that_the_noise_cannot_keep_is_refused_with_the_noise_that_would() -> None:
    config = PrivacyConfig(epsilon=1.0, noise_multiplier=1.0)
    with pytest.raises(
        PrivacyError, match=r"epsilon that the budget cannot reach.*noise_multiplier=1.*epsilon=1"
    ) as said:
        plan_for(config, population=500, lot=25, steps=40, trains_head=False)
    needed = float(str(said.value).split("noise_multiplier to ")[1].split()[0])
    assert epsilon([Event(0.05, needed, 40)], delta=1e-5) == pytest.approx(1.0, rel=2e-3)


def test_noise_that_keeps_the_budget_is_taken_as_given() -> None:
    config = PrivacyConfig(epsilon=4.0, noise_multiplier=3.0)
    plan = plan_for(config, population=500, lot=25, steps=40, trains_head=False)
    assert plan.mechanism.noise_multiplier == 3.0 and plan.epsilon < 4.0


@pytest.mark.parametrize(("population", "lot"), [(0, 5), (5, 0)])
def test_nobody_to_draw_from_is_an_error(population: int, lot: int) -> None:
    with pytest.raises(PrivacyError, match="at least 1"):
        plan_for(PrivacyConfig(epsilon=4.0), population=population, lot=lot, steps=1, trains_head=False)


def test_no_privacy_has_no_plan() -> None:
    with pytest.raises(PrivacyError, match=r"privacy\.epsilon"):
        plan_for(PrivacyConfig(), population=5, lot=1, steps=1, trains_head=False)


def test_assumptions_name_unit_adjacency_sampling_and_a_test() -> None:
    stated = assumptions(PrivacyConfig(epsilon=1.0, delta=1e-6))
    assert stated["unit"] == "example" and stated["adjacency"] == "add/remove one"
    assert "Poisson" in stated["sampling"] and stated["delta"] == "1e-06" and "server" in stated["adversary"]
    assert not any("no privacy" in words for words in stated.values())
    assert "claims no privacy" in assumptions(PrivacyConfig(epsilon=1.0, test_seed=3))["noise"]


@pytest.mark.parametrize(("share", "fits"), [(1.001, True), (0.999, False)])
def test_the_budget_is_kept_to_the_edge(share: float, fits: bool) -> None:
    cost = epsilon([Event(0.05, 1.5, 40)], delta=1e-5)
    config = PrivacyConfig(epsilon=cost * share, noise_multiplier=1.5)
    if fits:
        assert plan_for(config, population=500, lot=25, steps=40, trains_head=False).epsilon == cost
        return
    with pytest.raises(PrivacyError, match="budget cannot reach"):
        plan_for(config, population=500, lot=25, steps=40, trains_head=False)
