"""Composition against other accountants, and calibration against composition."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis import rdp as opacus_rdp
from opacus.accountants.prv import PRVAccountant

from lora.errors import PrivacyError
from privacy import accounting
from privacy.accounting import Event, calibrate, epsilon

# (rate, noise multiplier, steps, delta) -> dp-accounting's PLD at its default, finer grid.
GOLDEN = [
    ((0.01, 1.0, 1000, 1e-5), 1.828),
    ((1024 / 67349, 0.65, 198, 7.4e-6), 4.806),
    ((32 / 2000, 1.1, 500, 1e-5), 1.800),
    ((0.1, 1.0, 50, 1e-3), 3.314),
    ((1.0, 5.0, 50, 1e-5), 6.573),
]
ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))

events = st.builds(
    Event,
    rate=st.sampled_from([0.01, 0.05, 0.2, 1.0]),
    noise_multiplier=st.sampled_from([0.9, 1.3, 4.0]),
    steps=st.integers(1, 40),
)


def renyi(event: Event, delta: float) -> float:
    spent = opacus_rdp.compute_rdp(
        q=event.rate, noise_multiplier=event.noise_multiplier, steps=event.steps, orders=ORDERS
    )
    return float(opacus_rdp.get_privacy_spent(orders=ORDERS, rdp=spent, delta=delta)[0])


@pytest.mark.parametrize(("case", "golden"), GOLDEN)
def test_epsilon_equals_the_published_tables(case: tuple[float, float, int, float], golden: float) -> None:
    rate, noise, steps, delta = case
    event = Event(rate, noise, steps)
    found = epsilon([event], delta=delta)
    assert found == pytest.approx(golden, abs=0.005)
    assert found <= renyi(event, delta)


@pytest.mark.parametrize(("case", "golden"), GOLDEN[:4])
def test_epsilon_agrees_with_the_prv_accountant(case: tuple[float, float, int, float], golden: float) -> None:
    rate, noise, steps, delta = case
    accountant = PRVAccountant()
    accountant.history = [(noise, rate, steps)]
    assert epsilon([Event(rate, noise, steps)], delta=delta) == pytest.approx(
        accountant.get_epsilon(delta, eps_error=0.01), abs=0.02
    )


@given(st.lists(events, min_size=1, max_size=4), st.randoms())
@settings(max_examples=15)
def test_order_and_splitting_do_not_matter_and_more_costs_more(history: list[Event], random: object) -> None:
    whole = epsilon(history, delta=1e-5)
    assert epsilon(reversed(history), delta=1e-5) == whole
    single = [Event(each.rate, each.noise_multiplier, 1) for each in history for _ in range(each.steps)]
    random.shuffle(single)  # type: ignore[attr-defined]
    assert epsilon(single, delta=1e-5) == whole
    assert epsilon(history[1:], delta=1e-5) <= whole
    assert epsilon(history, delta=1e-4) <= whole
    assert epsilon([*history, history[0]], delta=1e-5) > whole


@given(events)
@settings(max_examples=15)
def test_epsilon_is_never_above_the_renyi_accountant(event: Event) -> None:
    assert epsilon([event], delta=1e-5) <= renyi(event, 1e-5) * (1 + 1e-6)


@pytest.mark.parametrize("event", [Event(0.02, 0.4, 300), Event(0.5, 0.35, 200), Event(0.01, 0.06, 40)])
def test_beyond_the_vague_the_figure_is_still_an_upper_bound(event: Event) -> None:
    merged = ((event.rate, event.noise_multiplier, event.steps),)
    assert accounting._crude(merged, 1e-5) >= accounting._composed(merged, 1e-5, 5e-3)
    # Opacus sums the Renyi divergences of whole orders exactly.
    exact = opacus_rdp.compute_rdp(q=event.rate, noise_multiplier=event.noise_multiplier, steps=1, orders=[2, 3, 5, 9])
    for order, divergence in zip([2, 3, 5, 9], exact, strict=True):
        exponent = order * (order - 1) / 2 / event.noise_multiplier**2
        assert divergence <= accounting._log_mixed(event.rate, exponent) / (order - 1) * (1 + 1e-9)


def test_absurdly_little_noise_is_counted_at_once_and_grows() -> None:
    costs = [epsilon([Event(0.3, 1e-4, steps)], delta=1e-5) for steps in (1, 2, 50)]
    assert 1000 < costs[0] < costs[1] < costs[2] < math.inf


def test_nothing_costs_nothing() -> None:
    assert epsilon([], delta=1e-5) == 0.0


@pytest.mark.parametrize(
    ("target", "rate", "steps"), [(1.0, 0.02, 60), (8.0, 0.1, 200), (3.0, 0.3, 50), (2.0, 1.0, 20)]
)
def test_calibration_is_never_under_and_hardly_over(target: float, rate: float, steps: int) -> None:
    noise = calibrate(epsilon=target, delta=1e-5, rate=rate, steps=steps)
    assert epsilon([Event(rate, noise, steps)], delta=1e-5) <= target
    assert epsilon([Event(rate, noise * (1 - 2e-3), steps)], delta=1e-5) > target


@given(
    target=st.floats(0.3, 20),
    rate=st.floats(0.005, 1.0),
    steps=st.integers(1, 400),
    delta=st.sampled_from([1e-7, 1e-5, 1e-3]),
)
@settings(max_examples=12)
def test_calibration_meets_any_reachable_target(target: float, rate: float, steps: int, delta: float) -> None:
    noise = calibrate(epsilon=target, delta=delta, rate=rate, steps=steps)
    assert target * 0.99 <= epsilon([Event(rate, noise, steps)], delta=delta) <= target


@pytest.mark.parametrize("noise", [1.5, 4.0])
def test_calibration_leaves_room_for_what_stands_beside_it(noise: float) -> None:
    beside = (Event(rate=1.0, noise_multiplier=noise, steps=2),)
    found = calibrate(epsilon=6.0, delta=1e-5, rate=0.1, steps=60, beside=beside)
    assert 0.99 * 6.0 <= epsilon([Event(0.1, found, 60), *beside], delta=1e-5) <= 6.0
    assert found > calibrate(epsilon=6.0, delta=1e-5, rate=0.1, steps=60)


def test_no_noise_makes_room_where_what_stands_beside_it_costs_too_much() -> None:
    with pytest.raises(PrivacyError, match="out of reach"):
        calibrate(epsilon=1.0, delta=1e-5, rate=0.1, steps=60, beside=(Event(1.0, 1.0, 1),))


@pytest.mark.parametrize(
    ("case", "golden"), [((1.0, 32 / 2000), 1.575), ((3.0, 32 / 2000), 0.873), ((8.0, 128 / 2000), 1.124)]
)
def test_calibration_equals_the_published_table(case: tuple[float, float], golden: float) -> None:
    target, rate = case
    assert calibrate(epsilon=target, delta=1e-5, rate=rate, steps=500) == pytest.approx(golden, abs=0.003)


def test_an_unreachable_epsilon_is_named_with_the_remedy() -> None:
    with pytest.raises(PrivacyError, match=r"epsilon=0.0001 .*500 steps at rate 0.3.*raise epsilon, or lower training"):
        calibrate(epsilon=1e-4, delta=1e-5, rate=0.3, steps=500)


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf, 1001.0])
def test_an_epsilon_that_means_nothing_is_refused(target: float) -> None:
    with pytest.raises(PrivacyError, match="epsilon="):
        calibrate(epsilon=target, delta=1e-5, rate=0.3, steps=5)


@pytest.mark.parametrize("delta", [0.0, 1e-12, 1.0, math.nan])
def test_a_delta_beyond_the_arithmetic_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="delta="):
        epsilon([Event(0.1, 1.0, 1)], delta=delta)


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "named"),
    [(0.0, 1.0, 1, "rate"), (1.1, 1.0, 1, "rate"), (math.nan, 1.0, 1, "rate"), (0.5, 0.0, 1, "noise_multiplier"),
     (0.5, math.inf, 1, "noise_multiplier"), (0.5, math.nan, 1, "noise_multiplier"), (0.5, 1.0, 0, "steps")],
)  # fmt: skip
def test_an_event_that_is_none_is_refused(rate: float, noise: float, steps: int, named: str) -> None:
    with pytest.raises(PrivacyError, match=named):
        Event(rate, noise, steps)
