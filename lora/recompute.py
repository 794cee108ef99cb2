"""Gradient checkpointing: blocks keep only their input, and run anew with the same factors in the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from lora.layer import Binding, Bound

Forward = Callable[..., Any]


class Recomputed:
    """A block's forward pass that autograd runs a second time instead of keeping what is inside.

    The second run happens in the backward pass: after the binding has ended, and on a GPU in autograd's own thread. So
    what was bound is kept with the call and bound again. The second run only restores what the layers had saved;
    their backward functions, which hand gradients to a sink, still run once each.
    """

    def __init__(self, forward: Forward, binding: Binding) -> None:
        self.forward = forward
        self.binding = binding

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer as the block does."""
        bound = self.binding.now
        if bound is None or not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        # Nothing is drawn at random in a base that stays in evaluation mode: no random state to keep.
        return checkpoint(self._bound, bound, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def _bound(self, bound: Bound, *args: Any, **kwargs: Any) -> Any:
        with self.binding.of(bound):
            return self.forward(*args, **kwargs)


def block_names(modules: list[str], sites: list[str]) -> list[str]:
    """Return the outermost numbered modules (`layers.0`) of every list of blocks in which a site lies."""
    lists = {head for site in sites if (head := _list_of(site)) is not None}
    return [name for name in modules if name.rpartition(".")[2].isdigit() and name.rpartition(".")[0] in lists]


def _list_of(name: str) -> str | None:
    """Return the path before the first number, such as `encoder.layer`; None for a path without a number."""
    pieces = name.split(".")
    first = next((place for place, piece in enumerate(pieces) if piece.isdigit()), None)
    return None if first is None else ".".join(pieces[:first])
