"""The gate of forgetting: how much of each request's slot is mixed into each row, beside the user's own slot.

The weight comes from the request's detector. Rows that no request is near to get nothing added, not even zero.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora.bank import Bank
from lora.errors import ModelError, nearest
from lora.gate import Gate
from lora.model import AdaptedModel
from lora.overlay import Overlay
from lora.recompute import block_names
from strategies.unlearning.detector import Detectors
from strategies.unlearning.encoder import SharedEncoder, masked_mean
from tasks.learner import Answers, Learner
from tasks.tokens import Batch

Weighting = Literal["hard", "soft", "cut", "always"]


def _hard(detectors: Detectors, distances: Tensor) -> Tensor:
    return (distances <= detectors.thresholds.to(distances)).double()


def _soft(detectors: Detectors, distances: Tensor, *, one_sided: bool = False) -> Tensor:
    columns = zip(detectors.each, distances.unbind(1), strict=True)
    return torch.stack([detector.weight(distance, one_sided=one_sided) for detector, distance in columns], dim=1)


def _cut(detectors: Detectors, distances: Tensor) -> Tensor:
    return _soft(detectors, distances, one_sided=True) * _hard(detectors, distances)


def _always(_: Detectors, distances: Tensor) -> Tensor:
    return torch.ones_like(distances)


WEIGHTINGS: dict[str, Callable[[Detectors, Tensor], Tensor]] = {
    "hard": _hard,
    "soft": _soft,
    "cut": _cut,
    "always": _always,
}


@dataclass(frozen=True)
class ForgettingGate:
    """Detectors of all requests and the bank of their slots.

    `weighting`: `hard` (1 within the request's threshold, else 0; the default), `soft` (O3's
    formula, which never falls below 0.119 and so touches every row), `cut` (the formula on the far side only, and 0
    beyond the threshold), `always` (1).

    With one slot a request, a hit loads that request's slot and no other. With one slot for all (O3's carried adapter)
    its weight is the largest of all requests', so any hit loads every request's forgetting.
    """

    detectors: Detectors
    slots: Bank
    weighting: Weighting = "hard"

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise ModelError(f"unlearning.gate={self.weighting} is unknown{nearest(self.weighting, WEIGHTINGS)}")
        if self.slots.slots not in (1, len(self.detectors)):
            raise ModelError(
                f"{len(self.detectors)} detectors for {self.slots.slots} slots; give one slot a request, or one for all"
            )

    @property
    def carried(self) -> bool:
        """Whether one slot serves all requests."""
        return self.slots.slots == 1 and len(self.detectors) > 1

    def weights(self, features: Tensor) -> Tensor:
        """Return the weight of every request for every row, `[rows, requests]`, of features `[rows, layers, d]`."""
        return WEIGHTINGS[self.weighting](self.detectors, self.detectors.distances(features)).float()

    def mixture(self, features: Tensor) -> Gate:
        """Return the gate over the slots."""
        weights = self.weights(features)
        return Gate.mixture(weights.amax(1, keepdim=True) if self.carried else weights)

    def overlay(self, features: Tensor) -> Overlay | None:
        """Return what the requests add to the batch, None where no request is near any row."""
        return Overlay.of(self.slots, self.mixture(features))


@dataclass(frozen=True)
class GatedLearner:
    """A learner whose answers pass the gate; features come from a separate pass of the shared encoder."""

    learner: Learner
    encoder: SharedEncoder
    gate: ForgettingGate

    @torch.no_grad()
    def answers(self, values: Tensor, batch: Batch) -> Answers:
        """Answer a batch with one vector `[size]` or one a row, `[rows, size]`, and the requests' slots on top."""
        overlay = self.gate.overlay(self.encoder.features(batch))
        return self.learner.answers(values, batch, overlay=overlay)


@dataclass
class _Watched:
    """Rides with a pass, adds nothing, and takes the features of its layers."""

    owner: "SecondLook"
    mask: Tensor | None
    features: dict[int, Tensor] = field(default_factory=dict)

    def add(self, name: str, x: Tensor, y: Tensor, *, scale: float) -> Tensor:
        return y


class SecondLook:
    """A gated learner whose detectors read any layer of the model's own pass, the last as well.

    Rows that no request is near to cost one pass and keep its answers, to the bit; the others are answered anew with
    their slots, which may adapt all layers: the price is the share of rows that are caught. Features are those of the
    model with the users' slots in it, so detectors are made with `factors`. Hooks sit on the model until `close`.
    """

    def __init__(self, learner: Learner, gate: ForgettingGate) -> None:
        self.learner, self.gate = learner, gate
        self.layers = gate.detectors.each[0].layers
        blocks = _blocks(learner.adapted)
        wrong = [layer for layer in self.layers if not 1 <= layer <= len(blocks)]
        if wrong or learner.base.causal:
            told = "a causal model" if learner.base.causal else f"layers {wrong}"
            raise ModelError(
                f"a second look reads layers 1 to {len(blocks)} of an encoder, not {told}; detect in a separate pass"
            )
        self._binding = next(iter(learner.adapted.layers.values())).binding
        base = learner.adapted.base
        self._hooks = [
            (base if layer == len(blocks) else base.get_submodule(blocks[layer - 1])).register_forward_hook(
                self._seen(layer)
            )
            for layer in self.layers
        ]

    @torch.no_grad()
    def answers(self, values: Tensor, batch: Batch) -> Answers:
        """Answer a batch with one vector `[size]` or one a group of rows, and the rows that are caught once more."""
        batch = batch.to(self.learner.device)
        watched = _Watched(self, batch.mask)
        first = self.learner.answers(values, batch, overlay=watched)
        weights = self.gate.mixture(torch.stack([watched.features[each] for each in self.layers], dim=1)).weights
        caught = None if weights is None else (weights != 0).any(1).nonzero()[:, 0]
        if weights is None or caught is None or not len(caught):
            return first
        rows = caught.to(batch.input_ids.device)
        mine = values if values.dim() == 1 else values[caught.to(values.device) * len(values) // len(batch)]
        overlay = Overlay.of(self.gate.slots, Gate.mixture(weights[caught]))
        again = self.learner.answers(mine, _rows(batch, rows), overlay=overlay)
        return _put(first, rows, again)

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _seen(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            bound = self._binding.now
            watched = None if bound is None else bound.overlay
            if isinstance(watched, _Watched) and watched.owner is self:
                states = output if isinstance(output, Tensor) else output[0]
                watched.features[layer] = masked_mean(states, watched.mask)

        return hook


def _rows(batch: Batch, rows: Tensor) -> Batch:
    mask, beside = (None if each is None else each[rows] for each in (batch.mask, batch.beside))
    longest = batch.input_ids.shape[1] if mask is None else int(mask.sum(1).max())
    return Batch(
        batch.input_ids[rows, :longest], None if mask is None else mask[:, :longest], batch.labels[rows], beside
    )


def _put(first: Answers, rows: Tensor, again: Answers) -> Answers:
    guess = None if first.guess is None or again.guess is None else first.guess.index_copy(0, rows, again.guess)
    columns = ("loss", "right", "asked")
    loss, right, asked = (getattr(first, each).index_copy(0, rows, getattr(again, each)) for each in columns)
    return Answers(loss, right, asked, guess)


@dataclass
class _Pending:
    """An overlay that is known only after the lower layers of the very pass that it is added to."""

    owner: "SamePass"
    mask: Tensor | None
    features: dict[int, Tensor] = field(default_factory=dict)
    overlay: Overlay | None = None

    def add(self, name: str, x: Tensor, y: Tensor, *, scale: float) -> Tensor:
        return y if self.overlay is None else self.overlay.add(name, x, y, scale=scale)


class SamePass:
    """A gated learner that needs no pass of its own for detection: the detectors read layers below the first slot.

    The features are those of the model with the users' slots in it: a slot in the lower layers moves them, so detectors
    are made with `features`, and users' slots belong into the layers above or stay small. Forward hooks sit on the
    blocks until `close`. Raises ModelError where a slot adapts a layer that the detectors read.
    """

    def __init__(self, learner: Learner, gate: ForgettingGate) -> None:
        self.learner, self.gate = learner, gate
        self.layers = gate.detectors.each[0].layers
        blocks = _blocks(learner.adapted)
        _check_below(self.layers, blocks, gate.slots)
        self._binding = next(iter(learner.adapted.layers.values())).binding
        self._hooks = [
            learner.adapted.base.get_submodule(blocks[layer - 1]).register_forward_hook(self._seen(layer))
            for layer in self.layers
        ]

    @torch.no_grad()
    def answers(self, values: Tensor, batch: Batch) -> Answers:
        """Answer a batch in one pass: detect below, mix above."""
        batch = batch.to(self.learner.device)
        return self.learner.answers(values, batch, overlay=_Pending(self, batch.mask))

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _seen(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            bound = self._binding.now
            pending = None if bound is None else bound.overlay
            if isinstance(pending, _Pending) and pending.owner is self:
                states = output if isinstance(output, Tensor) else output[0]
                pending.features[layer] = masked_mean(states, pending.mask)
                if len(pending.features) == len(self.layers):
                    pending.overlay = self.gate.overlay(torch.stack([pending.features[e] for e in self.layers], dim=1))

        return hook


def _blocks(adapted: AdaptedModel) -> list[str]:
    names = [name for name, _ in adapted.base.named_modules()]
    return block_names(names, [site.name for site in adapted.sites])


def _check_below(layers: Sequence[int], blocks: Sequence[str], slots: Bank) -> None:
    top = max(layers)
    if min(layers) < 1 or top >= len(blocks):
        raise ModelError(f"detection in the same pass reads layers 1 to {len(blocks) - 1}, not {list(layers)}")
    low = [name for name in slots.views("B") if any(name.startswith(f"{block}.") for block in blocks[:top])]
    if low:
        raise ModelError(
            f"the slots adapt '{low[0]}', which lies below layer {top} that the detectors read; adapt layers above it, "
            "or detect in a separate pass"
        )
