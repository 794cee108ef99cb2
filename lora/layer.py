"""The adapted layer: y = W x + s B (A x), one fused autograd function.

`A x` is computed once for all slots; only B differs by row. The backward pass hands out, beside the input's gradient,
either the summed gradients of the factors or one gradient a row (dL/dB_i = s e_i^T (A x_i)^T), without a second pass.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.errors import ModelError
from lora.frame import Site
from lora.gradients import GradientSink
from lora.overlay import Overlaying


def _grouped(x: Tensor, matrix: Tensor) -> Tensor:
    """View `x [rows, tokens, k]` as `[groups, rows / groups * tokens, k]` where the matrix is one a group."""
    return x.view(matrix.shape[0], -1, x.shape[-1]) if matrix.dim() == 3 else x


def _apply(left: Tensor, matrix: Tensor) -> Tensor:
    """Multiply `left [rows, tokens, k]` by `matrix [k, m]`, or by one `[groups, k, m]` a group of rows."""
    if matrix.dim() == 3:
        return torch.bmm(_grouped(left, matrix), matrix).view(*left.shape[:2], -1)
    return left @ matrix


def _add_applied(total: Tensor, left: Tensor, matrix: Tensor, scale: float) -> Tensor:
    """Add scale * left @ matrix to `total [rows, tokens, m]` in place."""
    if matrix.dim() == 3:
        _grouped(total, matrix).baddbmm_(_grouped(left, matrix), matrix, alpha=scale)
    else:
        total.view(-1, matrix.shape[1]).addmm_(left.view(-1, matrix.shape[0]), matrix, alpha=scale)
    return total


def _outer(left: Tensor, right: Tensor, *, groups: int | None, scale: float) -> Tensor:
    """Sum left^T right over tokens, for each of `groups` groups of rows, `[groups, m, k]`, or over all, `[m, k]`.

    They are float32 where the base computes in half precision too: gradients are rounded no coarser before the clip.
    """
    left, right = _wide(left), _wide(right)
    if groups is None:
        return (left.view(-1, left.shape[-1]).T @ right.view(-1, right.shape[-1])).mul_(scale)
    left, right = left.view(groups, -1, left.shape[-1]), right.view(groups, -1, right.shape[-1])
    return torch.bmm(left.transpose(1, 2), right).mul_(scale)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _forward(  # noqa: PLR0917 - as FusedLoRA's
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return y and A x."""
    y = F.linear(x, weight, bias)
    u = _apply(x, a.transpose(-1, -2))
    return _add_applied(y, u, b.transpose(-1, -2), scale), u


def _answer(  # noqa: PLR0917 - as FusedLoRA's
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """Return y where no gradient is asked for.

    One A for all rows is the left factor of its product: a few long rows take half the time of a few long columns.
    """
    y = F.linear(x, weight, bias)
    if a.dim() == 3:
        u = _apply(x, a.mT)
    else:
        u = torch.mm(a, x.view(-1, x.shape[-1]).T).view(-1, x.shape[0], x.shape[1]).permute(1, 2, 0)
    if b.shape[0] == x.shape[0] and b.dim() == 3:
        return y.baddbmm_(u, b.mT, alpha=scale)
    return _add_applied(y, u, b.mT, scale)


class FusedLoRA(torch.autograd.Function):
    """W x + bias + s B (A x), with A `[r, d_in]` and B `[d_out, r]`, or one of either for each group of rows.

    A batch of n rows and g factors is g groups of n / g neighbouring rows; one row a group is the usual mixed batch,
    larger groups make larger matrix products. With a sink, gradients of the factors go there and autograd sees none;
    without, autograd gets them as usual. The frozen W gets no gradient, and the input is kept for the backward pass
    only where A trains.
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
        y, u = _forward(x, weight, bias, a, b, scale)
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
                grad_b = _outer(error, u, groups=_groups(b), scale=ctx.scale)
            if ctx.wants_a:
                grad_a = _outer(back, x, groups=_groups(a), scale=ctx.scale)
        else:
            rows = error.shape[0] if sink.by_row else None
            if "B" in sink.parts:
                sink.take("B", ctx.name, _outer(error, u, groups=rows or _groups(b), scale=ctx.scale))
            if ctx.wants_a:
                sink.take("A", ctx.name, _outer(back, x, groups=rows or _groups(a), scale=ctx.scale))
        return grad_x, None, None, grad_a, grad_b, None, None, None, None


def _groups(matrix: Tensor) -> int | None:
    return matrix.shape[0] if matrix.dim() == 3 else None


@dataclass(frozen=True)
class Bound:
    """What is bound to the layers: factors by site (A, B), where gradients go, and what makes autograd ask for them.

    An overlay adds updates with frames of their own to some rows.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    sink: GradientSink | None
    anchor: Tensor | None
    overlay: Overlaying | None = None


class Binding(threading.local):
    """The present `Bound` of one model; every thread has its own, so that threads can answer different batches."""

    now: Bound | None = None

    @contextmanager
    def of(self, bound: Bound) -> Iterator[None]:
        """Bind in this thread for the block, and afterwards what was bound before."""
        before, self.now = self.now, bound
        try:
            yield
        finally:
            self.now = before


class AdaptedLinear(nn.Module):
    """A frozen linear layer (nn.Linear or GPT-2's Conv1D) with the low-rank update of whoever is bound to it.

    Unbound, it is the base layer. Binding is by `lora.model.AdaptedModel`; shapes are checked here.
    """

    def __init__(self, base: nn.Module, site: Site, *, scale: float, binding: Binding) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self.scale = scale
        self.binding = binding

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
        bound = self.binding.now
        if bound is None:
            return self.base(x)  # type: ignore[no-any-return]
        a, b = bound.factors[self.site.name]
        if a.dtype != x.dtype or b.dtype != x.dtype:
            a, b = a.to(x.dtype), b.to(x.dtype)
        groups = _groups(b) or 1
        if groups > 1 and (x.dim() != 3 or x.shape[0] % groups):
            raise ModelError(
                f"'{self.site.name}' saw an input of shape {tuple(x.shape)} for {groups} groups of rows with adapters "
                "of their own; leave it out of adapter.targets"
            )
        x3 = (x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])).contiguous()
        if bound.sink is None and not torch.is_grad_enabled():
            y = _answer(x3, self.weight, self.bias, a, b, self.scale)
        else:
            y = FusedLoRA.apply(  # type: ignore[no-untyped-call]
                x3, self.weight, self.bias, a, b, self.scale, self.site.name, bound.sink, bound.anchor
            )
        y = y if x.dim() == 3 else y.reshape(*x.shape[:-1], -1)
        return y if bound.overlay is None else bound.overlay.add(self.site.name, x, y, scale=self.scale)
