"""Prompts as tokens, and the score of liking: log odds of two answer tokens (decoders) or of a head (encoders)."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from lora.errors import ModelError
from tasks.heads import pool
from tasks.models import BaseModel
from tasks.recommendation.prompts import ANSWERS
from tasks.tokens import Batch, Ids, Tokens, buckets, collate

OVERHEAD_TOKENS = 400.0
"""What starting a batch costs, in tokens that could have been read meanwhile; for small models on a CPU (measured)."""


def tokenized(texts: Sequence[str], tokenizer: Any, *, max_length: int) -> Tokens:
    """Tokenize prompts; one that is too long keeps its first token (a model's start) and its end (the question)."""
    if not texts:
        return Tokens([], starts=np.empty(0, dtype=np.int64))
    encoded = tokenizer(list(texts), return_attention_mask=False, return_token_type_ids=False, verbose=False)
    rows = (np.asarray(ids or [tokenizer.pad_token_id or 0], dtype=np.int64) for ids in encoded["input_ids"])
    whole = [ids if len(ids) <= max_length else np.concatenate([ids[:1], ids[1 - max_length :]]) for ids in rows]
    return Tokens(whole, starts=np.fromiter((len(ids) for ids in whole), np.int64, count=len(whole)))


def batches(tokens: Tokens, *, pad: int, group: int = 1, budget: int = 16_384) -> Iterator[tuple[Ids, Batch]]:
    """Yield all rows in batches of like length, at most `budget` tokens each: row indices and the padded batch.

    Rows come in groups of `group` neighbours, which stay together and in order.
    """
    longest = tokens.lengths.reshape(-1, group).max(axis=1)
    for found in buckets(longest, overhead=OVERHEAD_TOKENS / group, budget=max(budget // group, 1)):
        rows = (np.sort(found)[:, None] * group + np.arange(group)).reshape(-1)
        yield rows, packed(tokens, rows, pad=pad)


def beginnings(tokens: Tokens, *, group: int) -> Ids:
    """Return how many tokens of each group of neighbours are read once for all of them, `[groups]`.

    It is what all rows begin with, less than the whole of any; 0 where two passes would take longer than one.
    Candidates of one user differ in their last line only.
    """
    if group < 2:
        return np.zeros(len(tokens), dtype=np.int64)
    starts = range(0, len(tokens), group)
    alike = np.fromiter((_alike(tokens.ids[first : first + group]) for first in starts), np.int64, count=len(starts))
    return np.where(alike * (group - 1) > 2 * OVERHEAD_TOKENS, alike, 0)


def _alike(ids: Sequence[Ids]) -> int:
    least = min(len(row) for row in ids) - 1
    different = np.flatnonzero((np.stack([row[:least] for row in ids]) != ids[0][:least]).any(axis=0))
    return int(different[0]) if len(different) else least


def packed(tokens: Tokens, rows: Ids, *, pad: int) -> Batch:
    """Return the given rows as one padded batch."""
    return collate([(tokens, int(row)) for row in rows], pad=pad)


def answer_tokens(tokenizer: Any) -> tuple[int, int]:
    """Return the first tokens of the answers No and Yes. Raises ModelError where they are the same."""
    no, yes = (tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in ANSWERS)
    for left, right in zip(no, yes, strict=False):
        # SentencePiece writes a lone space first, the same for both.
        if left != right:
            return int(left), int(right)
    raise ModelError(f"the tokenizer writes {ANSWERS[0]!r} and {ANSWERS[1]!r} alike; use a model with another one")


class Answering(nn.Module):
    """The log odds of Yes that a (bound) base model gives to prompts.

    Decoders: the difference of the two answer tokens' logits after the last token; nothing else is computed of the
    vocabulary, and nothing is trained. Encoders: a linear head over mean token states of length sqrt(20), which starts
    at zero and is trained.
    """

    def __init__(self, base: BaseModel) -> None:
        super().__init__()
        self.causal = base.causal
        self.pad = int(base.tokenizer.pad_token_id or 0)
        if base.causal:
            weight, bias = _direction(base)
            self.register_buffer("weight", weight)
            self.register_buffer("bias", bias)
        else:
            self.weight = nn.Parameter(torch.zeros(base.width))
            self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, model: nn.Module, batch: Batch, *, begun: Tensor | None = None) -> Tensor:
        """Return log odds `[rows]`; decoders read what all rows have `begun` with, `[tokens]`, once."""
        if not self.causal:
            states = model(input_ids=batch.input_ids, attention_mask=batch.mask).last_hidden_state
            pooled: Tensor = pool(states, batch, "mean") @ self.weight + self.bias
            return pooled
        # Padding stands on the right, where causal attention never looks back at it: no mask is needed.
        known = {} if begun is None else {"past_key_values": _read(model, begun, rows=len(batch)), "use_cache": True}
        states = model.base_model(input_ids=batch.input_ids, **known).last_hidden_state  # type: ignore[operator]
        last = states[torch.arange(len(batch), device=states.device), batch.last]
        odds: Tensor = last.float() @ self.weight + self.bias
        return odds


def _read(model: nn.Module, begun: Tensor, *, rows: int) -> DynamicCache:
    """Return the keys and values of `begun [tokens]`, once for each of the rows."""
    cache = DynamicCache()
    model.base_model(input_ids=begun[None], past_key_values=cache, use_cache=True)  # type: ignore[operator]
    cache.batch_repeat_interleave(rows)
    return cache


@torch.no_grad()
def _direction(base: BaseModel) -> tuple[Tensor, Tensor]:
    no, yes = answer_tokens(base.tokenizer)
    head = base.model.get_output_embeddings()  # type: ignore[operator]
    weight = (head.weight[yes] - head.weight[no]).float().clone()
    bias = getattr(head, "bias", None)
    return weight, torch.zeros((), device=weight.device) if bias is None else (bias[yes] - bias[no]).float()


def loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the mean negative log likelihood of labels `[rows]` under log odds `[rows]`, nats."""
    return functional.binary_cross_entropy_with_logits(scores, labels)
