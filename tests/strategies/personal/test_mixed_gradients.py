"""The sentence that MixedExampleGradients guarantees, and its compact sums against sums written out."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora.codec import Entry, Layout
from lora.gradients import ExampleGradients, SlotGradients, SummedGradients
from privacy.clipping import add_clipped, clip_factors
from strategies.personal.mixed_gradients import MixedExampleGradients, MixtureSink

COUNT, HEAD = 3, (1, 4)
SHAPES = {"one": (5, 2), "two": (3, 2)}
LAYOUT = Layout((*(Entry("B", name, (COUNT, *shape)) for name, shape in SHAPES.items()), Entry("head", "weight", HEAD)))
SIZE = LAYOUT.length(["B"])
SCALES = [0.0, 1e-30, 1e-6, 1.0, 1e3, 1e15, 1e30, 3e38]
EXTREMES = [None, None, float("nan"), float("inf"), -float("inf")]
Lot = list[tuple[dict[str, Tensor], dict[str, Tensor]]]


@st.composite
def examples(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mixed gradients and weights of one example by site: of any scale, some zero, huge or not finite."""
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale, extreme = draw(st.sampled_from(SCALES)), draw(st.sampled_from(EXTREMES))
    gradients = {name: (torch.rand(1, *shape, generator=source) * 2 - 1) * scale for name, shape in SHAPES.items()}
    sharpness = draw(st.sampled_from([0.0, 1.0, 100.0]))
    weights = {n: torch.softmax(torch.randn(1, COUNT, generator=source) * sharpness, dim=1) for n in SHAPES}
    if extreme is not None:
        broken = gradients if draw(st.booleans()) else weights
        broken[draw(st.sampled_from([*SHAPES]))].view(-1)[0] = extreme
    if draw(st.booleans()):
        weights = {name: weight * draw(st.sampled_from([0.0, 7.0, 1e30])) for name, weight in weights.items()}
    return gradients, weights


def sink_of(lot: Lot) -> MixedExampleGradients:
    sink = MixedExampleGradients(LAYOUT, ("B",))
    for name, shape in SHAPES.items():
        gradients = [gradient[name] for gradient, _ in lot] or [torch.empty(0, *shape)]
        weights = [weight[name] for _, weight in lot] or [torch.empty(0, COUNT)]
        MixtureSink(sink, {name: torch.cat(weights)}, 1).take("B", name, torch.cat(gradients))
    return sink


def clipped_sum(lot: Lot, *, bound: float) -> Tensor:
    sink, total = sink_of(lot), torch.zeros(LAYOUT.size)
    factors = clip_factors(sink.of(("B",)), bound=bound)
    for span, blocks, share in sink.shares(("B",)):
        add_clipped(total[span], blocks, factors=factors if share is None else factors * share)
    return total[:SIZE].double()


@given(st.lists(examples(), max_size=5), examples(), st.sampled_from([1e-25, 1e-3, 0.1, 1.0, 17.3, 1e25]))
@settings(max_examples=300, deadline=None)
def test_adding_any_example_moves_the_sum_of_all_meta_loras_by_at_most_the_bound(
    lot: Lot, one: Any, bound: float
) -> None:
    whole, less = clipped_sum([*lot, one], bound=bound), clipped_sum(lot, bound=bound)
    rounding = bound * 2 * (len(lot) + 1) ** 2 * 2.0**-24
    assert bool(whole.isfinite().all())
    assert float((whole - less).norm()) <= bound * (1 + 1e-6) + rounding
    assert float(clipped_sum([one], bound=bound).norm()) <= bound * (1 + 1e-6)


def usual(rows: int = 6, seed: int = 0) -> Lot:
    source = torch.Generator().manual_seed(seed)
    return [
        (
            {name: torch.randn(1, *shape, generator=source) for name, shape in SHAPES.items()},
            {name: torch.softmax(2 * torch.randn(1, COUNT, generator=source), dim=1) for name in SHAPES},
        )
        for _ in range(rows)
    ]


@pytest.mark.parametrize("bound", [0.3, 2.0, 100.0])
def test_the_sum_is_that_of_all_gradients_written_out_and_clipped_one_by_one(bound: float) -> None:
    lot, expected = usual(), torch.zeros(SIZE, dtype=torch.float64)
    clipped = 0
    for gradients, weights in lot:
        blocks = [weights[n].double()[0, :, None, None] * gradients[n].double() for n in SHAPES]
        whole = torch.cat([block.flatten() for block in blocks])
        clipped += float(whole.norm()) > bound
        expected += whole * min(1.0, bound / float(whole.norm()))
    assert clipped == {0.3: 6, 100.0: 0}.get(bound, clipped)
    torch.testing.assert_close(clipped_sum(lot, bound=bound), expected, rtol=1e-6, atol=1e-6)


def test_a_weight_of_a_broken_row_leaves_the_others_as_they_are() -> None:
    lot = usual()
    broken = usual(rows=1, seed=1)[0]
    broken[1]["two"][0, 1] = math.nan
    torch.testing.assert_close(clipped_sum([*lot, broken], bound=1.0), clipped_sum(lot, bound=1.0), rtol=0, atol=1e-6)
    none = usual(rows=1, seed=2)[0]
    none[1].update({name: torch.zeros(1, COUNT) for name in SHAPES})
    torch.testing.assert_close(clipped_sum([*lot, none], bound=1.0), clipped_sum(lot, bound=1.0), rtol=0, atol=1e-6)


def test_sums_over_rows_slots_and_examples_agree() -> None:
    lot = usual()
    summed, slots = torch.zeros(LAYOUT.size), torch.zeros(3, LAYOUT.size)
    plain = ExampleGradients(LAYOUT, ("B",))
    sinks = [
        (SummedGradients(LAYOUT, summed, ("B",)), 1),
        (SlotGradients(LAYOUT, slots, torch.tensor([2, 0, 1]), ("B",)), 3),
        (plain, 1),
    ]
    for sink, groups in sinks:
        for name in SHAPES:
            weights = torch.cat([weight[name] for _, weight in lot])
            MixtureSink(sink, {name: weights}, groups).take("B", name, torch.cat([one[name] for one, _ in lot]))
    each = torch.cat([block.flatten(1) for block in plain.of(("B",))], dim=1)
    torch.testing.assert_close(summed[:SIZE], each.sum(0))
    torch.testing.assert_close(slots[[2, 0, 1], :SIZE], each.view(3, 2, -1).sum(1))
    torch.testing.assert_close(each.sum(0).double(), clipped_sum(lot, bound=1e6), rtol=1e-5, atol=1e-6)


def test_a_head_beside_the_mixture_is_clipped_as_it_comes() -> None:
    sink = MixedExampleGradients(LAYOUT, ("B", "head"))
    MixtureSink(sink, {}, 1).take("head", "weight", torch.ones(2, *HEAD))
    shares = [*sink.shares(("head",))]
    assert [(span, share) for span, _, share in shares] == [(slice(SIZE, SIZE + 4), None)]
