"""Keys and values of texts that are written side by side: rows come and go, and every row keeps its own adapter."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lora.codec import Layout, Turned
from lora.model import AdaptedModel
from server.service.lent import Columns, Lent
from tasks.models import BaseModel


class Decoding:
    """Rows of a decoder in the middle of writing: their keys and values, right-aligned, and copies of their slots.

    `lengths [rows]` counts the tokens that a row has; all rows end at the same column, so that one step adds one token
    to each. A row joins by a prefill of its own and leaves by a selection of the others. There is room for `rows`.
    """

    def __init__(self, base: BaseModel, adapted: AdaptedModel, layout: Layout | Turned, *, rows: int) -> None:
        self.base, self.adapted = base, adapted
        self.device = base.placement.device
        self.lengths = torch.zeros(0, dtype=torch.int64)
        self.slots = Columns(layout, rows=rows, device=self.device, dtype=base.placement.dtype)
        self._cache = DynamicCache()

    @property
    def rows(self) -> int:
        """Rows that are being written."""
        return len(self.lengths)

    def copy(self, lent: Lent) -> None:
        """Copy the slots of the rows that join next."""
        self.slots.write(self.rows, lent)

    def join(self, prompts: Sequence[Tensor]) -> Tensor:
        """Read new prompts, whose slots were copied before, in order; returns the logits after each, `[n, V]`."""
        first = self.rows
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        cache = DynamicCache()
        # Padding stands on the right, where causal attention never looks back at it: no mask is needed.
        logits = self._pass(ids, slice(first, first + len(prompts)), cache, mask=None, positions=None, last=lengths - 1)
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
        self.slots.select(list(rows), of=self.rows)
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
        with self.adapted.bound(self.slots.views(rows)) as model:
            found = model(
                input_ids=ids.to(self.device), past_key_values=cache, use_cache=True,
                logits_to_keep=wanted.to(self.device), **moved,
            ).logits  # fmt: skip
        picked: Tensor = found[torch.arange(len(ids)), place].float().cpu()
        return picked

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
