"""What the `federation:` section refuses."""

from typing import Any

import pytest
from pydantic import ValidationError

from strategies.federated.aggregation import AGGREGATORS
from strategies.federated.config import Aggregator, FederationConfig


@pytest.mark.parametrize(
    ("traits", "message"),
    [
        ({"clients": 3, "min_clients": 4}, "min_clients=4 exceeds clients=3; lower min_clients"),
        ({"fraction": 0.5}, "fraction=0.5 has no meaning with `sampling: all`; use fixed or poisson"),
        (
            {"sampling": "fixed", "fraction": 0.5, "clients": 4, "min_clients": 3},
            "min_clients=3 exceeds the 2 clients that a round chooses; lower it",
        ),
        ({"fraction": 0.0, "sampling": "poisson"}, "fraction"),
        ({"fraction": 1.5, "sampling": "fixed"}, "fraction"),
        ({"clients": 1}, "clients"),
        ({"rounds": 0}, "rounds"),
        ({"timeout": 0}, "timeout"),
        ({"aggregator": "fedprox"}, "aggregator"),
        ({"strategy": "flora"}, "strategy"),
        ({"client": 3}, "Extra inputs"),
    ],
)
def test_what_is_refused(traits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FederationConfig(**traits)


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_a_fraction_goes_with_sampling(sampling: Any) -> None:
    assert FederationConfig(sampling=sampling, fraction=0.5, clients=3, min_clients=2).fraction == 0.5


def test_every_named_aggregator_exists() -> None:
    assert set(Aggregator.__args__) == set(AGGREGATORS)  # type: ignore[attr-defined]


def test_the_section_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        FederationConfig().rounds = 3  # type: ignore[misc]
