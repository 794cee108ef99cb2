"""Merging: the function stays, the layers are plain again, and PEFT merges to the same weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from lora.config import AdapterConfig
from lora.layer import AdaptedLinear
from lora.merge import merge
from lora.model import AdaptedModel

Make = Callable[..., dict[tuple[str, str], Tensor]]


@torch.no_grad()
def test_the_merged_model_answers_as_the_adapted_one(family: Any, random_blocks: Make) -> None:
    model, inputs = family.make(), family.inputs()
    before = family.output(model, inputs)
    adapted = AdaptedModel.attach(model, AdapterConfig(rank=4))
    blocks = random_blocks(adapted)
    with adapted.bound(blocks):
        expected = family.output(model, inputs)
    merged = family.output(merge(adapted, blocks), inputs)
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=2e-5)
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())


def test_a_trained_a_is_merged_in_place_of_the_frame(family: Any, random_blocks: Make) -> None:
    adapted = AdaptedModel.attach(family.make(), AdapterConfig(rank=2, alpha=3.0, targets="ffn"))
    site, layer = adapted.sites[0], adapted.layers[adapted.sites[0].name]
    before, blocks = layer.weight.clone(), random_blocks(adapted)
    a = torch.randn(2, site.d_in, generator=torch.Generator().manual_seed(3))
    merge(adapted, {**blocks, ("A", site.name): a})
    torch.testing.assert_close(layer.weight, before + 1.5 * blocks["B", site.name] @ a)


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning")
def test_peft_merges_to_the_same_weights(family: Any, random_blocks: Make) -> None:
    adapted = AdaptedModel.attach(family.make(), AdapterConfig(rank=4, alpha=8.0, targets="ffn"))
    blocks, names = random_blocks(adapted), [site.name for site in adapted.sites]
    peft = get_peft_model(family.make(), LoraConfig(r=4, lora_alpha=8, target_modules=names))
    with torch.no_grad():
        for site in names:
            layer = peft.base_model.model.get_submodule(site)
            layer.lora_A["default"].weight.copy_(adapted.frame.matrices[site])
            layer.lora_B["default"].weight.copy_(blocks["B", site])
    theirs, ours = peft.merge_and_unload().state_dict(), merge(adapted, blocks).state_dict()
    assert theirs.keys() == ours.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-6)
