"""The private detector: what one row can change, what noise is drawn, and that it still knows the request."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from lora.errors import DataError
from privacy.accounting import Event
from privacy.randomness import SeededRandomness
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.class_statistics import ClassStatistics
from strategies.unlearning.detector import Detectors, request_features
from strategies.unlearning.encoder import SharedEncoder
from strategies.unlearning.private_detector import (
    BINS,
    PrivateStatistics,
    class_sums,
    distance_counts,
    fit_private_detector,
)
from tasks.examples import Examples
from tasks.learner import Learner

WIDTH = 12


class Recorded(SeededRandomness):
    """Seeded noise that can be silenced, and remembers how much of it was drawn."""

    def __init__(self, *, silent: bool) -> None:
        super().__init__(5)
        self.silent, self.sizes = silent, list[int]()

    def gaussian(self, size: int) -> Tensor:
        self.sizes.append(size)
        return torch.zeros(size) if self.silent else super().gaussian(size)


def features(seed: int, count: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=source)
    middles = 3 * torch.randn(3, WIDTH, generator=source)
    return normalize(middles[labels] + torch.randn(count, WIDTH, generator=source), dim=1), one_hot(labels, 3).double()


@given(st.integers(0, 10_000), st.integers(0, 19))
def test_one_row_changes_either_release_by_no_more_than_its_sensitivity(seed: int, row: int) -> None:
    x, member = features(seed, 20)
    rest = torch.arange(20) != row
    sums = class_sums(x, member) - class_sums(x[rest], member[rest])
    assert float(sums.norm()) <= 2**0.5 * (1 + 1e-6)
    means = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed))
    nothing = torch.zeros(0)
    known = ClassStatistics(torch.zeros(0, WIDTH), nothing, torch.tensor(1.0), means, means.square().sum(1))
    assert float((distance_counts(x, known) - distance_counts(x[rest], known)).norm()) == 1.0


def made(learner: Learner, request: AuditedRequest, classes: tuple[int, ...], noise: float, source: Recorded) -> tuple[
    Tensor, float
]:  # fmt: skip
    encoder = SharedEncoder(learner.adapted, pad=learner.pad)
    tokens = request.tokens(learner.task)
    detector = fit_private_detector(
        encoder, request, tokens, classes=classes, settings=PrivateStatistics(noise, 0.9), randomness=source
    )
    own = Detectors([detector]).distances(request_features(encoder, request, tokens, request.used))[:, 0]
    return own, detector.threshold


def test_without_noise_it_is_cosine_to_class_means_with_the_quantile_of_its_rows(
    learner: Learner, rows: Callable[..., Examples]
) -> None:
    request = AuditedRequest(rows(2, 3), whole=True)
    encoder, tokens = SharedEncoder(learner.adapted, pad=learner.pad), request.tokens(learner.task)
    x = request_features(encoder, request, tokens, request.used)[:, 0].double().numpy()
    labels = np.asarray(request.examples.labels)
    means = np.stack([x[labels == label].mean(0) for label in (2, 3)])
    cosine = (x @ means.T / np.linalg.norm(means, axis=1)).max(1)
    source = Recorded(silent=True)
    own, threshold = made(learner, request, (2, 3), 4.0, source)
    assert np.allclose(own.numpy(), 1 - cosine, atol=1e-5)
    assert abs(threshold - np.quantile(1 - cosine, 0.9)) <= 1.2 / BINS
    # Two releases: counts and sums of two classes, and the histogram.
    assert source.sizes == [2 * (1 + x.shape[1]), BINS]
    assert request.audit.report()["foreign"] == 0 and len(request.audit.rows) == 48


def test_noise_is_of_the_size_that_is_charged(learner: Learner, rows: Callable[..., Examples]) -> None:
    request = AuditedRequest(rows(2, 3), whole=True)
    silent, threshold = made(learner, request, (2, 3), 0.5, Recorded(silent=True))
    noisy, moved = made(learner, request, (2, 3), 0.5, Recorded(silent=False))
    assert not torch.allclose(silent, noisy, atol=1e-3) and moved != threshold
    assert PrivateStatistics(0.5, 0.9).event(layers=3) == Event(rate=1.0, noise_multiplier=0.5, steps=6)


def test_noise_beyond_all_measure_leaves_one_class_and_finite_numbers(
    learner: Learner, rows: Callable[..., Examples]
) -> None:
    for seed in range(3):
        source = Recorded(silent=False)
        SeededRandomness.__init__(source, seed)
        own, threshold = made(learner, AuditedRequest(rows(2, 3), whole=True), (2, 3), 1e4, source)
        assert bool(own.isfinite().all()) and np.isfinite(threshold)


def test_single_rows_are_one_class_and_strange_ones_are_refused(
    learner: Learner, rows: Callable[..., Examples]
) -> None:
    source = Recorded(silent=True)
    made(learner, AuditedRequest(rows(2, 3), whole=True), (), 1.0, source)
    assert source.sizes[0] == 1 + learner.base.width
    with pytest.raises(DataError, match="does not name"):
        made(learner, AuditedRequest(rows(2, 3), whole=True), (3,), 1.0, Recorded(silent=True))
