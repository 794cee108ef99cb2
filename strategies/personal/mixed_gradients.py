"""Gradients of meta-LoRAs out of the gradient of their mixture: one is computed, N are meant."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora.codec import Part
from lora.gradients import ExampleGradients, GradientSink

Weights = Mapping[str, Tensor]
"""Weights `[rows, N]` of the meta-LoRAs by site."""


@dataclass
class MixedExampleGradients(ExampleGradients):
    """Keeps every row's gradients of all N meta-LoRAs as one block and N numbers.

    The mixture is B_u = sum_i w_i B_i over a frozen frame, so dL/dB_i = w_i dL/dB_u, and all N together have the norm
    |w| |dL/dB_u|. Kept are |w| dL/dB_u, `[rows, d_out, r]`, and w / |w|, `[rows, N]`.

    **Guarantee**: with factors from `privacy.clipping.clip_factors(of(parts), bound=C)`, the sum that
    `privacy.clipping.add_clipped` makes of `shares(parts)` moves by at most `C * (1 + 1e-6)` (and the rounding of the
    sum itself) in the norm over all N B's of all sites together, when any row is added or removed, whatever its
    gradient and its weights.

    | row | what it adds |
    |---|---|
    | within the bound | w_i dL/dB_u to every B_i: not touched |
    | beyond the bound | the same, scaled so that the norm over all sites and all i is C |
    | NaN or infinite gradient | nothing |
    | NaN or infinite weights, or all of them zero | nothing to that site; not finite ones: to no site |
    | finite, and its square overflows float32 | clipped like any other |
    | weights that do not sum to one | their norm counts, so the bound holds |
    """

    units: dict[str, Tensor] = field(default_factory=dict)
    """w / |w| by site, `[rows, N]`."""

    def take_mixed(self, name: str, gradient: Tensor, weights: Tensor) -> None:
        """Keep dL/dB_u `[rows, d_out, r]` of one site with the weights `[rows, N]` of its mixture."""
        norms = torch.linalg.vector_norm(weights, dim=1, dtype=torch.float64)
        units = weights / norms[:, None].clamp(min=1e-300)
        # What is not finite is left to the clip, which sees it in the block; here it must not outlive a factor of 0.
        self.units[name] = torch.where(units.isfinite(), units, 0.0).float()
        self.take("B", name, gradient.float() * norms.float()[:, None, None])

    def shares(self, parts: Collection[Part]) -> Iterator[tuple[slice, list[Tensor], Tensor | None]]:
        """Yield every block once for every meta-LoRA, with its share; blocks of no mixture once."""
        for (part, name), place in self.layout.slices.items():
            if part not in parts:
                continue
            if part != "B":
                yield place, [self.blocks[part, name]], None
                continue
            units = self.units[name]
            size = (place.stop - place.start) // units.shape[1]
            for index, unit in enumerate(units.unbind(1)):
                start = place.start + index * size
                yield slice(start, start + size), [self.blocks[part, name]], unit


@dataclass
class MixtureSink:
    """Stands between a mixed model and a sink over the meta-LoRAs' layout: hands on what each B_i's share is."""

    inner: GradientSink
    weights: Weights
    groups: int
    """Groups of neighbouring rows that share their meta-LoRAs: clients in a batch, or 1."""
    parts: Collection[Part] = field(init=False)
    by_row: bool = field(init=False)

    def __post_init__(self) -> None:
        self.parts, self.by_row = self.inner.parts, self.inner.by_row

    def take(self, part: Part, name: str, gradient: Tensor) -> None:
        """Receive a block: of a mixture one gradient a row, `[rows, d_out, r]`; anything else is handed on."""
        if part != "B":
            self.inner.take(part, name, gradient)
        elif isinstance(self.inner, MixedExampleGradients):
            self.inner.take_mixed(name, gradient, self.weights[name])
        else:
            self.inner.take(part, name, self._spread(gradient, self.weights[name]))

    def _spread(self, gradient: Tensor, weights: Tensor) -> Tensor:
        """Return `[groups, N, d_out, r]`, summed over the rows of a group (or `[rows, N, d_out, r]`)."""
        groups = len(gradient) if self.by_row else self.groups
        rows = gradient.float().view(groups, -1, gradient[0].numel())
        shares = weights.view(groups, -1, weights.shape[1]).transpose(1, 2)
        return torch.bmm(shares, rows).view(groups, weights.shape[1], *gradient.shape[1:])


def mixed(views: Mapping[tuple[Part, str], Tensor], weights: Weights) -> dict[tuple[Part, str], Tensor]:
    """Mix the B's `[N, d_out, r]` for rows, or `[groups, N, d_out, r]` for rows in groups: `[rows, d_out, r]`."""
    found = dict(views)
    for (part, name), view in views.items():
        if part == "B":
            groups = view if view.dim() == 4 else view[None]
            rows = weights[name].view(len(groups), -1, groups.shape[1])
            found[part, name] = torch.bmm(rows, groups.flatten(2)).view(-1, *groups.shape[2:])
    return found
