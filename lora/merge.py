"""Folding an adapter into the base model for good: W becomes W + s B A."""

import torch
from torch import nn

from lora.model import AdaptedModel, Blocks


@torch.no_grad()
def merge(adapted: AdaptedModel, blocks: Blocks) -> nn.Module:
    """Take the adapted layers out again with one slot's update in their weights, and return the base model.

    The base then answers as the adapted model did (up to rounding) and can be adapted anew. A is the frame where
    `blocks` has none.
    """
    frame = adapted.frame.matrices
    factors = {name: (blocks.get(("A", name), frame[name]), blocks["B", name]) for name in adapted.layers}
    layers = dict(adapted.layers)
    base = adapted.detach()
    for name, (a, b) in factors.items():
        weight = layers[name].weight  # of a Conv1D a transposed view, so it is written in place
        weight.add_((adapted.scale * (b.float() @ a.float())).to(weight))
    return base
