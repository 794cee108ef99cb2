"""The Gaussian mechanism on a clipped sum: what is added, and the event that it costs."""

import math
from dataclasses import dataclass

from torch import Tensor

from privacy.accounting import Event
from privacy.randomness import Randomness


@dataclass(frozen=True)
class Mechanism:
    """Gaussian noise on the sum of clipped gradients (Abadi et al. 2016, algorithm 1).

    **Guarantee**: one step is the Gaussian mechanism with noise multiplier `noise_multiplier` on a sum of sensitivity
    `sensitivity`, under adding or removing one example; drawn for a Poisson lot, it costs exactly `event(steps=1)`.

    | case | what holds |
    |---|---|
    | empty lot | the sum is zero, the noise is added and charged all the same |
    | no trained head (`head_clip` None) | the sensitivity is `clip` |
    | trained head | B's and the head are clipped apart; the sensitivity is the root of the sum of squares |
    """

    clip: float
    """Bound on an example's gradient over all B's together."""
    head_clip: float | None
    """Bound of its own for a trained head; None: no head is trained."""
    noise_multiplier: float
    """Standard deviation of the noise over the sensitivity."""

    @property
    def sensitivity(self) -> float:
        """How far one example can move the concatenated clipped sums of B and head."""
        return math.hypot(self.clip, self.head_clip or 0.0)

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on every coordinate of the sum."""
        return self.noise_multiplier * self.sensitivity

    def noise(self, size: int, randomness: Randomness) -> Tensor:
        """Draw N(0, deviation^2), float32 `[size]`; charge the event to the ledger before calling this."""
        return randomness.gaussian(size).mul_(self.deviation)

    def event(self, *, rate: float, steps: int) -> Event:
        """Return what `steps` noisy sums over Poisson lots of this rate cost."""
        return Event(rate=rate, noise_multiplier=self.noise_multiplier, steps=steps)
