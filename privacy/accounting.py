"""What private steps cost: composition and calibration over Google's privacy-loss-distribution accountant."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

from lora.errors import PrivacyError

# One grid for budgets, calibration and reports: figures of different grids cannot be compared at a budget's edge.
# At 5e-4 a typical client's epsilon is within 1e-4 of its limit, and an evaluation costs 0.04 to 0.1 s.
_GRID = 5e-4
_COARSE = 5e-3
_VAGUE = 1000.0
_SMALLEST_DELTA = 1e-10
_LEAST_NOISE = 0.1
_LARGEST_NOISE = 1e4
_TOLERANCE = 1e-3
_GAPS = [2.0**power for power in range(-10, 4)]


@dataclass(frozen=True)
class Event:
    """Steps of the Poisson-subsampled Gaussian mechanism, under adding or removing one example."""

    rate: float
    """Probability with which an example is in a step's lot, in (0, 1]."""
    noise_multiplier: float
    """Standard deviation of the noise over the sensitivity."""
    steps: int
    """How many such steps, each with fresh noise."""

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise PrivacyError(f"rate={self.rate} is no sampling rate; it lies above 0 and at most at 1")
        if not (0 < self.noise_multiplier < math.inf):
            raise PrivacyError(f"noise_multiplier={self.noise_multiplier} protects nobody; it must be positive, finite")
        if self.steps < 1:
            raise PrivacyError(f"an event of steps={self.steps} cannot be charged; charge at least 1 step")


_Merged = tuple[tuple[float, float, int], ...]


def epsilon(events: Iterable[Event], *, delta: float) -> float:
    """Return the epsilon at `delta` of all events together, an upper bound (PLD, Koskela et al. 2020).

    **Guarantee**: whoever is in the data or not, the outputs of all events together are (epsilon, delta)-close;
    equal events merge before they compose, so the figure depends neither on their order nor on how they were split.

    | case | result |
    |---|---|
    | no events | 0 |
    | rate 1 | the Gaussian mechanism itself, composed in closed form |
    | beyond 1000 by a crude bound, or a noise multiplier below 0.1 | that bound, in no time: it is vacuous anyway |
    | delta outside 1e-10 to 1 | PrivacyError: the accountant's arithmetic is not that fine |
    """
    _check_delta(delta)
    return _composed(_merge(events), delta, _GRID)


@lru_cache(maxsize=4096)
def calibrate(*, epsilon: float, delta: float, rate: float, steps: int, beside: tuple[Event, ...] = ()) -> float:
    """Return the smallest noise multiplier (to 1e-3 of itself, never under) that keeps `steps` steps within epsilon.

    Events `beside` are within it too; then epsilon is met to 1e-3. The figure satisfies the `epsilon` of this module
    exactly, so a run that stays within `steps` is never refused. Raises PrivacyError when no noise multiplier up to
    10,000 reaches epsilon.
    """

    def cost(interval: float) -> Callable[[float], float]:
        return lambda noise: _composed(_merge((Event(rate, noise, steps), *beside)), delta, interval)

    Event(rate=rate, noise_multiplier=1.0, steps=steps)
    _check_delta(delta)
    if not 0 < epsilon <= _VAGUE:
        raise PrivacyError(f"epsilon={epsilon} cannot be planned for; it lies above 0 and at most at {_VAGUE:g}")
    guess = _bisect(lambda noise: _limit(rate, noise, steps, delta), epsilon)
    coarse = _search(cost(_COARSE), guess, epsilon, window=_TOLERANCE)
    noise = _search(cost(_GRID), coarse if coarse < math.inf else guess, epsilon, window=_TOLERANCE)
    if noise > _LARGEST_NOISE:
        raise PrivacyError(
            f"epsilon={epsilon} at delta={delta} is out of reach for {steps} steps at rate {rate:.4g}: no noise "
            f"multiplier up to {_LARGEST_NOISE:g} suffices; raise epsilon, or lower training.steps, "
            "federation.rounds or training.batch"
        )
    return noise


def _check_delta(delta: float) -> None:
    if not _SMALLEST_DELTA <= delta < 1:
        raise PrivacyError(f"delta={delta} is outside {_SMALLEST_DELTA} to 1; 1e-5 is common, below 1 / examples")


def _merge(events: Iterable[Event]) -> _Merged:
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        steps[float(event.rate), float(event.noise_multiplier)] += int(event.steps)
    return tuple(sorted((rate, noise, count) for (rate, noise), count in steps.items()))


@lru_cache(maxsize=65_536)
def _composed(merged: _Merged, delta: float, interval: float) -> float:
    if not merged:
        return 0.0
    crude = _crude(merged, delta)
    if crude > _VAGUE or any(noise < _LEAST_NOISE for _, noise, _ in merged):
        return crude
    whole = reduce(lambda left, right: left.compose(right), (_losses(*item, interval) for item in merged))
    return float(whole.get_epsilon_for_delta(delta))


def _losses(rate: float, noise: float, steps: int, interval: float) -> Any:
    """Return the privacy loss distribution of the steps; full lots are one Gaussian with less noise."""
    if rate == 1.0:
        return _single(1.0, noise / math.sqrt(steps), interval)
    return _single(rate, noise, interval).self_compose(steps)


@lru_cache(maxsize=256)
def _single(rate: float, noise: float, interval: float) -> Any:
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(noise, sampling_prob=rate, value_discretization_interval=interval)


def _crude(merged: _Merged, delta: float) -> float:
    """Bound epsilon in closed form, for figures that promise nothing anyway.

    The Renyi divergence of a subsampled Gaussian is at most what joint convexity leaves of the full one:
    `exp((a - 1) D_a) <= 1 + rate * (exp(a (a - 1) / (2 noise^2)) - 1)`, and epsilon is at most the summed D_a plus
    `log(1 / delta) / (a - 1)`, for every order a (Mironov 2017).
    """
    return min((_moment(merged, gap) - math.log(delta)) / gap for gap in _GAPS)


def _moment(merged: _Merged, gap: float) -> float:
    """Bound gap * D of order 1 + gap, over all steps."""
    return sum(steps * _log_mixed(rate, gap * (1 + gap) / 2 / noise**2) for rate, noise, steps in merged)


def _log_mixed(rate: float, exponent: float) -> float:
    """Return log(1 + rate * (exp(exponent) - 1)) without overflow."""
    if exponent > 600:
        return exponent + math.log(rate)
    return math.log1p(rate * math.expm1(exponent))


def _limit(rate: float, noise: float, steps: int, delta: float) -> float:
    """Guess epsilon by the central limit (Bu et al. 2020): a start for the search, never a claim."""
    mean = rate * math.sqrt(steps * math.expm1(min(noise**-2, 700.0)))
    return _bisect(lambda epsilon: _gaussian_delta(epsilon, mean), delta)


def _gaussian_delta(epsilon: float, mean: float) -> float:
    """Return delta(epsilon) of a Gaussian mechanism of sensitivity `mean` and noise 1 (Balle and Wang 2018)."""
    upper, lower = (math.erfc((epsilon / mean + side * mean / 2) / math.sqrt(2)) / 2 for side in (-1, 1))
    return upper - math.exp(min(epsilon, 700.0)) * lower


def _bisect(falling: Callable[[float], float], target: float) -> float:
    """Return, within 1 %, where a falling function passes `target`, between 1e-3 and 1e4."""
    low, high = math.log(1e-3), math.log(_LARGEST_NOISE)
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (middle, high) if falling(math.exp(middle)) > target else (low, middle)
    return math.exp(high)


def _search(cost: Callable[[float], float], guess: float, target: float, *, window: float) -> float:
    """Find noise whose cost lies within `window` (relatively) under `target`: secants in logarithms, kept in a bracket.

    Costs fall with noise at least as 1 / noise, so the noise is within `window` of the smallest. Infinite when no
    noise up to the largest is enough.
    """
    aim = math.log(target * (1 - window / 2))
    trail = _Trail()
    x = math.log(guess)
    while x <= math.log(_LARGEST_NOISE) and trail.width > 1e-7:
        found = cost(math.exp(x))
        if target * (1 - window) <= found <= target:
            return math.exp(x)
        x = trail.after(x, math.log(max(found, 1e-9)) - aim)
    # A jump of the cost has no noise inside the window: the safe side of the jump is the answer.
    return math.exp(trail.high) if trail.width <= 1e-7 else math.inf


class _Trail:
    """A search for the zero of a falling, nearly straight function: the last point and the bracket around the zero."""

    def __init__(self) -> None:
        self.low, self.high = -math.inf, math.inf
        self._last: tuple[float, float] | None = None
        self._slope = -2.0

    @property
    def width(self) -> float:
        return self.high - self.low

    def after(self, x: float, y: float) -> float:
        """Take in the value y at x, and return where to look next."""
        if y > 0:
            self.low = max(self.low, x)
        else:
            self.high = min(self.high, x)
        if self._last is not None and abs(self._last[0] - x) > 1e-12:
            self._slope = min((y - self._last[1]) / (x - self._last[0]), -0.5)
        self._last = (x, y)
        step = x - min(max(y, -3.0), 3.0) / self._slope
        return step if self.low < step < self.high else (self.low + self.high) / 2
