"""The `training:` section of the run file."""

from typing import Literal

from pydantic import Field, model_validator

from lora.config import Section


class TrainingConfig(Section):
    """`training:`, what a client does in a round."""

    steps: int = Field(5, ge=1)
    """Local optimizer steps per round."""
    batch: int = Field(32, ge=1)
    """Examples per step; with privacy the expected size of a Poisson lot."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Local optimizer; its state starts anew in every round."""
    rate: float = Field(0.1, gt=0)
    """Learning rate."""
    decay: Literal["none", "linear"] = "none"
    """Rates stay, or fall linearly over the rounds (the last round trains at 1/rounds of them): noise averages out."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Momentum of SGD."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    head_rate: float | None = Field(None, gt=0)
    """Learning rate of a trained head; null: the same as `rate`."""
    proximal: float = Field(0.0, ge=0)
    """FedProx: mu of the pull towards the round's start."""
    min_examples: int = Field(2, ge=1)
    """A client with fewer examples declines, and is named in the report."""

    def at(self, number: int, *, rounds: int) -> "TrainingConfig":
        """Return the section as it holds in a round (the first is 1)."""
        if self.decay == "none":
            return self
        left = (rounds - number + 1) / rounds
        head = None if self.head_rate is None else self.head_rate * left
        return self.model_copy(update={"rate": self.rate * left, "head_rate": head})

    @model_validator(mode="after")
    def _options_fit_the_optimizer(self) -> "TrainingConfig":
        if self.optimizer == "adamw" and self.momentum:
            raise ValueError(f"momentum={self.momentum} belongs to `optimizer: sgd`")
        if self.optimizer == "sgd" and self.weight_decay:
            raise ValueError(f"weight_decay={self.weight_decay} belongs to `optimizer: adamw`")
        return self
