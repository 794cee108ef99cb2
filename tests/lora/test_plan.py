"""What trains and what travels, round by round."""

import pytest

from lora.codec import Part
from lora.plan import FFA_LORA, LORA, PLANS, ROLORA, FactorPlan, RoundPlan


@pytest.mark.parametrize(
    ("plan", "rounds"),
    [
        (FFA_LORA, [("B",), ("B",), ("B",)]),
        (LORA, [("A", "B"), ("A", "B"), ("A", "B")]),
        (ROLORA, [("B",), ("A",), ("B",)]),
    ],
)
def test_the_named_plans(plan: FactorPlan, rounds: list[tuple[Part, ...]]) -> None:
    for number, parts in enumerate(rounds, start=1):
        assert plan.at(number, head=False) == RoundPlan(parts, parts)
        assert plan.at(number, head=True) == RoundPlan((*parts, "head"), (*parts, "head"))


def test_only_a_frozen_frame_stays_out_of_the_vector() -> None:
    assert {name: plan.moves_frame for name, plan in PLANS.items()} == {
        "ffa-lora": False,
        "lora": True,
        "rolora": True,
    }


def test_training_and_sending_may_differ() -> None:
    fedsa = FactorPlan((RoundPlan(("A", "B"), ("A",)),))
    assert fedsa.moves_frame
    assert fedsa.at(5, head=True) == RoundPlan(("A", "B", "head"), ("A", "head"))
