"""Where the adapted layers put the gradients of their factors during one backward pass."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from lora.codec import Layout, Part


class GradientSink(Protocol):
    """Takes the gradients of one backward pass, block by block, in place of autograd's `.grad`."""

    parts: Collection[Part]
    by_row: bool
    """True: blocks come as `[rows, *shape]`, one gradient a row. False: summed over the rows that share a factor,
    `[*shape]` where all do, `[groups, *shape]` where each group of rows has its own."""

    def take(self, part: Part, name: str, gradient: Tensor) -> None:
        """Receive one block."""


@dataclass
class SummedGradients:
    """Adds up all rows in `total [size]`: training of one adapter."""

    layout: Layout
    total: Tensor
    parts: Collection[Part]
    by_row: bool = field(default=False, init=False)

    def take(self, part: Part, name: str, gradient: Tensor) -> None:
        """Add one block at its place."""
        self.total[self.layout.slices[part, name]] += gradient.flatten()


@dataclass
class SlotGradients:
    """Adds up the rows of each slot in `total [slots, size]`; group i of the batch belongs to `slots[i]`."""

    layout: Layout
    total: Tensor
    slots: Tensor
    parts: Collection[Part]
    by_row: bool = field(default=False, init=False)

    def take(self, part: Part, name: str, gradient: Tensor) -> None:
        """Add one block's groups at their slots."""
        self.total[:, self.layout.slices[part, name]].index_add_(0, self.slots, gradient.flatten(1).float())


@dataclass
class ExampleGradients:
    """Keeps every row's gradient apart, `[rows, *shape]` a block: what DP-SGD clips."""

    layout: Layout
    parts: Collection[Part]
    blocks: dict[tuple[Part, str], Tensor] = field(default_factory=dict)
    by_row: bool = field(default=True, init=False)

    def take(self, part: Part, name: str, gradient: Tensor) -> None:
        """Keep one block; a layer that runs twice in a pass adds to it."""
        gradient = gradient.float()
        known = self.blocks.get((part, name))
        self.blocks[part, name] = gradient if known is None else known.add_(gradient)

    def of(self, parts: Collection[Part]) -> list[Tensor]:
        """Return the blocks of some parts in layout order."""
        return [self.blocks[e.part, e.name] for e in self.layout.entries if e.part in parts]

    def shares(self, parts: Collection[Part]) -> Iterator[tuple[slice, list[Tensor], Tensor | None]]:
        """Yield where the blocks of neighbouring parts belong: a slice of the vector, the blocks that fill it, and by
        how much each row counts there, `[rows]` (None: once)."""
        spans = [self.layout.span(part) for part in self.layout.parts if part in parts]
        yield slice(spans[0].start, spans[-1].stop), self.of(parts), None
