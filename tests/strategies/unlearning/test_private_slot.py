"""The private slot: each row's gradient apart, clipped over all B's, noised, divided by the expected lot."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora.codec import Part
from lora.errors import PrivacyError
from privacy.mechanism import Mechanism
from privacy.plan import PrivatePlan
from privacy.randomness import SeededRandomness
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.frames import OrthogonalFrames
from strategies.unlearning.o3 import Slot, stacked_factors
from strategies.unlearning.objectives import RunnerUp
from strategies.unlearning.private_slot import unlearn_privately
from tasks.examples import Examples
from tasks.learner import Learner
from tests.queries import fit_head


@dataclass
class Scripted:
    """Lots that are given, and no noise; `drawn` are the sizes that were asked for."""

    lots: Sequence[Sequence[int]]
    drawn: list[int] = field(default_factory=list)
    asked: int = 0
    secure: bool = False

    def gaussian(self, size: int) -> Tensor:
        self.drawn.append(size)
        return torch.zeros(size)

    def lot(self, population: int, *, rate: float) -> NDArray[np.int64]:
        self.asked += 1
        return np.asarray(self.lots[self.asked - 1], dtype=np.int64)


def plan(*, steps: int = 1, clip: float = 1.0, noise: float = 1.0, lot: float = 8.0) -> PrivatePlan:
    return PrivatePlan(Mechanism(clip, None, noise), lot / 24, lot, steps, None, 1e-5)


def fresh(learner: Learner) -> Slot:
    sites = learner.adapted.sites
    slot = Slot.fresh(sites, OrthogonalFrames(sites, rank=2, beside=learner.adapted.frame).block(0))
    slot.values[slot.layout.span("B")] = 0.1 * torch.randn(
        slot.layout.length(("B",)), generator=torch.Generator().manual_seed(1)
    )
    return slot


def moved(learner: Learner, examples: Examples, lots: Sequence[Sequence[int]], **planned: float) -> Tensor:
    """Return by how much one step moves the B's, times the expected lot: the clipped sum, with its sign."""
    slot, chosen = fresh(learner), plan(**planned)  # type: ignore[arg-type]
    made = unlearn_privately(
        learner, AuditedRequest(examples, whole=True), RunnerUp((1,) * len(examples)),
        model=fit_head(learner, examples), slot=slot, rate=1.0, plan=chosen, randomness=Scripted(lots),
    )  # fmt: skip
    span = slot.layout.span("B")
    assert torch.equal(made.slot.part("A")["encoder.layer.0.attention.self.query"],
                       slot.part("A")["encoder.layer.0.attention.self.query"])  # fmt: skip
    return (slot.values - made.slot.values)[span] * chosen.lot


@dataclass
class OneRow:
    """Takes the gradient of a batch of one row, by the other way of summing."""

    slot: Slot
    own: int
    total: Tensor
    parts: tuple[Part, ...] = ("B",)
    by_row: bool = False

    def take(self, part: Part, name: str, gradient: Tensor) -> None:
        self.total[self.slot.layout.slices[part, name]] += gradient[:, self.own :].flatten()


def alone(learner: Learner, examples: Examples, row: int) -> Tensor:
    """Return the gradient of one row's loss, asked in a batch of its own."""
    slot, model = fresh(learner), fit_head(learner, examples)
    blocks = learner.layout.views(model)
    tokens = learner.task.tokenize(Examples(examples.texts, (1,) * len(examples)))
    sink = OneRow(slot, learner.adapted.frame.rank, torch.zeros_like(slot.values))
    ((_, batch),) = learner.batches([(tokens, row)])
    with learner.adapted.bound(stacked_factors(learner, blocks, slot.layout, slot.values), sink=sink) as base:
        torch.autograd.backward(learner.task.answer(base, batch, blocks, sink).loss.sum())
    return sink.total[slot.layout.span("B")]


def test_a_step_is_the_sum_of_gradients_that_are_clipped_row_by_row(
    learner: Learner, rows: Callable[..., Examples]
) -> None:
    examples, lot = rows(3), [0, 2, 5, 11, 23]
    each = [alone(learner, examples, row) for row in lot]
    norms = torch.stack([gradient.norm() for gradient in each])
    clip = float(norms.median())
    assert norms.min() < clip < norms.max()
    wanted = torch.stack([g * min(1.0, clip / float(g.norm())) for g in each]).sum(0)
    assert float((moved(learner, examples, [lot], clip=clip) - wanted).norm()) < 1e-4 * float(wanted.norm())


def test_one_row_more_moves_the_sum_by_no_more_than_the_clip(learner: Learner, rows: Callable[..., Examples]) -> None:
    examples = rows(3)
    for row in (0, 7, 19):
        with_it, without = (moved(learner, examples, [lot], clip=0.05) for lot in ([3, row, 21], [3, 21]))
        assert 0 < float((with_it - without).norm()) <= 0.05 * (1 + 1e-4)


def test_an_empty_lot_is_a_step_of_noise_alone(learner: Learner, rows: Callable[..., Examples]) -> None:
    assert not moved(learner, rows(3), [[]]).any()
    spans = {}
    for noise in (1.0, 3.0):
        slot = fresh(learner)
        made = unlearn_privately(
            learner, AuditedRequest(rows(3), whole=True), RunnerUp((1,) * 24), model=fit_head(learner, rows(3)),
            slot=slot, rate=1.0, plan=plan(noise=noise, clip=0.5), randomness=Noise(),
        )  # fmt: skip
        spans[noise] = float((slot.values - made.slot.values)[slot.layout.span("B")].std()) * 8.0
    assert spans[1.0] == pytest.approx(0.5, rel=0.05) and spans[3.0] == pytest.approx(1.5, rel=0.05)


class Noise(SeededRandomness):
    """Empty lots, and real noise."""

    def __init__(self) -> None:
        super().__init__(3)

    def lot(self, population: int, *, rate: float) -> NDArray[np.int64]:
        return np.zeros(0, dtype=np.int64)


def test_the_slot_forgets_and_nothing_but_the_request_is_read(learner: Learner, rows: Callable[..., Examples]) -> None:
    values = fit_head(learner, rows(0, 1, 2, 3))
    request = AuditedRequest(rows(3), whole=True)
    made = unlearn_privately(
        learner, request, RunnerUp((1,) * 24), model=values, slot=fresh(learner), rate=2.0,
        plan=plan(steps=40, noise=0.3), randomness=SeededRandomness(0),
    )  # fmt: skip
    losses = [loss for loss in made.losses if not np.isnan(loss)]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    report = request.audit.report()
    assert report["foreign"] == 0 and report["rows"] == 24 and not learner.adapted.base_moved()


def test_a_divided_request_is_refused(learner: Learner, rows: Callable[..., Examples]) -> None:
    with pytest.raises(PrivacyError, match="whole=True"):
        unlearn_privately(
            learner, AuditedRequest(rows(3)), RunnerUp((1,) * 24), model=learner.start(), slot=fresh(learner),
            rate=1.0, plan=plan(), randomness=Scripted([[]]),
        )  # fmt: skip
