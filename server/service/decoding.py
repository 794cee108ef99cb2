"""Keys and values of texts that are written side by side: rows come and go, and every row keeps its own adapter."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lora.codec import Layout, Turned
from lora.model import AdaptedModel
from tasks.models import BaseModel


class Decoding:
    """Rows of a decoder in the middle of writing: their keys and values, right-aligned, and copies of their slots.

    `lengths [rows]` counts the tokens that a row has; all rows end at the same column, so that one step adds one token
    to each. A row joins by a prefill of its own and leaves by a selection of the others.
    """

    def __init__(self, base: BaseModel, adapted: AdaptedModel, layout: Layout | Turned, *, slots: Tensor) -> None:
        self.base, self.adapted, self.layout = base, adapted, layout
        self.device = base.placement.device
        self.lengths = torch.zeros(0, dtype=torch.int64)
        self._slots = slots
        self._views: dict[tuple[int, int], Any] = {}
        self._cache = DynamicCache()

    @property
    def rows(self) -> int:
        """Rows that are being written."""
        return len(self.lengths)

    @property
    def free(self) -> Tensor:
        """The rest of the kept buffer of slots, `[room, size]`: new rows are gathered into it before `join`."""
        return self._slots[self.rows :]

    def join(self, prompts: Sequence[Tensor], keep: Sequence[int]) -> Tensor:
        """Read new prompts, whose slots are in `free` in order; returns the logits after each that is kept, `[n, V]`.

        Rows of the buffer that are not kept are given up.
        """
        first = self.rows
        kept = torch.tensor(list(keep), dtype=torch.int64)
        self._slots[first : first + len(kept)] = self._slots[first + kept]
        chosen = [prompts[place] for place in keep]
        lengths = torch.tensor([len(prompt) for prompt in chosen])
        ids = torch.zeros(len(chosen), int(lengths.max()), dtype=torch.int64)
        for row, prompt in enumerate(chosen):
            ids[row, : len(prompt)] = prompt
        cache = DynamicCache()
        # Padding stands on the right, where causal attention never looks back at it: no mask is needed.
        logits = self._pass(ids, slice(first, first + len(chosen)), cache, mask=None, positions=None, last=lengths - 1)
        _right_align(cache, lengths)
        self._append(cache, lengths)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Add a token to every row, `tokens [rows]`; returns the logits of the next one, `[rows, V]`."""
        width = self._cache.get_seq_length()
        mask = torch.arange(width + 1) >= (width - self.lengths)[:, None]
        whole = None if bool(mask.all()) else mask.long()
        zero = torch.zeros(self.rows, dtype=torch.int64)
        positions = self.lengths[:, None]
        logits = self._pass(
            tokens[:, None], slice(0, self.rows), self._cache, mask=whole, positions=positions, last=zero
        )
        self.lengths = self.lengths + 1
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Let all other rows go; their slots and what they have written are overwritten or freed."""
        chosen = torch.tensor(list(rows), dtype=torch.int64)
        before = self.rows
        self._slots[: len(chosen)] = self._slots[chosen]
        self._slots[len(chosen) : before] = 0
        self.lengths = self.lengths[chosen]
        if not len(chosen):
            self._cache = DynamicCache()
            return
        width, own = int(self.lengths.max()), chosen.to(self.device)
        for layer in self._cache.layers:
            layer.keys = layer.keys[own, :, -width:].contiguous()  # type: ignore[index,union-attr]
            layer.values = layer.values[own, :, -width:].contiguous()  # type: ignore[index,union-attr]

    def _pass(
        self, ids: Tensor, rows: slice, cache: Any, *, mask: Tensor | None, positions: Tensor | None, last: Tensor
    ) -> Tensor:
        """Run the model over rows that have a slot each; `last` says after which of their tokens logits are wanted."""
        wanted, place = torch.unique(last, return_inverse=True)
        given = {"attention_mask": mask, "position_ids": positions}
        moved = {key: value.to(self.device) for key, value in given.items() if value is not None}
        with self.adapted.bound(self._blocks(rows)) as model:
            found = model(
                input_ids=ids.to(self.device), past_key_values=cache, use_cache=True,
                logits_to_keep=wanted.to(self.device), **moved,
            ).logits  # fmt: skip
        picked: Tensor = found[torch.arange(len(ids)), place].float().cpu()
        return picked

    def _blocks(self, rows: slice) -> Any:
        """Return the blocks of some rows of the buffer, which stays where it is: a step is too short to cut it anew."""
        key = rows.start, rows.stop
        if key not in self._views:
            self._views[key] = self.layout.views(self._slots[rows])
        return self._views[key]

    def _append(self, cache: DynamicCache, lengths: Tensor) -> None:
        if not self.rows:
            self._cache = cache
        else:
            width = max(self._cache.get_seq_length(), cache.get_seq_length())
            for layer, more in zip(self._cache.layers, cache.layers, strict=True):
                layer.keys = _stacked(layer.keys, more.keys, width)  # type: ignore[arg-type,union-attr]
                layer.values = _stacked(layer.values, more.values, width)  # type: ignore[arg-type,union-attr]
        self.lengths = torch.cat([self.lengths, lengths])


def _right_align(cache: DynamicCache, lengths: Tensor) -> None:
    """Move the real tokens of right-padded rows to the right end, keys and values of every layer."""
    width = int(lengths.max())
    if int(lengths.min()) == width:
        return
    place = (torch.arange(width)[None] - (width - lengths)[:, None]) % width
    for layer in cache.layers:
        layer.keys = _picked(layer.keys, place)  # type: ignore[arg-type,union-attr]
        layer.values = _picked(layer.values, place)  # type: ignore[arg-type,union-attr]


def _picked(column: Tensor, place: Tensor) -> Tensor:
    index = place.to(column.device)[:, None, :, None].expand(-1, column.shape[1], -1, column.shape[3])
    return column.gather(2, index)


def _stacked(one: Tensor, other: Tensor, width: int) -> Tensor:
    """Put rows below rows, padded on the left to one width."""
    return torch.cat([_widened(one, width), _widened(other, width)])


def _widened(column: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(column, (0, 0, width - column.shape[2], 0))
