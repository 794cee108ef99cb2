"""The gate: which slots of the bank answer each row of a batch, and how much."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora.errors import ModelError


@dataclass(frozen=True)
class Gate:
    """Weights g_j of the slots for every row: one slot for all, one slot a row, or a mixture a row.

    Exactly one of `slot`, `index [rows]` (int64) and `weights [rows, slots]` is set.
    """

    slot: int | None = None
    index: Tensor | None = None
    weights: Tensor | None = None

    @classmethod
    def one(cls, slot: int) -> "Gate":
        """All rows are answered by one slot, with weight 1."""
        return cls(slot=slot)

    @classmethod
    def rows(cls, index: Tensor) -> "Gate":
        """Row i is answered by slot `index[i]`, with weight 1."""
        return cls(index=index)

    @classmethod
    def mixture(cls, weights: Tensor) -> "Gate":
        """Row i is answered by all slots, weighted by `weights[i]`."""
        return cls(weights=weights)

    def mix(self, bank: Tensor) -> Tensor:
        """Return the vectors that answer: `[size]` for one slot, else `[rows, size]`, from `bank [slots, size]`.

        Raises ModelError for a slot that the bank lacks.
        """
        if self.slot is not None:
            if not 0 <= self.slot < len(bank):
                raise _unknown(str(self.slot), slots=len(bank))
            return bank[self.slot]
        if self.index is not None:
            try:
                return bank.index_select(0, self.index)
            except IndexError as error:
                raise _unknown(f"among {self.index.tolist()}", slots=len(bank)) from error
        if self.weights is None:
            raise ValueError("an empty gate answers nothing; use Gate.one, Gate.rows or Gate.mixture")
        return torch.mm(self.weights.to(bank.dtype), bank)


def _unknown(which: str, *, slots: int) -> ModelError:
    return ModelError(f"slot {which} is not in the bank, which has {slots}; give 0 to {slots - 1}")
