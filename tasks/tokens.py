"""Examples as token ids, and batches of them whose padding is not paid for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.examples import Examples

Ids = NDArray[np.int64]
Numbers = NDArray[np.float32]
IGNORED = -100
"""Label of a token that is not learned, as in torch's cross entropy."""


@dataclass(frozen=True)
class Tokens:
    """Token ids of every example; `labels [n]` for classification, `starts [n]` (first learned token) for causal LM.

    `beside [n, k]` are numbers that go with every example, such as the weights that route it.
    """

    ids: Sequence[Ids]
    labels: Ids | None = None
    starts: Ids | None = None
    beside: Numbers | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int] | Ids) -> "Tokens":
        """Return the given rows, sharing their memory."""
        rows = np.asarray(indices, dtype=np.int64)
        return Tokens(
            [self.ids[row] for row in rows],
            None if self.labels is None else self.labels[rows],
            None if self.starts is None else self.starts[rows],
            None if self.beside is None else self.beside[rows],
        )

    @property
    def lengths(self) -> Ids:
        """Tokens of every example."""
        return np.fromiter((len(row) for row in self.ids), dtype=np.int64, count=len(self.ids))


@dataclass(frozen=True)
class Batch:
    """Padded rows: `input_ids [rows, tokens]`, a mask (None where nothing is padded), labels `[rows]` or per token.

    `beside [rows, k]` are the numbers that go with every row, if any.
    """

    input_ids: Tensor
    mask: Tensor | None
    labels: Tensor
    beside: Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def last(self) -> Tensor:
        """Index of every row's last real token, `[rows]`."""
        if self.mask is None:
            return torch.full((len(self),), self.input_ids.shape[1] - 1, device=self.input_ids.device)
        return self.mask.sum(1) - 1

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device, where it arrives while the CPU goes on; itself where it is there already."""
        if self.input_ids.device == device:
            return self
        mask, beside = (None if each is None else _sent(each, device) for each in (self.mask, self.beside))
        return Batch(_sent(self.input_ids, device), mask, _sent(self.labels, device), beside)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    # Only pinned memory is copied to a GPU while the CPU goes on.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def tokenize_classification(examples: Examples, tokenizer: Any, *, max_length: int) -> Tokens:
    """Tokenize texts with their class labels."""
    encoded = _encode(tokenizer, examples.texts, max_length=max_length)
    return Tokens(encoded, np.asarray(examples.labels, dtype=np.int64))


def tokenize_causal(examples: Examples, tokenizer: Any, *, max_length: int) -> Tokens:
    """Tokenize texts to be learned after their prompts (if any); a text that fits ends with the end-of-text token.

    A prompt too long for its text keeps its end: at least half of `max_length` stays for the text.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if examples.prompts is None:
        whole = _encode(tokenizer, examples.texts, max_length=None)
        rows = [np.concatenate([row, np.asarray(end, dtype=np.int64)])[:max_length] for row in whole]
        return Tokens(rows, starts=np.zeros(len(rows), dtype=np.int64))
    prompts = _encode(tokenizer, examples.prompts, max_length=None)
    answers = _encode(tokenizer, [" " + text for text in examples.texts], max_length=None, special=False)
    rows, starts = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        text = np.concatenate([answer, np.asarray(end, dtype=np.int64)])
        room = max(max_length - len(text), max_length // 2)
        kept = prompt[-room:]
        rows.append(np.concatenate([kept, text])[:max_length])
        starts.append(len(kept))
    return Tokens(rows, starts=np.asarray(starts, dtype=np.int64))


def _encode(tokenizer: Any, texts: Sequence[str], *, max_length: int | None, special: bool = True) -> list[Ids]:
    if not texts:
        return []
    # The tokenizer's own limit would only warn; texts are cut here.
    encoded = tokenizer(
        list(texts),
        truncation=max_length is not None,
        max_length=max_length,
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    fallback = [tokenizer.pad_token_id or 0]
    return [np.asarray(row or fallback, dtype=np.int64) for row in encoded]


def collate(rows: Sequence[tuple[Tokens, int]], *, pad: int) -> Batch:
    """Pad the given rows (of one task, perhaps of several clients) on the right to the longest of them."""
    ids = [tokens.ids[row] for tokens, row in rows]
    lengths = [len(row) for row in ids]
    width = max(lengths)
    padded = np.full((len(ids), width), pad, dtype=np.int64)
    for place, row in zip(padded, ids, strict=True):
        place[: len(row)] = row
    mask = None if min(lengths) == width else np.arange(width) < np.asarray(lengths)[:, None]
    labels = _labels(rows, padded, lengths)
    beside = [tokens.beside[row] for tokens, row in rows if tokens.beside is not None]
    return Batch(
        torch.from_numpy(padded),
        None if mask is None else torch.from_numpy(mask).long(),
        torch.from_numpy(labels),
        torch.from_numpy(np.stack(beside)) if beside else None,
    )


def _labels(rows: Sequence[tuple[Tokens, int]], padded: Ids, lengths: Sequence[int]) -> Ids:
    if rows[0][0].labels is not None:
        return np.fromiter((t.labels[row] for t, row in rows if t.labels is not None), np.int64, count=len(rows))
    labels = padded.copy()
    for place, length, (tokens, row) in zip(labels, lengths, rows, strict=True):
        place[length:] = IGNORED
        if tokens.starts is not None:
            place[: tokens.starts[row]] = IGNORED
    return labels


def buckets(lengths: Ids, *, overhead: float, budget: int) -> list[Ids]:
    """Divide rows into batches of like length, at the least cost; returns row indices, longest batch first.

    A batch of n rows padded to T costs n T + `overhead` tokens; the division over distinct lengths is optimal
    (dynamic programming). Batches above `budget` tokens are then cut.
    """
    if len(lengths) == 0:
        return []
    order = np.argsort(-lengths, kind="stable")
    distinct, firsts = np.unique(-lengths[order], return_index=True)
    bounds = np.append(firsts, len(lengths))
    cost = np.zeros(len(bounds))
    cut = np.zeros(len(bounds), dtype=np.int64)
    for stop in range(1, len(bounds)):
        options = cost[:stop] + (bounds[stop] - bounds[:stop]) * -distinct[:stop] + overhead
        cut[stop] = int(np.argmin(options))
        cost[stop] = options[cut[stop]]
    groups: list[Ids] = []
    stop = len(bounds) - 1
    while stop > 0:
        start = int(cut[stop])
        rows = order[bounds[start] : bounds[stop]]
        most = max(1, budget // int(-distinct[start]))
        groups = [*np.array_split(rows, -(-len(rows) // most)), *groups]
        stop = start
    return groups
