"""The whole step against Opacus, and an audit that must fail a broken mechanism."""

import math
from collections.abc import Callable

import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from scipy import optimize, stats
from torch import Tensor, nn

from privacy.accounting import Event, epsilon
from privacy.clipping import add_clipped, clip_factors
from privacy.mechanism import Mechanism
from privacy.randomness import SecureRandomness

DELTA = 1e-5


@pytest.mark.parametrize("bound", [0.05, 0.6, 100.0])
def test_the_clipped_sum_equals_that_of_opacus(bound: float) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3))
    model = GradSampleModule(network, loss_reduction="sum")
    inputs, labels = torch.randn(16, 12) * torch.rand(16, 1) * 4, torch.randint(3, (16,))
    torch.autograd.backward(nn.functional.cross_entropy(model(inputs), labels, reduction="sum"))
    blocks = [parameter.grad_sample.clone() for parameter in model.parameters()]
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=bound, expected_batch_size=16
    )
    optimizer.clip_and_accumulate()
    theirs = torch.cat([parameter.summed_grad.flatten() for parameter in model.parameters()])

    factors = clip_factors(blocks, bound=bound)
    ours = torch.zeros_like(theirs)
    add_clipped(ours, blocks, factors=factors)
    assert bool((factors < 1).any()) == (bound < 100)
    # Opacus divides by norm + 1e-6.
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


def step(blocks: list[Tensor], mechanism: Mechanism) -> Tensor:
    """One private step as the training code takes it: clip, sum, noise."""
    total = torch.zeros(sum(math.prod(block.shape[1:]) for block in blocks))
    add_clipped(total, blocks, factors=clip_factors(blocks, bound=mechanism.clip))
    return total + mechanism.noise(len(total), SecureRandomness())


def test_steps_without_gradients_are_pure_independent_noise() -> None:
    mechanism = Mechanism(0.7, None, noise_multiplier=1.3)
    steps = torch.stack([step([torch.zeros(rows, 600, 8)], mechanism) for rows in (0, 4, 0, 4)]).double()
    deviation = 1.3 * 0.7
    assert float(steps.var()) == pytest.approx(deviation**2, rel=6 * math.sqrt(2 / steps.numel()))
    assert stats.kstest(steps.flatten().numpy(), "norm", args=(0, deviation)).pvalue > 1e-7
    assert float((torch.corrcoef(steps) - torch.eye(4)).abs().max()) < 6 / steps.shape[1] ** 0.5


def separation(release: Callable[[list[Tensor]], Tensor], canaries: int = 4000) -> float:
    """Bound from below, with 99.9 % confidence, the distance mu of "canary in" and "canary out" in deviations.

    Every canary is a gradient 10 C long on a coordinate of its own, in with probability 1/2 and alone there, so the
    coordinates repeat one membership test. For a Gaussian mechanism mu = z(true positives) - z(false positives)
    (f-DP, Dong et al. 2022; audits after Nasr et al. 2023), with Clopper-Pearson intervals on both rates.
    """
    inside = torch.rand(canaries) < 0.5
    gradients = 10 * torch.eye(canaries)[inside]
    scores = release([gradients[:, : canaries // 2].reshape(len(gradients), -1, 8), gradients[:, canaries // 2 :]])
    threshold = scores.median()
    positive = stats.binomtest(int((scores[inside] > threshold).sum()), int(inside.sum()))
    false = stats.binomtest(int((scores[~inside] > threshold).sum()), int((~inside).sum()))
    low, high = positive.proportion_ci(0.999).low, false.proportion_ci(0.999).high
    return float(stats.norm.ppf(low) - stats.norm.ppf(high))


def epsilon_of(separated: float) -> float:
    """Return the epsilon at DELTA of a Gaussian mechanism of that separation (Balle and Wang 2018)."""

    def excess(eps: float) -> float:
        upper = stats.norm.cdf(separated / 2 - eps / separated)
        return float(upper - math.exp(eps) * stats.norm.cdf(-separated / 2 - eps / separated) - DELTA)

    return float(optimize.brentq(excess, 0, 500)) if separated > 0 and excess(0) > 0 else 0.0


CLAIM = Mechanism(1.0, None, noise_multiplier=1.6)


def unclipped(blocks: list[Tensor]) -> Tensor:
    return torch.cat([block.flatten(1) for block in blocks], dim=1).sum(0) + CLAIM.noise(4000, SecureRandomness())


def halved(blocks: list[Tensor]) -> Tensor:
    return step(blocks, Mechanism(1.0, None, noise_multiplier=0.8))


def test_the_audit_passes_the_mechanism_that_runs() -> None:
    claimed = epsilon([Event(1.0, CLAIM.noise_multiplier, 1)], delta=DELTA)
    bounds = [epsilon_of(separation(lambda blocks: step(blocks, CLAIM))) for _ in range(3)]
    assert claimed == pytest.approx(epsilon_of(1 / CLAIM.noise_multiplier), abs=0.01)
    assert all(0.25 * claimed < bound < claimed for bound in bounds)


@pytest.mark.parametrize("broken", [halved, unclipped])
def test_the_audit_fails_a_mechanism_that_breaks_its_claim(broken: Callable[[list[Tensor]], Tensor]) -> None:
    claimed = epsilon([Event(1.0, CLAIM.noise_multiplier, 1)], delta=DELTA)
    assert epsilon_of(separation(broken)) > claimed
