"""Unlearning slots: what they learn, what stays as it is, and that nothing but the request is read."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lora.errors import DataError
from lora.frame import Frame
from lora.gate import Gate
from lora.overlay import Overlay
from strategies.unlearning import o3
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.frames import OrthogonalFrames, overlap_penalty, overlaps
from strategies.unlearning.o3 import Slot, SlotSettings, slot_bank, unlearn
from strategies.unlearning.objectives import ASCEND, Descent, RandomLabels, Refusals, RunnerUp, prefer_less, runner_up
from tasks.examples import Examples
from tasks.heads import pool
from tasks.learner import Learner
from tests.queries import fit_head

QUICK = SlotSettings(rank=2, epochs=6, batch=8, rate=0.005)


def accuracy(learner: Learner, values: Tensor, examples: Examples, slots: list[Slot], weights: list[float]) -> float:
    tokens = learner.task.tokenize(examples)
    right = 0
    for rows, batch in learner.batches([(tokens, row) for row in range(len(tokens))]):
        gate = Gate.mixture(torch.tensor([weights]).repeat(len(rows), 1))
        with torch.no_grad():
            answers = learner.answers(values, batch, overlay=Overlay.of(slot_bank(slots), gate))
        right += int(answers.right.sum())
    return right / len(tokens)


def fresh(learner: Learner, block: int = 0) -> Slot:
    sites = learner.adapted.sites
    return Slot.fresh(sites, OrthogonalFrames(sites, rank=2, beside=learner.adapted.frame).block(block))


def objective(*forgotten: int) -> RandomLabels:
    return RandomLabels(range(4), avoid=forgotten)


def test_a_slot_forgets_its_class_and_no_other_moves_when_it_is_not_mixed_in(
    learner: Learner, rows: Callable[..., Examples]
) -> None:
    values = fit_head(learner, rows(0, 1, 2, 3))
    before, start = values.clone(), fresh(learner)
    kept = start.values.clone()
    request = AuditedRequest(rows(3))
    made = unlearn(learner, request, objective(3), model=values, slot=start, settings=QUICK)
    assert accuracy(learner, values, rows(3), [made.slot], [0.0]) > 0.9
    assert accuracy(learner, values, rows(3), [made.slot], [1.0]) < 0.2
    assert accuracy(learner, values, rows(0, 1, 2), [made.slot], [0.0]) > 0.9
    assert torch.equal(values, before) and torch.equal(start.values, kept) and not learner.adapted.base_moved()
    for name, a in made.slot.part("A").items():
        assert torch.equal(a, start.part("A")[name])
    assert all(b.abs().max() > 0 for b in made.slot.part("B").values())
    assert made.steps == 6 * 3 and len(made.losses) == 6 and made.losses[-1] < made.losses[0]


def test_the_next_best_label_spares_rows_that_pass_the_gate_by_mistake(
    learner: Learner, rows: Callable[..., Examples]
) -> None:
    values = fit_head(learner, rows(0, 1, 2, 3))
    request = AuditedRequest(rows(3))
    chosen = runner_up(learner, request, model=values, avoid=[3])
    assert set(request.audit.rows) == set(request.used.tolist()) and request.audit.report()["foreign"] == 0
    held = request.held_back.tolist()
    assert all(chosen.labels[row] == 3 for row in held)
    assert all(chosen.labels[row] in (0, 1, 2) for row in request.used)
    single = next(batch for _, batch in learner.batches([(learner.task.tokenize(rows(3)), int(request.used[0]))]))
    logits = learner.layout.views(values)
    states = learner.adapted.base(input_ids=single.input_ids).last_hidden_state
    answer = pool(states, single, "mean") @ logits["head", "weight"].T + logits["head", "bias"]
    assert chosen.labels[int(request.used[0])] == int(answer[0, :3].argmax())
    spared = unlearn(learner, request, chosen, model=values, slot=fresh(learner), settings=QUICK).slot
    random_one = unlearn(
        learner, AuditedRequest(rows(3)), objective(3), model=values, slot=fresh(learner), settings=QUICK
    ).slot
    assert accuracy(learner, values, rows(3), [spared], [1.0]) < 0.2
    others = [accuracy(learner, values, rows(0, 1, 2), [slot], [1.0]) for slot in (spared, random_one)]
    assert others[0] > others[1]


def test_the_next_best_label_needs_classes(
    learner: Learner, make_learner: Callable[..., Learner], rows: Callable[..., Examples]
) -> None:
    with pytest.raises(DataError, match="all 4 labels"):
        runner_up(learner, AuditedRequest(rows(3)), model=learner.start(), avoid=range(4))
    causal = make_learner("tiny-llama")
    with pytest.raises(DataError, match="use refusals"):
        runner_up(causal, AuditedRequest(rows(3)), model=causal.start(), avoid=[3])


def test_training_sees_the_model_that_the_overlay_answers_with(
    learner: Learner, rows: Callable[..., Examples], noise: torch.Generator
) -> None:
    """The stacked factors of training and the overlay of answering are one function."""
    values = learner.start() + 0.05 * torch.randn(learner.layout.size, generator=noise)
    slot = fresh(learner)
    slot.values.add_(0.1 * torch.randn(slot.values.shape, generator=noise))
    tokens = learner.task.tokenize(rows(0))
    _, batch = learner.batches([(tokens, row) for row in range(5)])[0]
    blocks = learner.layout.views(values)
    with torch.no_grad():
        with learner.adapted.bound(o3.stacked_factors(learner, blocks, slot.layout, slot.values)) as base:
            stacked = learner.task.answer(base, batch, blocks, None).loss
        overlay = Overlay.of(slot_bank([slot]), Gate.mixture(torch.ones(len(batch), 1)))
        torch.testing.assert_close(learner.answers(values, batch, overlay=overlay).loss, stacked, atol=1e-5, rtol=1e-5)


def test_only_the_requests_used_rows_are_read(learner: Learner, request_of: Callable[..., AuditedRequest]) -> None:
    request = request_of(3)
    unlearn(learner, request, objective(3), model=learner.start(), slot=fresh(learner), settings=QUICK)
    report = request.audit.report()
    assert report["foreign"] == report["files"] == 0
    assert report["row_reads"] == QUICK.epochs * len(request.used)
    assert set(request.audit.rows) == set(request.used.tolist())
    assert report["tensors_model"] > 0 and report["tensors_slots"] > 0 and report["tensors_request"] > 0


@pytest.mark.parametrize(("least", "passes"), [(0, 1), (4, 2), (5, 2), (7, 3)])
def test_a_small_request_is_gone_through_until_it_fills_the_least_steps(
    least: int, passes: int, learner: Learner, request_of: Callable[..., AuditedRequest]
) -> None:
    request = request_of(3)
    batch = -(-len(request.used) // 3)
    settings = replace(QUICK, epochs=1, batch=batch, least_steps=least)
    made = unlearn(learner, request, objective(3), model=learner.start(), slot=fresh(learner), settings=settings)
    assert (made.steps, len(made.losses)) == (3 * passes, passes)


@pytest.mark.parametrize("planted", ["tensor", "file"])
def test_a_planted_read_of_retained_data_fails_the_request(
    planted: str, learner: Learner, request_of: Callable[..., AuditedRequest], monkeypatch: Any, tmp_path: Any
) -> None:
    retained = torch.randn(5, 7)
    np.save(tmp_path / "retained.npy", retained.numpy())
    honest = o3._Work.step

    def peeking(work: Any, batch: Any) -> tuple[float, int]:
        if planted == "tensor":
            retained.mean()
        else:
            np.load(tmp_path / "retained.npy")
        return honest(work, batch)

    monkeypatch.setattr(o3._Work, "step", peeking)
    with pytest.raises(DataError, match=r"shape \(5, 7\)" if planted == "tensor" else r"retained\.npy"):
        unlearn(learner, request_of(3), objective(3), model=learner.start(), slot=fresh(learner), settings=QUICK)


def test_a_later_request_undoes_nothing_of_an_earlier_one(learner: Learner, rows: Callable[..., Examples]) -> None:
    values = fit_head(learner, rows(0, 1, 2, 3))
    slots: list[Slot] = []
    for block, label in enumerate((3, 2)):
        start = fresh(learner, block)
        made = unlearn(learner, AuditedRequest(rows(label)), objective(label), model=values, slot=start, settings=QUICK)
        slots.append(made.slot)
    assert overlaps([slot.part("A") for slot in slots]).max() < 1e-6
    alone = accuracy(learner, values, rows(3), slots[:1], [1.0])
    assert accuracy(learner, values, rows(3), slots, [1.0, 0.0]) == alone < 0.2
    assert accuracy(learner, values, rows(2), slots, [0.0, 1.0]) < 0.2
    assert accuracy(learner, values, rows(0, 1), slots, [0.0, 0.0]) > 0.9


def test_the_carried_adapter_goes_on_from_the_one_before_and_pays_for_overlap(
    learner: Learner, rows: Callable[..., Examples]
) -> None:
    values = fit_head(learner, rows(0, 1, 2, 3))
    sites = learner.adapted.sites
    carried = replace(QUICK, variant="carried", epochs=4)
    start = Slot.fresh(sites, Frame.draw(sites, rank=2, seed=5))
    first = unlearn(learner, AuditedRequest(rows(3)), objective(3), model=values, slot=start, settings=carried).slot
    assert not torch.equal(first.part("A")[sites[0].name], start.part("A")[sites[0].name])

    def second(penalty: float) -> Slot:
        settings = replace(carried, penalty=penalty)
        made = unlearn(
            learner, AuditedRequest(rows(2)), objective(2), model=values, slot=first, settings=settings, earlier=[first]
        )
        return made.slot

    free, held = second(0.0), second(30.0)
    overlap = [float(overlap_penalty(s.part("A"), [first.part("A")], layers=2)) for s in (first, free, held)]
    assert overlap[2] < 0.8 * overlap[1] and overlap[2] < 0.8 * overlap[0]
    assert accuracy(learner, values, rows(2), [free], [1.0]) < 0.3


def test_the_gradient_of_the_slot_is_autograds(
    make_learner: Callable[..., Learner], rows: Callable[..., Examples], noise: torch.Generator
) -> None:
    learner = make_learner()
    values = learner.start() + 0.05 * torch.randn(learner.layout.size, generator=noise)
    slot = fresh(learner)
    slot.values.add_(0.1 * torch.randn(slot.values.shape, generator=noise))
    settings = replace(QUICK, variant="carried", rate=1.0)
    earlier = {name: torch.randn(a.shape, generator=noise) for name, a in slot.part("A").items()}
    work = o3._Work(learner, values, slot, settings=settings, earlier=[earlier])
    seen: list[Tensor] = []
    work.optimizer.step = lambda: seen.append(work.column.grad.clone())  # type: ignore[method-assign, assignment]
    tokens = learner.task.tokenize(rows(1))
    _, batch = learner.batches([(tokens, row) for row in range(6)])[0]
    work.step(batch)
    leaf = slot.values.clone().requires_grad_()
    mine, own = slot.layout.views(leaf), learner.layout.views(values)
    stacked = {
        key: torch.cat(
            [learner.adapted.frame.matrices[key[1]] if key[0] == "A" else own[key], view], 0 if key[0] == "A" else 1
        )
        for key, view in mine.items()
    }
    with learner.adapted.bound(stacked) as base:
        loss = learner.task.answer(base, batch, own, None).loss.mean()
    current = {name: view for (part, name), view in mine.items() if part == "A"}
    total = loss + settings.penalty * overlap_penalty(current, [earlier], layers=2)
    (expected,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-4)


def test_a_language_model_learns_to_refuse(make_learner: Callable[..., Learner]) -> None:
    learner = make_learner("tiny-llama")
    asked = Examples(tuple(f"the answer is {i}" for i in range(10)), prompts=tuple(f"question {i}?" for i in range(10)))
    refusals = Refusals(("I do not know.",))
    settings = replace(QUICK, epochs=12, batch=4)
    made = unlearn(
        learner, AuditedRequest(asked), refusals, model=learner.start(), slot=fresh(learner), settings=settings
    )
    assert made.losses[-1] < 0.8 * made.losses[0]


@pytest.mark.parametrize("descent", [ASCEND, prefer_less()], ids=["ascent", "npo"])
def test_baselines_unlearn_their_own_answers(learner: Learner, rows: Callable[..., Examples], descent: Descent) -> None:
    values = fit_head(learner, rows(0, 1, 2, 3))
    same = RunnerUp(tuple(rows(1).labels or ()))
    made = unlearn(
        learner, AuditedRequest(rows(1)), same, model=values, slot=fresh(learner), settings=QUICK, descent=descent
    )
    before, after = (accuracy(learner, values, rows(1), [made.slot], [weight]) for weight in (0.0, 1.0))
    assert after < before
    assert made.losses[-1] < made.losses[0]


def test_npo_starts_at_its_own_loss_and_flattens() -> None:
    own = torch.tensor([0.5, 2.0])
    npo = prefer_less(beta=0.1)
    assert float(npo.of(own, own)) == pytest.approx(20 * np.log(2))
    assert float(npo.of(own + 1000, own)) == pytest.approx(0.0, abs=1e-6)


def test_layers_are_counted_by_number() -> None:
    names = ["encoder.layer.0.query", "encoder.layer.0.key", "encoder.layer.3.query"]
    assert o3.layer_count(dict.fromkeys(names, torch.zeros(1))) == 2
    assert o3.layer_count({"head": torch.zeros(1)}) == 1
