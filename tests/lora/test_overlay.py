"""Slots with frames of their own on some rows: what they add, and that other rows keep every bit."""

import pytest
import torch
from torch import Tensor, nn

from lora.bank import Bank
from lora.codec import Entry, Layout
from lora.config import AdapterConfig
from lora.errors import ModelError
from lora.gate import Gate
from lora.model import AdaptedModel
from lora.overlay import Overlay


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


@pytest.fixture
def adapted() -> AdaptedModel:
    torch.manual_seed(0)
    return AdaptedModel.attach(Net(), AdapterConfig(rank=2, alpha=6))


def slots(adapted: AdaptedModel, count: int, *, rank: int, sites: slice = slice(None)) -> Bank:
    chosen = adapted.sites[sites]
    a = [Entry("A", site.name, (rank, site.d_in)) for site in chosen]
    b = [Entry("B", site.name, (site.d_out, rank)) for site in chosen]
    layout = Layout((*a, *b))
    return Bank(layout, torch.randn(count, layout.size, generator=torch.Generator().manual_seed(1)))


def users(adapted: AdaptedModel, rows: int) -> dict:
    generator = torch.Generator().manual_seed(2)
    return {("B", s.name): torch.randn(rows, s.d_out, 2, generator=generator) for s in adapted.sites}


@torch.no_grad()
def answer(adapted: AdaptedModel, x: Tensor, blocks: dict, overlay: Overlay | None) -> Tensor:
    with adapted.bound(blocks, overlay=overlay) as model:
        return model(x)


def by_hand(adapted: AdaptedModel, x: Tensor, blocks: dict, bank: Bank, weights: Tensor) -> Tensor:
    """Answer row by row with the dense sum of all updates."""
    a, b = bank.views("A"), bank.views("B")
    outputs = []
    for row in range(len(x)):
        state = x[row].double()
        for name, layer in adapted.layers.items():
            delta = blocks["B", name][row].double() @ adapted.frame.matrices[name].double()
            if name in b:
                for slot, weight in enumerate(weights[row]):
                    delta = delta + weight.double() * b[name][slot].double() @ a[name][slot].double()
            whole = layer.weight.double() + adapted.scale * delta
            state = torch.tanh(state @ whole.T + layer.bias.double())
        outputs.append(state.float())
    return torch.stack(outputs)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("sites", [slice(None), slice(1, None)])
def test_it_adds_the_weighted_updates_of_a_row(adapted: AdaptedModel, rank: int, sites: slice) -> None:
    bank = slots(adapted, 3, rank=rank, sites=sites)
    x, blocks = torch.randn(4, 5, 12), users(adapted, 4)
    weights = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0.3, 0.5], [0, 0, 1.0]])
    overlay = Overlay.of(bank, Gate.mixture(weights))
    assert overlay is not None and len(overlay.rows) == 4
    found = answer(adapted, x, blocks, overlay)
    torch.testing.assert_close(found, by_hand(adapted, x, blocks, bank, weights), atol=1e-5, rtol=1e-5)


def test_rows_without_a_hit_keep_every_bit(adapted: AdaptedModel) -> None:
    bank = slots(adapted, 2, rank=2)
    x, blocks = torch.randn(6, 3, 12), users(adapted, 6)
    weights = torch.zeros(6, 2)
    weights[[1, 4], [0, 1]] = torch.tensor([1.0, 0.4])
    with_gate = answer(adapted, x, blocks, Overlay.of(bank, Gate.mixture(weights)))
    without = answer(adapted, x, blocks, None)
    assert torch.equal(with_gate[[0, 2, 3, 5]], without[[0, 2, 3, 5]])
    assert not torch.allclose(with_gate[[1, 4]], without[[1, 4]], atol=1e-2)


def test_no_hit_is_no_overlay(adapted: AdaptedModel) -> None:
    assert Overlay.of(slots(adapted, 2, rank=2), Gate.mixture(torch.zeros(5, 2))) is None


def test_what_does_not_fit_is_refused(adapted: AdaptedModel) -> None:
    bank = slots(adapted, 2, rank=2)
    for gate in (Gate.one(0), Gate.mixture(torch.ones(3, 5))):
        with pytest.raises(ModelError, match=r"Gate\.mixture over 2 slots"):
            Overlay.of(bank, gate)
    overlay = Overlay.of(bank, Gate.mixture(torch.ones(1, 2)))
    blocks = {("B", site.name): torch.zeros(site.d_out, 2) for site in adapted.sites}
    with pytest.raises(ModelError, match=r"without rows .* leave it out of adapter\.targets"):
        answer(adapted, torch.randn(4, 12), blocks, overlay)


def test_gradients_pass_through(adapted: AdaptedModel) -> None:
    bank = slots(adapted, 1, rank=2)
    x, blocks = torch.randn(2, 3, 12, requires_grad=True), users(adapted, 2)
    overlay = Overlay.of(bank, Gate.mixture(torch.tensor([[0.5], [0.0]])))
    with adapted.bound(blocks, overlay=overlay) as model:
        loss = model(x).sum()
    (found,) = torch.autograd.grad(loss, x)
    dense = by_hand_gradient(adapted, x, blocks, bank)
    torch.testing.assert_close(found, dense, atol=1e-4, rtol=1e-4)


def by_hand_gradient(adapted: AdaptedModel, x: Tensor, blocks: dict, bank: Bank) -> Tensor:
    copy = x.detach().clone().requires_grad_()
    weights = torch.tensor([[0.5], [0.0]])
    (gradient,) = torch.autograd.grad(by_hand(adapted, copy, blocks, bank, weights).sum(), copy)
    return gradient
