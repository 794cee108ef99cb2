"""The bank: many small adapters over one frame, one contiguous row each."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.codec import Layout, Part
from lora.gate import Gate


@dataclass(frozen=True)
class Bank:
    """Slots `data [slots, layout.size]`, float32; slot j holds the B's (and what else the layout names) of one owner.

    One row a slot makes gathering a user, averaging clients and writing a checkpoint one operation each.
    """

    layout: Layout
    data: Tensor

    @classmethod
    def of(cls, layout: Layout, start: Tensor, *, slots: int) -> "Bank":
        """Return a bank whose slots are all copies of `start [size]`."""
        return cls(layout, start.repeat(slots, 1))

    @property
    def slots(self) -> int:
        """Number of slots."""
        return self.data.shape[0]

    def views(self, part: Part) -> dict[str, Tensor]:
        """Return a part's blocks as views, such as B of a site: `[slots, d_out, r]`."""
        return {name: view for (kind, name), view in self.layout.views(self.data).items() if kind == part}

    def mix(self, gate: Gate) -> Tensor:
        """Return the vectors that answer a batch, see `Gate.mix`."""
        return gate.mix(self.data)

    def mean(self, weights: Sequence[float] | None = None) -> Tensor:
        """Average the slots, `[size]`; exact because A is shared: mean(B_k) A == mean(B_k A)."""
        shares = torch.full((self.slots,), 1.0 / self.slots, dtype=torch.float64)
        if weights is not None:
            shares = torch.tensor(weights, dtype=torch.float64)
            shares = shares / shares.sum()
        return torch.mv(self.data.double().T, shares.to(self.data.device)).float()
