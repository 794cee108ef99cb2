"""Gradient checkpointing: the same gradients, handed out once, with less kept; also in autograd's own thread."""

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora.codec import Layout
from lora.config import AdapterConfig
from lora.errors import ModelError
from lora.gradients import ExampleGradients, SlotGradients, SummedGradients
from lora.model import AdaptedModel
from lora.recompute import Recomputed, block_names


def attach(family: Any, *, recompute: bool, **traits: Any) -> tuple[AdaptedModel, Layout]:
    base = family.make()
    base.config.use_cache = False
    adapted = AdaptedModel.attach(base, AdapterConfig(rank=3, **traits))
    if recompute:
        adapted.recompute_blocks()
    return adapted, Layout((*adapted.entries("A"), *adapted.entries("B")))


def start(layout: Layout, *lead: int) -> Tensor:
    return 0.3 * torch.randn(*lead, layout.size, generator=torch.Generator().manual_seed(2))


def loss_of(family: Any, adapted: AdaptedModel, layout: Layout, values: Tensor, sink: Any, *, rows: int = 4) -> Tensor:
    with adapted.bound(layout.views(values), sink=sink) as model:
        output = family.output(model, family.inputs(rows))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    return (output * weights).sum()


def by_example(family: Any, *, recompute: bool) -> Tensor:
    adapted, layout = attach(family, recompute=recompute)
    sink = ExampleGradients(layout, ("A", "B"))
    loss_of(family, adapted, layout, start(layout), sink).backward()
    return torch.cat([block.flatten(1) for block in sink.of(sink.parts)], dim=1)


def by_slot(family: Any, *, recompute: bool) -> Tensor:
    adapted, layout = attach(family, recompute=recompute)
    total = torch.zeros(3, layout.size)
    sink = SlotGradients(layout, total, torch.tensor([2, 0]), ("A", "B"))
    loss_of(family, adapted, layout, start(layout, 2), sink).backward()
    return total


def summed(family: Any, *, recompute: bool) -> Tensor:
    adapted, layout = attach(family, recompute=recompute)
    total = torch.zeros(layout.size)
    loss_of(family, adapted, layout, start(layout), SummedGradients(layout, total, ("A", "B"))).backward()
    return total


def by_autograd(family: Any, *, recompute: bool) -> Tensor:
    adapted, layout = attach(family, recompute=recompute)
    values = start(layout).requires_grad_()
    loss_of(family, adapted, layout, values, None).backward()
    assert values.grad is not None
    return values.grad


@pytest.mark.parametrize("gradients", [by_example, by_slot, summed, by_autograd])
def test_gradients_are_the_same(family: Any, gradients: Any) -> None:
    plain, recomputed = gradients(family, recompute=False), gradients(family, recompute=True)
    assert plain.abs().max() > 1e-3
    torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-6)


@dataclass
class Counting:
    """A sink that counts what it is given."""

    parts: tuple[str, ...] = ("A", "B")
    by_row: bool = True
    taken: Counter[tuple[str, str]] = field(default_factory=Counter)

    def take(self, part: str, name: str, gradient: Tensor) -> None:
        self.taken[part, name] += 1


def test_every_gradient_is_handed_out_once(family: Any) -> None:
    adapted, layout = attach(family, recompute=True)
    sink = Counting()
    loss_of(family, adapted, layout, start(layout), sink).backward()
    assert sink.taken == {(entry.part, entry.name): 1 for entry in layout.entries}


def kept(family: Any, *, recompute: bool) -> int:
    """Return how many numbers autograd holds between forward and backward pass."""
    adapted, layout = attach(family, recompute=recompute)
    sizes: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    own = {parameter.data_ptr() for parameter in adapted.base.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(family, adapted, layout, start(layout), Counting())
    return sum(size for place, size in sizes.items() if place not in own)


def test_blocks_keep_their_input_only(family: Any) -> None:
    assert kept(family, recompute=True) < 0.5 * kept(family, recompute=False)


def test_the_second_run_in_another_thread_has_the_same_factors(family: Any) -> None:
    """On a GPU autograd runs the backward pass in a thread of its own, where nothing is bound."""
    expected = by_example(family, recompute=False)
    adapted, layout = attach(family, recompute=True)
    sink = ExampleGradients(layout, ("A", "B"))
    loss = loss_of(family, adapted, layout, start(layout), sink)
    failures: list[BaseException] = []

    def backward() -> None:
        try:
            loss.backward()
        except BaseException as error:
            failures.append(error)

    with adapted.bound(layout.views(start(layout) * 7)):  # what this thread binds next is none of its business
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    assert not failures
    found = torch.cat([block.flatten(1) for block in sink.of(sink.parts)], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_backward_pass_leaves_the_binding_alone(family: Any) -> None:
    adapted, layout = attach(family, recompute=True)
    loss = loss_of(family, adapted, layout, start(layout), Counting())
    before = family.output(adapted.base, family.inputs())
    loss.backward()
    assert torch.equal(family.output(adapted.base, family.inputs()), before)


def test_answers_without_gradients_run_once(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, layout = attach(family, recompute=True)
    assert adapted.recomputes
    monkeypatch.setattr("lora.recompute.checkpoint", lambda *_, **__: pytest.fail("nothing is to be kept here"))
    with torch.no_grad():
        found = loss_of(family, adapted, layout, start(layout), None)
    plain, layout = attach(family, recompute=False)
    with torch.no_grad():
        assert torch.equal(found, loss_of(family, plain, layout, start(layout), None))
    family.output(adapted.base, family.inputs())  # unbound, with gradients on


def test_detached_blocks_are_the_original_ones(family: Any) -> None:
    adapted, _ = attach(family, recompute=True)
    adapted.recompute_blocks()
    wrapped = [module for module in adapted.base.modules() if isinstance(module.forward, Recomputed)]
    assert len(wrapped) == 2
    assert not any(isinstance(block.forward.forward, Recomputed) for block in wrapped)
    restored = adapted.detach()
    assert not adapted.recomputes
    assert not any(isinstance(module.forward, Recomputed) for module in restored.modules())
    assert torch.equal(family.output(restored, family.inputs()), family.output(family.make(), family.inputs()))


def test_a_model_without_blocks_is_refused() -> None:
    adapted = AdaptedModel.attach(nn.ModuleDict({"up": nn.Linear(4, 3)}), AdapterConfig(rank=2, targets=("up",)))
    with pytest.raises(
        ModelError, match=r"model\.gradient_checkpointing=true: .* no list of blocks .* set it to false"
    ):
        adapted.recompute_blocks()


def test_blocks_are_the_outermost_numbered_modules_around_sites() -> None:
    modules = ["", "embed", "embed.0", "m.layers", "m.layers.0", "m.layers.0.mlp", "m.layers.0.mlp.3", "m.layers.1"]
    assert block_names(modules, ["m.layers.0.mlp.3"]) == ["m.layers.0", "m.layers.1"]
    assert block_names(modules, ["head"]) == []
