"""Pooling against plain loops; the head against nn.Linear and functorch."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn
from torch.func import grad, vmap

from lora.codec import Entry, Layout, Part
from lora.gradients import ExampleGradients, SlotGradients, SummedGradients
from tasks.heads import TEMPERATURE, Head, pool, random_weight, unit
from tasks.tokens import Batch

CLASSES, WIDTH, ROWS = 3, 5, 6
HEAD: tuple[Part, ...] = ("head",)
FACTOR: tuple[Part, ...] = ("B",)
LAYOUT = Layout((Entry("head", "weight", (CLASSES, WIDTH)), Entry("head", "bias", (CLASSES,))))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- pooling --------------------------------------------------------------------------------------------------------


def pooled_by_loops(states: Tensor, lengths: list[int], how: str) -> Tensor:
    rows = []
    for row, length in zip(states.double(), lengths, strict=True):
        tokens = [row[place] for place in range(length)]
        whole = {"first": tokens[0], "last": tokens[-1], "mean": torch.stack(tokens).sum(0) / length}[how]
        rows.append(whole / math.sqrt(float((whole * whole).sum())) * math.sqrt(20))
    return torch.stack(rows)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.sampled_from(["mean", "first", "last"]), st.integers(0))
def test_pooling_is_what_loops_give_and_sees_no_padding(lengths: list[int], how: Any, seed: int) -> None:
    width = max(lengths)
    states = draw(len(lengths), width, 4, seed=seed % 2**60)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    batch = Batch(ids, None if bool(mask.all()) else mask.long(), torch.zeros(len(lengths)))
    found = pool(states, batch, how)
    torch.testing.assert_close(found.double(), pooled_by_loops(states, lengths, how), rtol=1e-5, atol=1e-5)
    noisy = torch.where(mask[:, :, None], states, torch.full((), 1e3))
    torch.testing.assert_close(pool(noisy, batch, how), found)


def test_features_are_float32_and_of_the_temperatures_length() -> None:
    batch = Batch(torch.zeros(2, 3, dtype=torch.long), None, torch.zeros(2))
    feature = pool(draw(2, 3, 8).bfloat16(), batch, "mean")
    assert feature.dtype == torch.float32
    torch.testing.assert_close(feature.norm(dim=1), torch.full((2,), math.sqrt(TEMPERATURE)))
    logits = feature @ unit(feature).T
    torch.testing.assert_close(logits.diagonal(), torch.full((2,), TEMPERATURE))


# -- head -----------------------------------------------------------------------------------------------------------


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(WIDTH, CLASSES)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def head() -> Head:
    return Head(draw(CLASSES, WIDTH, seed=1), draw(CLASSES, seed=2), trained=True)


LABELS = torch.tensor([0, 1, 2, 2, 1, 0])


def losses(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, LABELS, reduction="none")


def test_logits_are_nn_linears() -> None:
    own, x = head(), draw(ROWS, WIDTH)
    wanted = linear(own.weight, own.bias)(x)
    frozen = own.logits(x, weight=None, bias=None, sink=None)
    bound = own.logits(x, weight=own.weight, bias=own.bias, sink=None)
    torch.testing.assert_close(frozen, wanted)
    torch.testing.assert_close(bound, wanted)
    with_sink = own.logits(x, weight=own.weight, bias=own.bias, sink=ExampleGradients(LAYOUT, HEAD))
    torch.testing.assert_close(with_sink, wanted)


def test_rows_may_each_have_a_head_of_their_own() -> None:
    x, weights, biases = draw(ROWS, WIDTH), draw(ROWS, CLASSES, WIDTH, seed=3), draw(ROWS, CLASSES, seed=4)
    wanted = torch.stack([linear(weights[row], biases[row])(x[row]) for row in range(ROWS)])
    found = head().logits(x, weight=weights, bias=biases, sink=None)
    torch.testing.assert_close(found, wanted)


def test_per_row_gradients_are_opacus_own() -> None:
    own, x = head(), draw(ROWS, WIDTH).requires_grad_()
    sink = ExampleGradients(LAYOUT, HEAD)
    torch.autograd.backward(losses(own.logits(x, weight=own.weight, bias=own.bias, sink=sink)).sum())
    twin, inputs = GradSampleModule(linear(own.weight, own.bias), loss_reduction="sum"), draw(ROWS, WIDTH)
    inputs.requires_grad_()
    torch.autograd.backward(losses(twin(inputs)).sum())
    module: Any = twin._module
    torch.testing.assert_close(sink.blocks["head", "weight"], module.weight.grad_sample)
    torch.testing.assert_close(sink.blocks["head", "bias"], module.bias.grad_sample)
    torch.testing.assert_close(x.grad, inputs.grad)


def test_per_row_gradients_of_rows_own_heads_are_functorchs() -> None:
    x, weights, biases = draw(ROWS, WIDTH), draw(ROWS, CLASSES, WIDTH, seed=3), draw(ROWS, CLASSES, seed=4)
    sink = ExampleGradients(LAYOUT, HEAD)
    leaf = x.clone().requires_grad_()
    torch.autograd.backward(losses(head().logits(leaf, weight=weights, bias=biases, sink=sink)).sum())

    def loss(weight: Tensor, bias: Tensor, row: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(row, weight, bias), label)

    grad_w, grad_b, grad_x = vmap(grad(loss, argnums=(0, 1, 2)))(weights, biases, x, LABELS)
    torch.testing.assert_close(sink.blocks["head", "weight"], grad_w)
    torch.testing.assert_close(sink.blocks["head", "bias"], grad_b)
    torch.testing.assert_close(leaf.grad, grad_x)


def test_summed_gradients_are_autograds() -> None:
    own, x = head(), draw(ROWS, WIDTH)
    sink = SummedGradients(LAYOUT, torch.zeros(LAYOUT.size), HEAD)
    torch.autograd.backward(losses(own.logits(x, weight=own.weight, bias=own.bias, sink=sink)).sum())
    twin = linear(own.weight, own.bias)
    torch.autograd.backward(losses(twin(x)).sum())
    found: Any = LAYOUT.views(sink.total)
    torch.testing.assert_close(found["head", "weight"], twin.weight.grad)
    torch.testing.assert_close(found["head", "bias"], twin.bias.grad)


@pytest.mark.parametrize("group", [1, 2, 3])
def test_groups_of_rows_share_a_head_and_add_up_in_their_slot(group: int) -> None:
    count = ROWS // group
    x, weights, biases = draw(ROWS, WIDTH), draw(count, CLASSES, WIDTH, seed=3), draw(count, CLASSES, seed=4)
    slots = torch.arange(count).flip(0)
    sink = SlotGradients(LAYOUT, torch.zeros(count, LAYOUT.size), slots, HEAD)
    torch.autograd.backward(losses(head().logits(x, weight=weights, bias=biases, sink=sink)).sum())
    for place, slot in enumerate(slots.tolist()):
        rows = slice(place * group, (place + 1) * group)
        twin = linear(weights[place], biases[place])
        torch.autograd.backward(F.cross_entropy(twin(x[rows]), LABELS[rows], reduction="sum"))
        found: Any = LAYOUT.views(sink.total[slot])
        torch.testing.assert_close(found["head", "weight"], twin.weight.grad)
        torch.testing.assert_close(found["head", "bias"], twin.bias.grad)


def test_a_sink_that_wants_no_head_gets_none() -> None:
    own, x = head(), draw(ROWS, WIDTH).requires_grad_()
    sink = ExampleGradients(LAYOUT, FACTOR)
    torch.autograd.backward(losses(own.logits(x, weight=own.weight, bias=own.bias, sink=sink)).sum())
    assert sink.blocks == {}
    assert x.grad is not None and x.grad.abs().max() > 0


def test_only_a_trained_head_is_in_the_layout() -> None:
    own = head()
    assert own.entries() == LAYOUT.entries
    assert Head(own.weight, own.bias, trained=False).entries() == ()


# -- random start ---------------------------------------------------------------------------------------------------


def test_random_weights_depend_on_the_seed_alone() -> None:
    first = random_weight(4, 32, seed=3)
    torch.manual_seed(5)
    assert torch.equal(random_weight(4, 32, seed=3), first)
    assert not torch.equal(random_weight(4, 32, seed=4), first)
    assert first.dtype == torch.float32


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**40))
def test_random_weights_have_the_temperatures_length(classes: int, width: int, seed: int) -> None:
    weight = random_weight(classes, width, seed=seed)
    assert weight.shape == (classes, width)
    torch.testing.assert_close(weight.double().norm(dim=1), torch.full((classes,), math.sqrt(20.0)).double())


def test_random_weights_point_everywhere() -> None:
    cosines = F.normalize(random_weight(40, 512, seed=0), dim=1)
    off = (cosines @ cosines.T)[~torch.eye(40, dtype=torch.bool)]
    assert off.abs().max() < 0.25
    assert off.std() == pytest.approx(512**-0.5, rel=0.1)
