"""Per-example clipping and the clipped sum, the only two steps that touch unprotected gradients."""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from lora.errors import PrivacyError

# Rounding of the factor and of its products can add 2^-23 relatively; the shrink takes that off beforehand.
_SHRINK = 1.0 - 2.0**-22
_SMALLEST = float(torch.finfo(torch.float32).tiny)
_BOUNDS = (1e-25, 1e25)


@torch.no_grad()
def clip_factors(blocks: Sequence[Tensor], *, bound: float) -> Tensor:
    """Return the factor `min(1, bound / ||g_i||)` of every example, float32 `[rows]`.

    g_i is row i of all blocks (`[rows, ...]` each) together: one flat clip (Abadi et al. 2016, algorithm 1).

    **Guarantee**: the clipped gradient `factor_i * g_i`, in float32, has a norm of at most `bound * (1 + 1e-6)`,
    whatever the gradient; so adding or removing an example moves the clipped sum by no more than that (and the
    rounding of the sum itself).

    | gradient | factor |
    |---|---|
    | within the bound, zero included | 1 exactly: not touched |
    | beyond the bound | `bound / norm`, less 2.4e-7 of itself |
    | finite, and its square overflows float32 | clipped like any other (norms are float64) |
    | so large that `bound / norm` is below 1.2e-38 | 0: float32 cannot hold the factor |
    | NaN or infinite anywhere | 0, and the row is zeroed in place, since 0 * inf would be NaN |
    | no rows | an empty tensor |

    Raises PrivacyError when the bound is not between 1e-25 and 1e25.
    """
    _check_bound(bound)
    norms = _norms(blocks)
    wrong = ~norms.isfinite()
    if bool(wrong.any()):
        for block in blocks:
            block[wrong.to(block.device)] = 0
    factors = torch.where(norms > bound, (bound * _SHRINK) / norms, 1.0)
    factors[wrong | (factors < _SMALLEST)] = 0
    return factors.float().to(blocks[0].device)


@torch.no_grad()
def add_clipped(total: Tensor, blocks: Sequence[Tensor], *, factors: Tensor, slots: Tensor | None = None) -> None:
    """Add `factors[i] * g_i` to `total` `[P]`, or to row `slots[i]` of `total` `[slots, P]`, in place.

    P is the size of a row of all blocks together, in their order. Rows of one slot that lie side by side are added
    in one product, so a batch sorted by slot is the fast case (2-5 times faster than an index_add_ on a CPU). On a GPU,
    where every product is a launch of its own, this is done for the rows of a single slot only. `slots` is best on
    the CPU, since its values are read.

    Raises ValueError when P and the blocks disagree.
    """
    width = sum(math.prod(block.shape[1:]) for block in blocks)
    if total.shape[-1] != width:
        raise ValueError(f"the total holds {total.shape[-1]} values per slot, the blocks hold {width} per example")
    runs = list(_runs(slots)) if slots is not None else []
    start = 0
    for block in blocks:
        rows = block.flatten(1)
        piece = total[..., start : start + rows.shape[1]]
        start += rows.shape[1]
        if slots is None:
            _add(piece, rows, factors)
        elif _run_by_run(total.device, runs=len(runs)):
            for slot, first, last in runs:
                _add(piece[slot], rows[first:last], factors[first:last])
        else:
            piece.index_add_(0, slots.to(piece.device), rows * factors[:, None])


def _run_by_run(device: torch.device, *, runs: int) -> bool:
    return device.type == "cpu" or runs == 1


def _check_bound(bound: float) -> None:
    low, high = _BOUNDS
    if not low <= bound <= high:
        raise PrivacyError(f"clip={bound} is outside {low} to {high}, where float32 clips exactly; 1.0 is a good start")


def _norms(blocks: Sequence[Tensor]) -> Tensor:
    """Norms over all blocks, float64 `[rows]`: the square of any float32 fits."""
    norms: Tensor = torch.stack([_block_norms(block) for block in blocks]).norm(dim=0)
    return norms


def _block_norms(block: Tensor) -> Tensor:
    # Apple's GPUs have no float64, and float32 could not keep the bound.
    rows = block.flatten(1).cpu() if block.device.type == "mps" else block.flatten(1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms


def _add(total: Tensor, rows: Tensor, factors: Tensor) -> None:
    """Add `factors @ rows`; matrix-vector products stay in full float32 where matrix products may not (TF32)."""
    total.addmv_(rows.T, factors)


def _runs(slots: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (slot, first row, last row + 1) of every stretch of equal slots."""
    first = 0
    for slot, stretch in groupby(slots.tolist()):
        last = first + sum(1 for _ in stretch)
        yield slot, first, last
        first = last
