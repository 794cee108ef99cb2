"""SGD and AdamW over rows that do not know of each other: every slot has its own moments and its own count of steps."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lora.config import Section
from lora.errors import WrongUpdate


class SlotSteps(Section):
    """How slots are trained on new events."""

    steps: int = Field(3, ge=1)
    """Steps on all of a user's new events."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """Rule of a step."""
    rate: float = Field(0.01, gt=0)
    """Learning rate."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Momentum of sgd."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of adamw."""


BETAS, EPSILON = (0.9, 0.999), 1e-5
"""AdamW's. Well below 1e-5 a gradient is rounding noise, whose sign would depend on who shares the batch."""


@dataclass(frozen=True)
class Moments:
    """Optimizer state of slots: `first` and `second` `[slots, size]`, and steps taken `[slots]`, float32."""

    first: Tensor
    second: Tensor
    steps: Tensor

    @classmethod
    def fresh(cls, slots: int, size: int, *, device: torch.device | None = None) -> "Moments":
        """Return the state before any step."""
        zeros = torch.zeros(2, slots, size, device=device)
        return cls(zeros[0], zeros[1], torch.zeros(slots, device=device))

    @classmethod
    def read(cls, rows: Tensor) -> "Moments":
        """Take apart what `flat` made. Raises WrongUpdate for rows of another length."""
        if rows.dim() != 2 or rows.shape[1] % 2 == 0:
            raise WrongUpdate(f"optimizer rows of shape {tuple(rows.shape)}, expected [slots, 2 * size + 1]")
        size = rows.shape[1] // 2
        return cls(rows[:, :size].clone(), rows[:, size:-1].clone(), rows[:, -1].clone())

    def flat(self) -> Tensor:
        """Return the state as rows `[slots, 2 * size + 1]`, which can be kept as slots are."""
        return torch.cat([self.first, self.second, self.steps.unsqueeze(1)], dim=1)

    def take(self, rows: Tensor) -> "Moments":
        """Return copies of some rows."""
        return Moments(self.first[rows], self.second[rows], self.steps[rows])

    def to(self, device: torch.device) -> "Moments":
        """Return the state on a device; itself where it is there already."""
        if self.first.device == device:
            return self
        return Moments(self.first.to(device), self.second.to(device), self.steps.to(device))

    def put(self, rows: Tensor, other: "Moments") -> None:
        """Overwrite some rows."""
        self.first[rows], self.second[rows], self.steps[rows] = other.first, other.second, other.steps


def step(values: Tensor, gradients: Tensor, moments: Moments, *, config: SlotSteps) -> None:
    """Take one step on `values [slots, size]` in place, as torch.optim would for every row on its own."""
    moments.steps.add_(1)
    if config.optimizer == "adamw":
        _adamw(values, gradients, moments, config=config)
        return
    if config.momentum:
        gradients = moments.first.mul_(config.momentum).add_(gradients)
    values.sub_(gradients, alpha=config.rate)


def _adamw(values: Tensor, gradients: Tensor, moments: Moments, *, config: SlotSteps) -> None:
    """Decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), in torch's order of operations."""
    beta1, beta2 = BETAS
    count = moments.steps.double().unsqueeze(1)
    first, second = 1 - beta1**count, 1 - beta2**count
    if config.weight_decay:
        values.mul_(1 - config.rate * config.weight_decay)
    moments.first.lerp_(gradients, 1 - beta1)
    moments.second.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
    spread = moments.second.sqrt().mul_(second.rsqrt().float()).add_(EPSILON)
    values.sub_(spread.reciprocal_().mul_(moments.first).mul_((config.rate / first).float()))
