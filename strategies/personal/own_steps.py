"""A few gradient steps on a user's own latest events, from the mixture that the router gives: a slot of one's own."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lora.config import Section
from strategies.personal.asking import Asked, Asking
from strategies.personal.personalized import Personalized
from strategies.personal.slot_batches import UserEvents
from strategies.personal.slot_optimizer import SlotSteps
from strategies.personal.slot_training import SlotTrainer
from tasks.recommendation.interactions import Interactions, Queries
from tasks.tokens import Batch


class OwnSteps(Section):
    """How a mixture is trained on its user's own events."""

    steps: SlotSteps = SlotSteps(optimizer="sgd", rate=0.1)
    """Steps and their rule."""
    recent: int = 20
    """Latest events that are learned from, each asked as it stood when it happened."""


class _OwnLoss:
    """Negative log likelihood of likes under the whole score; a row's label is its place in `offsets` and `likes`."""

    def __init__(self, personal: Personalized, offsets: Tensor, likes: Tensor) -> None:
        self.parts, self.offsets, self.likes = personal.parts, offsets, likes

    def __call__(self, base: nn.Module, batch: Batch) -> Tensor:
        """Return the loss `[rows]`."""
        odds = self.parts.answering(base, batch)
        scores = self.parts.calibration(self.offsets[batch.labels], odds)
        return functional.binary_cross_entropy_with_logits(scores, self.likes[batch.labels], reduction="none")


def trained(personal: Personalized, log: Interactions, slots: Tensor, config: OwnSteps) -> Tensor:
    """Return `slots [users, size]` after the configured steps of every user of `log` on the latest events.

    A pure function of a user's slot and events: what comes event by event ends where it would have come at once. A
    slot whose training came to NaN or infinity stays the mixture.
    """
    latest = [np.arange(max(first, end - config.recent), end) for first, end in zip(log.starts, log.starts[1:])]  # noqa: B905
    rows = np.concatenate(latest)
    asked = questions(personal.asking, log, log.queries(rows))
    tokens = replace(asked.tokens, labels=np.arange(len(rows)), starts=None)
    ends = np.cumsum([len(each) for each in latest])
    events = [UserEvents(tokens.take(np.arange(end - len(own), end))) for end, own in zip(ends, latest, strict=True)]
    device = personal.base.placement.device
    loss = _OwnLoss(
        personal,
        torch.from_numpy(asked.offsets.astype(np.float32)).to(device),
        torch.from_numpy(log.likes[rows].astype(np.float32)).to(device),
    )
    found = SlotTrainer(personal.adapted, loss, pad=personal.parts.answering.pad)(slots, events, config=config.steps)
    return torch.where(found.finite[:, None], found.values, slots)


def questions(asking: Asking, log: Interactions, queries: Queries) -> Asked:
    """Ask without being remembered: what `Asking` keeps would outlive a user who is forgotten."""
    scores = np.zeros(len(queries))
    if asking.scorer is not None and asking.base_score != "none":
        scores = asking.scorer.logits(log, queries)
    return asking(log, queries, scores=scores)
