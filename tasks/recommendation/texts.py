"""Embeddings of item texts by an encoder: mean of its token states."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from tasks.examples import Examples
from tasks.heads import pool
from tasks.models import BaseModel
from tasks.tokens import collate, tokenize_classification


def embedded(texts: Sequence[str], base: BaseModel, *, max_length: int = 64, batch: int = 64) -> NDArray[np.float32]:
    """Return unit vectors of texts, `[texts, d]`; texts of like length share a batch."""
    examples = Examples(tuple(texts), labels=(0,) * len(texts))
    tokens = tokenize_classification(examples, base.tokenizer, max_length=max_length)
    order = np.argsort(tokens.lengths, kind="stable")
    base.model.eval()  # A model that was made, not loaded, still drops out.
    found = np.empty((len(texts), base.width), dtype=np.float32)
    with torch.no_grad():
        for begin in range(0, len(order), batch):
            rows = order[begin : begin + batch]
            packed = collate([(tokens, int(row)) for row in rows], pad=base.tokenizer.pad_token_id or 0)
            packed = packed.to(base.placement.device)
            states = base.model(input_ids=packed.input_ids, attention_mask=packed.mask).last_hidden_state
            vectors = functional.normalize(pool(states.float(), packed, "mean"), dim=-1)
            found[rows] = vectors.cpu().numpy()
    return found
