"""Factor plans: which factor trains in a round, and which one travels."""

from dataclasses import dataclass

from lora.codec import Part


@dataclass(frozen=True)
class RoundPlan:
    """What one round trains and what clients send of it."""

    train: tuple[Part, ...]
    send: tuple[Part, ...]


@dataclass(frozen=True)
class FactorPlan:
    """A cycle of round plans over the factors A and B; a trained head always trains and travels beside them."""

    cycle: tuple[RoundPlan, ...]

    @property
    def moves_frame(self) -> bool:
        """Whether A ever trains; only then does a vector carry it."""
        return any("A" in plan.train for plan in self.cycle)

    def at(self, number: int, *, head: bool) -> RoundPlan:
        """Return the plan of a round (the first is 1)."""
        plan = self.cycle[(number - 1) % len(self.cycle)]
        return RoundPlan((*plan.train, "head"), (*plan.send, "head")) if head else plan


FFA_LORA = FactorPlan((RoundPlan(("B",), ("B",)),))
"""Train and send B over a frozen A (Sun et al., ICLR 2024)."""
LORA = FactorPlan((RoundPlan(("A", "B"), ("A", "B")),))
"""Train and send both factors: plain federated averaging of LoRA, whose mean of products is not exact."""
ROLORA = FactorPlan((RoundPlan(("B",), ("B",)), RoundPlan(("A",), ("A",))))
"""Odd rounds train B, even rounds A (RoLoRA, NeurIPS 2025): exact in every round."""

PLANS = {"ffa-lora": FFA_LORA, "lora": LORA, "rolora": ROLORA}
