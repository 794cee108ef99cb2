"""Attaching to a base model, binding factors to it, and taking everything off again."""

from typing import Any

import pytest
import torch
from torch import nn

from lora.codec import Entry, Layout
from lora.config import AdapterConfig
from lora.errors import ModelError
from lora.frame import Frame
from lora.layer import AdaptedLinear
from lora.model import AdaptedModel
from lora.targets import find_sites


def attach(family: Any, **traits: Any) -> AdaptedModel:
    return AdaptedModel.attach(family.make(), AdapterConfig(**({"rank": 4} | traits)))


def test_attach_draws_the_configured_frame(family: Any) -> None:
    adapted = attach(family, alpha=6, frame_seed=5, init="orthogonal", targets="attention")
    expected = Frame.draw(find_sites(family.make(), "attention"), rank=4, seed=5, init="orthogonal")
    assert adapted.frame.digest == expected.digest
    assert adapted.scale == 1.5
    assert set(adapted.layers) == set(expected.matrices)
    wrapped = {name for name, module in adapted.base.named_modules() if isinstance(module, AdaptedLinear)}
    assert wrapped == set(expected.matrices)


def test_a_frame_can_be_given(family: Any) -> None:
    base = family.make()
    frame = Frame.draw(find_sites(base, "ffn"), rank=2, seed=9)
    adapted = AdaptedModel.attach(base, AdapterConfig(targets="ffn", rank=2), frame=frame)
    assert adapted.frame is frame


def test_the_base_is_frozen_and_in_evaluation_mode(family: Any) -> None:
    base = family.make().train().requires_grad_(True)
    AdaptedModel.attach(base, AdapterConfig(rank=4))
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert not any(module.training for module in base.modules())


def test_entries_have_the_factors_shapes(family: Any) -> None:
    adapted = attach(family)
    assert adapted.entries("A") == tuple(Entry("A", site.name, (4, site.d_in)) for site in adapted.sites)
    assert adapted.entries("B") == tuple(Entry("B", site.name, (site.d_out, 4)) for site in adapted.sites)
    Layout((*adapted.entries("A"), *adapted.entries("B")))


def test_zero_b_is_the_base(family: Any) -> None:
    adapted, inputs = attach(family), family.inputs()
    zero: Any = {("B", entry.name): torch.zeros(entry.shape) for entry in adapted.entries("B")}
    with adapted.bound(zero) as model, torch.no_grad():
        torch.testing.assert_close(family.output(model, inputs), family.output(family.make(), inputs))


def test_nothing_stays_bound_after_the_block_even_after_an_error(family: Any, random_blocks: Any) -> None:
    adapted, inputs = attach(family), family.inputs()
    before = family.output(adapted.base, inputs)
    with adapted.bound(random_blocks(adapted)) as model:
        assert not torch.equal(family.output(model, inputs), before)
    assert torch.equal(family.output(adapted.base, inputs), before)
    with pytest.raises(KeyError), adapted.bound(random_blocks(adapted)):
        raise KeyError
    assert torch.equal(family.output(adapted.base, inputs), before)
    incomplete = dict(list(random_blocks(adapted).items())[:-1])
    with pytest.raises(KeyError), adapted.bound(incomplete):
        raise AssertionError("a missing block must not bind")
    assert torch.equal(family.output(adapted.base, inputs), before)


def test_a_bound_a_wins_over_the_frame_for_that_block_only(family: Any, random_blocks: Any) -> None:
    adapted, inputs, blocks = attach(family), family.inputs(), random_blocks(attach(family))
    own: Any = {("A", name): matrix * 2 for name, matrix in adapted.frame.matrices.items()}
    halved = {key: block / 2 for key, block in blocks.items()}
    digest = adapted.frame.fingerprint()
    with adapted.bound(blocks) as model, torch.no_grad():
        wanted = family.output(model, inputs)
    with adapted.bound({**halved, **own}) as model, torch.no_grad():
        torch.testing.assert_close(family.output(model, inputs), wanted, rtol=1e-5, atol=1e-5)
    with adapted.bound(blocks) as model, torch.no_grad():
        assert torch.equal(family.output(model, inputs), wanted)
    assert adapted.frame.fingerprint() == digest


def test_base_moved_sees_any_write_to_any_parameter(family: Any) -> None:
    count = len(list(family.make().parameters()))
    for place in (0, count // 2, count - 1):
        adapted = attach(family)
        assert not adapted.base_moved()
        with torch.no_grad():
            list(adapted.base.parameters())[place].view(-1)[0] += 1
        assert adapted.base_moved()


def test_detach_gives_the_base_back(family: Any, random_blocks: Any) -> None:
    base, inputs = family.make(), family.inputs()
    names, wanted = [name for name, _ in base.named_modules()], family.output(base, inputs)
    layers = {site.name: base.get_submodule(site.name) for site in find_sites(base, "all")}
    adapted = AdaptedModel.attach(base, AdapterConfig(rank=4))
    with adapted.bound(random_blocks(adapted)) as model:
        family.output(model, inputs)
    restored = adapted.detach()
    assert [name for name, _ in restored.named_modules()] == names
    assert all(restored.get_submodule(name) is layer for name, layer in layers.items())
    assert torch.equal(family.output(restored, inputs), wanted)
    again = AdaptedModel.attach(restored, AdapterConfig(rank=4))
    assert again.frame.digest == adapted.frame.digest


@pytest.mark.parametrize("first", ["all", "attention", "ffn"])
def test_a_second_adapter_is_refused_and_changes_nothing(family: Any, first: str) -> None:
    adapted = attach(family, targets=first)
    modules = dict(adapted.base.named_modules())
    with pytest.raises(ModelError, match="is adapted already; detach the first adapter"):
        AdaptedModel.attach(adapted.base, AdapterConfig(rank=2))
    assert dict(adapted.base.named_modules()) == modules


def test_a_missing_target_is_refused() -> None:
    with pytest.raises(ModelError, match="no linear layer is called 'q'"):
        AdaptedModel.attach(nn.ModuleDict({"0": nn.Linear(2, 2)}), AdapterConfig(targets=("q",)))
