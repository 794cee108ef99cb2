"""Prototypes: class means of the original model against plain formulas, and nothing of any one row."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from lora.errors import RunError
from strategies.unlearning.prototypes import LEAST, Prototypes
from tasks.images import Images


class Linear:
    """A model whose features are the pixels."""

    def features(self, rows: Any) -> torch.Tensor:
        return torch.from_numpy(rows.pixels.reshape(len(rows), -1)).float() / 40

    def logits(self, rows: Any) -> torch.Tensor:
        return self.features(rows)


def rows(labels: list[int], *, seed: int = 0) -> Images:
    drawn = np.random.default_rng(seed).integers(0, 256, (len(labels), 1, 2, 3), dtype=np.uint8)
    return Images(drawn, np.array(labels))


LABELS = [0, 0, 0, 1, 2, 2, 4, 4, 4, 4]


def naive(target: Any, feature: Any) -> float:
    return float(rel_entr(softmax(target), softmax(feature)).sum())


def test_prototypes_are_class_means_and_single_rows_have_none() -> None:
    given = rows(LABELS)
    features = Linear().features(given).numpy()
    made = Prototypes.of(Linear(), given, classes=6)
    assert made.known.tolist() == [True, False, True, False, True, False]
    for label in (0, 2, 4):
        own = features[given.labels == label]
        np.testing.assert_allclose(made.means[label].numpy(), own.mean(0), rtol=1e-5)
        expected = np.mean([naive(own.mean(0), each) for each in own])
        assert float(made.spread[label]) == pytest.approx(expected, rel=1e-4)
    assert not made.means[[1, 3, 5]].any()


def test_copies_move_the_means_and_neither_make_a_class_known_nor_change_whose_spread_it_is() -> None:
    given, copies = rows(LABELS), rows([0, 0, 1, 1, 1, 2, 4, 4], seed=1)
    made = Prototypes.of(Linear(), given, classes=6, copies=copies)
    # Class 1 has one row: its copies would tell of that row alone.
    assert made.known.tolist() == [True, False, True, False, True, False] and not made.means[1].any()
    features, more = Linear().features(given).numpy(), Linear().features(copies).numpy()
    for label in (0, 2, 4):
        own = features[given.labels == label]
        mean = np.concatenate([own, more[copies.labels == label]]).mean(0)
        np.testing.assert_allclose(made.means[label].numpy(), mean, rtol=1e-5)
        assert float(made.spread[label]) == pytest.approx(np.mean([naive(mean, each) for each in own]), rel=1e-4)


def test_prototypes_hold_class_statistics_and_no_row() -> None:
    given = rows(LABELS)
    features = Linear().features(given)
    made = Prototypes.of(Linear(), given, classes=6)
    held = [getattr(made, each.name) for each in fields(made)]
    assert sum(tensor.numel() for tensor in held) == 6 * 6 + 6 + 6
    assert all(isinstance(tensor, torch.Tensor) and tensor._base is None for tensor in held)
    assert float(torch.cdist(made.means, features).min()) > 0.01
    assert LEAST > 1


def test_divergence_is_the_mean_over_rows_with_a_prototype() -> None:
    made = Prototypes.of(Linear(), rows(LABELS), classes=6)
    features = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 4, 0])
    kept = [naive(made.means[labels[i]].numpy(), features[i].numpy()) for i in (0, 2, 3)]
    assert float(made.divergence(features, labels)) == pytest.approx(np.mean(kept), rel=1e-4)
    spread = float(made.spread[torch.tensor([0, 4, 0])].mean())
    beyond = float(made.divergence(features, labels, beyond_spread=True))
    assert beyond == pytest.approx(max(0.0, np.mean(kept) - spread), rel=1e-4)
    assert float(made.divergence(features, torch.tensor([1, 1, 3, 5]))) == 0.0


def test_the_original_models_own_rows_are_no_farther_than_their_spread() -> None:
    given = rows(LABELS)
    made = Prototypes.of(Linear(), given, classes=6)
    own = given.take([0, 1, 2])
    found = made.divergence(Linear().features(own), torch.from_numpy(own.labels), beyond_spread=True)
    assert float(found) == pytest.approx(0.0, abs=1e-6)


def test_between_is_the_mean_over_pairs_of_classes() -> None:
    made = Prototypes.of(Linear(), rows(LABELS), classes=6)
    means = made.means[made.known].numpy()
    pairs = [naive(means[i], means[j]) for i in range(3) for j in range(3) if i != j]
    assert made.between() == pytest.approx(np.mean(pairs), rel=1e-4)
    assert made.without([0, 2]).between() == 1.0


def test_a_forgotten_class_leaves_nothing() -> None:
    made = Prototypes.of(Linear(), rows(LABELS), classes=6)
    left = made.without([4])
    assert left.known.tolist() == [True, False, True, False, False, False]
    assert not left.means[4].any() and not left.spread[4].any()
    assert made.known[4] and torch.equal(left.means[0], made.means[0])


def test_gradients_flow_to_features_alone() -> None:
    made = Prototypes.of(Linear(), rows(LABELS), classes=6)
    features = torch.zeros(2, 6, requires_grad=True)
    torch.autograd.backward(made.divergence(features, torch.tensor([0, 2])))
    assert features.grad is not None and bool(features.grad.abs().sum() > 0)
    assert not made.means.requires_grad


def test_prototypes_come_back_from_their_file_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    made = Prototypes.of(Linear(), rows(LABELS), classes=6)
    (path := tmp_path / "prototypes.safetensors").write_bytes(made.to_bytes())
    back = Prototypes.load(path)
    assert all(torch.equal(getattr(back, each.name), getattr(made, each.name)) for each in fields(Prototypes))
    path.write_bytes(made.to_bytes()[:-9])
    with pytest.raises(RunError, match=r"prototypes\.safetensors"):
        Prototypes.load(path)
