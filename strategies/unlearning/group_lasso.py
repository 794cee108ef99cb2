"""The group lasso over an adapter's factors: which blocks carry an update, and which are exactly zero."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lora.codec import Part
from lora.model import AdaptedModel, Blocks

Group = tuple[nn.Parameter, ...]


def block_of(site: str) -> str:
    """Return the path of the block that a site lies in: up to its first number; the site itself outside blocks."""
    pieces = site.split(".")
    first = next((place for place, piece in enumerate(pieces) if piece.isdigit()), len(pieces))
    return ".".join(pieces[: first + 1])


By = Literal["block", "adapter", "matrix"]


def grouped(factors: Mapping[tuple[Part, str], nn.Parameter], by: By) -> dict[str, Group]:
    """Divide factors by block, by adapted matrix, or one by one."""
    found: dict[str, list[nn.Parameter]] = {}
    for (part, site), factor in factors.items():
        name = {"block": block_of(site), "adapter": site, "matrix": f"{site}.{part}"}[by]
        found.setdefault(name, []).append(factor)
    return {name: tuple(group) for name, group in found.items()}


def norm(group: Group) -> Tensor:
    """Return the root of the sum of squares of all factors of a group; its gradient at zero is zero."""
    length: Tensor = torch.linalg.vector_norm(torch.cat([factor.flatten() for factor in group]))
    return length


def penalty(groups: Mapping[str, Group]) -> Tensor:
    """Return the structure loss: the sum of the groups' norms (no weight for their sizes, as the released code)."""
    return torch.stack([norm(group) for group in groups.values()]).sum()


@torch.no_grad()
def shrink(group: Group, amount: float) -> float:
    """Take the proximal step of `amount * norm` in place, and return the norm afterwards.

    argmin_x 1/2 |x - v|^2 + amount |x|  =  v max(0, 1 - amount / |v|): exact zeros where |v| <= amount.
    """
    length = float(norm(group))
    kept = max(0.0, 1.0 - amount / length) if length > 0 else 0.0
    for factor in group:
        factor.mul_(kept)
    return kept * length


def metric(group: Group, optimizer: torch.optim.AdamW) -> float:
    """Return AdamW's denominator for a group: root mean square of its gradients (plus eps), from its second moments."""
    settings = optimizer.param_groups[0]
    total, count = 0.0, 0
    for factor in group:
        state = optimizer.state.get(factor)
        if state:
            moment = state["exp_avg_sq"] / (1 - settings["betas"][1] ** float(state["step"]))
            total += float(moment.sum())
        count += factor.numel()
    return math.sqrt(total / count) + float(settings["eps"])


class ProximalGroups:
    """Takes the proximal step of every group after AdamW's, and lets go of groups that reached zero.

    AdamW moves every coordinate by about its rate, however small the gradient; a proximal step of rate * weight would
    be nothing beside that. So the step is measured in AdamW's own metric, as in proximal methods for adaptive steps
    (Yun et al., NeurIPS 2021), with one scalar a group for which a closed form exists: rate * weight / metric. A group
    is then held at zero about where the norm of its gradient is below the weight, as without AdamW. A group at
    zero has no gradient in either factor (dB ~ A x, dA ~ B^T e), so it stays there and is no longer computed.
    """

    def __init__(self, groups: Mapping[str, Group], optimizer: torch.optim.AdamW) -> None:
        self.groups, self.optimizer = groups, optimizer
        self.alive = dict(groups)

    def step(self, weight: float) -> None:
        """Shrink all groups by the present rate."""
        if weight == 0:
            return
        rate = float(self.optimizer.param_groups[0]["lr"])
        for name, group in list(self.alive.items()):
            if shrink(group, rate * weight / metric(group, self.optimizer)) == 0.0:
                del self.alive[name]
                for factor in group:
                    factor.requires_grad_(False)
                    factor.grad = None


@torch.no_grad()
def update_norms(adapted: AdaptedModel, blocks: Blocks, by: By) -> dict[str, float]:
    """Return the Frobenius norm of s B A of all matrices that a group has a factor in."""
    squares: dict[str, float] = {}
    for site in adapted.layers:
        key = block_of(site) if by == "block" else site
        product = adapted.scale * (blocks["B", site] @ blocks["A", site])
        squares[key] = squares.get(key, 0.0) + float(product.square().sum())
    return {key: value**0.5 for key, value in squares.items()}
