"""A request's slot by DP-SGD: what leaves the client tells little about any one of its rows."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora.codec import Part
from lora.errors import PrivacyError
from lora.gradients import ExampleGradients
from privacy.clipping import add_clipped, clip_factors
from privacy.plan import PrivatePlan
from privacy.randomness import Randomness
from strategies.unlearning.audit import drawn
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.o3 import Slot, Unlearned, stacked_factors
from strategies.unlearning.objectives import Objective
from tasks.learner import Learner
from tasks.tokens import Batch, Tokens

TRAINED: tuple[Part, ...] = ("B",)
PIECE = 32
"""Rows whose gradients are held at once."""


def unlearn_privately(
    learner: Learner,
    request: AuditedRequest,
    objective: Objective,
    *,
    model: Tensor,
    slot: Slot,
    rate: float,
    plan: PrivatePlan,
    randomness: Randomness,
    seed: int = 0,
) -> Unlearned:
    """Train a slot's B's on all rows of a request by DP-SGD (Abadi et al. 2016), over the model, which stays as it is.

    `rate` is SGD's, and falls to zero in a straight line: the noise of the last steps would stay in B. The caller has
    charged `plan.event(plan.steps)` to the rows' owner before. The losses are for the owner alone.

    **Guarantee**: the slot depends on the request's rows only through `plan.steps` sums of gradients, each over a fresh
    Poisson lot, clipped over all B's together to `clip`, with noise of `noise_multiplier * clip`, and divided by the
    expected size of a lot; each row's gradient depends on no other row.

    | case | what happens |
    |---|---|
    | a request that is divided | PrivacyError: who is held back would depend on the number of rows |
    | an empty lot | no forward pass; the noise alone is the sum |
    | a row with a NaN or infinite gradient | contributes zero |
    """
    if not request.whole:
        raise PrivacyError("the rows of a private request are not divided; make it with whole=True")
    audit, frame = request.audit, learner.adapted.frame
    values = slot.values.clone().to(learner.device)
    model = model.to(learner.device)
    audit.declare("model", [*learner.base.model.parameters(), *learner.base.model.buffers(), model])
    audit.declare("model", frame.matrices.values())
    audit.declare("slots", [slot.values, values])
    losses = []
    with audit.watching():
        tokens = request.tokens(learner.task, objective(request.examples, random.Random(f"unlearning/{seed}")))
        span = slot.layout.span("B")
        for step in range(plan.steps):
            lot = randomness.lot(len(tokens), rate=plan.rate)
            work = _Lot(learner, request, tokens, model, Slot(slot.layout, values))
            total, loss = work.clipped_sum(lot.tolist(), clip=plan.mechanism.clip)
            total += drawn(lambda: plan.mechanism.noise(span.stop - span.start, randomness)).to(total.device)
            values[span] -= rate * (1 - step / plan.steps) * total / plan.lot
            losses.append(loss)
    audit.check()
    return Unlearned(Slot(slot.layout, values.cpu()), tuple(losses), plan.steps)


@dataclass
class _SlotExamples(ExampleGradients):
    """Keeps the slot's own columns of every row's gradient of stacked B's, `[rows, d_out, r]` a site."""

    own: int = 0
    """First rank of the slot in the stack."""

    def take(self, part: Part, name: str, gradient: Tensor) -> None:
        """Keep one block."""
        if (part, name) in self.layout.slices:
            super().take(part, name, gradient[..., self.own :])


@dataclass(frozen=True)
class _Lot:
    """The gradients of a lot's rows, where the slot is now."""

    learner: Learner
    request: AuditedRequest
    tokens: Tokens
    model: Tensor
    slot: Slot

    def clipped_sum(self, lot: list[int], *, clip: float) -> tuple[Tensor, float]:
        """Return the sum of clipped gradients of all B's, and the mean loss (NaN of an empty lot)."""
        span = self.slot.layout.span("B")
        total = torch.zeros(span.stop - span.start, device=self.learner.device)
        losses: list[float] = []
        for start in range(0, len(lot), PIECE):
            rows = lot[start : start + PIECE]
            batch = self.request.batch(self.tokens, rows, pad=self.learner.pad).to(self.learner.device)
            losses += self._add(total, batch, clip=clip)
        return total, float(np.mean(losses)) if losses else float("nan")

    def _add(self, total: Tensor, batch: Batch, *, clip: float) -> list[float]:
        learner = self.learner
        blocks = learner.layout.views(self.model)
        stacked = stacked_factors(learner, blocks, self.slot.layout, self.slot.values)
        sink = _SlotExamples(self.slot.layout, TRAINED, own=learner.adapted.frame.rank)
        with learner.adapted.bound(stacked, sink=sink) as base:
            losses = learner.task.answer(base, batch, blocks, sink).loss
            torch.autograd.backward(losses.sum())
        gradients = sink.of(TRAINED)
        add_clipped(total, gradients, factors=clip_factors(gradients, bound=clip))
        return [float(loss) for loss in losses.detach()]
