"""The group lasso: the proximal step is the optimum it claims to be, and zero groups stay zero."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import nn

from lora.config import AdapterConfig
from lora.model import AdaptedModel
from strategies.unlearning.group_lasso import (
    ProximalGroups,
    block_of,
    grouped,
    metric,
    norm,
    penalty,
    shrink,
    update_norms,
)
from tasks.vision import VitConfig, build_vit

NUMBERS = st.floats(-3, 3, allow_nan=False, width=32)


def group(*values: float) -> tuple[nn.Parameter, ...]:
    """Divide numbers into two factors."""
    half = len(values) // 2
    return tuple(nn.Parameter(torch.tensor(part, dtype=torch.float64)) for part in (values[:half], values[half:]))


def flat(of: tuple[nn.Parameter, ...]) -> Any:
    return torch.cat([factor.detach() for factor in of]).numpy()


@given(st.lists(NUMBERS, min_size=2, max_size=6), st.floats(0, 4), st.integers(0, 99))
def test_the_proximal_step_is_the_numeric_optimum(values: list[float], amount: float, seed: int) -> None:
    start = np.array(values)

    def objective(x: Any) -> float:
        return float(0.5 * np.sum((x - start) ** 2) + amount * np.linalg.norm(x))

    factors = group(*values)
    length = shrink(factors, amount)
    ours = flat(factors)
    along = minimize_scalar(lambda share: objective(share * start), bounds=(0, 1), method="bounded")
    assert objective(ours) <= min(along.fun, objective(0 * start)) + 1e-9
    # The objective is convex: a point that nothing near it beats is the optimum.
    near = np.random.default_rng(seed).normal(0, 1e-3, (50, len(start)))
    assert objective(ours) <= min(objective(ours + step) for step in near) + 1e-12
    assert length == pytest.approx(np.linalg.norm(ours), abs=1e-12)


@given(st.lists(NUMBERS, min_size=2, max_size=6), st.floats(0.01, 4))
def test_a_group_becomes_exactly_zero_where_it_is_no_longer_than_the_step(values: list[float], amount: float) -> None:
    factors = group(*values)
    long = float(norm(factors).detach()) > amount
    shrink(factors, amount)
    assert bool(flat(factors).any()) == long


def test_the_penalty_is_the_sum_of_group_norms_and_has_a_gradient_at_zero() -> None:
    groups = {"one": group(3.0, 4.0), "zero": group(0.0, 0.0)}
    total = penalty(groups)
    torch.autograd.backward(total)
    assert float(total.detach()) == pytest.approx(5.0)
    assert [float(factor.grad) for factor in groups["one"] if factor.grad is not None] == pytest.approx([0.6, 0.8])
    assert all(factor.grad is not None and not factor.grad.any() for factor in groups["zero"])


def test_the_metric_is_the_root_mean_square_of_the_gradients() -> None:
    factors = group(1.0, 2.0, 3.0, 4.0)
    optimizer = torch.optim.AdamW(factors, lr=1e-3)
    gradient = np.array([0.3, -0.1, 0.2, 0.5])
    for _ in range(3):
        for place, factor in enumerate(factors):
            factor.grad = torch.from_numpy(gradient[2 * place : 2 * place + 2])
        optimizer.step()
    assert metric(factors, optimizer) == pytest.approx(np.sqrt(np.mean(gradient**2)) + 1e-8)


@pytest.mark.parametrize(("weight", "survives"), [(0.5, True), (2.0, False)])
def test_a_group_is_held_at_zero_where_its_gradient_is_shorter_than_the_weight(weight: float, survives: bool) -> None:
    factors = group(*[0.02] * 16)
    optimizer = torch.optim.AdamW(factors, lr=1e-2, weight_decay=0.0)
    proximal = ProximalGroups({"only": factors}, optimizer)
    for _ in range(60):
        optimizer.zero_grad()
        # A gradient of norm 1, always the same way.
        torch.autograd.backward(-torch.cat(list(factors)).sum() / 4)
        optimizer.step()
        proximal.step(weight)
        if not proximal.alive:
            break
    assert (float(norm(factors).detach()) > 0.1) == survives
    assert bool(proximal.alive) == survives


def test_a_group_at_zero_is_let_go() -> None:
    factors = {"one": group(0.001, 0.001), "other": group(5.0, 5.0)}
    optimizer = torch.optim.AdamW([each for of in factors.values() for each in of], lr=0.1)
    torch.autograd.backward(penalty(factors))
    optimizer.step()
    proximal = ProximalGroups(factors, optimizer)
    proximal.step(0.0)
    assert set(proximal.alive) == {"one", "other"}
    proximal.step(1.0)
    assert set(proximal.alive) == {"other"}
    assert not flat(factors["one"]).any() and not any(each.requires_grad for each in factors["one"])
    assert all(each.requires_grad for each in factors["other"])


def test_factors_are_divided_by_block_by_matrix_or_one_by_one() -> None:
    adapted = AdaptedModel.attach(build_vit(VitConfig(), seed=0), AdapterConfig(rank=2, targets="ffn"))
    factors = {
        (e.part, e.name): nn.Parameter(torch.ones(e.shape)) for e in (*adapted.entries("A"), *adapted.entries("B"))
    }
    blocks = grouped(factors, "block")
    assert sorted(blocks) == [f"layers.{number}" for number in range(6)]
    assert {len(each) for each in blocks.values()} == {4}
    assert {len(each) for each in grouped(factors, "adapter").values()} == {2}
    assert len(grouped(factors, "matrix")) == 24
    # One weight a block: the root of the sum of squares of all its numbers.
    assert float(norm(blocks["layers.0"]).detach()) == pytest.approx((2 * (64 + 128) * 2) ** 0.5)


def test_a_block_is_the_path_to_its_number() -> None:
    assert block_of("encoder.layer.3.output.dense") == "encoder.layer.3"
    assert block_of("classifier") == "classifier"


def test_update_norms_are_those_of_the_products() -> None:
    adapted = AdaptedModel.attach(
        build_vit(VitConfig(depth=2), seed=0), AdapterConfig(rank=3, alpha=6.0, targets="ffn")
    )
    source = torch.Generator().manual_seed(0)
    entries = (*adapted.entries("A"), *adapted.entries("B"))
    blocks = {(e.part, e.name): torch.randn(e.shape, generator=source) for e in entries}
    found = update_norms(adapted, blocks, "block")
    for number in range(2):
        names = [f"layers.{number}.mlp.fc{which}" for which in (1, 2)]
        products = [(2.0 * blocks["B", name] @ blocks["A", name]).flatten() for name in names]
        assert found[f"layers.{number}"] == pytest.approx(float(torch.cat(products).norm()), rel=1e-5)
