"""Gates: the batched router against plain modules, and a report that can say yes and no."""

import math

import pytest
import torch
from torch import Tensor, nn

from lora.errors import ModelError
from strategies.personal.config import PersonalConfig
from strategies.personal.meta import MetaLoRAs
from strategies.personal.router import Random, Router, Uniform, gate_of, gate_report
from tests.strategies.personal.test_meta import adapted_model, made

SITES = 7


def plain(router: Router, site: int) -> nn.Sequential:
    """The gate of one matrix as the released code writes it."""
    inputs, width = router.first.shape[1:]
    twin = nn.Sequential(
        nn.LayerNorm(inputs), nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(0.1),
        nn.Linear(width, router.second.shape[2]),
    )  # fmt: skip
    values = (router.scale[site, 0], router.shift[site, 0], router.first[site].T, router.first_bias[site, 0],
              router.second[site].T, router.second_bias[site, 0])  # fmt: skip
    with torch.no_grad():
        for parameter, value in zip(twin.parameters(), values, strict=True):
            parameter.copy_(value)
    return twin.eval()


def test_the_router_is_one_small_network_per_matrix() -> None:
    router = Router(sites=3, inputs=11, count=4, temperature=0.5, seed=1).eval()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    vectors = torch.randn(6, 11)
    weights = router(vectors)
    assert weights.shape == (3, 6, 4)
    for site in range(3):
        torch.testing.assert_close(weights[site], torch.softmax(plain(router, site)(vectors) / 0.5, -1))


def test_linear_layers_start_as_torchs_own() -> None:
    router = Router(sites=40, inputs=30, count=8)
    own = nn.Linear(30, 60)
    assert float(router.first.detach().std()) == pytest.approx(float(own.weight.detach().std()), rel=0.05)
    assert router.first.abs().max() <= 30**-0.5 and not router.first_bias.any()


def test_dropout_is_for_training_only() -> None:
    router = Router(sites=2, inputs=8, count=3, dropout=0.5)
    vectors = torch.randn(5, 8)
    assert not torch.equal(router.train()(vectors), router(vectors))
    assert torch.equal(router.eval()(vectors), router(vectors))


def test_another_representation_is_refused() -> None:
    with pytest.raises(ModelError, match="reads vectors of 8 numbers, not 9"):
        Router(sites=2, inputs=8, count=3)(torch.randn(5, 9))


@pytest.mark.parametrize(("gate", "kind"), [("router", Router), ("uniform", Uniform), ("random", Random)])
def test_every_gates_weights_sum_to_one(gate: str, kind: type) -> None:
    config = PersonalConfig(gate=gate, meta_loras=4)  # type: ignore[arg-type]
    made_gate = gate_of(config, sites=3, inputs=12, seed=0)
    assert isinstance(made_gate, kind)
    weights: Tensor = made_gate(torch.randn(5, 12))
    assert weights.shape == (3, 5, 4) and (weights > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 5))


def meta_with(*, alike: bool) -> MetaLoRAs:
    _, meta = made("product", "shared", count=4)
    if alike:
        with torch.no_grad():
            meta.b.copy_(meta.b[:1].expand_as(meta.b) * torch.tensor([[1.0], [1.01], [0.99], [1.0]]))
    return meta


def peaked(rows: int = 40, *, count: int = 4) -> Tensor:
    """Every row has a favourite of its own."""
    return torch.softmax(4.0 * torch.eye(count)[torch.arange(rows) % count], -1).expand(SITES, -1, -1)


def test_a_gate_that_tells_users_apart_is_not_collapsed() -> None:
    report = gate_report(peaked(), meta_with(alike=False))
    assert not report.collapsed
    assert report.information > 0.3
    assert report.usage == pytest.approx((0.25,) * 4, abs=1e-6)
    assert 0 < report.entropy < math.log(4) and report.relative_entropy == pytest.approx(report.entropy / math.log(4))


def test_equal_updates_equally_mixed_are_collapsed() -> None:
    near = torch.softmax(0.3 * torch.eye(4)[torch.arange(40) % 4], -1).expand(SITES, -1, -1)
    assert gate_report(near, meta_with(alike=True)).collapsed
    assert not gate_report(near, meta_with(alike=False)).collapsed
    assert not gate_report(peaked(), meta_with(alike=True)).collapsed


def test_one_meta_lora_for_everybody_is_collapsed() -> None:
    weights = torch.tensor([0.991, 0.003, 0.003, 0.003]).expand(SITES, 10, -1)
    report = gate_report(weights, meta_with(alike=False))
    assert report.collapsed and report.usage[0] == pytest.approx(0.991)


def test_one_mixture_for_everybody_is_collapsed_although_it_is_not_uniform() -> None:
    report = gate_report(torch.tensor([0.4, 0.3, 0.2, 0.1]).expand(SITES, 10, -1), meta_with(alike=False))
    assert report.collapsed and report.information == pytest.approx(0, abs=1e-9) and report.relative_entropy < 0.95


def test_a_single_lora_has_nothing_to_collapse() -> None:
    meta = MetaLoRAs(adapted_model(), count=1)
    assert not gate_report(torch.ones(SITES, 5, 1), meta).collapsed


def test_a_report_about_nobody_is_refused() -> None:
    with pytest.raises(ModelError, match="needs rows"):
        gate_report(torch.ones(SITES, 0, 4), meta_with(alike=False))
