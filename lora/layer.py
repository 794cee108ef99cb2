"""The adapted layer: y = W x + s B (A x), one fused autograd function.

`A x` is computed once for all slots; only B differs by row. The backward pass hands out, beside the input's gradient,
either the summed gradients of the factors or one gradient a row (dL/dB_i = s e_i^T (A x_i)^T), without a second pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.errors import ModelError
from lora.frame import Site
from lora.gradients import GradientSink


def _apply(left: Tensor, matrix: Tensor) -> Tensor:
    """Multiply `left [rows, tokens, k]` by `matrix [k, m]`, or by one `[rows, k, m]` a row."""
    return torch.bmm(left, matrix) if matrix.dim() == 3 else left @ matrix


def _add_applied(total: Tensor, left: Tensor, matrix: Tensor, scale: float) -> Tensor:
    """Add scale * left @ matrix to `total [rows, tokens, m]` in place."""
    if matrix.dim() == 3:
        return total.baddbmm_(left, matrix, alpha=scale)
    width, depth = matrix.shape[1], matrix.shape[0]
    return total.view(-1, width).addmm_(left.reshape(-1, depth), matrix, alpha=scale).view(total.shape)


def _outer(left: Tensor, right: Tensor, *, by_row: bool, scale: float) -> Tensor:
    """Sum left^T right over tokens: `[rows, m, k]`, or over rows as well: `[m, k]`."""
    if by_row:
        return torch.bmm(left.transpose(1, 2), right).mul_(scale)
    return (left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])).mul_(scale)


class FusedLoRA(torch.autograd.Function):
    """W x + bias + s B (A x), with A `[r, d_in]` and B `[d_out, r]`, or one of either a row.

    With a sink, gradients of the factors go there and autograd sees none; without, autograd gets them as usual.
    The frozen W gets no gradient, and the input is kept for the backward pass only where A trains.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes positions only)
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        name: str,
        sink: GradientSink | None,
        anchor: Tensor | None,
    ) -> Tensor:
        """Return y `[rows, tokens, d_out]` for x `[rows, tokens, d_in]`."""
        y = F.linear(x, weight, bias)
        u = _apply(x, a.transpose(-1, -2))
        _add_applied(y, u, b.transpose(-1, -2), scale)
        wants_a = "A" in sink.parts if sink is not None else ctx.needs_input_grad[3]
        ctx.save_for_backward(u, weight, a, b, x if wants_a else None)
        ctx.scale, ctx.name, ctx.sink, ctx.wants_a = scale, name, sink, wants_a
        return y

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        """Return the gradients of x and, without a sink, of A and B."""
        u, weight, a, b, x = ctx.saved_tensors
        error = outputs[0].contiguous()
        sink: GradientSink | None = ctx.sink
        wants_x = ctx.needs_input_grad[0]
        grad_x = grad_a = grad_b = None
        back = _apply(error, b) if wants_x or ctx.wants_a else u
        if wants_x:
            grad_x = _add_applied(F.linear(error, weight.T), back, a, ctx.scale)
        if sink is None:
            if ctx.needs_input_grad[4]:
                grad_b = _outer(error, u, by_row=b.dim() == 3, scale=ctx.scale)
            if ctx.wants_a:
                grad_a = _outer(back, x, by_row=a.dim() == 3, scale=ctx.scale)
        else:
            if "B" in sink.parts:
                sink.take("B", ctx.name, _outer(error, u, by_row=sink.by_row, scale=ctx.scale))
            if ctx.wants_a:
                sink.take("A", ctx.name, _outer(back, x, by_row=sink.by_row, scale=ctx.scale))
        return grad_x, None, None, grad_a, grad_b, None, None, None, None


class AdaptedLinear(nn.Module):
    """A frozen linear layer (nn.Linear or GPT-2's Conv1D) with the low-rank update of whoever is bound to it.

    Unbound, it is the base layer. Binding is by `lora.model.AdaptedModel`; shapes are checked here.
    """

    def __init__(self, base: nn.Module, site: Site, *, scale: float) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self.scale = scale
        self.a: Tensor | None = None
        self.b: Tensor | None = None
        self.sink: GradientSink | None = None
        self.anchor: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen W as `[d_out, d_in]`; Conv1D keeps it the other way round."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight if isinstance(self.base, nn.Linear) else weight.T

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias `[d_out]`, if any."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted output; raises ModelError where rows have factors of their own and x has no rows."""
        if self.a is None or self.b is None:
            return self.base(x)  # type: ignore[no-any-return]
        rows = self.b.shape[0] if self.b.dim() == 3 else x.shape[0]
        if self.b.dim() == 3 and (x.dim() != 3 or x.shape[0] != rows):
            raise ModelError(
                f"'{self.site.name}' saw an input of shape {tuple(x.shape)} for {rows} rows of their own adapters; "
                "leave it out of adapter.targets"
            )
        x3 = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        y: Tensor = FusedLoRA.apply(  # type: ignore[no-untyped-call]
            x3, self.weight, self.bias, a, b, self.scale, self.site.name, self.sink, self.anchor
        )
        return y if x.dim() == 3 else y.reshape(*x.shape[:-1], -1)
