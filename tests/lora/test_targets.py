"""Which layers are adapted, and that PEFT understands the same by the names we give it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora.errors import ModelError
from lora.targets import GROUPS, find_sites, short_names

COUNTS = {
    "bert": {"attention": 8, "ffn": 4},
    "roberta": {"attention": 8, "ffn": 4},
    "distilbert": {"attention": 8, "ffn": 4},
    "llama": {"attention": 8, "ffn": 6},
    "qwen": {"attention": 8, "ffn": 6},
    "gpt2": {"attention": 4, "ffn": 4},
    "vit": {"attention": 8, "ffn": 4},
}


def adapted_by_peft(model: nn.Module, names: list[str]) -> set[str]:
    twin = get_peft_model(model, LoraConfig(target_modules=names))
    return {name.removeprefix("base_model.model.") for name, module in twin.named_modules() if hasattr(module, "r")}


def test_groups_hold_the_layers_of_the_blocks(family: Any) -> None:
    model = family.make()
    found = {group: [site.name for site in find_sites(model, group)] for group in GROUPS}
    assert {group: len(found[group]) for group in ("attention", "ffn")} == COUNTS[family.name]
    assert sorted(found["all"]) == sorted(found["attention"] + found["ffn"])
    assert not any("pooler" in name or "lm_head" in name or "embed" in name for name in found["all"])


def test_sites_have_the_layers_widths(family: Any) -> None:
    model = family.make()
    for site in find_sites(model, "all"):
        layer: Any = model.get_submodule(site.name)
        assert layer(torch.zeros(1, site.d_in)).shape == (1, site.d_out)


@pytest.mark.parametrize("targets", GROUPS)
def test_peft_adapts_the_same_modules_by_the_short_names(family: Any, targets: str) -> None:
    model = family.make()
    sites = find_sites(model, targets)
    names = short_names(model, sites)
    assert adapted_by_peft(model, names) == {site.name for site in sites}
    leaves = {site.name.rsplit(".", 1)[-1] for site in sites}
    if set(names) != leaves:
        assert adapted_by_peft(family.make(), sorted(leaves)) != {site.name for site in sites}


@pytest.mark.parametrize("which", [0, 3, -1])
def test_peft_adapts_the_same_single_module(family: Any, which: int) -> None:
    model = family.make()
    site = find_sites(model, "all")[which]
    assert adapted_by_peft(model, short_names(model, [site])) == {site.name}


def test_a_name_means_what_it_means_in_peft(family: Any) -> None:
    model = family.make()
    leaf = find_sites(model, "all")[0].name.rsplit(".", 1)[-1]
    ours = {site.name for site in find_sites(model, [leaf])}
    assert ours == {site.name for site in find_sites(model, leaf)}
    assert ours == adapted_by_peft(model, [leaf])


def test_a_full_path_means_one_layer_and_a_tail_of_it_every_such_layer() -> None:
    block = {"query": nn.Linear(2, 2), "subquery": nn.Linear(2, 2)}
    model = nn.ModuleDict({"0": nn.ModuleDict(block), "1": nn.ModuleDict({"query": nn.Linear(2, 3)})})
    assert [site.name for site in find_sites(model, ["1.query"])] == ["1.query"]
    assert [site.name for site in find_sites(model, "query")] == ["0.query", "1.query"]


def test_a_list_may_mix_groups_and_names(family: Any) -> None:
    model = family.make()
    everything = find_sites(model, "all")
    assert find_sites(model, ["attention", "ffn"]) == everything
    assert find_sites(model, ["ffn", everything[0].name]) != find_sites(model, "ffn")
    assert everything[0] in find_sites(model, ["ffn", everything[0].name])


def test_a_misspelt_name_is_answered_with_the_nearest(family: Any) -> None:
    model = family.make()
    leaf = find_sites(model, "all")[0].name.rsplit(".", 1)[-1]
    with pytest.raises(ModelError, match=rf"no linear layer is called '{leaf}x'; did you mean '{leaf}'\?"):
        find_sites(model, [leaf + "x"])
    with pytest.raises(ModelError, match=r"did you mean 'attention'\?"):
        find_sites(model, "atention")


@pytest.mark.parametrize(
    ("build", "targets", "message"),
    [
        (lambda: nn.Linear(2, 2), "all", "targets=all: the model has no such linear layers"),
        (lambda: nn.ModuleDict({"out": nn.Linear(2, 2)}), "attention", "known: out"),
        (lambda: nn.ModuleDict({"0": nn.ModuleDict({"up": nn.Linear(2, 2)})}), "attention", "known: up"),
        (lambda: nn.Conv2d(1, 1, 1), "ffn", r"known: none \(it has no nn.Linear or Conv1D\)"),
        (lambda: nn.ModuleDict({"out": nn.Linear(2, 2)}), (), r"targets=\[\]: nothing would be adapted.*ffn.*out"),
    ],
)
def test_a_model_without_such_layers_is_refused(build: Callable[[], nn.Module], targets: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        find_sites(build(), targets)
