"""The `federation:` section of the run file."""

from typing import Literal

from pydantic import Field, model_validator

from lora.config import Section

Aggregator = Literal[
    "fedavg", "fedavgm", "fedadam", "fedadagrad", "fedyogi", "median", "trimmed-mean", "krum", "multi-krum"
]


class FederationConfig(Section):
    """`federation:`, who takes part, for how long, and how updates are combined."""

    strategy: Literal["ffa-lora", "lora", "rolora"] = "ffa-lora"
    """ffa-lora trains and sends B; lora trains and sends A and B; rolora alternates."""
    aggregator: Aggregator = "fedavg"
    """Flower's aggregator over the sent factors."""
    aggregator_options: dict[str, float] = Field(default_factory=dict)
    """Options handed to the aggregator, such as {server_learning_rate: 1.0, server_momentum: 0.9}."""
    clients: int = Field(4, ge=2, le=100_000)
    """Clients of the federation."""
    rounds: int = Field(5, ge=1)
    """Federated rounds."""
    sampling: Literal["all", "fixed", "poisson"] = "all"
    """Who trains in a round: everybody, a fixed number, or each with probability `fraction`."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of clients that train in a round, for `sampling: fixed` or `poisson`."""
    min_clients: int = Field(1, ge=1)
    """A round with fewer usable replies ends the run (a Poisson round for which nobody was drawn is skipped)."""
    weights: Literal["uniform", "examples"] = "uniform"
    """Weight of a client in the average; private runs demand uniform."""
    timeout: float = Field(3600.0, gt=0)
    """Seconds to wait for the replies of a round."""
    greeting_timeout: float = Field(600.0, gt=0)
    """Seconds to wait for `min_clients` nodes, at the start and before a round: a node loads its model first."""
    evaluate_clients: bool = False
    """Ask clients for their own accuracy after the last round (non-private runs only)."""

    @model_validator(mode="after")
    def _enough_clients(self) -> "FederationConfig":
        if self.min_clients > self.clients:
            raise ValueError(f"min_clients={self.min_clients} exceeds clients={self.clients}; lower min_clients")
        if self.sampling == "all" and self.fraction != 1.0:
            raise ValueError(f"fraction={self.fraction} has no meaning with `sampling: all`; use fixed or poisson")
        chosen = max(1, round(self.fraction * self.clients))
        if self.sampling == "fixed" and self.min_clients > chosen:
            raise ValueError(
                f"min_clients={self.min_clients} exceeds the {chosen} clients that a round chooses; lower it"
            )
        return self
