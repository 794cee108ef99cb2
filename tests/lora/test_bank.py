"""The law that FFA-LoRA rests on: over one frame, averaging adapters averages what they do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora.bank import Bank
from lora.codec import Entry, Layout
from lora.frame import Frame, Site
from lora.gate import Gate

SITES = (Site("q", 11, 6), Site("v", 5, 9))


def layout_of(rank: int) -> Layout:
    return Layout(tuple(Entry("B", site.name, (site.d_out, rank)) for site in SITES))


def bank_of(slots: int, *, rank: int, seed: int) -> Bank:
    source = torch.Generator().manual_seed(seed)
    layout = layout_of(rank)
    return Bank(layout, torch.randn(slots, layout.size, generator=source))


def products(bank: Bank, frame: Frame) -> dict[str, Tensor]:
    """B_k A of every slot, `[slots, d_out, d_in]`, in double precision."""
    return {name: b.double() @ frame.matrices[name].double() for name, b in bank.views("B").items()}


@given(st.integers(1, 9), st.integers(1, 8), st.integers(0, 2**32), st.booleans(), st.data())
@settings(max_examples=80)
def test_exact_averaging(slots: int, rank: int, seed: int, weighted: bool, data: st.DataObject) -> None:
    """mean(B_k) A == mean(B_k A) to float precision, for any weights."""
    bank, frame = bank_of(slots, rank=rank, seed=seed), Frame.draw(SITES, rank=rank, seed=seed)
    weights = data.draw(st.lists(st.floats(0.01, 100), min_size=slots, max_size=slots)) if weighted else None
    shares = torch.tensor(weights or [1.0] * slots, dtype=torch.float64)
    mean = bank.layout.views(bank.mean(weights))
    for name, each in products(bank, frame).items():
        wanted = torch.einsum("k,koi->oi", shares / shares.sum(), each)
        got = mean["B", name].double() @ frame.matrices[name].double()
        # The mean is rounded once to float32: a relative error of 2^-24 for each of its numbers.
        allowed = 2.0**-23 * mean["B", name].double().abs() @ frame.matrices[name].double().abs() + 1e-12
        assert ((got - wanted).abs() <= allowed).all()


@given(st.integers(1, 50), st.integers(0, 2**32))
def test_the_mean_of_copies_is_the_copy(slots: int, seed: int) -> None:
    start = bank_of(1, rank=3, seed=seed).data[0]
    assert torch.equal(Bank.of(layout_of(3), start, slots=slots).mean(), start)


def test_only_the_ratio_of_weights_matters() -> None:
    bank = bank_of(3, rank=2, seed=0)
    torch.testing.assert_close(bank.mean([1, 2, 5]), bank.mean([10, 20, 50]))
    assert torch.equal(bank.mean([0, 1, 0]), bank.data[1])


def test_slots_are_independent() -> None:
    layout = layout_of(2)
    start = torch.randn(layout.size, generator=torch.Generator().manual_seed(0))
    bank = Bank.of(layout, start, slots=4)
    bank.views("B")["v"][2].fill_(7.0)
    for slot in (0, 1, 3):
        assert torch.equal(bank.data[slot], start)
    changed = layout.views(bank.mix(Gate.one(2)))
    assert (changed["B", "v"] == 7).all()
    assert torch.equal(changed["B", "q"], layout.views(start)["B", "q"])
    assert bank.slots == 4


def test_views_hold_one_part_only() -> None:
    layout = Layout((Entry("B", "q", (2, 3)), Entry("head", "bias", (4,))))
    bank = Bank.of(layout, torch.zeros(layout.size), slots=5)
    assert {name: tuple(view.shape) for name, view in bank.views("B").items()} == {"q": (5, 2, 3)}
    assert {name: tuple(view.shape) for name, view in bank.views("head").items()} == {"bias": (5, 4)}
    assert bank.views("A") == {}


def test_shares_need_one_weight_a_slot() -> None:
    with pytest.raises(RuntimeError):
        bank_of(3, rank=1, seed=0).mean([1.0, 2.0])
