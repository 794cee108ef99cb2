"""A base model with adapted layers in place: the frame attached, slots bound batch by batch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora.codec import Entry, Part
from lora.config import AdapterConfig
from lora.errors import ModelError
from lora.frame import Frame, Site
from lora.gradients import GradientSink
from lora.layer import AdaptedLinear, Binding, Bound
from lora.overlay import Overlaying
from lora.recompute import Recomputed, block_names
from lora.targets import find_sites

Blocks = Mapping[tuple[Part, str], Tensor]
"""Factors by part and site: B `[d_out, r]` (and A `[r, d_in]`), or one a group of rows: `[groups, d_out, r]`."""


class _Factors(Mapping[str, tuple[Tensor, Tensor]]):
    """A and B of every site, looked up when the model comes to it: blocks may be brought only then."""

    def __init__(self, blocks: Blocks, frame: Mapping[str, Tensor]) -> None:
        self._blocks, self._frame = blocks, frame

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        key: tuple[Part, str] = ("A", name)
        return self._blocks[key] if key in self._blocks else self._frame[name], self._blocks["B", name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._frame)

    def __len__(self) -> int:
        return len(self._frame)


class AdaptedModel:
    """A frozen base model whose chosen linear layers take the low-rank update of whoever is bound.

    The base never trains: its parameters are frozen here, and it stays in evaluation mode, so that one client's
    numbers do not depend on who shares its batch.
    """

    def __init__(self, base: nn.Module, sites: tuple[Site, ...], frame: Frame, *, alpha: float) -> None:
        for site in sites:
            _refuse_nested(base, site.name)
        self.base = base.eval().requires_grad_(False)
        self.sites = sites
        device = next(base.parameters()).device
        self.frame = frame.to(device)
        self.alpha = alpha
        self._binding = Binding()
        self.layers = {site.name: self._adapt(site) for site in sites}
        self._recomputed: list[nn.Module] = []
        self._rounded: tuple[Frame, torch.dtype, Mapping[str, Tensor]] | None = None
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._versions = [(parameter, parameter._version) for parameter in base.parameters()]

    @classmethod
    def attach(cls, base: nn.Module, config: AdapterConfig, *, frame: Frame | None = None) -> "AdaptedModel":
        """Put adapted layers in place of the configured targets. Raises ModelError where there are none."""
        sites = find_sites(base, config.targets)
        if frame is None:
            frame = Frame.draw(sites, rank=config.rank, seed=config.frame_seed, init=config.init)
        return cls(base, sites, frame, alpha=config.alpha)

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.alpha / self.frame.rank

    def entries(self, part: Part) -> tuple[Entry, ...]:
        """Return the layout entries of the factor A `[r, d_in]` or B `[d_out, r]`."""
        rank = self.frame.rank
        shapes = ((site.name, (rank, site.d_in) if part == "A" else (site.d_out, rank)) for site in self.sites)
        return tuple(Entry(part, name, shape) for name, shape in shapes)

    @contextmanager
    def bound(
        self, blocks: Blocks, *, sink: GradientSink | None = None, overlay: Overlaying | None = None
    ) -> Iterator[nn.Module]:
        """Answer, in this thread, with the given factors (A defaults to the frame); gradients go to `sink`.

        An overlay adds to some rows what they get on top.
        """
        missing = [name for name in self.layers if ("B", name) not in blocks]
        if missing:
            raise KeyError(f"there is no B of '{missing[0]}'")
        own = next(self.base.parameters())
        frame = self._frame_as(own.device, own.dtype)
        anchor = self._anchor if sink is not None else None
        with self._binding.of(Bound(_Factors(blocks, frame), sink, anchor, overlay)):
            yield self.base

    def _frame_as(self, device: torch.device, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Return the frame where the base computes, in its precision; it is rounded once and not in every pass."""
        frame = self.frame.to(device)
        if dtype not in (torch.bfloat16, torch.float16):
            return frame.matrices
        if self._rounded is None or self._rounded[0] is not frame or self._rounded[1] != dtype:
            self._rounded = frame, dtype, {name: matrix.to(dtype) for name, matrix in frame.matrices.items()}
        return self._rounded[2]

    @property
    def recomputes(self) -> bool:
        """Whether blocks run twice instead of keeping what is inside."""
        return bool(self._recomputed)

    def recompute_blocks(self) -> None:
        """Keep only the inputs of the model's blocks for the backward pass, and run every block twice instead.

        Gradients stay the same. Raises ModelError for a model without a list of blocks around its adapted matrices.
        """
        names = block_names([name for name, _ in self.base.named_modules()], [site.name for site in self.sites])
        if not names:
            raise ModelError(
                "model.gradient_checkpointing=true: the adapted matrices lie in no list of blocks (such as layers.0) "
                "that could be run again; set it to false"
            )
        for block in map(self.base.get_submodule, names):
            if not isinstance(block.forward, Recomputed):
                block.forward = Recomputed(block.forward, self._binding)
                self._recomputed.append(block)

    def base_moved(self) -> bool:
        """Whether any base parameter was written to since the layers were attached."""
        return any(parameter._version != version for parameter, version in self._versions)

    def detach(self) -> nn.Module:
        """Put the original layers and blocks back and return the base model."""
        for block in self._recomputed:
            del block.forward
        self._recomputed.clear()
        for name, layer in self.layers.items():
            parent, leaf = self._parent(name)
            setattr(parent, leaf, layer.base)
        return self.base

    def _adapt(self, site: Site) -> AdaptedLinear:
        parent, leaf = self._parent(site.name)
        layer = AdaptedLinear(getattr(parent, leaf), site, scale=self.scale, binding=self._binding).eval()
        setattr(parent, leaf, layer)
        return layer

    def _parent(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.base.get_submodule(path), leaf


def _refuse_nested(base: nn.Module, name: str) -> None:
    """Raise ModelError where the site, or the layer that holds it, is adapted already; nothing has been changed yet."""
    for path in (name, name.rpartition(".")[0]):
        if isinstance(base.get_submodule(path), AdaptedLinear):
            raise ModelError(f"'{path}' is adapted already; detach the first adapter before attaching another")
