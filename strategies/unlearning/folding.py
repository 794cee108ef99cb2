"""GS-LoRA over a served classifier: its adapter folded in, a request forgotten, and the result one adapter again.

The base model is public and stays as it is. What GS-LoRA learns is put beside the adapter's own factors, as further
rows of A and columns of B: the sum of both products is one product of stacked factors, exactly.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora.codec import Part
from lora.errors import ModelError
from lora.merge import merge
from strategies.unlearning.class_request import ClassRequest
from strategies.unlearning.classifier import Classifier
from strategies.unlearning.config import BudgetConfig, GsLoraConfig
from strategies.unlearning.gs_lora import GsLora
from tasks.encoders import TextEncoder
from tasks.exported import ExportedClassifier
from tasks.models import BaseModel

Factors = Mapping[tuple[Part, str], Tensor]

SERVED = GsLoraConfig(rate=6e-3, bound=1.0, sparsity=0.02, hold_weight=0.25, hold_bound=2.5)
"""What a served classifier forgets by; chosen on validation rows of CLINC150. A store is asked again and again: without
the hold, later requests bring earlier ones back."""
SERVED_PLUS = SERVED.model_copy(update={"prototypes": True, "prototype_forget": 0.1, "prototype_retain": 0.3})
"""The same for GS-LoRA++, chosen in the same way."""
BATCH = 16
"""Retained rows of a step, and as many of the request's; chosen with them."""


def plain(exported: ExportedClassifier, base: BaseModel) -> Classifier:
    """Return a classifier with the adapter in its weights; it takes the base model, which is no longer the public one.

    Raises ModelError for a base that the adapter does not fit.
    """
    learner, values = exported.over(base)
    merge(learner.adapted, learner.layout.views(values))
    head = nn.Linear(base.width, len(exported.labels))
    with torch.no_grad():
        head.weight.copy_(exported.weight)
        head.bias.copy_(exported.bias)
    encoder = TextEncoder(base, exported.pooling, exported.max_length)

    def fresh(seed: int) -> Classifier:
        raise ModelError("a served classifier cannot be trained anew here: what it learned from stays with the clients")

    return Classifier(encoder, head.to(base.placement.device), fresh=fresh)


def forget_classes(
    exported: ExportedClassifier,
    classifier: Classifier,
    request: ClassRequest,
    *,
    config: GsLoraConfig = SERVED,
    epochs: int,
    least_steps: int,
    seed: int,
) -> ExportedClassifier:
    """Return the exported classifier, `plain` as given, after it forgot the classes.

    It takes `epochs` passes over the replay sample, and more where that does not fill `least_steps`. Raises DataError
    for a request that does not fit.
    """
    passes = max(epochs, math.ceil(least_steps / math.ceil(len(request.retain) / BATCH)))
    budget = BudgetConfig(epochs=passes, batch=BATCH)
    proposal = GsLora(config).propose(classifier, request, budget, seed=seed)
    return stacked(exported, proposal.factors, scale=proposal.adapted.scale)


def stacked(exported: ExportedClassifier, factors: Factors, *, scale: float) -> ExportedClassifier:
    """Put further factors, which count `scale` times, beside an adapter's own; sites that one lacks get zeros there.

    Guarantee: with s the adapter's own scale, s [B, (scale/s) B'] [A; A'] = s B A + scale B' A'.
    """
    mine = {name: (exported.a[name], exported.b[name]) for name in exported.a}
    theirs = {name: (factors["A", name].detach().cpu(), factors["B", name].detach().cpu()) for part, name in factors
              if part == "A"}  # fmt: skip
    ratio, own, more = scale / exported.scale, exported.rank, next(iter(theirs.values()))[0].shape[0]
    a, b = {}, {}
    for name in {**mine, **theirs}:
        some_a, some_b = mine.get(name) or theirs[name]
        zeros_a, zeros_b = torch.zeros(1, some_a.shape[1]), torch.zeros(some_b.shape[0], 1)
        first_a, first_b = mine.get(name, (zeros_a.expand(own, -1), zeros_b.expand(-1, own)))
        next_a, next_b = theirs.get(name, (zeros_a.expand(more, -1), zeros_b.expand(-1, more)))
        a[name] = torch.cat([first_a, next_a]).contiguous()
        b[name] = torch.cat([first_b, ratio * next_b], dim=1).contiguous()
    return replace(exported, a=a, b=b, alpha=exported.scale * (own + more))
