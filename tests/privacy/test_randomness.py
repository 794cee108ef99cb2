"""Laws of the two sources of noise and lots."""

import copy
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lora.errors import PrivacyError
from privacy.randomness import Randomness, SecureRandomness, SeededRandomness

SIZE = 200_000


@pytest.mark.parametrize("source", [SecureRandomness(), SeededRandomness(7)], ids=["secure", "seeded"])
def test_gaussian_law(source: Randomness) -> None:
    drawn = source.gaussian(SIZE).double().numpy()
    # Six standard deviations of each statistic: one false alarm in about 10^8 runs.
    assert abs(drawn.mean()) < 6 / SIZE**0.5
    assert abs(drawn.var() - 1) < 6 * (2 / SIZE) ** 0.5
    assert abs((drawn**4).mean() - 3) < 6 * (96 / SIZE) ** 0.5
    assert stats.kstest(drawn, "norm").pvalue > 1e-7
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 6 / SIZE**0.5
    halves = drawn[: SIZE // 2], drawn[SIZE // 2 :]
    assert abs(np.corrcoef(*halves)[0, 1]) < 6 / (SIZE // 2) ** 0.5


def test_the_two_halves_of_a_box_muller_pair_are_independent() -> None:
    radius, angle_part = SeededRandomness(3).gaussian(2 * 16_384).double().view(2, -1)
    assert abs(np.corrcoef(radius**2, angle_part**2)[0, 1]) < 6 / 16_384**0.5


def test_calls_do_not_repeat_or_correlate() -> None:
    first, second = (SecureRandomness().gaussian(SIZE).double() for _ in range(2))
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 6 / SIZE**0.5


def test_copies_forks_and_pickles_of_the_secure_source_draw_afresh() -> None:
    source = SecureRandomness()
    copies = [copy.deepcopy(source), pickle.loads(pickle.dumps(source))]
    here = source.gaussian(16)
    assert all(not torch.equal(here, other.gaussian(16)) for other in copies)

    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, source.lot(256, rate=0.5).tobytes())
        os._exit(0)
    os.wait()
    forked = os.read(reader, 1 << 16)
    assert forked != source.lot(256, rate=0.5).tobytes()


def test_the_secure_source_refuses_a_seed_and_ignores_global_ones() -> None:
    with pytest.raises(PrivacyError, match=r"seed=42.*test_seed"):
        SecureRandomness(42)
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        drawn.append(SecureRandomness().gaussian(8))
    assert not torch.equal(*drawn)
    assert SecureRandomness().secure and not SeededRandomness(0).secure


def test_a_seed_repeats_and_a_path_separates() -> None:
    assert torch.equal(SeededRandomness(1, "a", 2).gaussian(9), SeededRandomness(1, "a", 2).gaussian(9))
    paths: list[tuple[int, tuple[int | str, ...]]] = [
        (1, ()),
        (2, ()),
        (1, ("a",)),
        (1, ("b",)),
        (1, ("a", 1)),
        (1, ("a1",)),
    ]
    draws = [SeededRandomness(seed, *path).gaussian(9) for seed, path in paths]
    assert len({tuple(each.tolist()) for each in draws}) == len(draws)


@given(size=st.integers(0, 70_000))
def test_gaussian_has_the_asked_shape_and_is_finite(size: int) -> None:
    drawn = SeededRandomness(size).gaussian(size)
    assert drawn.shape == (size,) and drawn.dtype == torch.float32 and bool(drawn.isfinite().all())


def test_the_least_uniform_gives_a_finite_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    for byte in (b"\x00", b"\xff"):
        monkeypatch.setattr("privacy.randomness.os.urandom", lambda count, byte=byte: byte * count)
        drawn = SecureRandomness().gaussian(4)
        assert bool(drawn.isfinite().all()) and float(drawn.abs().max()) < 8.6


@given(population=st.integers(0, 3000), rate=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_a_lot_is_sorted_and_without_repeats(population: int, rate: float, seed: int) -> None:
    lot = SeededRandomness(seed).lot(population, rate=rate)
    assert lot.dtype == np.int64 and np.all(np.diff(lot) > 0)
    assert len(lot) == 0 or (lot[0] >= 0 and lot[-1] < population)
    if rate in (0.0, 1.0):
        assert len(lot) == population * rate


def test_lots_are_poisson_samples() -> None:
    rate, rounds, population = 0.07, 4000, 60
    source = SecureRandomness()
    member = np.zeros((rounds, population))
    for row in member:
        row[source.lot(population, rate=rate)] = 1
    # Each example is in with `rate`, sizes are binomial, and two examples are independent.
    deviation = (rate * (1 - rate) / rounds) ** 0.5
    assert np.abs(member.mean(0) - rate).max() < 6 * deviation
    sizes = np.bincount(member.sum(1).astype(int), minlength=population + 1)[:12]
    expected = stats.binom.pmf(np.arange(12), population, rate) * rounds
    assert stats.chisquare([*sizes, rounds - sizes.sum()], [*expected, rounds - expected.sum()]).pvalue > 1e-7
    pairs = np.asarray(np.corrcoef(member.T))[np.triu_indices(population, 1)]
    assert np.abs(pairs).max() < 7 / rounds**0.5


@pytest.mark.parametrize(("population", "rate"), [(5, -0.1), (5, 1.1), (5, float("nan")), (-1, 0.5)])
def test_a_wrong_rate_or_population_is_refused(population: int, rate: float) -> None:
    with pytest.raises(PrivacyError, match="between 0 and 1"):
        SecureRandomness().lot(population, rate=rate)
