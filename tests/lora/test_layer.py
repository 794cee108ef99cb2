"""The adapted layer against PEFT (outputs and gradients) and Opacus (per-example gradients)."""

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from peft import LoraConfig, get_peft_model
from torch import nn

from lora.codec import Layout
from lora.config import AdapterConfig
from lora.errors import ModelError
from lora.gradients import ExampleGradients, SlotGradients, SummedGradients
from lora.model import AdaptedModel

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def peft_twin(family, adapted: AdaptedModel, blocks) -> nn.Module:
    config = LoraConfig(r=adapted.frame.rank, lora_alpha=adapted.alpha, target_modules=[s.name for s in adapted.sites])
    twin = get_peft_model(family.make(), config).eval()
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for site in adapted.sites:
            stem = f"base_model.model.{site.name}"
            parameters[f"{stem}.lora_A.default.weight"].copy_(adapted.frame.matrices[site.name])
            parameters[f"{stem}.lora_B.default.weight"].copy_(blocks["B", site.name])
    return twin


def test_outputs_and_factor_gradients_equal_peft(family, random_blocks):
    adapted = AdaptedModel.attach(family.make(), AdapterConfig(rank=4, alpha=6))
    blocks = random_blocks(adapted)
    twin = peft_twin(family, adapted, blocks)
    inputs = family.inputs()
    leaves = {key: value.clone().requires_grad_() for key, value in blocks.items()}
    for site in adapted.sites:
        leaves["A", site.name] = adapted.frame.matrices[site.name].clone().requires_grad_()
    with adapted.bound(leaves) as model:
        ours = family.output(model, inputs)
    theirs = family.output(twin, inputs)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    assert (ours - family.output(family.make(), inputs)).abs().max() > 1e-2

    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    parameters = dict(twin.named_parameters())
    for site in adapted.sites:
        for part in ("A", "B"):
            wanted = parameters[f"base_model.model.{site.name}.lora_{part}.default.weight"].grad
            torch.testing.assert_close(leaves[part, site.name].grad, wanted, rtol=1e-4, atol=1e-5)


def test_every_row_can_have_its_own_adapter(family, random_blocks):
    adapted = AdaptedModel.attach(family.make(), AdapterConfig(rank=4))
    inputs = family.inputs()
    owners = [random_blocks(adapted, seed=seed) for seed in range(5)]
    rows = {key: torch.stack([blocks[key] for blocks in owners]) for key in owners[0]}
    with adapted.bound(rows) as model, torch.no_grad():
        mixed = family.output(model, inputs)
    for row, blocks in enumerate(owners):
        with adapted.bound(blocks) as model, torch.no_grad():
            alone = family.output(model, inputs)
        torch.testing.assert_close(mixed[row], alone[row], **TOLERANCE)


def test_example_gradients_equal_opacus(family, random_blocks):
    adapted = AdaptedModel.attach(family.make(), AdapterConfig(rank=4))
    blocks = random_blocks(adapted)
    twin = peft_twin(family, adapted, blocks)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    hooked = GradSampleModule(twin, loss_reduction="sum", strict=False)
    hooked.train()
    for module in hooked.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs = family.inputs()
    weights = torch.randn(family.output(adapted.base, inputs).shape, generator=torch.Generator().manual_seed(3))
    (family.output(hooked, inputs) * weights).sum().backward()

    sink = ExampleGradients(Layout(adapted.entries("B")), parts=("B",))
    with adapted.bound(blocks, sink=sink) as model:
        (family.output(model, inputs) * weights).sum().backward()
    parameters = dict(twin.named_parameters())
    assert len(sink.blocks) == len(adapted.sites)
    for site in adapted.sites:
        wanted = parameters[f"base_model.model.{site.name}.lora_B.default.weight"].grad_sample
        torch.testing.assert_close(sink.blocks["B", site.name], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [("B",), ("A",), ("A", "B")])
def test_sinks_agree_with_each_other(family, parts, random_blocks):
    adapted = AdaptedModel.attach(family.make(), AdapterConfig(rank=4))
    blocks = random_blocks(adapted)
    layout = Layout((*adapted.entries("A"), *adapted.entries("B"))).subset(parts)
    factors = blocks | {("A", site.name): adapted.frame.matrices[site.name] for site in adapted.sites}
    slots = torch.tensor([0, 1, 1, 0, 2])
    summed = SummedGradients(layout, torch.zeros(layout.size), parts)
    slotted = SlotGradients(layout, torch.zeros(3, layout.size), slots, parts)
    apart = ExampleGradients(layout, parts)
    each = {key: block.expand(5, *block.shape) for key, block in factors.items()}
    for sink, bound in ((summed, factors), (slotted, each), (apart, each)):
        with adapted.bound(bound, sink=sink) as model:
            family.output(model, family.inputs()).square().sum().backward()
    rows = torch.cat([block.flatten(1) for block in apart.of(parts)], dim=1)
    torch.testing.assert_close(rows.sum(0), summed.total, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slotted.total.sum(0), summed.total, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slotted.total[1], rows[1] + rows[2], rtol=1e-4, atol=1e-4)


def test_the_base_gets_no_gradient_and_does_not_move(family, random_blocks):
    adapted = AdaptedModel.attach(family.make(), AdapterConfig(rank=4))
    sink = ExampleGradients(Layout(adapted.entries("B")), parts=("B",))
    with adapted.bound(random_blocks(adapted), sink=sink) as model:
        family.output(model, family.inputs()).sum().backward()
    assert all(parameter.grad is None for parameter in adapted.base.parameters())
    assert not adapted.base_moved()
    with torch.no_grad():
        next(adapted.base.parameters()).add_(1.0)
    assert adapted.base_moved()


def test_unbound_and_detached_layers_are_the_base(family):
    base = family.make()
    before = family.output(base, family.inputs())
    adapted = AdaptedModel.attach(base, AdapterConfig(rank=4))
    torch.testing.assert_close(family.output(adapted.base, family.inputs()), before)
    with pytest.raises(ModelError, match="adapted already"):
        AdaptedModel(base, adapted.sites, adapted.frame, alpha=1.0)
    restored = adapted.detach()
    assert not any("AdaptedLinear" in type(module).__name__ for module in restored.modules())


def test_rows_of_their_own_need_an_input_with_those_rows():
    layer_model = nn.ModuleDict({"0": nn.Linear(4, 3)})
    adapted = AdaptedModel.attach(layer_model, AdapterConfig(rank=2))
    rows = {("B", "0"): torch.zeros(5, 3, 2)}
    with adapted.bound(rows) as model, pytest.raises(ModelError, match=r"'0' saw an input of shape \(4, 4\)"):
        model["0"](torch.zeros(4, 4))


def test_an_adapter_in_bfloat16_stays_close(family, random_blocks):
    adapted = AdaptedModel.attach(family.make(), AdapterConfig(rank=4))
    blocks = random_blocks(adapted)
    with adapted.bound(blocks) as model, torch.no_grad():
        exact = family.output(model, family.inputs())
        model.to(torch.bfloat16)
        inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in family.inputs().items()}
        rough = family.output(model, inputs).float()
    assert (rough - exact).norm() / exact.norm() < 0.05
