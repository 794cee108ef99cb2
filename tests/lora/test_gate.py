"""Which slots answer: one, one a row, or a mixture a row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora.errors import ModelError
from lora.gate import Gate


def bank(slots: int, size: int, seed: int) -> Tensor:
    return torch.randn(slots, size, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**32), st.data())
def test_rows_pick_their_slots(slots: int, size: int, seed: int, data: st.DataObject) -> None:
    data_bank = bank(slots, size, seed)
    index = data.draw(st.lists(st.integers(0, slots - 1), min_size=1, max_size=8))
    picked = Gate.rows(torch.tensor(index)).mix(data_bank)
    for row, slot in enumerate(index):
        assert torch.equal(picked[row], data_bank[slot])
        assert torch.equal(Gate.one(slot).mix(data_bank), data_bank[slot])


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32))
def test_a_mixture_is_the_explicit_sum(slots: int, size: int, rows: int, seed: int) -> None:
    data_bank = bank(slots, size, seed)
    weights = torch.rand(rows, slots, generator=torch.Generator().manual_seed(seed + 1))
    mixed = Gate.mixture(weights).mix(data_bank)
    for row in range(rows):
        wanted = sum((float(weights[row, slot]) * data_bank[slot].double() for slot in range(slots)), torch.zeros(size))
        torch.testing.assert_close(mixed[row].double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_one_hot_mixture_is_the_slot() -> None:
    data_bank = bank(4, 7, 0)
    one_hot = torch.eye(4, dtype=torch.float64)[[2, 0]]
    assert torch.equal(Gate.mixture(one_hot).mix(data_bank), Gate.rows(torch.tensor([2, 0])).mix(data_bank))


@pytest.mark.parametrize(
    "gate", [Gate.one(3), Gate.one(-1), Gate.rows(torch.tensor([0, 3])), Gate.rows(torch.tensor([-1]))]
)
def test_an_unknown_slot_is_an_error_never_another_slot(gate: Gate) -> None:
    with pytest.raises(ModelError, match="not in the bank, which has 3; give 0 to 2"):
        gate.mix(bank(3, 4, 0))


def test_an_empty_gate_answers_nothing() -> None:
    with pytest.raises(ValueError, match=r"use Gate\.one, Gate\.rows or Gate\.mixture"):
        Gate().mix(bank(2, 2, 0))
