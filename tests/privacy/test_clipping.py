"""The sentence that clip_factors guarantees, on neighbouring lots of any gradients."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora.errors import PrivacyError
from privacy.clipping import add_clipped, clip_factors
from privacy.mechanism import Mechanism

SHAPES = [(5, 3), (1,), (7,), (2, 2, 2)]
SCALES = [0.0, 1e-30, 1e-6, 1.0, 1e3, 1e15, 1e30, 3e38]
EXTREMES = [None, float("nan"), float("inf"), -float("inf")]


@st.composite
def lots(draw: st.DrawFn) -> list[Tensor]:
    """Blocks of one to six examples: each of its own scale, some zero, huge or not finite."""
    rows = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    blocks = [torch.rand(rows, *shape, generator=generator) * 2 - 1 for shape in draw(st.permutations(SHAPES))]
    for row in range(rows):
        scale, extreme = draw(st.sampled_from(SCALES)), draw(st.sampled_from(EXTREMES))
        for block in blocks:
            block[row] *= scale
        if extreme is not None:
            blocks[draw(st.integers(0, 3))][row].view(-1)[0] = extreme
    return blocks


bounds = st.sampled_from([1e-25, 1e-8, 1e-3, 0.1, 1.0, 17.3, 1e6, 1e25])


def clipped_sum(blocks: list[Tensor], *, bound: float) -> Tensor:
    blocks = [block.clone() for block in blocks]
    total = torch.zeros(sum(math.prod(block.shape[1:]) for block in blocks))
    add_clipped(total, blocks, factors=clip_factors(blocks, bound=bound))
    return total.double()


def without(blocks: list[Tensor], row: int) -> list[Tensor]:
    return [torch.cat([block[:row], block[row + 1 :]]) for block in blocks]


@given(lots(), bounds)
@settings(max_examples=300)
def test_removing_any_example_moves_the_sum_by_at_most_the_bound(blocks: list[Tensor], bound: float) -> None:
    rows = len(blocks[0])
    whole = clipped_sum(blocks, bound=bound)
    # A float32 sum of n terms of norm <= bound is itself rounded by at most n^2 * 2^-24 * bound.
    rounding = bound * 2 * rows**2 * 2.0**-24
    for row in range(rows):
        moved = float((whole - clipped_sum(without(blocks, row), bound=bound)).norm())
        assert moved <= bound * (1 + 1e-6) + rounding
        alone = clipped_sum([block[row : row + 1] for block in blocks], bound=bound)
        assert float(alone.norm()) <= bound * (1 + 1e-6)


@given(lots(), bounds)
def test_clipped_gradients_are_the_gradients_scaled_to_the_bound(blocks: list[Tensor], bound: float) -> None:
    exact = torch.cat([block.flatten(1) for block in blocks], dim=1).double()
    factors = clip_factors(blocks, bound=bound)
    assert factors.dtype == torch.float32
    for row, factor in zip(exact, factors.double(), strict=True):
        norm = float(row.norm())
        if not math.isfinite(norm) or bound / max(norm, bound) < 1.2e-38:
            assert factor == 0
        elif norm <= bound:
            assert factor == 1
        else:
            assert float(factor) == pytest.approx(bound / norm, rel=4e-7)


@given(lots(), st.integers(0, 2**16))
def test_non_finite_rows_become_zero_and_the_others_stay(blocks: list[Tensor], seed: int) -> None:
    before = [block.clone() for block in blocks]
    finite = torch.stack([block.flatten(1).isfinite().all(1) for block in before]).all(0)
    clip_factors(blocks, bound=1.0)
    for block, old in zip(blocks, before, strict=True):
        assert torch.equal(block[finite], old[finite])
        assert not block[~finite].any()


@given(lots(), st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_slots_receive_the_sums_of_their_own_rows(blocks: list[Tensor], slots: list[int]) -> None:
    rows = len(blocks[0])
    owner = torch.tensor(slots[:rows])
    factors = clip_factors(blocks, bound=2.0)
    total = torch.full((4, sum(block[0].numel() for block in blocks)), 0.5)
    add_clipped(total, blocks, factors=factors, slots=owner)
    for slot in range(4):
        mine = [block[owner == slot] for block in blocks]
        alone = torch.full((total.shape[1],), 0.5)
        add_clipped(alone, mine, factors=factors[owner == slot])
        torch.testing.assert_close(total[slot], alone, rtol=1e-5, atol=1e-6)


def test_slots_on_a_gpu_receive_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """There one index_add_ takes the place of a product for every run of rows."""
    source = torch.Generator().manual_seed(1)
    blocks = [torch.randn(6, *shape, generator=source) for shape in SHAPES]
    slots, factors = torch.tensor([1, 1, 0, 2, 2, 2]), torch.rand(6, generator=source)
    one_by_one, at_once = torch.zeros(2, 3, sum(math.prod(shape) for shape in SHAPES))
    add_clipped(one_by_one, blocks, factors=factors, slots=slots)
    monkeypatch.setattr("privacy.clipping._run_by_run", lambda device, runs: False)
    add_clipped(at_once, blocks, factors=factors, slots=slots)
    torch.testing.assert_close(one_by_one, at_once)
    assert one_by_one.abs().min() > 0


def test_strided_blocks_are_added_like_their_copies() -> None:
    block = torch.randn(6, 4, 9).transpose(1, 2)
    factors = clip_factors([block], bound=1.0)
    totals = torch.zeros(2, 36)
    for total, each in zip(totals, [block, block.contiguous()], strict=True):
        add_clipped(total, [each], factors=factors)
    torch.testing.assert_close(*totals)


def test_no_rows_add_nothing() -> None:
    blocks = [torch.zeros(0, 3, 2), torch.zeros(0, 4)]
    factors = clip_factors(blocks, bound=1.0)
    assert factors.shape == (0,)
    for total, slots in [(torch.ones(10), None), (torch.ones(2, 10), torch.zeros(0, dtype=torch.long))]:
        add_clipped(total, blocks, factors=factors, slots=slots)
        assert torch.equal(total, torch.ones_like(total))


@given(lots(), lots(), bounds, st.sampled_from([0.1, 1.0, 3.0]))
def test_head_and_b_clipped_apart_stay_within_the_root_of_the_sum_of_squares(
    blocks: list[Tensor], head: list[Tensor], bound: float, ratio: float
) -> None:
    rows = min(len(blocks[0]), len(head[0]))
    blocks, head = [block[:rows] for block in blocks], [block[:rows] for block in head]
    mechanism = Mechanism(bound, min(max(bound * ratio, 1e-25), 1e25), noise_multiplier=1.0)

    def released(select: Callable[[list[Tensor]], list[Tensor]]) -> Tensor:
        assert mechanism.head_clip is not None
        parts = (
            clipped_sum(select(blocks), bound=mechanism.clip),
            clipped_sum(select(head), bound=mechanism.head_clip),
        )
        return torch.cat(parts)

    whole = released(lambda each: each)
    limit = mechanism.sensitivity * (1 + 1e-6 + 2 * rows**2 * 2.0**-24)
    for row in range(rows):
        assert float((whole - released(partial(without, row=row))).norm()) <= limit


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf"), 1e-30])
def test_a_bound_that_float32_cannot_keep_is_refused(bound: float) -> None:
    with pytest.raises(PrivacyError, match="clip="):
        clip_factors([torch.ones(2, 3)], bound=bound)


@pytest.mark.parametrize("width", [1, 5, 7])
def test_a_total_of_another_width_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"holds {width} values"):
        add_clipped(torch.zeros(width), [torch.ones(2, 3), torch.ones(2, 3)], factors=torch.ones(2))


def test_a_reduced_matmul_precision_does_not_loosen_the_bound() -> None:
    blocks = [torch.randn(16, 300, 8) for _ in range(3)]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        for row in range(16):
            alone = [block[row : row + 1] for block in blocks]
            assert float(clipped_sum(alone, bound=1.0).norm()) <= 1 + 1e-6
    finally:
        torch.set_float32_matmul_precision(before)
