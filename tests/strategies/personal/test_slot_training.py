"""Slots trained together: each as PEFT and torch.optim train it alone, and none moved by another."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lora.config import AdapterConfig
from lora.errors import DataError, ModelError, WrongUpdate
from lora.model import AdaptedModel
from strategies.personal.losses import AnswerToken, RowLoss, task_loss
from strategies.personal.slot_batches import UserEvents, best_group
from strategies.personal.slot_optimizer import Moments, SlotSteps, step
from strategies.personal.slot_training import SlotTrainer, update_users
from strategies.personal.slots import UserSlots
from tasks.config import ModelConfig, TaskConfig
from tasks.heads import pool
from tasks.learner import build_learner
from tasks.models import BaseModel, load_base
from tasks.parallel import cores
from tasks.tokens import Batch, Tokens

ANSWERS = (7, 11)
ADAPTER = AdapterConfig(rank=4)


def decoder() -> BaseModel:
    return load_base(ModelConfig(name="tiny-llama"), causal=True)


def events(*counts: int, seed: int = 0, longest: int = 14) -> list[UserEvents]:
    """Make prompts of random lengths with a No or Yes each."""
    source = np.random.default_rng(seed)
    made = []
    for count in counts:
        ids = [source.integers(3, 259, size=length) for length in source.integers(2, longest + 1, size=count)]
        made.append(UserEvents(Tokens(ids, labels=source.integers(0, 2, size=count))))
    return made


def trainer_of(adapted: AdaptedModel, loss: RowLoss | None = None, **limits: int) -> SlotTrainer:
    return SlotTrainer(adapted, loss or AnswerToken(ANSWERS), pad=0, **limits)


def starts(users: int, trainer: SlotTrainer) -> Tensor:
    return 0.05 * torch.randn(users, trainer.layout.size, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def adapted() -> AdaptedModel:
    return AdaptedModel.attach(decoder().model, ADAPTER)


class Alone:
    """PEFT's model of the same base with one user's B, trained by torch.optim, row by row: nothing is padded."""

    def __init__(self, base: nn.Module, adapted: AdaptedModel, value: Tensor, layout: Any) -> None:
        names = [site.name for site in adapted.sites]
        config = LoraConfig(r=adapted.frame.rank, lora_alpha=int(adapted.alpha), target_modules=names)
        self.model = get_peft_model(base, config).eval()
        own = dict(self.model.named_parameters())
        views = layout.views(value)
        self.trained = []
        for name in names:
            own[f"base_model.model.{name}.lora_A.default.weight"].requires_grad_(False).copy_(
                adapted.frame.matrices[name]
            )
            b = own[f"base_model.model.{name}.lora_B.default.weight"]
            b.data.copy_(views["B", name])
            self.trained.append(b)

    def train(
        self,
        own: UserEvents,
        loss: Callable[[nn.Module, Tensor, int], Tensor],
        optimizer: torch.optim.Optimizer,
        steps: int,
    ) -> Tensor:
        for _ in range(steps):
            rows = [
                own.weight(row)
                * loss(self.model, torch.from_numpy(own.tokens.ids[row])[None], int(own.tokens.labels[row]))  # type: ignore[index]
                for row in range(len(own.tokens))
            ]
            optimizer.zero_grad()
            torch.autograd.backward(torch.stack(rows).sum())
            optimizer.step()
        return torch.cat([b.detach().flatten() for b in self.trained])


def answer_of_two(model: nn.Module, ids: Tensor, label: int) -> Tensor:
    return F.cross_entropy(model(input_ids=ids).logits[:, -1, list(ANSWERS)], torch.tensor([label]))


def answer_of_all(model: nn.Module, ids: Tensor, label: int) -> Tensor:
    return F.cross_entropy(model(input_ids=ids).logits[:, -1], torch.tensor([label]))


OPTIMIZERS: dict[str, tuple[SlotSteps, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]] = {
    "sgd": (SlotSteps(steps=3, optimizer="sgd", rate=0.5), lambda own: torch.optim.SGD(own, lr=0.5)),
    "momentum": (
        SlotSteps(steps=3, optimizer="sgd", rate=0.3, momentum=0.9),
        lambda own: torch.optim.SGD(own, lr=0.3, momentum=0.9),
    ),
    "adamw": (
        SlotSteps(steps=3, rate=0.01, weight_decay=0.1),
        lambda own: torch.optim.AdamW(own, lr=0.01, weight_decay=0.1, eps=1e-5),
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("choices", [ANSWERS, None], ids=["two answers", "vocabulary"])
def test_a_batch_of_users_equals_each_alone_in_peft(optimizer: str, choices: tuple[int, ...] | None) -> None:
    config, make = OPTIMIZERS[optimizer]
    adapted = AdaptedModel.attach(decoder().model, ADAPTER)
    trainer = trainer_of(adapted, AnswerToken(choices), tokens=64)
    own = events(1, 2, 7, 1, 3, 20)
    own[2] = UserEvents(own[2].tokens, weights=[0.5, 0.1, 0.0, 0.2, 0.1, 0.1, 1.0])
    begin = starts(len(own), trainer)
    kept = begin.clone()
    found = trainer(begin, own, config=config)
    assert torch.equal(begin, kept) and found.finite.all()
    for value, each, trained in zip(begin, own, found.values, strict=True):
        alone = Alone(decoder().model, adapted, value, trainer.layout)
        expected = alone.train(each, answer_of_two if choices else answer_of_all, make(alone.trained), config.steps)
        # AdamW divides by the gradient's size: where that is near its epsilon, rounding is what remains.
        close = 2e-4 if optimizer == "adamw" else 1e-5
        torch.testing.assert_close(trained, expected, rtol=1e-4, atol=close)
        assert (trained - value).abs().max() > 1e-3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_step_is_torchs_own(optimizer: str) -> None:
    config, make = OPTIMIZERS[optimizer]
    source = torch.Generator().manual_seed(0)
    values = torch.randn(3, 40, generator=source)
    theirs = [nn.Parameter(row.clone()) for row in values]
    optimizers = [make([row]) for row in theirs]
    moments = Moments.fresh(3, 40)
    for _ in range(5):
        gradients = torch.randn(3, 40, generator=source) * 10.0 ** -torch.arange(3)[:, None]
        step(values, gradients, moments, config=config)
        for row, gradient, own in zip(theirs, gradients, optimizers, strict=True):
            row.grad = gradient.clone()
            own.step()
    torch.testing.assert_close(values, torch.stack([row.detach() for row in theirs]), rtol=1e-6, atol=1e-6)


def test_an_encoder_with_a_frozen_head_equals_each_alone_in_peft() -> None:
    model, task = ModelConfig(name="tiny-bert"), TaskConfig(head="frozen")
    learner = build_learner(model, task, ADAPTER, labels=["no", "yes"], trains_frame=False)
    trainer = trainer_of(learner.adapted, task_loss(learner.task))
    head = learner.task.head  # type: ignore[attr-defined]

    def loss(base: nn.Module, ids: Tensor, label: int) -> Tensor:
        states = base(input_ids=ids).last_hidden_state
        feature = pool(states, Batch(ids, None, torch.zeros(1)), "mean")
        return F.cross_entropy(F.linear(feature, head.weight), torch.tensor([label]))

    own, config = events(2, 1, 5), SlotSteps(steps=2, optimizer="sgd", rate=0.2)
    begin = starts(3, trainer)
    found = trainer(begin, own, config=config).values
    for value, each, trained in zip(begin, own, found, strict=True):
        alone = Alone(load_base(model, causal=False).model, learner.adapted, value, trainer.layout)
        expected = alone.train(each, loss, torch.optim.SGD(alone.trained, lr=0.2), 2)
        torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-5)


def test_next_token_losses_of_a_task_train_slots_too() -> None:
    learner = build_learner(
        ModelConfig(name="tiny-llama"), TaskConfig(kind="causal-lm"), ADAPTER, labels=(), trains_frame=False
    )
    source = np.random.default_rng(0)
    own = [UserEvents(Tokens([source.integers(3, 259, 9)], starts=np.array([4]))) for _ in range(3)]
    trainer = trainer_of(learner.adapted, task_loss(learner.task))
    config = SlotSteps(steps=2, optimizer="sgd", rate=0.2)
    begin = starts(3, trainer)
    found = trainer(begin, own, config=config).values
    alone = Alone(decoder().model, learner.adapted, begin[1], trainer.layout)
    for _ in range(2):
        ids = torch.from_numpy(own[1].tokens.ids[0])[None]
        loss = F.cross_entropy(alone.model(input_ids=ids).logits[0, 3:-1], ids[0, 4:])
        gradients = torch.autograd.grad(loss, alone.trained)
        for parameter, gradient in zip(alone.trained, gradients, strict=True):
            parameter.data -= 0.2 * gradient
    expected = torch.cat([b.detach().flatten() for b in alone.trained])
    torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-5)


def test_optimizer_state_goes_on_where_it_stopped(adapted: AdaptedModel) -> None:
    trainer, own = trainer_of(adapted), events(2, 3, 1)
    begin = starts(3, trainer)
    whole = trainer(begin, own, config=SlotSteps(steps=4, rate=0.01))
    half = trainer(begin, own, config=SlotSteps(steps=2, rate=0.01))
    kept = Moments.read(half.moments.flat())
    rest = trainer(half.values, own, config=SlotSteps(steps=2, rate=0.01), moments=kept)
    torch.testing.assert_close(rest.values, whole.values, rtol=0, atol=1e-7)
    fresh = trainer(half.values, own, config=SlotSteps(steps=2, rate=0.01))
    assert not torch.allclose(fresh.values, whole.values, rtol=0, atol=1e-4)
    # Users at different counts of steps share a batch.
    kept.steps[1], kept.first[1], kept.second[1] = 0, 0, 0
    mixed = trainer(half.values, own, config=SlotSteps(steps=2, rate=0.01), moments=kept).values
    torch.testing.assert_close(mixed[0], whole.values[0], rtol=0, atol=1e-7)
    torch.testing.assert_close(mixed[1], fresh.values[1], rtol=0, atol=1e-7)
    with pytest.raises(WrongUpdate, match="2 \\* size"):
        Moments.read(torch.zeros(2, 4))


# --- Isolation -------------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), count=st.integers(1, 3), spoiled=st.booleans())
def test_what_a_user_did_is_nothing_to_the_others(adapted: AdaptedModel, seed: int, count: int, spoiled: bool) -> None:
    """Of users in one batch, the others come out the same bit for bit whatever one's prompts and slot are."""
    trainer, config = trainer_of(adapted), SlotSteps(steps=2, rate=0.01)
    own = events(*[count] * 4, seed=seed)
    begin = starts(4, trainer)
    before = trainer(begin, own, config=config).values
    lengths = own[2].tokens.lengths
    other = [np.random.default_rng(seed + 1).integers(3, 259, size=length) for length in lengths]
    own[2] = UserEvents(Tokens(other, labels=1 - own[2].tokens.labels))  # type: ignore[operator, arg-type]
    begin[2] = float("nan") if spoiled else -begin[2]
    after = trainer(begin, own, config=config)
    kept = [0, 1, 3]
    assert torch.equal(after.values[kept], before[kept])
    assert not torch.equal(after.values[2], before[2])
    assert after.finite.tolist() == [True, True, not spoiled, True]


def answers(slots: UserSlots, adapted: AdaptedModel, users: list[str]) -> Tensor:
    """Answer one prompt for each user, all in one batch."""
    ids = torch.from_numpy(np.random.default_rng(3).integers(3, 259, size=(len(users), 10)))
    batch = Batch(ids, None, torch.zeros(len(users), dtype=torch.int64))
    with torch.no_grad(), adapted.bound(slots.layout.views(slots.bank.mix(slots.gate(users)))) as base:
        return AnswerToken(ANSWERS).logits(base, batch)


@settings(max_examples=8)
@given(trained=st.sets(st.sampled_from("abcdef"), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_training_some_users_leaves_slots_and_answers_of_others(
    adapted: AdaptedModel, trained: set[str], seed: int
) -> None:
    trainer, users = trainer_of(adapted), list("abcdef")
    slots = UserSlots.of(adapted)
    slots.add(users, starts(6, trainer))
    before, said = slots.read(users), answers(slots, adapted, users)
    new = dict(zip(sorted(trained), events(*[1 + seed % 3] * len(trained), seed=seed), strict=True))
    done = update_users(slots, trainer, new, config=SlotSteps(steps=2, rate=0.01))
    after, says = slots.read(users), answers(slots, adapted, users)
    for place, user in enumerate(users):
        moved = user in trained
        assert torch.equal(after.values[place], before.values[place]) != moved
        assert torch.equal(says[place], said[place]) != moved
        assert (after.versions[place] > before.versions[place]) == moved
    assert set(done.versions) == set(done.losses) == trained and not done.diverged


def test_new_users_start_cold_and_diverging_ones_stay(adapted: AdaptedModel) -> None:
    trainer, slots = trainer_of(adapted), UserSlots.of(adapted)
    zero, config = torch.zeros(trainer.layout.size), SlotSteps(steps=2, rate=0.01)
    slots.add(["known"], starts(1, trainer))
    new = dict(zip(["known", "fresh"], events(2, 1), strict=True))
    with pytest.raises(DataError, match="'fresh' has no slot"):
        update_users(slots, trainer, new, config=config)
    assert slots.names() == ("known",) and slots.version("known") == 1
    update_users(slots, trainer, new, config=config, start=zero)
    expected = trainer(zero[None], [new["fresh"]], config=config).values
    torch.testing.assert_close(slots.read(["fresh"]).values, expected, rtol=1e-4, atol=1e-5)
    before = slots.read(["known", "fresh"])
    new["known"] = UserEvents(new["known"].tokens, weights=[float("inf"), 1.0])
    done = update_users(slots, trainer, new, config=config)
    after = slots.read(["known", "fresh"])
    assert done.diverged == ("known",) and set(done.versions) == {"fresh"}
    assert torch.equal(after.values[0], before.values[0]) and after.versions[0] == before.versions[0]
    assert not torch.equal(after.values[1], before.values[1])


# --- Batches ---------------------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=7), tokens=st.integers(8, 200), workers=st.integers(1, 2)
)
def test_batches_change_nothing_but_rounding(
    adapted: AdaptedModel, counts: list[int], tokens: int, workers: int
) -> None:
    own, config = events(*counts, seed=sum(counts)), SlotSteps(steps=2, optimizer="sgd", rate=0.3)
    with cores(workers):
        trainer = trainer_of(adapted, tokens=tokens)
        begin = starts(len(own), trainer)
        found = trainer(begin, own, config=config)
    for place, each in enumerate(own):
        alone = trainer(begin[place : place + 1], [each], config=config)
        torch.testing.assert_close(found.values[place], alone.values[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.losses[:, place], alone.losses[:, 0], rtol=1e-4, atol=1e-5)


def test_groups_weigh_padding_against_their_number() -> None:
    even, uneven = [np.full(20, 8)] * 3, [np.array([64, *[8] * 19])] * 3
    assert best_group(even, overhead=1.0) == 20
    assert best_group(uneven, overhead=0.0) == 1
    assert 1 < best_group(uneven, overhead=30.0) < 20
    assert best_group([np.full(1, 8), np.full(2, 8)], overhead=0.1) == 1


def test_wrong_events_and_slots_are_refused(adapted: AdaptedModel) -> None:
    with pytest.raises(DataError, match="without new events"):
        UserEvents(Tokens([]))
    with pytest.raises(DataError, match="2 weights for 3 events"):
        UserEvents(events(3)[0].tokens, weights=[1, 1])
    trainer = trainer_of(adapted)
    with pytest.raises(WrongUpdate, match="one for each user"):
        trainer(torch.zeros(1, trainer.layout.size), events(1, 1), config=SlotSteps())
    assert trainer(torch.zeros(0, trainer.layout.size), [], config=SlotSteps()).values.shape[0] == 0


def test_losses_refuse_what_they_cannot_score() -> None:
    encoder = load_base(ModelConfig(name="tiny-bert"), causal=False).model
    with pytest.raises(ModelError, match="predicts no tokens"):
        AnswerToken(ANSWERS)(encoder, Batch(torch.zeros(1, 3, dtype=torch.int64), None, torch.zeros(1)))
    learner = build_learner(
        ModelConfig(name="tiny-bert"), TaskConfig(head="trained"), ADAPTER, labels=["no", "yes"], trains_frame=False
    )
    with pytest.raises(ModelError, match="head"):
        task_loss(learner.task)
