"""The mirrored-CDF weight at the values worked out from O3's released code."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from strategies.unlearning.weight import MirroredCdf

FAR = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 6.0], dtype=torch.float64)
EXPECTED = [0.9997, 0.985, 0.764, 0.340, 0.176, 0.122, 0.119]


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_it_has_the_known_values(side: float) -> None:
    weight = MirroredCdf(used=4.0, held_back=4.0, spread=0.5)
    assert weight(4.0 + side * FAR * 0.5).tolist() == pytest.approx(EXPECTED, abs=6e-4)


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.1, 3), st.floats(-10, 10))
def test_it_is_what_scipy_says_and_the_same_on_both_sides(used: float, held: float, spread: float, d: float) -> None:
    weight = MirroredCdf(used, held, spread)
    cdf = lambda x: (norm.cdf(x, used, spread) + norm.cdf(x, held, spread)) / 2  # noqa: E731
    mirror = used + held - d
    c = 1 - max(cdf(d), cdf(mirror)) + min(cdf(d), cdf(mirror))
    expected = 1 / (1 + torch.exp(torch.tensor(-(10 * c - 2), dtype=torch.float64)))
    found = weight(torch.tensor([d, mirror], dtype=torch.float64))
    assert found.tolist() == pytest.approx([float(expected)] * 2, abs=1e-9)
    assert found.min() >= 0.1192


def test_one_sided_gives_the_nearest_inputs_full_weight() -> None:
    weight = MirroredCdf(used=1.0, held_back=1.2, spread=0.1)
    near, far = torch.tensor([0.0, 0.5, 1.1]), torch.tensor([1.2, 1.5, 2.0])
    assert (weight(near, one_sided=True) > 0.999).all() and weight(near)[0] < 0.12
    torch.testing.assert_close(weight(far, one_sided=True), weight(far))


def test_it_is_read_off_the_distances() -> None:
    weight = MirroredCdf.of(torch.tensor([1.0, 3.0]), torch.tensor([4.0, 6.0]))
    assert (weight.used, weight.held_back, weight.middle) == (2.0, 5.0, 3.5)
    assert weight.spread == pytest.approx(2**0.5)
    assert MirroredCdf.of(torch.tensor([1.0]), torch.tensor([1.0])).spread > 0
