"""Local training: clients side by side never touch each other, and what is private depends on clipped sums alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from client.config import TrainingConfig
from client.job import ClientJob
from client.training import Trained, Work, train
from lora.codec import Part
from lora.config import AdapterConfig
from lora.plan import PLANS
from privacy.mechanism import Mechanism
from privacy.plan import PrivatePlan
from privacy.randomness import SecureRandomness, SeededRandomness
from strategies.federated.job import World
from tasks.heads import Head
from tasks.learner import Classification, Learner, build_learner
from tasks.parallel import cores
from tasks.tokens import Tokens

FROZEN = {"task": {"head": "frozen", "head_init": "labels"}}
ADAMW = {"optimizer": "adamw", "rate": 0.01, "weight_decay": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "frozen head": FROZEN,
    "momentum": {"training": {"momentum": 0.9, "steps": 4}},
    "adamw": {"training": {**ADAMW, "steps": 4}},
    "proximal": {"training": {"proximal": 0.7, "steps": 4}},
    "head rate": {"training": {"head_rate": 0.5}},
    "causal": {"causal": True},
    "causal adamw": {"causal": True, "training": ADAMW},
    "lora": {"federation": {"strategy": "lora"}},
    "lora adamw": {"federation": {"strategy": "lora"}, "training": ADAMW},
    "rolora": {"federation": {"strategy": "rolora"}},
}
MakeJob = Callable[..., ClientJob]


def begin(learner: Learner) -> Tensor:
    """Return a start at which every factor has a gradient."""
    start = learner.start()
    source = torch.Generator().manual_seed(5)
    span = learner.layout.span("B")
    start[span] = 0.05 * torch.randn(span.stop - span.start, generator=source)
    return start


def parts_of(job: ClientJob, number: int) -> tuple[Part, ...]:
    head = "head" in job.world.learner.layout.parts
    return PLANS[job.federation.strategy].at(number, head=head).train


def fit(job: ClientJob, works: Sequence[Work], *, number: int = 1, start: Tensor | None = None) -> Trained:
    learner = job.world.learner
    return train(
        learner,
        works,
        start=begin(learner) if start is None else start,
        config=job.training,
        parts=parts_of(job, number),
        seed=job.seed,
        number=number,
    )


def private_work(job: ClientJob, index: int) -> Work:
    tokens = job.world.client(index)
    plan = PrivatePlan(Mechanism(0.5, 0.3, 0.8), 0.4, 0.4 * len(tokens), 10, None, 1e-5)
    return Work(str(index), tokens, plan, SeededRandomness(3, index))


def open_work(job: ClientJob, index: int) -> Work:
    return Work(str(index), job.world.client(index))


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("make_work", [open_work, private_work])
@pytest.mark.parametrize("case", CASES)
def test_clients_trained_together_equal_each_trained_alone(
    make_job: MakeJob, case: str, make_work: Callable[[ClientJob, int], Work], number: int
) -> None:
    job = make_job(**CASES[case])
    start = begin(job.world.learner)
    together = fit(job, [make_work(job, index) for index in range(3)], number=number)
    for index in range(3):
        alone = fit(job, [make_work(job, index)], number=number)
        torch.testing.assert_close(together.values[index], alone.values[0], rtol=1e-5, atol=1e-5)
        assert together.losses[index] == pytest.approx(alone.losses[0], rel=1e-5, abs=1e-5)
        assert not torch.equal(alone.values[0], start)


@pytest.mark.parametrize("make_work", [open_work, private_work])
def test_a_result_does_not_depend_on_who_else_trains(
    make_job: MakeJob, make_work: Callable[[ClientJob, int], Work]
) -> None:
    job = make_job()
    orders = [[0, 1, 2], [2, 1, 0], [1, 0], [0]]
    for order in orders:
        values = fit(job, [make_work(job, index) for index in order]).values[order.index(0)]
        torch.testing.assert_close(values, fit(job, [make_work(job, 0)]).values[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make_work", [open_work, private_work])
@pytest.mark.parametrize(("strategy", "number"), [("ffa-lora", 1), ("lora", 1), ("rolora", 1), ("rolora", 2)])
def test_what_is_not_trained_does_not_move(
    make_job: MakeJob, strategy: str, number: int, make_work: Callable[[ClientJob, int], Work]
) -> None:
    job = make_job(federation={"strategy": strategy})
    learner = job.world.learner
    layout, start = learner.layout, begin(learner)
    frame = learner.adapted.frame.fingerprint()
    weights = [parameter.clone() for parameter in learner.base.model.parameters()]
    trained = fit(job, [make_work(job, 0), make_work(job, 1)], number=number)
    for part in layout.parts:
        moved = not torch.equal(trained.values[:, layout.span(part)], start[layout.span(part)].repeat(2, 1))
        assert moved == (part in parts_of(job, number))
    assert learner.adapted.frame.fingerprint() == frame == learner.adapted.frame.digest
    assert not learner.adapted.base_moved()
    for parameter, before in zip(learner.base.model.parameters(), weights, strict=True):
        assert torch.equal(parameter, before)
        assert parameter.grad is None


def test_a_pass_shows_every_example_once_and_rounds_differ_in_order(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(training={"steps": 4, "batch": 7})
    seen: list[int] = []
    batches = job.world.learner.batches

    def spy(rows: Sequence[tuple[Tokens, int]], **options: Any) -> Any:
        seen.extend(row for _, row in rows)
        return batches(rows, **options)

    monkeypatch.setattr(job.world.learner, "batches", spy)
    fit(job, [open_work(job, 0)])
    assert sorted(seen[:14]) == sorted(seen[14:]) == [*range(14)]
    first = list(seen)
    seen.clear()
    fit(job, [open_work(job, 0)])
    assert seen == first
    seen.clear()
    fit(job, [open_work(job, 0)], number=2)
    assert seen != first


@pytest.mark.parametrize("make_work", [open_work, private_work])
@pytest.mark.parametrize("case", ["sgd", "causal adamw", "lora"])
def test_batches_spread_over_cores_give_the_same_result_every_time(
    make_job: MakeJob, case: str, make_work: Callable[[ClientJob, int], Work]
) -> None:
    job = make_job(**CASES[case])

    def values() -> Tensor:
        return fit(job, [make_work(job, index) for index in range(3)]).values

    one = values()
    with cores(3):
        many, again = values(), values()
    torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)
    assert torch.equal(many, again)


def test_the_loss_is_the_mean_over_the_rows_seen(make_job: MakeJob) -> None:
    job = make_job(training={"steps": 1, "batch": 100})
    start = begin(job.world.learner)
    scores = job.world.learner.score(start, job.world.client(0))
    assert fit(job, [open_work(job, 0), open_work(job, 1)]).losses[0] == pytest.approx(scores.loss, rel=1e-5)


# --- Private steps, seen from their sums -----------------------------------------------------------------------------


def step(
    learner: Learner,
    works: Sequence[Work],
    *,
    start: Tensor,
    parts: tuple[Part, ...] | None = None,
    steps: int = 1,
    number: int = 1,
) -> Tensor:
    """Train with rate 1, so that `start - values` is the noisy sum over the lot size; returns the values."""
    config = TrainingConfig(steps=steps, rate=1.0)
    chosen = parts or (("B", "head") if "head" in learner.layout.parts else ("B",))
    return train(learner, works, start=start, config=config, parts=chosen, seed=0, number=number).values


def plan(*, clip: float = 1.0, head_clip: float | None = None, noise: float = 1.0, lot: float = 1.0) -> PrivatePlan:
    return PrivatePlan(Mechanism(clip, head_clip, noise), 0.5, lot, 10, None, 1e-5)


def test_an_empty_lot_gives_the_noise_alone(make_job: MakeJob) -> None:
    job = make_job(**FROZEN)
    learner, tokens = job.world.learner, job.world.client(0)
    rare = PrivatePlan(Mechanism(0.7, None, 1.3), 1e-12, 4.0, 10, None, 1e-5)
    values = step(learner, [Work("0", tokens, rare, SeededRandomness(1))], start=learner.start(), steps=2)[0]
    draws = SeededRandomness(1)
    expected = torch.zeros(learner.layout.size)
    for _ in range(2):
        assert draws.lot(len(tokens), rate=1e-12).size == 0
        expected -= rare.mechanism.noise(learner.layout.size, draws) / 4.0
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-7)


def test_the_denominator_is_the_expected_lot_whatever_was_drawn(make_job: MakeJob, scripted: Any) -> None:
    job = make_job(**FROZEN)
    learner, tokens = job.world.learner, job.world.client(0)

    def total(lot: list[int], size: float) -> Tensor:
        work = Work("0", tokens, plan(lot=size), scripted(lot))
        return -step(learner, [work], start=learner.start())[0] * size

    torch.testing.assert_close(total([0, 1, 2], 4.0), total([0, 1, 2], 64.0), rtol=1e-5, atol=1e-6)
    apart = total([0], 4.0) + total([1], 4.0) + total([2], 4.0)
    torch.testing.assert_close(total([0, 1, 2], 4.0), apart, rtol=1e-4, atol=1e-5)
    assert total([0, 1, 2], 4.0).norm() > 0.1


def embeddings(learner: Learner) -> Tensor:
    """Return the base model's token embeddings, `[vocabulary, width]`."""
    model: Any = learner.base.model
    weight: Tensor = model.get_input_embeddings().weight
    return weight


def test_an_example_with_nan_contributes_nothing_and_disturbs_nobody(scripted: Any) -> None:
    job = ClientJob.model_validate({"model": {"name": "tiny-bert"}, "data": {"max_train": 24}, **FROZEN, "seed": 31})
    learner = build_learner(job.model, job.task, job.adapter, labels=["a", "b", "c"], trains_frame=False)
    tokens, poison = World(job).client(0), 258
    tokens = Tokens(tokens.ids, np.arange(len(tokens)) % 3)
    sick = Tokens([np.append(tokens.ids[0], poison), *tokens.ids[1:]], tokens.labels)
    assert not any(poison in ids for ids in tokens.ids)
    with torch.no_grad():
        embeddings(learner)[poison] = float("nan")

    def values(own: Tokens, lot: list[int]) -> Tensor:
        works = [Work("0", own, plan(), scripted(lot)), Work("1", tokens, plan(), scripted([1, 4]))]
        return step(learner, works, start=learner.start())

    poisoned, without = values(sick, [0, 2, 3]), values(tokens, [2, 3])
    assert bool(poisoned.isfinite().all())
    torch.testing.assert_close(poisoned, without, rtol=1e-4, atol=1e-5)
    assert not values(sick, [0])[0].any()
    assert values(tokens, [0])[0].any()


def test_a_poisoned_client_without_privacy_ruins_only_itself() -> None:
    job = ClientJob.model_validate({"model": {"name": "tiny-bert"}, "data": {"max_train": 24}, **FROZEN, "seed": 32})
    learner = build_learner(job.model, job.task, job.adapter, labels=["a", "b", "c"], trains_frame=False)
    tokens = World(job).client(0)
    tokens = Tokens(tokens.ids, np.arange(len(tokens)) % 3)
    sick = Tokens([np.append(ids, 258) for ids in tokens.ids], tokens.labels)
    with torch.no_grad():
        embeddings(learner)[258] = float("nan")
    start = learner.start()
    both = step(learner, [Work("0", sick), Work("1", tokens)], start=start)
    assert not both[0].isfinite().all()
    torch.testing.assert_close(both[1], step(learner, [Work("1", tokens)], start=start)[0], rtol=1e-5, atol=1e-5)


@lru_cache
def exposed(kind: str) -> tuple[Learner, Tokens]:
    """Return a learner (with exploding logits or gradients, or a trained head) and twelve examples of all lengths."""
    job = ClientJob.model_validate({"model": {"name": "tiny-bert"}, "data": {"max_train": 24}, "seed": 33})
    task = job.task if kind == "trained head" else job.task.model_copy(update={"head": "frozen"})
    adapter = AdapterConfig(rank=4, alpha=1e9 if kind == "exploding gradients" else 16.0)
    learner = build_learner(job.model, task, adapter, labels=World(job).splits.label_names, trains_frame=False)
    if kind == "exploding logits" and isinstance(learner.task, Classification):
        head = learner.task.head
        learner.task = replace(learner.task, head=Head(head.weight * 1e7, head.bias, head.trained))
    tokens = World(job).train
    order = np.argsort([len(ids) for ids in tokens.ids], kind="stable")
    return learner, tokens.take(order[:: len(order) // 12][:12])


KINDS = ["plain", "trained head", "exploding logits", "exploding gradients"]


@settings(max_examples=25)
@given(
    kind=st.sampled_from(KINDS),
    lot=st.sets(st.integers(0, 11)),
    other=st.integers(0, 11),
    clip=st.sampled_from([1e-4, 0.05, 1.0, 30.0, 1e6]),
    head_clip=st.sampled_from([0.01, 1.0]),
)
def test_law_adding_or_removing_an_example_moves_the_sum_by_at_most_the_clip(
    kind: str, lot: set[int], other: int, clip: float, head_clip: float
) -> None:
    learner, tokens = exposed(kind)
    layout = learner.layout
    own_clip = head_clip if "head" in layout.parts else None
    start = learner.start()
    spread = Mechanism(clip, own_clip, 1.0)

    def total(rows: set[int]) -> Tensor:
        work = Work("0", tokens, plan(clip=clip, head_clip=own_clip), Fixed(rows))
        return start - step(learner, [work], start=start)[0]

    moved = total(lot | {other}) - total(lot - {other})
    assert bool(moved.isfinite().all())
    # A sum of n clipped gradients is itself rounded to n * 2^-24; a trained head is subtracted from its start.
    slack, head_slack = clip * 1e-5, head_clip * 1e-5 + 1e-6 * float(start.norm())
    assert float(moved[layout.span("B")].double().norm()) <= clip + slack
    if own_clip is not None:
        assert float(moved[layout.span("head")].double().norm()) <= head_clip + head_slack
        assert float(moved.double().norm()) <= spread.sensitivity + slack + head_slack


class Fixed:
    """Draws the same lot in every step, and no noise."""

    secure = False

    def __init__(self, rows: set[int]) -> None:
        self._rows = np.array(sorted(rows), dtype=np.int64)

    def gaussian(self, size: int) -> Tensor:
        return torch.zeros(size)

    def lot(self, population: int, *, rate: float) -> np.ndarray:
        return self._rows


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_of_the_law_is_reached(kind: str) -> None:
    """The law above would pass for a clip of zero: an example beyond the clip moves the sum by all of it."""
    learner, tokens = exposed(kind)
    head_clip = 0.01 if "head" in learner.layout.parts else None
    work = Work("0", tokens, plan(clip=1e-4, head_clip=head_clip), Fixed({3}))
    moved = learner.start() - step(learner, [work], start=learner.start())[0]
    assert float(moved[learner.layout.span("B")].norm()) == pytest.approx(1e-4, rel=1e-4)
    if head_clip is not None:
        assert float(moved[learner.layout.span("head")].norm()) == pytest.approx(head_clip, rel=1e-3)


def test_secret_noise_differs_between_clients_rounds_and_restarts(make_job: MakeJob, scripted: Any) -> None:
    job = make_job(**FROZEN)
    learner, tokens = job.world.learner, job.world.client(0)
    size = learner.layout.size

    def noises(number: int) -> Tensor:
        works = [Work(str(index), tokens, _never(), SecureRandomness()) for index in range(2)]
        return step(learner, works, start=torch.zeros(size), number=number)

    draws = torch.cat([noises(1), noises(1), noises(2)])
    assert float((torch.corrcoef(draws) - torch.eye(6)).abs().max()) < 6 / size**0.5
    assert float(draws.std()) == pytest.approx(1.0, rel=0.1)


def _never() -> PrivatePlan:
    return PrivatePlan(Mechanism(1.0, None, 1.0), 1e-12, 1.0, 1, None, 1e-5)


def test_a_private_client_without_a_source_of_noise_is_refused(make_job: MakeJob) -> None:
    job = make_job(**FROZEN)
    work = Work("0", job.world.client(0), plan(), None)
    with pytest.raises(Exception, match=r"randomness|noise"):
        step(job.world.learner, [work], start=job.world.learner.start())


def test_a_private_client_beside_an_open_one_is_still_private(make_job: MakeJob) -> None:
    """Or the cohort is refused; what may not happen is that the first client's lack of privacy goes for all."""
    job = make_job(**FROZEN)
    learner, tokens = job.world.learner, job.world.client(0)
    private = Work("1", tokens, plan(clip=1e-3), Fixed({0, 1, 2}))
    alone = step(learner, [private], start=learner.start())[0]
    try:
        together = step(learner, [Work("0", tokens), private], start=learner.start())[1]
    except Exception:
        return
    torch.testing.assert_close(together, alone)
