"""O3's soft weight of a request for an input: a Gaussian CDF mirrored at the middle of the request's distances."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ZETA = 10.0
"""Steepness of the weight (the paper's zeta)."""
SHIFT = 2.0
"""What the released code subtracts inside the sigmoid; the paper does not have it."""


@dataclass(frozen=True)
class MirroredCdf:
    """Weight of a distance d: `sigmoid(zeta c(d) - 2)`, c = 1 at the request's middle and 0 far from it.

    F is the CDF of two equal Gaussians N(`used`, `spread`^2) and N(`held_back`, `spread`^2): the mean distances of the
    rows that made the detector and of those held back, and the spread of the latter; x0 is the middle of the means,
    d' = 2 x0 - d, and c = 1 - |F(d) - F(d')| (2407.10223, Eq. 13, and the released code, whose form this is).

    The weight never falls below sigmoid(-2) = 0.119, and falls on both sides, also where an input is nearer to the
    request than most of its own rows. `one_sided` gives those c = 1.
    """

    used: float
    held_back: float
    spread: float
    zeta: float = ZETA

    @classmethod
    def of(cls, used: Tensor, held_back: Tensor) -> "MirroredCdf":
        """Read the weight off the distances `[n]` of used and of held-back rows."""
        spread = float(held_back.std()) if len(held_back) > 1 else 0.0
        return cls(float(used.mean()), float(held_back.mean()), max(spread, 1e-6))

    @property
    def middle(self) -> float:
        """Distance x0 where the weight is largest."""
        return (self.used + self.held_back) / 2

    def __call__(self, distance: Tensor, *, one_sided: bool = False) -> Tensor:
        """Return the weights of distances of any shape, float64."""
        d = distance.double()
        if one_sided:
            d = d.clamp(min=self.middle)
        closeness = 1 - (self._cdf(d) - self._cdf(2 * self.middle - d)).abs()
        return torch.sigmoid(self.zeta * closeness - SHIFT)

    def _cdf(self, x: Tensor) -> Tensor:
        means = (self.used, self.held_back)
        parts: list[Any] = [torch.special.ndtr((x - mean) / self.spread) for mean in means]
        half: Tensor = (parts[0] + parts[1]) / 2
        return half
