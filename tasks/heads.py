"""Classification heads over pooled token states: trained, frozen or none."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora.codec import Entry
from lora.frame import Stream, dot
from lora.gradients import GradientSink
from tasks.tokens import Batch

TEMPERATURE = 20.0
"""Largest logit of a unit feature that meets a unit class vector; both are scaled by its root."""

Pooling = Literal["mean", "first", "last"]


def pool(states: Tensor, batch: Batch, how: Pooling) -> Tensor:
    """Make one feature `[rows, width]` of token states `[rows, tokens, width]`, of length sqrt(TEMPERATURE)."""
    if how == "first":
        pooled = states[:, 0]
    elif how == "last":
        pooled = states[torch.arange(len(batch), device=states.device), batch.last.to(states.device)]
    elif batch.mask is None:
        pooled = states.float().mean(1)
    else:
        mask = batch.mask.to(states.device, torch.float32)
        pooled = torch.einsum("nt,ntd->nd", mask, states.float()) / mask.sum(1, keepdim=True)
    return unit(pooled.float())


def unit(vectors: Tensor) -> Tensor:
    """Scale vectors `[..., width]` to length sqrt(TEMPERATURE)."""
    scaled: Tensor = F.normalize(vectors, dim=-1) * TEMPERATURE**0.5
    return scaled


class RowLinear(torch.autograd.Function):
    """x W^T + b with one (W, b) for all rows or one for each group of rows; gradients of both go to a sink."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes positions only)
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, sink: GradientSink, anchor: Tensor
    ) -> Tensor:
        """Return logits `[rows, classes]` for x `[rows, width]`."""
        ctx.save_for_backward(x, weight)
        ctx.sink = sink
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        """Return the gradient of x; hand those of W and b to the sink."""
        x, weight = ctx.saved_tensors
        error = outputs[0].contiguous()
        sink: GradientSink = ctx.sink
        if "head" in sink.parts:
            groups = error.shape[0] if sink.by_row else weight.shape[0] if weight.dim() == 3 else 1
            errors, inputs = error.view(groups, -1, error.shape[1]), x.view(groups, -1, x.shape[1])
            shape = (groups,) if sink.by_row or weight.dim() == 3 else ()
            sink.take("head", "weight", torch.bmm(errors.transpose(1, 2), inputs).view(*shape, *weight.shape[-2:]))
            sink.take("head", "bias", errors.sum(1).view(*shape, -1))
        return _back(error, weight), None, None, None, None


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if weight.dim() == 3:
        grouped = x.view(weight.shape[0], -1, x.shape[1])
        return torch.baddbmm(bias.unsqueeze(1), grouped, weight.transpose(1, 2)).view(x.shape[0], -1)
    return F.linear(x, weight, bias)


def _back(error: Tensor, weight: Tensor) -> Tensor:
    if weight.dim() == 3:
        return torch.bmm(error.view(weight.shape[0], -1, error.shape[1]), weight).view(error.shape[0], -1)
    return error @ weight


@dataclass(frozen=True)
class Head:
    """A linear head: weight `[classes, width]` and bias `[classes]`; trained heads live in the flat vector."""

    weight: Tensor
    bias: Tensor
    trained: bool

    def entries(self) -> tuple[Entry, ...]:
        """Return the layout entries of a trained head; none for a frozen one."""
        if not self.trained:
            return ()
        return Entry("head", "weight", tuple(self.weight.shape)), Entry("head", "bias", tuple(self.bias.shape))

    def logits(
        self, features: Tensor, *, weight: Tensor | None, bias: Tensor | None, sink: GradientSink | None
    ) -> Tensor:
        """Answer with the bound weights (one set, or one a row), or with the frozen ones."""
        if weight is None or bias is None:
            return F.linear(features, self.weight.to(features.device), self.bias.to(features.device))
        if sink is None:
            return _linear(features, weight, bias)
        anchor = torch.zeros((), device=features.device, requires_grad=True)
        answer: Tensor = RowLinear.apply(features, weight, bias, sink, anchor)  # type: ignore[no-untyped-call]
        return answer


def random_weight(classes: int, width: int, *, seed: int) -> Tensor:
    """Draw class vectors of length sqrt(TEMPERATURE), bit-identical on every machine."""
    rows = Stream(seed, "head").uniform(12, classes, width).sum(axis=0)
    # torch's own norm rounds by the width of the machine's vector registers; `dot` does not.
    lengths = np.array([[math.sqrt(dot(row, row))] for row in rows])
    return torch.from_numpy((rows / lengths * math.sqrt(TEMPERATURE)).astype(np.float32))
