"""Arms by name, and what equal parameters means."""

from typing import Any

import pytest

from lora.config import AdapterConfig
from lora.errors import ConfigError
from strategies.personal.config import PersonalConfig
from strategies.personal.variants import VARIANTS, equal_rank, parameters_of, variant, widened


def test_every_form_has_a_name_and_is_what_it_says() -> None:
    forms = [name for name in VARIANTS if name.startswith("reclora-")]
    assert len(forms) == 8
    for name in forms:
        _, mixing, frame, routing = name.split("-")
        own = variant(name).personal(PersonalConfig())
        assert (own.mixing, own.frame, own.routing, own.gate) == (mixing, frame, routing, "router")


def test_an_unknown_arm_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'uniform-gate'"):
        variant("uniform_gate")


def test_a_single_lora_has_one_meta_lora_for_all() -> None:
    own = variant("single-lora-equal-rank").personal(PersonalConfig())
    assert own.meta_loras == 1 and own.gate == "uniform"
    with pytest.raises(ValueError, match="set gate: uniform"):
        PersonalConfig(meta_loras=1)


@pytest.mark.parametrize("frame", ["shared", "own"])
@pytest.mark.parametrize("gate", ["router", "uniform"])
def test_numbers_are_counted_as_they_are_trained(world: Any, frame: str, gate: str) -> None:
    one = world.arm(frame=frame, gate=gate)
    one.build(inputs=5, seed=0)
    counted = parameters_of(one.adapted.sites, one.config, rank=2, inputs=5)
    parts = (one.parts.meta, one.parts.gate)
    assert counted == sum(p.numel() for part in parts for p in part.parameters())


def test_equal_parameters_means_at_least_as_many_until_the_rank_is_full(world: Any) -> None:
    sites = world.arm().adapted.sites
    config = PersonalConfig(meta_loras=3, gate="uniform")
    single = PersonalConfig(meta_loras=1, gate="uniform")
    rank = equal_rank(sites, config, rank=2, inputs=5)
    assert rank == 6
    assert parameters_of(sites, single, rank=rank, inputs=5) == parameters_of(sites, config, rank=2, inputs=5)
    assert equal_rank(sites, PersonalConfig(meta_loras=3), rank=2, inputs=5) == 16  # the width of the small model
    with_a = equal_rank(sites, config, rank=2, inputs=5, own=True)
    own = PersonalConfig(meta_loras=1, gate="uniform", frame="own")
    wanted, found = (parameters_of(sites, each, rank=at, inputs=5) for each, at in ((config, 2), (own, with_a)))
    assert with_a < rank and wanted <= found < wanted + parameters_of(sites, own, rank=1, inputs=5)
    assert widened(AdapterConfig(rank=2, alpha=3), 6).alpha == 9
