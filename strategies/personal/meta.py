"""Meta-LoRAs: N low-rank updates of every adapted matrix, mixed anew for each row of a batch."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora.codec import Layout, Part
from lora.model import AdaptedModel
from strategies.personal.config import FrameKind, Mixing

Factors = Mapping[tuple[Part, str], Tensor]


class MetaLoRAs(nn.Module):
    """The parameters: B's, `b [N, size]`, a bank of N slots, and, where each has an A of its own, `a [N, size_a]`.

    All B start at zero, all A's are Kaiming-uniform with a = sqrt(5), as in the released code. Source: RecLoRA
    (Zhu et al., 2024), paper for `product`, code for `factor`.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        *,
        count: int,
        mixing: Mixing = "product",
        frame: FrameKind = "shared",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.count, self.mixing, self.frame = count, mixing, frame
        self.sites = tuple(site.name for site in adapted.sites)
        self.rank = adapted.frame.rank
        self.layout = Layout(adapted.entries("B"))
        self.layout_a = Layout(adapted.entries("A"))
        device = next(adapted.base.parameters()).device
        self.b = nn.Parameter(torch.zeros(count, self.layout.size, device=device))
        self.a: nn.Parameter | None = None
        if frame == "own":
            self.a = nn.Parameter(self._drawn(seed).to(device))
        self.shared = dict(adapted.frame.matrices)

    def _drawn(self, seed: int) -> Tensor:
        drawn = torch.empty(self.count, self.layout_a.size)
        source = torch.Generator().manual_seed(seed)
        for view in self.layout_a.views(drawn).values():
            bound = 1 / math.sqrt(view.shape[-1])
            view.uniform_(-bound, bound, generator=source)
        return drawn

    @property
    def mixed_rank(self) -> int:
        """Rank of a mixture: r, or N r where products over own A's are mixed."""
        return self.rank * self.count if self.stacked else self.rank

    @property
    def stacked(self) -> bool:
        """Whether a mixture is the N updates beside one another: products over A's of their own."""
        return self.frame == "own" and self.mixing == "product"

    def blocks(self, weights: Tensor) -> dict[tuple[Part, str], Tensor]:
        """Mix for groups of rows: weights `[sites, groups, N]` -> factors to bind, `B [groups, d_out, r]`.

        - shared frame: B_u = sum w_i B_i, and A stays the frame, whichever way is mixed;
        - own A's, factor: A_u = sum w_i A_i and B_u, so that the update has cross terms w_i w_j B_i A_j;
        - own A's, product: A `[N r, d_in]`, the A's on top of one another and the same for all rows, and B
          `[groups, d_out, N r]`, the B_i side by side, each scaled by w_i.
        """
        views = self.layout.views(self.b)
        per_site = dict(zip(self.sites, weights, strict=True))
        if self.stacked:
            return self._stacked_a() | {key: _beside(view, per_site[key[1]]) for key, view in views.items()}
        mixed = {key: _mixed(view, per_site[key[1]]) for key, view in views.items()}
        if self.a is not None:
            mixed |= {key: _mixed(view, per_site[key[1]]) for key, view in self.layout_a.views(self.a).items()}
        return mixed

    def _stacked_a(self) -> dict[tuple[Part, str], Tensor]:
        if self.a is None:
            return {}
        return {key: view.reshape(-1, view.shape[-1]) for key, view in self.layout_a.views(self.a).items()}

    def one(self, weights: Tensor) -> dict[tuple[Part, str], Tensor]:
        """Return one mixture, weights `[sites, N]` -> A `[r, d_in]` (where it is not the frame) and B `[d_out, r]`."""
        blocks = self.blocks(weights[:, None])
        return {key: block[0] if block.dim() == 3 else block for key, block in blocks.items()}

    @torch.no_grad()
    def cosines(self) -> Tensor:
        """Return the mean pairwise cosine of the updates B_i A_i, all sites joined, over pairs that are not zero.

        1 means that all are the same, whatever the gate says; NaN before anything was learned. No product is formed:
        <B_i A_i, B_j A_j> = sum of (B_i^T B_j) * (A_i A_j^T).
        """
        gram = torch.zeros(self.count, self.count, dtype=torch.float64)
        own = None if self.a is None else self.layout_a.views(self.a)
        for (_, name), b in self.layout.views(self.b).items():
            a = self.shared[name].to(b.device).expand(self.count, -1, -1) if own is None else own["A", name]
            inner = torch.einsum("ior,jos->ijrs", b, b) * torch.einsum("ird,jsd->ijrs", a, a)
            gram += inner.sum((2, 3)).double().cpu()
        size = gram.diagonal().sqrt()
        pairs = torch.triu(torch.outer(size, size) > 0, diagonal=1)
        return (gram / torch.outer(size, size).clamp(min=1e-300))[pairs].mean()


def _mixed(view: Tensor, weights: Tensor) -> Tensor:
    """Sum `view [N, m, k]` by `weights [groups, N]`: one product of matrices."""
    return torch.mm(weights, view.flatten(1)).view(len(weights), *view.shape[1:])


def _beside(view: Tensor, weights: Tensor) -> Tensor:
    """Put `view [N, d_out, r]` side by side, scaled by `weights [groups, N]`: `[groups, d_out, N r]`."""
    scaled = view.transpose(0, 1)[None] * weights[:, None, :, None]
    return scaled.flatten(2)
