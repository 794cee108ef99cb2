"""What detectors see of an input: layer-wise means of token states, from one pass that all detectors share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.codec import Part
from lora.errors import ModelError
from lora.model import AdaptedModel
from tasks.tokens import Batch

Factors = Mapping[tuple[Part, str], Tensor]


def masked_mean(states: Tensor, mask: Tensor | None) -> Tensor:
    """Return the unit mean `[rows, d]` of token states `[rows, tokens, d]` over real tokens alone.

    The released code of O3 takes padding in, so that its features tell the length of a text.
    """
    if mask is None:
        return F.normalize(states.float().mean(1), dim=-1)
    weight = mask.to(states.device, torch.float32)
    summed = torch.einsum("nt,ntd->nd", weight, states.float())
    return F.normalize(summed / weight.sum(1, keepdim=True), dim=-1)


@dataclass
class SharedEncoder:
    """The frozen base model as the encoder of all detectors: one pass a batch, however many requests there are.

    `layers` are hidden states, 0 the embeddings, -1 the last. `factors`, if any, is an adapter of the encoder's own
    (A and B of every site), as in O3, where every request trains one: requests with different ones cannot share a pass.
    `passes` counts forward passes; `pad` is the token id that fills rows up.
    """

    adapted: AdaptedModel
    layers: Sequence[int] = (-1,)
    factors: Factors | None = None
    pad: int = 0
    passes: int = field(default=0, init=False)

    @property
    def device(self) -> torch.device:
        """Where the base computes, and features are."""
        return next(self.adapted.base.parameters()).device

    @torch.no_grad()
    def features(self, batch: Batch) -> Tensor:
        """Return unit layer means `[rows, layers, d]`, float32."""
        batch = batch.to(self.device)
        states = self.states(batch)
        return torch.stack([masked_mean(states[layer], batch.mask) for layer in self.layers], dim=1)

    def states(self, batch: Batch) -> Sequence[Tensor]:
        """Return the token states of all layers, `[rows, tokens, d]` each. Raises ModelError for an unknown layer."""
        self.passes += 1
        if self.factors is None:
            found = self._run(batch)
        else:
            with self.adapted.bound(self.factors):
                found = self._run(batch)
        for layer in self.layers:
            if not -len(found) <= layer < len(found):
                last = len(found) - 1
                raise ModelError(f"layer {layer} does not exist: the model has layers 0 to {last}; give one of them")
        return found

    def _run(self, batch: Batch) -> Sequence[Tensor]:
        answer = self.adapted.base(
            input_ids=batch.input_ids, attention_mask=batch.mask, output_hidden_states=True, return_dict=True
        )
        states: Sequence[Tensor] = answer.hidden_states
        return states
