"""Training of an encoder adapter for a detector: O3's contrastive entropy beside masked language modelling.

After the released code of O3 (2407.10223, section 3.2): a view with 15 % of its tokens masked goes through the encoder
with its adapter, the view as it is through the frozen encoder; equal weights of both losses. Means leave padding out.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.gradients import SummedGradients
from lora.model import AdaptedModel
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.o3 import Slot
from tasks.models import BaseModel
from tasks.tokens import IGNORED, Batch, Tokens


@dataclass(frozen=True)
class ContrastiveSettings:
    """How an encoder adapter is trained; defaults as the released code on short texts (rate 1e-4 there)."""

    rank: int = 8
    epochs: int = 2
    batch: int = 32
    rate: float = 1e-3
    weight_decay: float = 0.01
    masked: float = 0.15
    entropy: bool = True
    mlm: bool = True


def layer_mean(states: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean `[rows, d]` of token states over real tokens, not normalised."""
    if mask is None:
        return states.mean(1)
    weight = mask.to(states.device, states.dtype)
    return torch.einsum("nt,ntd->nd", weight, states) / weight.sum(1, keepdim=True)


def entropy_loss(views: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    """Return O3's contrastive entropy loss of layer means `[rows, d]`, one of each sequence a layer.

    Delta(i, l, j) = softmax_j(view_{i,l} . key_{j,l}) over the batch, raw products; the loss is the entropy
    `- sum_l mean_i sum_j Delta log Delta`. It is not InfoNCE: nothing says that j = i is the positive.
    """
    total = views[0].new_zeros(())
    for view, key in zip(views, keys, strict=True):
        logs = F.log_softmax(view @ key.T, dim=1)
        total = total - (logs.exp() * logs).sum(1).mean()
    return total


def mlm_loss(states: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
    """Return the masked-language-modelling loss of last states `[rows, tokens, d]`, by a head tied to the embeddings.

    `labels [rows, tokens]` are the hidden tokens' ids, IGNORED elsewhere; `embeddings [vocabulary, d]`. Sentence
    encoders such as MiniLM ship without a head of their own. 0 where nothing is masked.
    """
    asked = labels != IGNORED
    if not asked.any():
        return states.sum() * 0
    logits = states[asked] @ embeddings.T
    return F.cross_entropy(logits, labels[asked])


def mask_tokens(batch: Batch, tokenizer: Any, *, share: float, source: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return ids with a share of the tokens hidden and the labels of those, both `[rows, tokens]`.

    As in BERT: of the chosen ones 80 % become the mask token, 10 % a random token, 10 % stay; special tokens and
    padding are never chosen. A tokenizer without a mask token gets random tokens instead.
    """
    ids, width = batch.input_ids.numpy(), len(tokenizer)
    special = np.isin(ids, np.asarray(tokenizer.all_special_ids))
    real = np.ones_like(special) if batch.mask is None else batch.mask.numpy().astype(bool)
    chosen = (source.random(ids.shape) < share) & real & ~special
    fate = source.random(ids.shape)
    drawn = source.integers(0, width, ids.shape)
    hidden = drawn if tokenizer.mask_token_id is None else np.full_like(ids, tokenizer.mask_token_id)
    shown = np.where(chosen & (fate < 0.8), hidden, np.where(chosen & (fate < 0.9), drawn, ids))
    return torch.from_numpy(shown), torch.from_numpy(np.where(chosen, ids, IGNORED))


@dataclass(frozen=True)
class Adapted:
    """A trained encoder adapter and the mean losses of every epoch: entropy and MLM."""

    slot: Slot
    entropy: tuple[float, ...]
    mlm: tuple[float, ...]


def train_encoder(
    adapted: AdaptedModel,
    base: BaseModel,
    request: AuditedRequest,
    tokens: Tokens,
    *,
    start: Slot,
    settings: ContrastiveSettings,
    seed: int = 0,
) -> Adapted:
    """Train an adapter of the encoder (A and B) on the request's used rows, from `start`, which stays as it is."""
    audit = request.audit
    audit.declare("model", [*adapted.base.parameters(), *adapted.base.buffers()])
    audit.declare("slots", [start.values])
    pad = int(base.tokenizer.pad_token_id)
    source, order = np.random.default_rng(seed), random.Random(f"encoder/{seed}")
    values = start.values.clone().to(next(adapted.base.parameters()).device)
    column = nn.Parameter(values, requires_grad=False)
    optimizer = torch.optim.AdamW([column], lr=settings.rate, weight_decay=settings.weight_decay)
    audit.declare("slots", [values])
    entropies, mlms = [], []
    with audit.watching():
        for _ in range(settings.epochs):
            rows = request.used.tolist()
            order.shuffle(rows)
            found = []
            for first in range(0, len(rows), settings.batch):
                batch = request.batch(tokens, rows[first : first + settings.batch], pad=pad)
                with audit.reading(()) as made:
                    made.extend(mask_tokens(batch, base.tokenizer, share=settings.masked, source=source))
                gradient, losses = _gradient(adapted, Slot(start.layout, values), batch, made, settings=settings)
                column.grad = gradient
                optimizer.step()
                found.append(losses)
            means = np.asarray(found).mean(0)
            entropies.append(float(means[0]))
            mlms.append(float(means[1]))
    audit.check()
    return Adapted(Slot(start.layout, values.cpu()), tuple(entropies), tuple(mlms))


def _gradient(
    adapted: AdaptedModel,
    slot: Slot,
    batch: Batch,
    masked: Sequence[Tensor | None],
    *,
    settings: ContrastiveSettings,
) -> tuple[Tensor, tuple[float, float]]:
    """Return the gradient `[size]` of both losses at the adapter, and the losses."""
    device = slot.values.device
    shown, labels = (tensor.to(device) for tensor in masked if tensor is not None)
    batch = batch.to(device)
    with torch.no_grad():
        keys = [layer_mean(s, batch.mask) for s in _states(adapted.base, batch.input_ids, batch.mask)[1:]]
    gradient = torch.zeros_like(slot.values)
    sink = SummedGradients(slot.layout, gradient, ("A", "B"))
    with adapted.bound(slot.layout.views(slot.values), sink=sink) as model:
        states = _states(model, shown, batch.mask)
        views = [layer_mean(s, batch.mask) for s in states[1:]]
        entropy = entropy_loss(views, keys)
        mlm = mlm_loss(states[-1], labels, adapted.base.get_input_embeddings().weight)  # type: ignore[operator]
        total = entropy * settings.entropy + mlm * settings.mlm
        torch.autograd.backward(total)
    return gradient, (float(entropy.detach()), float(mlm.detach()))


def _states(model: nn.Module, ids: Tensor, mask: Tensor | None) -> Sequence[Tensor]:
    answer = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, return_dict=True)
    states: Sequence[Tensor] = answer.hidden_states
    return states
