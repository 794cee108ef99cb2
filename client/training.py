"""Local training of one client or of many at once: the same steps, on one slot of the bank or on a slot each."""

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.config import TrainingConfig
from lora.bank import Bank
from lora.codec import Layout, Part
from lora.errors import PrivacyError
from lora.gate import Gate
from lora.gradients import ExampleGradients, GradientSink, SlotGradients, SummedGradients
from privacy.clipping import add_clipped, clip_factors
from privacy.plan import PrivatePlan
from privacy.randomness import Randomness
from tasks.device import release
from tasks.learner import Learner
from tasks.parallel import spread
from tasks.tokens import Batch, Tokens

FACTORS: tuple[Part, ...] = ("A", "B")
GROUP = 4
"""Most rows of one client that share a matrix product in a cohort."""


@dataclass(frozen=True)
class Work:
    """What one client brings to a round: its examples, and its privacy plan with its own source of noise."""

    client: str
    tokens: Tokens
    private: PrivatePlan | None = None
    randomness: Randomness | None = None


@dataclass(frozen=True)
class Trained:
    """What training came to: `values [clients, layout.size]`, float32 on the CPU, and every client's mean loss."""

    values: Tensor
    losses: tuple[float, ...]


@dataclass
class _Step:
    """Gradients and losses that one step gathers for all clients."""

    gradients: Tensor
    losses: list[float]


def train(
    learner: Learner,
    works: Sequence[Work],
    *,
    start: Tensor,
    config: TrainingConfig,
    parts: Sequence[Part],
    seed: int,
    number: int,
) -> Trained:
    """Train every client for `config.steps` from `start [layout.size]`; only `parts` move.

    Clients share forward and backward passes, never numbers: each has its own slot, lots, clip, noise and optimizer
    state, so that a client's result does not depend on who trains beside it (up to rounding). Values, gradients, clips,
    noise and sums are float32 whatever the base computes in, and nothing but the base stays on a GPU afterwards.

    **Guarantee** (private works): a client's result depends on its examples only through `config.steps` sums of
    gradients, each clipped over all factors together to `clip` (and over a trained head to `head_clip`), to which noise
    of `noise_multiplier * sensitivity` was added, divided by the expected lot size.

    | case | what happens |
    |---|---|
    | empty lot | no forward pass; the noise alone is the sum |
    | example with a NaN or infinite gradient | contributes zero |
    | lot larger than expected | the denominator stays the expected size |
    """
    _check_privacy(works)
    start = start.to(learner.device)
    bank = Bank.of(learner.layout, start, slots=len(works))
    optimizer = _Optimizer(bank, config=config, parts=parts, start=start)
    streams = [_lots(work, config=config, seed=seed, number=number) for work in works]
    sums, counts = [0.0] * len(works), [0] * len(works)
    for _ in range(config.steps):
        lots = [next(stream) for stream in streams]
        step = _step(learner, bank, works, lots, parts=parts)
        optimizer.step(step.gradients)
        sums = [total + loss for total, loss in zip(sums, step.losses, strict=True)]
        counts = [total + len(lot) for total, lot in zip(counts, lots, strict=True)]
    losses = tuple(total / count if count else 0.0 for total, count in zip(sums, counts, strict=True))
    trained = Trained(bank.data.cpu(), losses)
    del bank, optimizer, step
    release(learner.device)
    return trained


def _check_privacy(works: Sequence[Work]) -> None:
    """Refuse a cohort that is not private as a whole. Raises PrivacyError."""
    private = [work.private is not None for work in works]
    if any(private) and not all(private):
        raise PrivacyError("a cohort is private as a whole or not at all; train the others apart")
    for work in works:
        if work.private is not None and work.randomness is None:
            raise PrivacyError(f"client {work.client} has a privacy plan and no source of randomness for its noise")
    bounds = {(w.private.mechanism.clip, w.private.mechanism.head_clip) for w in works if w.private is not None}
    if len(bounds) > 1:
        raise PrivacyError(f"the clients of a cohort share one clip and head_clip, not {sorted(map(str, bounds))}")


def _lots(work: Work, *, config: TrainingConfig, seed: int, number: int) -> Iterator[list[int]]:
    """Yield the rows of every step: Poisson lots from the noise source, else passes in a seeded order."""
    if work.private is not None and work.randomness is not None:
        while True:
            yield [int(row) for row in work.randomness.lot(len(work.tokens), rate=work.private.rate)]
    source = random.Random(f"lots/{seed}/{number}/{work.client}")
    size = min(config.batch, len(work.tokens))
    queue: list[int] = []
    while True:
        while len(queue) < size:
            fresh = list(range(len(work.tokens)))
            source.shuffle(fresh)
            queue += fresh
        yield queue[:size]
        queue = queue[size:]


def _step(
    learner: Learner, bank: Bank, works: Sequence[Work], lots: Sequence[Sequence[int]], *, parts: Sequence[Part]
) -> _Step:
    """Gather the gradients `[clients, layout.size]` of one step over all clients' lots.

    Every worker adds up its own batches, and the workers' sums are added in their order: the same rounding each time.
    """
    sizes = torch.tensor([len(lot) for lot in lots])
    jobs = [
        (batch, torch.from_numpy(chunk.owners[places]), chunk.group)
        for chunk in _chunks(works, lots)
        for places, batch in learner.batches(chunk.rows, group=chunk.group)
    ]

    def gather(share: list[int]) -> _Step:
        own = _Step(torch.zeros_like(bank.data), [0.0] * len(works))
        for index in share:
            batch, slots, group = jobs[index]
            _add_batch(own, learner, bank, works, batch, slots=slots, group=group, sizes=sizes, parts=parts)
        return own

    costs = [float(batch.input_ids.numel()) + learner.overhead for batch, _, _ in jobs]
    gathered = spread(gather, costs, count=learner.workers)
    step = gathered[0] if gathered else _Step(torch.zeros_like(bank.data), [0.0] * len(works))
    for other in gathered[1:]:
        step.gradients += other.gradients
        step.losses = [one + two for one, two in zip(step.losses, other.losses, strict=True)]
    _add_noise(step.gradients, bank.layout, works, parts=parts)
    return step


def _add_batch(
    step: _Step,
    learner: Learner,
    bank: Bank,
    works: Sequence[Work],
    batch: Batch,
    *,
    slots: Tensor,
    group: int,
    sizes: Tensor,
    parts: Sequence[Part],
) -> None:
    """Add one batch to a step: its i-th group of `group` rows is of client `slots[i]`, whose lot has `sizes` rows."""
    here = slots.to(learner.device)
    gate = Gate.one(0) if len(works) == 1 else Gate.rows(here)
    owners = slots.repeat_interleave(group)
    sink = _sink(learner, step.gradients, here, parts=parts, private=works[0].private is not None)
    loss = learner.answers(bank.mix(gate), batch, sink=sink).loss
    if isinstance(sink, ExampleGradients):
        torch.autograd.backward(loss.sum())
        _add_private(sink, step.gradients, owners, works)
    else:
        torch.autograd.backward(loss.dot((1.0 / sizes[owners].to(loss.dtype)).to(learner.device)))
    for slot, value in zip(owners.tolist(), loss.tolist(), strict=True):
        step.losses[slot] += value


@dataclass(frozen=True)
class _Chunk:
    """Rows in groups of `group` neighbours that belong to one client: `owners [groups]`."""

    rows: list[tuple[Tokens, int]]
    owners: NDArray[np.int64]
    group: int


def _chunks(works: Sequence[Work], lots: Sequence[Sequence[int]]) -> list[_Chunk]:
    """Divide all lots into groups of GROUP rows of one client and of like length, and the rows left over.

    A group shares one gather of its client's vector and one matrix product, which single rows would each pay for.
    """
    size = min(GROUP, max(1, *map(len, lots))) if len(works) > 1 else 1
    grouped: tuple[list[tuple[Tokens, int]], list[int]] = ([], [])
    single: tuple[list[tuple[Tokens, int]], list[int]] = ([], [])
    for slot, (work, lot) in enumerate(zip(works, lots, strict=True)):
        ordered = sorted(lot, key=lambda row, ids=work.tokens.ids: -len(ids[row]))  # type: ignore[misc]
        whole = len(ordered) // size * size
        grouped[0].extend((work.tokens, row) for row in ordered[:whole])
        grouped[1].extend([slot] * (whole // size))
        single[0].extend((work.tokens, row) for row in ordered[whole:])
        single[1].extend([slot] * (len(ordered) - whole))
    parts = ((*grouped, size), (*single, 1))
    return [_Chunk(rows, np.asarray(owners, dtype=np.int64), group) for rows, owners, group in parts if rows]


def _sink(learner: Learner, total: Tensor, slots: Tensor, *, parts: Sequence[Part], private: bool) -> GradientSink:
    layout = learner.layout
    if private:
        return learner.example_gradients(parts)
    if total.shape[0] == 1:
        return SummedGradients(layout, total[0], parts)
    return SlotGradients(layout, total, slots, parts)


def _add_private(sink: ExampleGradients, total: Tensor, slots: Tensor, works: Sequence[Work]) -> None:
    """Clip every example, factors and head apart, and add it to its client's sum."""
    for own, bound in _bounds(works, sink.parts):
        factors = clip_factors(sink.of(own), bound=bound)
        for span, blocks, share in sink.shares(own):
            add_clipped(total[:, span], blocks, factors=factors if share is None else factors * share, slots=slots)
    sink.blocks.clear()


def _bounds(works: Sequence[Work], parts: Collection[Part]) -> list[tuple[tuple[Part, ...], float]]:
    mechanism = works[0].private.mechanism if works[0].private else None
    if mechanism is None:
        return []
    factors = tuple(part for part in FACTORS if part in parts)
    bounds: list[tuple[tuple[Part, ...], float]] = [(factors, mechanism.clip)]
    if "head" in parts and mechanism.head_clip is not None:
        bounds.append((("head",), mechanism.head_clip))
    return bounds


def _add_noise(total: Tensor, layout: Layout, works: Sequence[Work], *, parts: Sequence[Part]) -> None:
    """Add every client's own noise to its sum, and divide by the expected lot size."""
    for slot, work in enumerate(works):
        if work.private is None or work.randomness is None:
            continue
        noise = work.private.mechanism.noise(layout.length(parts), work.randomness)
        padded = torch.zeros(layout.size)
        layout.insert(padded, parts, noise)
        total[slot] = (total[slot] + padded.to(total.device)) / work.private.lot


@dataclass
class _Optimizer:
    """Torch's optimizer over the trained columns of the bank: elementwise, so every slot is optimized on its own."""

    bank: Bank
    config: TrainingConfig
    parts: Sequence[Part]
    start: Tensor
    columns: list[tuple[slice, nn.Parameter]] = field(init=False)

    def __post_init__(self) -> None:
        layout = self.bank.layout
        spans = [(part, layout.span(part)) for part in layout.parts if part in self.parts]
        self.columns = [(span, nn.Parameter(self.bank.data[:, span], requires_grad=False)) for _, span in spans]
        config = self.config
        groups = [
            {"params": [column], "lr": (config.head_rate or config.rate) if part == "head" else config.rate}
            for (part, _), (_, column) in zip(spans, self.columns, strict=True)
        ]
        if config.optimizer == "sgd":
            self.inner: torch.optim.Optimizer = torch.optim.SGD(groups, lr=config.rate, momentum=config.momentum)
        else:
            # eps 1e-5: well below it a gradient is rounding noise, whose sign would differ from engine to engine.
            self.inner = torch.optim.AdamW(groups, lr=config.rate, weight_decay=config.weight_decay, eps=1e-5)

    def step(self, gradients: Tensor) -> None:
        """Take one step along `gradients [clients, layout.size]`, pulled towards the start by FedProx."""
        if self.config.proximal:
            gradients = gradients + self.config.proximal * (self.bank.data - self.start)
        for span, column in self.columns:
            column.grad = gradients[:, span]
        self.inner.step()
