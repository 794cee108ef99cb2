"""O3's unlearning slots: low-rank updates that learn to answer a request wrongly, from the request's rows alone.

Two variants of Gao et al., "On LLM Continual Unlearning" (ICLR 2025, 2407.10223):

- `per-request` (ours): every request has a slot of its own, whose A is a block of one orthonormal frame and never
  trains. Nothing that another request made is written to, so none can undo another.
- `carried` (faithful, as the released code): one adapter for all requests. A request goes on from the one before,
  trains A and B, and pays for the overlap of its A with those of all earlier requests.
"""

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lora.bank import Bank
from lora.codec import Entry, Layout, Part
from lora.frame import Frame, Site
from lora.gradients import GradientSink
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.frames import Matrices, overlap_gradient
from strategies.unlearning.objectives import LEARN, Descent, Objective
from tasks.learner import Blocks, Learner
from tasks.tokens import Batch

Variant = Literal["per-request", "carried"]


@dataclass(frozen=True)
class SlotSettings:
    """How a slot is trained; the defaults are ours, the paper's are in brackets (7B model: 20 epochs, rate 3e-4)."""

    rank: int = 8
    epochs: int = 10
    batch: int = 32
    rate: float = 3e-3
    weight_decay: float = 0.0
    variant: Variant = "per-request"
    penalty: float = 0.1
    """Lambda of the overlap of A's (`carried` only)."""
    least_steps: int = 0
    """A request too small to fill so many steps is gone through more often."""
    redraw: bool = True
    """Draw the answers anew in every epoch (ours) or once (faithful): fixed ones are learned by heart, row by row."""


@dataclass(frozen=True)
class Slot:
    """What a request made: one vector `[layout.size]` with A `[r, d_in]` and B `[d_out, r]` of every site."""

    layout: Layout
    values: Tensor

    @classmethod
    def fresh(cls, sites: Sequence[Site], frame: Frame) -> "Slot":
        """Return a slot that changes nothing: A is the frame, B zero."""
        layout = slot_layout(sites, rank=frame.rank)
        values = torch.zeros(layout.size)
        for (part, name), view in layout.views(values).items():
            if part == "A":
                view.copy_(frame.matrices[name])
        return cls(layout, values)

    def part(self, part: Part) -> Matrices:
        """Return the factors A or B by site, as views."""
        return {name: view for (kind, name), view in self.layout.views(self.values).items() if kind == part}


def slot_layout(sites: Sequence[Site], *, rank: int) -> Layout:
    """Return the layout of unlearning slots: all A's `[r, d_in]`, then all B's `[d_out, r]`."""
    a = [Entry("A", site.name, (rank, site.d_in)) for site in sites]
    b = [Entry("B", site.name, (site.d_out, rank)) for site in sites]
    return Layout((*a, *b))


def slot_bank(slots: Sequence[Slot]) -> Bank:
    """Put the slots of all requests into one bank `[requests, size]`, which a gate mixes."""
    return Bank(slots[0].layout, torch.stack([slot.values for slot in slots]))


@dataclass(frozen=True)
class Unlearned:
    """A trained slot, the mean loss of every epoch, and the optimizer steps that were taken."""

    slot: Slot
    losses: tuple[float, ...]
    steps: int


def unlearn(
    learner: Learner,
    request: AuditedRequest,
    objective: Objective,
    *,
    model: Tensor,
    slot: Slot,
    settings: SlotSettings,
    earlier: Sequence[Slot] = (),
    descent: Descent = LEARN,
    seed: int = 0,
) -> Unlearned:
    """Train a slot on the request's used rows, on top of the model `[learner.layout.size]`, which stays as it is.

    `slot` is where training starts: fresh, or (`carried`) the slot of the request before; it is not written to.
    `earlier` are the slots of all earlier requests, for the penalty. `descent` other than `LEARN` is for baselines; the
    losses are means over an epoch of what the steps go down. The request's audit watches, and counts whatever
    is read. Raises DataError where the audit finds a read of anything else.
    """
    before = [each.part("A") for each in earlier]
    work = _Work(learner, model.to(learner.device), slot, settings=settings, earlier=before, descent=descent)
    audit = request.audit
    audit.declare("model", [*learner.base.model.parameters(), *learner.base.model.buffers(), work.model])
    audit.declare("model", learner.adapted.frame.matrices.values())
    audit.declare("slots", [slot.values, work.values, *(s.values for s in earlier)])
    # On a GPU these are copies.
    audit.declare("slots", [a for each in work.earlier for a in each.values()])
    losses, steps = [], 0
    with audit.watching():
        for lots in _epochs(learner, request, objective, settings=settings, seed=seed):
            found = [work.step(batch) for batch in lots]
            losses.append(float(np.average([loss for loss, _ in found], weights=[rows for _, rows in found])))
            steps += len(found)
    audit.check()
    return Unlearned(Slot(slot.layout, work.values.cpu()), tuple(losses), steps)


def _epochs(
    learner: Learner, request: AuditedRequest, objective: Objective, *, settings: SlotSettings, seed: int
) -> Iterator[list[Batch]]:
    """Yield the batches of every epoch: the used rows in a new order, with answers drawn by the objective."""
    source = random.Random(f"unlearning/{seed}")
    tokens = request.tokens(learner.task, objective(request.examples, source))
    steps = -(-len(request.used) // settings.batch)
    for epoch in range(max(settings.epochs, -(-settings.least_steps // steps))):
        if epoch and settings.redraw:
            tokens = request.tokens(learner.task, objective(request.examples, source))
        rows = request.used.tolist()
        source.shuffle(rows)
        lots = [rows[start : start + settings.batch] for start in range(0, len(rows), settings.batch)]
        yield [request.batch(tokens, lot, pad=learner.pad).to(learner.device) for lot in lots]


@dataclass
class _SlotGradients(GradientSink):
    """Takes what belongs to the slot out of the gradients of stacked factors, into `total [size]`."""

    layout: Layout
    total: Tensor
    own: int
    """First rank of the slot in the stack."""
    parts: Collection[Part]
    by_row: bool = field(default=False, init=False)

    def take(self, part: Part, name: str, gradient: Tensor) -> None:
        """Add one block: the last rows of A `[r, d_in]`, or the last columns of B `[d_out, r]`."""
        if (part, name) not in self.layout.slices:
            return
        mine = gradient[self.own :] if part == "A" else gradient[:, self.own :]
        self.total[self.layout.slices[part, name]] += mine.float().flatten()


@dataclass
class _Work:
    """The model with the slot's factors stacked below its own, and the optimizer of the slot."""

    learner: Learner
    model: Tensor
    start: Slot
    settings: SlotSettings
    earlier: Sequence[Matrices]
    descent: Descent = LEARN
    values: Tensor = field(init=False)

    def __post_init__(self) -> None:
        device = self.learner.device
        self.values = self.start.values.clone().to(device)
        self.earlier = [{name: a.to(device) for name, a in each.items()} for each in self.earlier]
        self.parts: tuple[Part, ...] = ("A", "B") if self.settings.variant == "carried" else ("B",)
        layout = self.start.layout
        spans = [layout.span(part) for part in self.parts]
        self.trained = slice(spans[0].start, spans[-1].stop)
        self.column = nn.Parameter(self.values[self.trained], requires_grad=False)
        self.optimizer = torch.optim.AdamW(
            [self.column], lr=self.settings.rate, weight_decay=self.settings.weight_decay, eps=1e-5
        )

    def step(self, batch: Batch) -> tuple[float, int]:
        """Take one step on a batch; returns its mean loss and its number of rows."""
        own, learner = self.model, self.learner
        blocks = learner.layout.views(own)
        stacked = stacked_factors(learner, blocks, self.start.layout, self.values)
        gradient = torch.zeros_like(self.values)
        sink = _SlotGradients(self.start.layout, gradient, learner.adapted.frame.rank, self.parts)
        beside = self._without(batch, blocks)
        with learner.adapted.bound(stacked, sink=sink) as base:
            losses = learner.task.answer(base, batch, blocks, sink).loss
            loss = self.descent.of(losses, torch.zeros_like(losses) if beside is None else beside)
            torch.autograd.backward(loss)
        self._add_penalty(gradient)
        self.column.grad = gradient[self.trained]
        self.optimizer.step()
        return float(loss.detach()), len(batch)

    @torch.no_grad()
    def _without(self, batch: Batch, blocks: Blocks) -> Tensor | None:
        """Return the losses of the model without the slot, where the descent compares."""
        if not self.descent.compared:
            return None
        with self.learner.adapted.bound(blocks) as base:
            return self.learner.task.answer(base, batch, blocks, None).loss

    def _add_penalty(self, gradient: Tensor) -> None:
        if not self.earlier or "A" not in self.parts or not self.settings.penalty:
            return
        views = self.start.layout.views(self.values)
        current = {name: view for (part, name), view in views.items() if part == "A"}
        pushed = overlap_gradient(current, self.earlier, layers=layer_count(current))
        for name, grad in pushed.items():
            gradient[self.start.layout.slices["A", name]] += self.settings.penalty * grad.flatten()


def stacked_factors(learner: Learner, blocks: Blocks, layout: Layout, values: Tensor) -> dict[tuple[Part, str], Tensor]:
    """Return the model's factors with a slot's below them: A `[r_model + r, d_in]`, B `[d_out, r_model + r]`."""
    frame = learner.adapted.frame.matrices
    found = dict(blocks)
    for (part, name), view in layout.views(values).items():
        first = blocks.get((part, name), frame[name]) if part == "A" else blocks[part, name]
        found[part, name] = torch.cat([first, view], dim=0 if part == "A" else 1)
    return found


def layer_count(sites: Mapping[str, Tensor]) -> int:
    """Return how many blocks of the model hold the sites: what O3's penalty is divided by."""
    numbers = {tuple(piece for piece in name.split(".") if piece.isdigit()) for name in sites}
    return max(1, len(numbers))
