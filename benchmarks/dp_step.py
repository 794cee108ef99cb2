"""One private step beside one non-private step: ours, PEFT's, Opacus by hooks and by ghost clipping.

    python -m benchmarks.dp_step [--rounds 15]

MiniLM-L6 with rank-8 adapters on query, value and both FFN matrices, a 2-class head, 32 rows of 64 tokens, SGD,
float32, one torch thread. CPU time of the process, variants interleaved with rotating order; ratios are medians of
paired ratios. A private step clips each example, draws its noise and steps: ours from the operating system's
generator, Opacus' from torch's.
"""

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.measure import interleaved, paired_ratio, peak_bytes, publish, settings
from client.config import TrainingConfig
from client.training import Work, train
from lora.config import AdapterConfig
from privacy.mechanism import Mechanism
from privacy.plan import PrivatePlan
from privacy.randomness import SecureRandomness
from tasks.config import ModelConfig, TaskConfig
from tasks.learner import Learner, build_learner
from tasks.models import load_base
from tasks.tokens import Tokens

ROWS, LENGTH, CLASSES = 32, 64, 2
TARGETS = ("query", "value", "intermediate.dense", "output.dense")
CLIP, NOISE, RATE = 1.0, 1.0, 0.1


class PeftClassifier(nn.Module):
    """PEFT's adapters with A frozen, mean pooling and a linear head: the peer that is timed."""

    def __init__(self) -> None:
        super().__init__()
        base = load_base(ModelConfig(), causal=False).model
        self.encoder = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=_sites(base)))
        self.head = nn.Linear(384, CLASSES)
        for name, parameter in self.encoder.named_parameters():
            parameter.requires_grad_("lora_B" in name)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # Opacus insists on training mode; the work must be the same.

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits `[rows, classes]`."""
        logits: Tensor = self.head(self.encoder(input_ids=ids).last_hidden_state.mean(1))
        return logits


def peft_step(model: nn.Module, ids: Tensor, labels: Tensor) -> Callable[[], None]:
    """A non-private step: mean loss, backward, SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)

    def step() -> None:
        torch.autograd.backward([F.cross_entropy(model(ids), labels)])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def opacus_hooks_step(model: nn.Module, ids: Tensor, labels: Tensor) -> Callable[[], None]:
    """Opacus' per-sample gradients by hooks; its clip, sum and noise, written as its DPOptimizer does them."""
    hooked = GradSampleModule(model, loss_reduction="sum")
    parameters = [p for p in hooked.parameters() if p.requires_grad]

    def step() -> None:
        torch.autograd.backward([F.cross_entropy(hooked(ids), labels, reduction="sum")])
        samples = [p.grad_sample for p in parameters]
        norms = torch.stack([g.flatten(1).norm(2, dim=1) for g in samples], dim=1).norm(2, dim=1)
        factors = (CLIP / (norms + 1e-6)).clamp(max=1.0)
        with torch.no_grad():
            for parameter, sample in zip(parameters, samples, strict=True):
                total = torch.einsum("i,i...->...", factors, sample) + torch.randn_like(parameter) * NOISE * CLIP
                parameter.sub_(total / ROWS, alpha=RATE)
        hooked.zero_grad(set_to_none=True)
        for parameter in parameters:
            parameter.grad_sample = None

    return step


def opacus_ghost_step(model: nn.Module, ids: Tensor, labels: Tensor) -> Callable[[], None]:
    """Opacus' ghost clipping: norms in a first backward pass, the clipped sum in a second."""
    ghost = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=CLIP, use_ghost_clipping=True, loss_reduction="sum"
    )
    parameters = [p for p in ghost.parameters() if p.requires_grad]

    def step() -> None:
        losses = F.cross_entropy(ghost(ids), labels, reduction="none")
        torch.autograd.backward([losses.sum()], retain_graph=True)
        factors = ghost.get_clipping_coef()
        for parameter in parameters:
            parameter.grad = None
        ghost.disable_hooks()
        torch.autograd.backward([(factors * losses).sum()])
        ghost.enable_hooks()
        with torch.no_grad():
            for parameter in parameters:
                total = parameter.grad + torch.randn_like(parameter) * NOISE * CLIP
                parameter.sub_(total / ROWS, alpha=RATE)
        ghost.zero_grad(set_to_none=True)

    return step


def lethe_step(learner: Learner, tokens: Tokens, *, private: bool) -> Callable[[], None]:
    """Lethe's own training function for one client and one step, private or not."""
    config = TrainingConfig(steps=1, batch=ROWS, rate=RATE)
    plan = PrivatePlan(Mechanism(CLIP, CLIP, NOISE), 1.0, float(ROWS), 1, None, 1e-5)
    work = Work("0", tokens, plan, SecureRandomness()) if private else Work("0", tokens)
    start = learner.start()

    def step() -> None:
        train(learner, [work], start=start, config=config, parts=("B", "head"), seed=0, number=1)

    return step


def variants() -> dict[str, Callable[[], None]]:
    """Make all five steps over the same rows."""
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (ROWS, LENGTH), generator=source)
    labels = torch.randint(0, CLASSES, (ROWS,), generator=source)
    tokens = Tokens(list(ids.numpy()), labels.numpy())
    adapter = AdapterConfig(targets=tuple(_sites(load_base(ModelConfig(), causal=False).model)))
    learner = build_learner(ModelConfig(), TaskConfig(), adapter, labels=("a", "b"), trains_frame=False)
    return {
        "peft": peft_step(PeftClassifier().eval(), ids, labels),
        "lethe non-private": lethe_step(learner, tokens, private=False),
        "lethe private": lethe_step(learner, tokens, private=True),
        "opacus hooks": opacus_hooks_step(PeftClassifier().train(), ids, labels),
        "opacus ghost": opacus_ghost_step(PeftClassifier().train(), ids, labels),
    }


def _sites(base: nn.Module) -> list[str]:
    return [name for name, _ in base.named_modules() if name.endswith(TARGETS) and "attention.output" not in name]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    steps = variants()
    times = interleaved(steps, rounds=rounds)
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    rows: list[list[str]] = [["step", "CPU ms (median)", "over peft (quartiles)", "peak MiB"]]
    for name in steps:
        middle, low, high = paired_ratio(times, name, "peft")
        milliseconds = sorted(times[name])[rounds // 2] * 1000
        rows.append([name, f"{milliseconds:.0f}", f"{middle:.3f} ({low:.3f}-{high:.3f})", f"{peaks[name] / 2**20:.1f}"])
    figures: dict[str, Any] = {
        "private_over_nonprivate": paired_ratio(times, "lethe private", "peft")[0],
        "private_over_own_nonprivate": paired_ratio(times, "lethe private", "lethe non-private")[0],
        "private_over_opacus_hooks": paired_ratio(times, "lethe private", "opacus hooks")[0],
        "private_over_opacus_ghost": paired_ratio(times, "lethe private", "opacus ghost")[0],
        "memory_over_nonprivate": peaks["lethe private"] / peaks["peft"],
        "memory_over_own_nonprivate": peaks["lethe private"] / peaks["lethe non-private"],
    }
    about = settings(model="MiniLM-L6", rows=ROWS, tokens=LENGTH, rank=8, targets=list(TARGETS), rounds=rounds)
    publish("dp_step", figures=figures, rows=rows, about=about)


if __name__ == "__main__":
    main()
