"""Blocks of one orthonormal frame: orthogonal by construction; and O3's penalty on overlap."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.errors import ModelError
from lora.frame import Frame, Site
from strategies.unlearning.frames import (
    OrthogonalFrames,
    halved_sum,
    next_block,
    orthonormal,
    overlap_gradient,
    overlap_penalty,
    overlaps,
)

SITES = (Site("layer.0.query", 24, 8), Site("layer.1.query", 32, 8))


@settings(max_examples=25)
@given(
    rank=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    beside=st.booleans(),
    init=st.sampled_from(["kaiming", "orthogonal"]),
)
def test_all_blocks_are_orthonormal_and_apart(rank: int, seed: int, beside: bool, init: str) -> None:
    users = Frame.draw(SITES, rank=3, seed=seed, init=init) if beside else None
    frames = OrthogonalFrames(SITES, rank=rank, seed=seed, beside=users)
    drawn = [frames.block(index).matrices for index in range(frames.blocks)]
    assert len(drawn) == (24 - 3 * beside) // rank
    assert overlaps(drawn).max() < 1e-6
    for each in drawn:
        for a in each.values():
            torch.testing.assert_close(a @ a.T, torch.eye(rank), atol=1e-6, rtol=0)
    if users is not None:
        assert overlaps([users.matrices, *drawn])[0].max() < 1e-5


@settings(max_examples=15)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True))
def test_a_block_does_not_depend_on_what_was_asked_before(order: list[int]) -> None:
    one, other = (OrthogonalFrames(SITES, rank=4, seed=7) for _ in range(2))
    for index in order:
        assert one.block(index).digest == other.block(index).digest
    fresh = OrthogonalFrames(SITES, rank=4, seed=7)
    assert fresh.block(order[-1]).digest == one.block(order[-1]).digest
    assert OrthogonalFrames(SITES, rank=4, seed=8).block(0).digest != fresh.block(0).digest


def test_the_blocks_span_what_qr_spans(rng: np.random.Generator) -> None:
    rows = np.zeros((0, 20))
    raw = rng.normal(size=(6, 20))
    for row in raw:
        rows = np.vstack([rows, orthonormal(row, rows)])
    q, _ = np.linalg.qr(raw.T)
    np.testing.assert_allclose(rows.T @ rows, q @ q.T, atol=1e-12)


def test_sums_by_halves_are_sums(rng: np.random.Generator) -> None:
    for count in (1, 2, 3, 7, 64, 65):
        terms = rng.normal(size=(count, 3))
        np.testing.assert_allclose(halved_sum(terms), terms.sum(0), rtol=1e-12, atol=1e-12)


def test_too_wide_a_rank_and_a_block_too_far_are_refused() -> None:
    with pytest.raises(ModelError, match=r"unlearning\.rank=25: .* width 24 of 'layer\.0\.query'; give at most 24"):
        OrthogonalFrames(SITES, rank=25)
    with pytest.raises(ModelError, match="3 of them the users'; give at most 21"):
        OrthogonalFrames(SITES, rank=22, beside=Frame.draw(SITES, rank=3, seed=0))
    with pytest.raises(ModelError, match=r"block 6 .* 6 blocks .* give 0 to 5"):
        OrthogonalFrames(SITES, rank=4).block(6)


@given(st.lists(st.integers(0, 3), max_size=12))
def test_requests_share_blocks_only_when_all_are_used(used: list[int]) -> None:
    chosen = next_block(used, blocks=4)
    assert used.count(chosen) == min(used.count(block) for block in range(4))
    assert (chosen in used) == (set(used) >= set(range(4)))


def test_a_full_frame_can_be_refused_with_what_to_do() -> None:
    assert next_block([0, 2], blocks=3, when_full="refuse") == 1
    with pytest.raises(ModelError, match=r"all 3 .* blocks .* 4 requests; lower unlearning\.rank.*when_full=share"):
        next_block([0, 1, 2, 0], blocks=3, when_full="refuse")


def test_the_penalty_is_the_sum_over_all_earlier_requests(noise: torch.Generator) -> None:
    def draw() -> dict[str, torch.Tensor]:
        return {site.name: torch.randn(3, site.d_in, generator=noise, dtype=torch.float64) for site in SITES}

    earlier, current = [draw(), draw()], {name: a.requires_grad_() for name, a in draw().items()}
    naive = sum(
        float(torch.dot(before[name][i], current[name][j].detach()) ** 2)
        for before in earlier
        for name in current
        for i in range(3)
        for j in range(3)
    )
    penalty = overlap_penalty(current, earlier, layers=2)
    assert float(penalty.detach()) == pytest.approx(naive / 2)
    torch.autograd.backward(penalty)
    by_hand = overlap_gradient({n: a.detach() for n, a in current.items()}, earlier, layers=2)
    for name, a in current.items():
        torch.testing.assert_close(by_hand[name], a.grad)
    assert float(overlap_penalty(current, [], layers=2)) == 0.0
