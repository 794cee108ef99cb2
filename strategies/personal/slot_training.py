"""Training many users' slots in one batch: every user's rows move that user's slot and no other.

A is frozen and shared, so a batch may hold the rows of any number of users; what a user's rows come to does not depend
on who else is in the batch, up to the rounding of differently shaped products.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora.codec import Layout, Part
from lora.errors import WrongUpdate
from lora.model import AdaptedModel
from strategies.personal.losses import RowLoss
from strategies.personal.slot_batches import Cost, SlotBatch, UserEvents, divide, tokens_of, units
from strategies.personal.slot_optimizer import Moments, SlotSteps, step
from strategies.personal.slots import UserSlots
from tasks.device import Room, free_bytes
from tasks.learner import GPU_OVERHEAD_FLOP, OVERHEAD_FLOP
from tasks.memory import memory_of
from tasks.parallel import even_budget, spread, workers

FACTOR: tuple[Part, ...] = ("B",)
GROUP_FLOP = 4e6
"""What one more group of rows costs in a pass, in floating-point operations that could have been done meanwhile."""
UNIT = 4
"""Full batches whose users are trained together: enough to sort rows by length, few enough to stay in cache."""


@dataclass(frozen=True)
class TrainedSlots:
    """Slots after training `[users, size]`, every step's loss before it `[steps, users]`, and the optimizer's state."""

    values: Tensor
    losses: Tensor
    moments: Moments

    @property
    def finite(self) -> Tensor:
        """Which users' slots hold finite numbers only, `[users]`."""
        return self.values.isfinite().all(1)


@dataclass
class _Gradients:
    """Puts gradients of B into `total [users, size]`; the groups of one user add up."""

    layout: Layout
    total: Tensor
    owners: Tensor
    every: bool
    parts: Collection[Part] = field(default=FACTOR, init=False)
    by_row: bool = field(default=False, init=False)

    def take(self, part: Part, name: str, gradient: Tensor) -> None:
        """Add one block `[groups, d_out, r]`."""
        target = self.total[:, self.layout.slices[part, name]]
        if self.every:
            target.add_(gradient.flatten(1))
        else:
            target.index_add_(0, self.owners, gradient.flatten(1))


class SlotTrainer:
    """Trains slots of a bank on their users' own rows.

    **Guarantee**: the slot of a user after training depends on that user's slot, events and optimizer state, and on
    the settings; never on another user's.

    | case | what happens |
    |---|---|
    | a user whose loss is NaN or infinite | only that user's slot is spoiled; `TrainedSlots.finite` says so |
    | users with different numbers of rows | groups are filled with rows of weight zero |
    """

    def __init__(self, adapted: AdaptedModel, loss: RowLoss, *, pad: int, tokens: int | None = None) -> None:
        """Train passes of at most `tokens`; None: as many as suit the device and its free memory."""
        self.adapted, self.loss, self.pad = adapted, loss, pad
        self.layout = Layout(adapted.entries("B"))
        self.device = next(adapted.base.parameters()).device
        self.tokens = self._room().tokens if tokens is None else tokens
        self._flop = 6 * sum(site.d_in * site.d_out for site in adapted.sites)

    def __call__(
        self, values: Tensor, events: Sequence[UserEvents], *, config: SlotSteps, moments: Moments | None = None
    ) -> TrainedSlots:
        """Return `values [users, size]` after `config.steps` steps of every user, each on all of the user's events.

        The arguments stay as they are. `moments` go on from an earlier training; without, they start fresh. Results
        are on the CPU. Raises WrongUpdate for values of another shape.
        """
        expected = (len(events), self.layout.size)
        if tuple(values.shape) != expected:
            raise WrongUpdate(f"slots of shape {tuple(values.shape)}, expected {expected}: one for each user's events")
        values = values.detach().to("cpu", torch.float32, copy=True)
        state = Moments.fresh(*expected) if moments is None else moments.take(torch.arange(len(events)))
        losses = torch.zeros(config.steps, len(events))
        divided = [torch.from_numpy(unit) for unit in units(events, budget=self._budget(events))]

        def train(share: list[int]) -> None:
            for unit in (divided[index] for index in share):
                own, kept = values[unit].to(self.device), state.take(unit).to(self.device)
                losses[:, unit] = self._train(own, [events[user] for user in unit.tolist()], config, kept).cpu()
                values[unit] = own.cpu()
                state.put(unit, kept.to(torch.device("cpu")))

        spread(train, [float(tokens_of([events[user] for user in unit])) for unit in divided], count=self._workers)
        return TrainedSlots(values, losses, state)

    def _room(self) -> Room:
        free = free_bytes(self.device)
        if free is None:
            return Room()
        memory = memory_of(self.adapted, self.layout, causal=False, recomputed=self.adapted.recomputes)
        return Room.within(free, token=memory.token, row=memory.row)

    @property
    def _workers(self) -> int:
        return workers() if self.device.type == "cpu" else 1

    @property
    def _cost(self) -> Cost:
        each = (OVERHEAD_FLOP if self.device.type == "cpu" else GPU_OVERHEAD_FLOP) / self._flop * 6
        return Cost(each, GROUP_FLOP / self._flop, self.tokens)

    def _budget(self, events: Sequence[UserEvents]) -> int:
        most = UNIT * self.tokens
        return even_budget(tokens_of(events), most=most, least=int(self._cost.each), count=self._workers)

    def _train(self, values: Tensor, events: Sequence[UserEvents], config: SlotSteps, moments: Moments) -> Tensor:
        """Train one unit's slots in place; returns losses `[steps, users]`."""
        batches = [batch.to(self.device) for batch in divide(events, pad=self.pad, cost=self._cost)]
        gradients, losses = torch.empty_like(values), values.new_zeros(config.steps, len(events))
        for number in range(config.steps):
            gradients.zero_()
            for batch in batches:
                self._add(batch, values, gradients=gradients, losses=losses[number])
            step(values, gradients, moments, config=config)
        return losses

    def _add(self, one: SlotBatch, values: Tensor, *, gradients: Tensor, losses: Tensor) -> None:
        """Add one batch's gradients and weighted losses to those of its users."""
        vectors = values if one.every else values.index_select(0, one.owners)
        sink = _Gradients(self.layout, gradients, one.owners, one.every)
        with self.adapted.bound(self.layout.views(vectors), sink=sink) as base:
            rows = self.loss(base, one.batch)
            torch.autograd.backward(rows.dot(one.weights.to(rows.dtype)))
        losses.index_add_(0, one.owners, (rows.detach().float() * one.weights).view(len(one.owners), -1).sum(1))


CHUNK = 512
"""Most users that are read, trained and written together: bounds memory however many have new events."""


@dataclass(frozen=True)
class Updated:
    """What came of new events, by user: the loss before every step, the new version, and who was left as they were."""

    losses: Mapping[str, tuple[float, ...]]
    versions: Mapping[str, int]
    diverged: tuple[str, ...]
    """Users whose training came to NaN or infinity; their slots are unchanged."""


def update_users(
    slots: UserSlots,
    trainer: SlotTrainer,
    events: Mapping[str, UserEvents],
    *,
    config: SlotSteps,
    start: Tensor | None = None,
) -> Updated:
    """Train the slots of the users that have new events, and write them; all others stay as they are, bit for bit.

    `start [size]` is the cold start of users that have no slot yet; without it they raise DataError. Users are written
    CHUNK at a time, each chunk wholly or not at all; a slot that was written meanwhile raises DataError.
    """
    if start is None:
        slots.gate(tuple(events))
    losses: dict[str, tuple[float, ...]] = {}
    versions: dict[str, int] = {}
    for first in range(0, len(events), CHUNK):
        users = list(events)[first : first + CHUNK]
        new = [user for user in users if user not in slots]
        if new and start is not None:
            slots.add(new, start)
        read = slots.read(users)
        trained = trainer(read.values, [events[user] for user in users], config=config)
        losses |= {user: tuple(column) for user, column in zip(users, trained.losses.T.tolist(), strict=True)}
        kept = trained.finite.nonzero().flatten().tolist()
        good = [users[place] for place in kept]
        version = slots.write(good, trained.values[kept], versions=[read.versions[place] for place in kept])
        versions |= dict.fromkeys(good, version)
    return Updated(losses, versions, tuple(user for user in events if user not in versions))
