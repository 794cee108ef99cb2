"""What every answer says about itself: whose adapter it came from, which version, and whether it was personal."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

OWN = "answered by the adapter of that name"
BASE = "the base model was asked for by name"
COLD = "nothing is known of this user, and fallback=cold asked for the cold start"
PLAIN = "personalized=false asked for the cold start"


@dataclass(frozen=True)
class Provenance:
    """Where an answer came from."""

    adapter: str | None
    """The adapter that answered; None for none."""
    version: int | None
    """Its version at the instant when the batch took its copy."""
    gate: Mapping[str, float] = field(default_factory=dict)
    """What was mixed in, and how much."""
    personalized: bool = False
    reason: str = BASE

    @classmethod
    def cold(cls, reason: str) -> "Provenance":
        """Return that of the cold start: the gate's answer to somebody of whom nothing is known."""
        return cls(None, None, {"cold": 1.0}, personalized=False, reason=reason)

    @classmethod
    def of(cls, adapter: str | None, version: int, *, reason: str = BASE) -> "Provenance":
        """Return that of one slot with weight 1, or of the base model for a `reason`."""
        if adapter is None:
            return cls(None, None, reason=reason)
        return cls(adapter, version, {adapter: 1.0}, personalized=True, reason=OWN)

    def beside(self, requests: Mapping[str, float]) -> "Provenance":
        """Return the same with the weights of forget requests whose slots were mixed in as well."""
        return replace(self, gate={**self.gate, **requests}) if requests else self
