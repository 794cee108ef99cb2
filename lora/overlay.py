"""Updates with frames of their own on top of a batch's slots: what a request to forget mixes in, row by row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lora.bank import Bank
from lora.errors import ModelError
from lora.gate import Gate


class Overlaying(Protocol):
    """Adds to the outputs of the adapted layers."""

    def add(self, name: str, x: Tensor, y: Tensor, *, scale: float) -> Tensor:
        """Return what site `name` answers for x `[rows, tokens, d_in]`, given y `[rows, tokens, d_out]` so far."""


@dataclass(frozen=True)
class Overlay:
    """Pairs of a row and a slot: pair p adds `weights[p] * s * B_p (A_p x)` to row `rows[p]`.

    `rows` and `weights` are `[pairs]`, `factors` hold A `[pairs, r, d_in]` and B `[pairs, d_out, r]` of the sites that
    the slots adapt; other sites are left alone.

    Guarantee: a row in no pair keeps y bit by bit, since nothing is added to it, not even zero.
    """

    rows: Tensor
    weights: Tensor
    factors: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, slots: Bank, gate: Gate) -> "Overlay | None":
        """Return the pairs of `Gate.mixture(weights [rows, slots])` whose weight is not 0, or None where none is.

        `slots` has A and B of every site in its layout. Raises ModelError for a gate that does not fit the bank.
        """
        weights = gate.weights
        if weights is None or weights.shape[1] != slots.slots:
            raise ModelError(f"an overlay takes Gate.mixture over {slots.slots} slots, one weight a row and slot")
        rows, chosen = weights.nonzero(as_tuple=True)
        if not len(rows):
            return None
        picked = Bank(slots.layout, slots.data.index_select(0, chosen.to(slots.data.device)))
        a, b = picked.views("A"), picked.views("B")
        return cls(rows, weights[rows, chosen], {name: (a[name], b[name]) for name in b})

    def add(self, name: str, x: Tensor, y: Tensor, *, scale: float) -> Tensor:
        """Add the pairs' updates to their rows. Raises ModelError where x has no rows."""
        found = self.factors.get(name)
        if found is None:
            return y
        if x.dim() != 3:
            raise ModelError(
                f"'{name}' saw an input of shape {tuple(x.shape)}, without rows to which a request's slot could be "
                "added; leave it out of adapter.targets"
            )
        a, b = (factor.to(x.device, x.dtype) for factor in found)
        rows = self.rows.to(x.device)
        update = torch.bmm(torch.bmm(x.index_select(0, rows), a.transpose(1, 2)), b.transpose(1, 2))
        shares = (self.weights.to(x.device, x.dtype) * scale).view(-1, 1, 1)
        return y.index_add(0, rows, update * shares)
