"""Class means and a shrunk covariance, checked against scikit-learn and dense algebra."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.covariance import ShrunkCovariance
from torch import Tensor

from lora.errors import DataError
from privacy.randomness import SeededRandomness
from strategies.unlearning.class_statistics import ClassStatistics, Shape, StackedStatistics, class_statistics


def features(count: int, *, classes: int = 3, width: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    means = rng.normal(size=(classes, width)) * 2
    rows = means[labels] + rng.normal(size=(count, width)) * np.linspace(0.2, 1.5, width)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return torch.from_numpy(rows).float(), torch.from_numpy(labels)


def dense(rows: Tensor, labels: Tensor, shrinkage: float) -> tuple[np.ndarray, np.ndarray]:
    """Return means and precision as scikit-learn has them."""
    x, y = rows.double().numpy(), labels.numpy()
    means = np.stack([x[y == k].mean(0) for k in range(y.max() + 1)])
    fitted = ShrunkCovariance(shrinkage=shrinkage, assume_centered=True).fit(x - means[y])
    return means, fitted.precision_


def distances(statistics: ClassStatistics, rows: Tensor) -> Tensor:
    return StackedStatistics.of([statistics]).distances(rows)[:, 0]


@pytest.mark.parametrize("shrinkage", [0.1, 0.8, 1.0])
def test_with_all_directions_it_is_scikit_learns(shrinkage: float) -> None:
    rows, labels = features(240)
    shape = Shape(shrinkage=shrinkage, directions=11)
    found = distances(class_statistics(rows, labels, shape=shape), rows[:50]).double().numpy()
    means, precision = dense(rows, labels, shrinkage)
    z = rows[:50].double().numpy()
    gaps = z[:, None] - means
    mahalanobis = np.einsum("nkd,de,nke->nk", gaps, precision, gaps).min(1)
    root = np.linalg.cholesky(precision)
    white, centre = z @ root, means @ root
    cosine = (white @ centre.T) / np.linalg.norm(white, axis=1)[:, None] / np.linalg.norm(centre, axis=1)
    np.testing.assert_allclose(found[:, 0], mahalanobis, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(found[:, 1], 1 - cosine.max(1), rtol=2e-3, atol=1e-4)


def test_the_smallest_variances_are_replaced_by_their_mean() -> None:
    rows, labels = features(400)
    kept = class_statistics(rows, labels, shape=Shape(shrinkage=0.3, directions=4))
    means, _ = dense(rows, labels, 0.3)
    within = np.cov((rows.double().numpy() - means[labels.numpy()]).T, bias=True)
    values, vectors = np.linalg.eigh(within)
    values = 0.7 * np.r_[np.full(8, values[:8].mean()), values[8:]] + 0.3 * values.mean()
    precision = vectors @ np.diag(1 / values) @ vectors.T
    mine = kept.base * torch.eye(12) - kept.directions.T @ torch.diag(kept.gains) @ kept.directions
    np.testing.assert_allclose(mine.numpy(), precision, rtol=1e-3, atol=1e-3 * abs(precision).max())


@given(st.integers(0, 1000), st.floats(1.0, 4.0))
def test_both_distances_rise_when_an_input_leaves(seed: int, far: float) -> None:
    rows, labels = features(120, classes=1, seed=seed)
    statistics = class_statistics(rows, labels, shape=Shape(shrinkage=0.5))
    mean = torch.nn.functional.normalize(rows.mean(0), dim=0)
    away = torch.randn(12, generator=torch.Generator().manual_seed(seed))
    away = away - (away @ mean) * mean
    steps = torch.linspace(0, 1, 5) * far
    path = torch.nn.functional.normalize(mean + steps[:, None] * torch.nn.functional.normalize(away, dim=0), dim=1)
    # From the nearest point on, along a great circle.
    found = StackedStatistics.of([class_statistics(rows, labels, shape=Shape(shrinkage=1.0))]).distances(path)[:, 0]
    assert (found.diff(dim=0) > -1e-6).all()
    whole = distances(statistics, torch.cat([path[:1], path[-1:]]))
    assert whole[1, 0] > whole[0, 0]


def test_requests_of_other_sizes_share_one_product() -> None:
    parts = [features(300, seed=1), features(60, classes=1, seed=2), features(90, classes=6, seed=3)]
    each = [class_statistics(rows, labels, shape=Shape(directions=9)) for rows, labels in parts]
    asked = features(40, seed=4)[0]
    together = StackedStatistics.of(each).distances(asked)
    apart = torch.stack([distances(one, asked) for one in each], dim=1)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    assert together.isfinite().all()


def test_no_mean_stands_for_fewer_than_the_least() -> None:
    rows, _ = features(40)
    labels = torch.tensor([0] * 30 + [1] * 4 + [2] * 3 + [3] * 3)
    found = class_statistics(rows, labels, shape=Shape(least=5, shrinkage=1.0))
    assert len(found.norms) == 2
    one_small = class_statistics(rows, torch.tensor([0] * 37 + [1] * 3), shape=Shape(least=5))
    all_small = class_statistics(rows[:8], torch.arange(8), shape=Shape(least=5))
    assert len(one_small.norms) == len(all_small.norms) == 1
    with pytest.raises(DataError, match=r"detector of 4 examples .* at least 5"):
        class_statistics(rows[:4], None, shape=Shape(least=5))


def test_without_labels_clusters_stand_for_classes() -> None:
    rows, labels = features(300)
    by_label = class_statistics(rows, labels, shape=Shape(shrinkage=1.0))
    by_cluster = class_statistics(rows, None, shape=Shape(shrinkage=1.0, classes=3))
    torch.testing.assert_close(by_cluster.norms.sort()[0], by_label.norms.sort()[0], rtol=0.05, atol=0.0)
    assert len(class_statistics(rows[:20], None, shape=Shape(classes=15)).norms) <= 2


def test_directions_follow_the_number_of_examples() -> None:
    rows, labels = features(1000, width=200)
    assert len(class_statistics(rows, labels, shape=Shape(directions=64)).gains) == 64
    assert len(class_statistics(rows[:95], labels[:95], shape=Shape(directions=64)).gains) == 9
    assert len(class_statistics(rows[:9], None, shape=Shape()).gains) == 0


def test_identical_rows_are_no_trouble() -> None:
    rows = torch.nn.functional.normalize(torch.ones(30, 6), dim=1)
    found = distances(class_statistics(rows, torch.zeros(30), shape=Shape()), features(5, width=6)[0])
    assert found.isfinite().all()


def test_noise_has_the_stated_size_and_needs_a_source() -> None:
    rows, labels = features(300)
    clean = class_statistics(rows, labels, shape=Shape())
    noised = [
        class_statistics(rows, labels, shape=Shape(noise_multiplier=m), randomness=SeededRandomness(1))
        for m in (1e-6, 1.0)
    ]
    torch.testing.assert_close(noised[0].pulled, clean.pulled, rtol=1e-2, atol=1e-2)
    assert (noised[1].pulled - clean.pulled).abs().max() > 0.1
    assert all(t.isfinite().all() for t in (noised[1].pulled, noised[1].norms, noised[1].gains))
    for labels_, source in ((labels, None), (None, SeededRandomness(1))):
        with pytest.raises(DataError, match="labels and a source of noise"):
            class_statistics(rows, labels_, shape=Shape(noise_multiplier=1.0), randomness=source)


@given(st.integers(0, 500))
def test_one_example_changes_the_noised_sums_by_at_most_the_sensitivity(seed: int) -> None:
    from strategies.unlearning.class_statistics import _moments

    rows, labels = features(20, seed=seed)
    more, fewer = _moments(rows.double(), labels), _moments(rows[:-1].double(), labels[:-1])
    change = sum(float((one - other).square().sum()) for one, other in zip(more, fewer, strict=True))
    assert change == pytest.approx(3.0, abs=1e-5)
