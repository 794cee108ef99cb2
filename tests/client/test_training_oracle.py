"""Local training against other people's code: PEFT and torch.optim for open clients, Opacus for private ones."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from client.config import TrainingConfig
from client.job import ClientJob
from client.training import Work, train
from lora.codec import Part
from lora.plan import PLANS
from privacy.mechanism import Mechanism
from privacy.plan import PrivatePlan
from privacy.randomness import SeededRandomness
from tasks.models import load_base
from tasks.tokens import Tokens

MakeJob = Callable[..., ClientJob]
CAUSAL = {"causal": True}
FROZEN = {"task": {"head": "frozen", "head_init": "labels"}}


def begin(job: ClientJob) -> Tensor:
    learner = job.world.learner
    start = learner.start()
    span = learner.layout.span("B")
    start[span] = 0.05 * torch.randn(span.stop - span.start, generator=torch.Generator().manual_seed(5))
    return start


def parts_of(job: ClientJob, number: int) -> tuple[Part, ...]:
    head = "head" in job.world.learner.layout.parts
    return PLANS[job.federation.strategy].at(number, head=head).train


@dataclass
class Twin:
    """PEFT's model of the same base with the same factors, and a head in plain torch."""

    job: ClientJob
    model: nn.Module
    head: nn.Linear | None
    parameters: dict[tuple[Part, str], nn.Parameter]

    @classmethod
    def of(cls, job: ClientJob, start: Tensor, parts: tuple[Part, ...]) -> "Twin":
        learner = job.world.learner
        adapted = learner.adapted
        names = [site.name for site in adapted.sites]
        config = LoraConfig(r=adapted.frame.rank, lora_alpha=int(adapted.alpha), target_modules=names)
        model = get_peft_model(load_base(job.model, causal=learner.base.causal).model, config)
        blocks: dict[tuple[Part, str], Tensor] = {**frame_blocks(adapted.frame.matrices), **learner.layout.views(start)}
        own = dict(model.named_parameters())
        factors: tuple[Part, ...] = ("A", "B")
        parameters: dict[tuple[Part, str], nn.Parameter] = {
            (part, name): own[f"base_model.model.{name}.lora_{part}.default.weight"]
            for part in factors
            for name in names
        }
        head = None if learner.base.causal else nn.Linear(learner.base.width, len(job.world.splits.label_names))
        if head is not None:
            parameters |= {("head", name): parameter for name, parameter in head.named_parameters()}
            kept = learner.task.head  # type: ignore[attr-defined]
            own_head: dict[tuple[Part, str], Tensor] = {("head", "weight"): kept.weight, ("head", "bias"): kept.bias}
            blocks = own_head | blocks
        for key, parameter in parameters.items():
            parameter.data.copy_(blocks[key])
            parameter.requires_grad_(key[0] in parts)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return cls(job, model, head, parameters)

    def trained(self, parts: tuple[Part, ...]) -> list[nn.Parameter]:
        """The trained parameters in layout order."""
        return [self.parameters[e.part, e.name] for e in self.job.world.learner.layout.entries if e.part in parts]

    def vector(self, start: Tensor) -> Tensor:
        """Everything that the layout names, as one vector."""
        layout = self.job.world.learner.layout
        return torch.cat([self.parameters[entry.part, entry.name].detach().flatten() for entry in layout.entries])

    def loss(self, tokens: Tokens, row: int) -> Tensor:
        """Loss of one example on its own: nothing is padded."""
        ids = torch.from_numpy(tokens.ids[row])[None]
        if self.head is None:
            logits = self.model(input_ids=ids).logits[0, :-1]
            return F.cross_entropy(logits, ids[0, 1:])
        states = self.model(input_ids=ids).last_hidden_state
        feature = F.normalize(states.mean(1), dim=-1) * 20**0.5
        return F.cross_entropy(self.head(feature), torch.tensor([int(tokens.labels[row])]))  # type: ignore[index]


def optimizer_of(twin: Twin, parts: tuple[Part, ...], config: TrainingConfig) -> torch.optim.Optimizer:
    factors = tuple(part for part in parts if part != "head")
    groups: list[dict[str, Any]] = [{"params": twin.trained(factors), "lr": config.rate}]
    if "head" in parts:
        groups.append({"params": twin.trained(("head",)), "lr": config.head_rate or config.rate})
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum)
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, eps=1e-5)


def frame_blocks(matrices: Mapping[str, Tensor]) -> dict[tuple[Part, str], Tensor]:
    return {("A", name): matrix for name, matrix in matrices.items()}


OPEN: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"training": {"momentum": 0.9}},
    "adamw": {"training": {"optimizer": "adamw", "rate": 0.01, "weight_decay": 0.1}},
    "proximal": {"training": {"proximal": 0.5}},
    "head rate": {"training": {"head_rate": 0.9, "rate": 0.05}},
    "frozen head": FROZEN,
    "causal": CAUSAL,
    "lora": {"federation": {"strategy": "lora"}},
    "causal lora": {**CAUSAL, "federation": {"strategy": "lora"}},
    "rolora": {"federation": {"strategy": "rolora"}},
}


@pytest.mark.parametrize(("case", "number"), [*((case, 1) for case in OPEN), ("rolora", 2)])
def test_open_training_equals_peft_with_torch_optim(make_job: MakeJob, case: str, number: int) -> None:
    changes = OPEN[case]
    full = {**changes, "training": {**changes.get("training", {}), "steps": 3, "batch": 1000}}
    job = make_job(**full)
    start, parts, config = begin(job), parts_of(job, number), job.training
    tokens = [job.world.client(index) for index in range(2)]
    works = [Work(str(index), own) for index, own in enumerate(tokens)]
    ours = train(job.world.learner, works, start=start, config=config, parts=parts, seed=0, number=number).values
    for index, own in enumerate(tokens):
        twin = Twin.of(job, start, parts)
        optimizer = optimizer_of(twin, parts, config)
        origin = [parameter.detach().clone() for parameter in twin.trained(parts)]
        for _ in range(config.steps):
            loss = torch.stack([twin.loss(own, row) for row in range(len(own))]).mean()
            for parameter, first in zip(twin.trained(parts), origin, strict=True):
                loss = loss + config.proximal / 2 * (parameter - first).square().sum()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        torch.testing.assert_close(ours[index], twin.vector(start), rtol=1e-4, atol=1e-5)
        assert (ours[index] - start).norm() > 1e-2


PRIVATE: dict[str, dict[str, Any]] = {
    "trained head": {},
    "frozen head": FROZEN,
    "causal": CAUSAL,
    "adamw": {"training": {"optimizer": "adamw", "rate": 0.01}},
    "lora": {"federation": {"strategy": "lora"}},
}


@pytest.mark.parametrize("clip", [0.3, 1e3])
@pytest.mark.parametrize("case", PRIVATE)
def test_private_training_equals_opacus_gradients_clipped_and_noised(make_job: MakeJob, case: str, clip: float) -> None:
    job = make_job(**PRIVATE[case])
    start, parts, tokens = begin(job), parts_of(job, 1), job.world.client(0)
    mechanism = Mechanism(clip, clip / 2 if "head" in parts else None, 0.5 if clip < 1 else 1e-4)
    plan = PrivatePlan(mechanism, 0.4, 0.4 * len(tokens), 10, None, 1e-5)
    works = [Work("0", tokens, plan, SeededRandomness(9, "a")), Work("1", tokens, plan, SeededRandomness(9, "b"))]
    ours = train(job.world.learner, works, start=start, config=job.training, parts=parts, seed=0, number=1).values
    for values, name in zip(ours, "ab", strict=True):
        theirs = opacus_run(job, start, parts, tokens=tokens, plan=plan, draws=SeededRandomness(9, name))
        torch.testing.assert_close(values, theirs, rtol=1e-4, atol=1e-5)


def opacus_run(
    job: ClientJob,
    start: Tensor,
    parts: tuple[Part, ...],
    *,
    tokens: Tokens,
    plan: PrivatePlan,
    draws: SeededRandomness,
) -> Tensor:
    """Train with per-example gradients from Opacus' hooks, and everything else written out."""
    twin = Twin.of(job, start, parts)
    twin.model = hooked(twin.model)
    twin.head = None if twin.head is None else hooked(twin.head)  # type: ignore[assignment]
    optimizer = optimizer_of(twin, parts, job.training)
    factors = twin.trained(tuple(part for part in parts if part != "head"))
    head = twin.trained(("head",)) if "head" in parts else []
    for _ in range(job.training.steps):
        lot = draws.lot(len(tokens), rate=plan.rate)
        samples = [
            list(gradients) for gradients in zip(*per_example(twin, tokens, lot, [*factors, *head]), strict=True)
        ]
        sums = [torch.zeros_like(parameter) for parameter in (*factors, *head)]
        for example in samples:
            add_clipped(sums[: len(factors)], example[: len(factors)], bound=plan.mechanism.clip)
            add_clipped(sums[len(factors) :], example[len(factors) :], bound=plan.mechanism.head_clip or 0.0)
        noise = draws.gaussian(sum(total.numel() for total in sums)) * plan.mechanism.deviation
        pieces = torch.split(noise, [total.numel() for total in sums])
        for parameter, total, piece in zip((*factors, *head), sums, pieces, strict=True):
            parameter.grad = (total + piece.view_as(total)) / plan.lot
        optimizer.step()
    return twin.vector(start)


def hooked(module: nn.Module) -> nn.Module:
    wrapped: nn.Module = GradSampleModule(module, loss_reduction="sum", strict=False).train()
    return wrapped


def per_example(twin: Twin, tokens: Tokens, lot: np.ndarray, parameters: list[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Yield the gradients of every example in the lot, parameter by parameter."""
    for row in lot:
        torch.autograd.backward(twin.loss(tokens, int(row)))
    for parameter in parameters:
        samples = getattr(parameter, "grad_sample", None)
        pieces = samples if isinstance(samples, list) else [samples]
        yield [piece[0] for piece in pieces if piece is not None]
        parameter.grad_sample = parameter.grad = None  # type: ignore[attr-defined]


def add_clipped(sums: list[Tensor], example: list[Tensor], *, bound: float) -> None:
    """Add an example's gradients, scaled so that their norm over all blocks is at most `bound`."""
    if not sums:
        return
    norm = float(torch.cat([gradient.flatten() for gradient in example]).double().norm())
    for total, gradient in zip(sums, example, strict=True):
        total.add_(gradient * min(1.0, bound / norm))
