"""The detector: separation, what it keeps, its thresholds, its file, and that all share a pass."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import roc_auc_score
from sklearn.svm import OneClassSVM
from torch import Tensor

from lora.errors import DataError, ModelError
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.class_statistics import Shape
from strategies.unlearning.detector import (
    TERMS,
    Detector,
    Detectors,
    DetectorSettings,
    detector_of,
    fit_detector,
    left_out_distances,
    request_features,
    svm_weights,
)
from strategies.unlearning.encoder import SharedEncoder, masked_mean
from tasks.examples import Examples
from tasks.learner import Learner
from tasks.tokens import Batch, collate

LAYERS = (1, 2)


@pytest.fixture
def encoder(learner: Learner) -> SharedEncoder:
    return SharedEncoder(learner.adapted, layers=LAYERS, pad=learner.pad)


def seen(encoder: SharedEncoder, learner: Learner, examples: Examples) -> Tensor:
    tokens = learner.task.tokenize(examples)
    found = torch.zeros(len(tokens), len(LAYERS), learner.base.width)
    for places, batch in learner.batches([(tokens, row) for row in range(len(tokens))]):
        found[torch.from_numpy(places)] = encoder.features(batch)
    return found


def fit(encoder: SharedEncoder, learner: Learner, request: AuditedRequest, **settings: object) -> Detector:
    made = DetectorSettings(shape=Shape(shrinkage=0.5), **settings)  # type: ignore[arg-type]
    return fit_detector(encoder, request, request.tokens(learner.task), settings=made)


@pytest.mark.parametrize("terms", [TERMS, ("mahalanobis",), ("cosine",)])
@pytest.mark.parametrize("combine", ["sum", "svm"])
def test_every_term_alone_and_together_tells_the_request_from_others(
    terms: tuple, combine: str, encoder: SharedEncoder, rng: np.random.Generator
) -> None:
    means = rng.normal(size=(6, 2, 16))
    labels = np.arange(360) % 6
    drawn = means[labels] + 0.5 * rng.normal(size=(360, 2, 16))
    features = torch.nn.functional.normalize(torch.from_numpy(drawn).float(), dim=2)
    inside, classes = features[labels < 3], torch.from_numpy(labels[labels < 3])
    settings = DetectorSettings(combine=combine, terms=terms)  # type: ignore[arg-type]
    detector = detector_of(inside[:120], classes[:120], inside[120:150], encoder=encoder, settings=settings)
    asked = torch.cat([inside[150:], features[labels >= 3]])
    found = Detectors([detector]).distances(asked)[:, 0]
    truth = np.r_[np.zeros(30), np.ones(180)]
    assert roc_auc_score(truth, found) > 0.99
    for place, term in enumerate(TERMS):
        assert (detector.weights[:, place] > 0).all() == (term in terms)


def test_only_the_requests_rows_are_read_and_thresholds_come_from_the_held_back(
    encoder: SharedEncoder, learner: Learner, request_of: Callable[..., AuditedRequest]
) -> None:
    wide = request_of(2, 3)
    assert fit(encoder, learner, wide).threshold > 0
    assert wide.audit.report()["foreign"] == wide.audit.report()["files"] == 0
    request = request_of(2, 3)
    detector = fit(encoder, learner, request, folds=0)
    assert request.audit.report()["foreign"] == request.audit.report()["files"] == 0
    assert set(request.audit.rows) == set(range(48)) and max(request.audit.rows.values()) == 1
    tokens = request.tokens(learner.task)
    held = request_features(encoder, request, tokens, request.held_back)
    distances = Detectors([detector]).distances(held)[:, 0]
    assert detector.threshold == pytest.approx(float(distances.quantile(DetectorSettings().coverage)))
    assert detector.weight.held_back == pytest.approx(float(distances.mean()))
    used = Detectors([detector]).distances(request_features(encoder, request, tokens, request.used))[:, 0]
    assert detector.weight.used == pytest.approx(float(used.mean()))


def test_the_threshold_reaches_what_is_said_in_other_ways(encoder: SharedEncoder, rng: np.random.Generator) -> None:
    """Rows come in ways of saying; statistics have seen some ways of a class, and others are asked about."""
    means = rng.normal(size=(5, 1, 2, 32))
    ways = means + 0.5 * rng.normal(size=(5, 24, 2, 32))
    ways[:, 12:] += 0.3 * rng.normal(size=(5, 12, 2, 32))
    said = ways[:, :, None] + 0.02 * rng.normal(size=(5, 24, 6, 2, 32))
    features = torch.nn.functional.normalize(torch.from_numpy(said).float(), dim=-1)
    own = features[:2, :12].reshape(-1, 2, 32)
    labels = torch.arange(2).repeat_interleave(72)
    mixed = torch.from_numpy(rng.permutation(144))
    used, held_back = mixed[:115], mixed[115:]
    caught, touched = {}, {}
    for folds in (0, 8):
        settings = DetectorSettings(folds=folds)
        detector = detector_of(own[used], labels[used], own[held_back], encoder=encoder, settings=settings)
        near = [Detectors([detector]).distances(rows.reshape(-1, 2, 32))[:, 0] <= detector.threshold
                for rows in (features[:2, 12:], features[2:])]  # fmt: skip
        caught[folds], touched[folds] = (float(each.float().mean()) for each in near)
    assert caught[8] > caught[0] + 0.3
    assert touched[8] <= 0.05


def test_left_out_rows_are_asked_about_by_the_others(encoder: SharedEncoder, rng: np.random.Generator) -> None:
    drawn = torch.from_numpy(rng.normal(size=(80, 2, 16))).float()
    features, labels = torch.nn.functional.normalize(drawn, dim=2), torch.arange(80) % 2
    settings, weights = DetectorSettings(folds=2), torch.ones(2, 2).double()
    found = left_out_distances(features, labels, weights, settings=settings)
    halves = [KMeans(2, n_init=3, random_state=0).fit_predict(features[labels == each].flatten(1).double().numpy())
              for each in (0, 1)]  # fmt: skip
    wanted = []
    for large in (True, False):
        out = torch.zeros(80, dtype=torch.bool)
        for each, half in enumerate(halves):
            larger = int(np.bincount(half).argmax())
            out[labels == each] = torch.from_numpy((half == larger) == large)
        others = detector_of(features[~out], labels[~out], features[out], encoder=encoder, settings=settings)
        asked = replace(others, weights=weights)
        wanted.append(Detectors([asked]).distances(features[out])[:, 0])
    assert found is not None
    torch.testing.assert_close(found, torch.cat(wanted))
    assert left_out_distances(features[:9], None, weights, settings=settings) is None
    assert left_out_distances(features, labels, weights, settings=replace(settings, folds=0)) is None


def test_a_planted_read_fails_the_detector(learner: Learner, rows: Callable[..., Examples]) -> None:
    retained = torch.randn(6, 2)

    class Peeking(SharedEncoder):
        def features(self, batch: Batch) -> Tensor:
            return super().features(batch) + retained.mean() * 0

    with pytest.raises(DataError, match=r"shape \(6, 2\)"):
        fit(Peeking(learner.adapted, layers=LAYERS), learner, AuditedRequest(rows(2, 3)))


def test_a_request_without_classes_is_clustered_under_the_same_audit(
    make_learner: Callable[..., Learner], rows: Callable[..., Examples]
) -> None:
    learner = make_learner("tiny-llama")
    request = AuditedRequest(Examples(rows(2, 3).texts))
    detector = fit(SharedEncoder(learner.adapted, layers=LAYERS), learner, request, combine="svm")
    assert request.audit.report()["foreign"] == 0 and len(detector.statistics[0].norms) > 1


def test_the_primal_svm_is_scikit_learns(rng: np.random.Generator) -> None:
    terms = rng.gamma(3.0, size=(200, 4))
    weights = svm_weights(torch.from_numpy(terms), nu=0.1)
    svm = OneClassSVM(kernel="linear", nu=0.1).fit(terms)
    asked = rng.gamma(3.0, size=(50, 4))
    scores = svm.score_samples(asked)
    np.testing.assert_allclose((asked @ weights.numpy()) / scores, np.full(50, 1 / svm.coef_.sum()), rtol=1e-8)
    assert float(weights.sum()) == pytest.approx(1.0) and (weights > 0).all()


def test_padding_changes_nothing(encoder: SharedEncoder, learner: Learner, rows: Callable[..., Examples]) -> None:
    tokens = learner.task.tokenize(rows(0))
    _, wide = tokens.ids[0], np.concatenate([tokens.ids[1]] * 4)[:60]
    alone = collate([(tokens, 0)], pad=learner.pad)
    padded = collate([(tokens, 0), (type(tokens)([wide], np.zeros(1, dtype=np.int64)), 0)], pad=learner.pad)
    assert padded.mask is not None and alone.mask is None
    other = Batch(torch.where(padded.mask.bool(), padded.input_ids, 7), padded.mask, padded.labels)
    one, two, three = (encoder.features(batch)[0] for batch in (alone, padded, other))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(two, three, atol=1e-6, rtol=1e-6)
    detector = fit(encoder, learner, AuditedRequest(rows(0, 1)))
    ask = Detectors([detector]).distances
    torch.testing.assert_close(ask(one[None]), ask(two[None]), atol=1e-3, rtol=1e-3)


def test_means_are_of_length_one(noise: torch.Generator) -> None:
    states, mask = torch.randn(3, 4, 5, generator=noise), torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    found = masked_mean(states, mask)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(found[0], torch.nn.functional.normalize(states[0, 0], dim=0))


def test_all_requests_share_one_pass(learner: Learner, encoder: SharedEncoder, rows: Callable[..., Examples]) -> None:
    each = [fit(encoder, learner, AuditedRequest(rows(label))) for label in range(4)] * 25
    _, batch = learner.batches([(learner.task.tokenize(rows(0)), row) for row in range(8)])[0]
    calls: list[int] = []
    hook = learner.adapted.base.register_forward_hook(lambda *_: calls.append(1))
    before = encoder.passes
    found = Detectors(each).distances(encoder.features(batch))
    hook.remove()
    assert found.shape == (len(batch), 100)
    assert len(calls) == encoder.passes - before == 1
    alone = torch.cat([Detectors([one]).distances(encoder.features(batch)) for one in each[:4]], dim=1)
    torch.testing.assert_close(found[:, :4], alone, atol=1e-4, rtol=1e-4)


def test_the_file_holds_no_examples_features(
    encoder: SharedEncoder, learner: Learner, rows: Callable[..., Examples], tmp_path: Path
) -> None:
    request = AuditedRequest(rows(2, 3))
    detector = fit(encoder, learner, request, combine="svm")
    path = tmp_path / "detector.safetensors"
    detector.save(path)
    written = path.read_bytes()
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    tokens = request.tokens(learner.task)
    features = request_features(encoder, request, tokens, np.arange(48))
    for row, text in zip(features, rows(2, 3).texts, strict=True):
        for kind in (np.float32, np.float64, np.float16):
            for layer in row.numpy().astype(kind):
                assert layer.tobytes() not in written and layer[:4].tobytes() not in written
        assert text.encode() not in written
    # No row of numbers in the file points where an example does: the nearest is a mean of many.
    flat = features.flatten(0, 1)
    for each in detector.statistics:
        for kept in (each.directions, each.pulled):
            if len(kept):
                cosines = torch.nn.functional.normalize(kept, dim=1) @ flat.T
                assert cosines.abs().max() < 0.9999
    # The search finds what it looks for.
    planted = written + features[5, 1].numpy().tobytes()
    assert features[5, 1].numpy().tobytes() in planted


def test_what_was_saved_answers_as_before(
    encoder: SharedEncoder, learner: Learner, rows: Callable[..., Examples], tmp_path: Path
) -> None:
    detector = fit(encoder, learner, AuditedRequest(rows(2, 3)))
    detector.save(tmp_path / "d")
    loaded = Detector.load(tmp_path / "d")
    asked = seen(encoder, learner, rows(0, 3))
    assert torch.equal(Detectors([loaded]).distances(asked), Detectors([detector]).distances(asked))
    assert (loaded.weight, loaded.threshold, loaded.layers) == (detector.weight, detector.threshold, LAYERS)
    stored = sum(t.numel() for t in (*vars(detector.statistics[0]).values(), *vars(detector.statistics[1]).values()))
    assert detector.numbers == stored + 4 + 5
    (tmp_path / "x").write_bytes(b"no")
    with pytest.raises(DataError, match="not a detector's file"):
        Detector.load(tmp_path / "x")
    with pytest.raises(DataError, match="not a detector's file"):
        Detector.load(tmp_path / "absent")


def test_detectors_of_other_layers_are_not_mixed(
    noise: torch.Generator, encoder: SharedEncoder, learner: Learner
) -> None:
    features = torch.nn.functional.normalize(torch.randn(30, 2, 8, generator=noise), dim=2)
    one = detector_of(features, None, features, encoder=encoder, settings=DetectorSettings())
    only_last = SharedEncoder(learner.adapted, layers=(2,))
    other = detector_of(features[:, :1], None, features[:, :1], encoder=only_last, settings=DetectorSettings())
    with pytest.raises(DataError, match="same layers"):
        Detectors([one, other])


def test_an_unknown_layer_is_named(learner: Learner, rows: Callable[..., Examples]) -> None:
    _, batch = learner.batches([(learner.task.tokenize(rows(0)), 0)])[0]
    with pytest.raises(ModelError, match="layer 9 does not exist: the model has layers 0 to 2"):
        SharedEncoder(learner.adapted, layers=(9,)).features(batch)
