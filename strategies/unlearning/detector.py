"""The out-of-distribution detector of a request: how far an input is from what is to be forgotten.

After O3 (2407.10223, section 3.2 of its released code), with these differences: means leave padding out; both distances
rise with distance; the bank of stored features is replaced by class means, and the one-class SVM by its primal form, so
that nothing of a single example is kept; scale and threshold come from rows of the request that the statistics behind
them did not see, and from nothing else.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from sklearn.cluster import KMeans
from sklearn.svm import OneClassSVM
from torch import Tensor

from lora.errors import DataError
from lora.files import write_bytes
from privacy.randomness import Randomness
from strategies.unlearning.audit import derived
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.class_statistics import ClassStatistics, Shape, StackedStatistics, class_statistics
from strategies.unlearning.encoder import SharedEncoder
from strategies.unlearning.weight import MirroredCdf
from tasks.tokens import Ids, Tokens

Term = Literal["mahalanobis", "cosine"]
TERMS: tuple[Term, ...] = ("mahalanobis", "cosine")
VERSION = 1
_TENSORS = ("directions", "gains", "base", "pulled", "norms")


@dataclass(frozen=True)
class DetectorSettings:
    """Which distances are taken, and how they become one."""

    shape: Shape = field(default_factory=Shape)
    terms: tuple[Term, ...] = TERMS
    combine: Literal["sum", "svm"] = "sum"
    """`sum` of the terms, each in units of its spread over held-back rows, or a linear one-class SVM over them."""
    nu: float = 0.1
    """Share of used rows that the SVM may leave out."""
    coverage: float = 0.97
    """Share of left-out rows within the threshold of the hard gate."""
    folds: int = 8
    """Clusters of every class that are left out in turn, for the threshold: how far is what is said in another way?
    Rows that are held back at random are nearer than that, since some rows are all but the same. 0: the held-back rows
    give the threshold, as in the paper."""


@dataclass(frozen=True)
class Detector:
    """What is kept of a request: statistics at every layer, weights of the terms `[layers, 2]`, and five numbers."""

    statistics: tuple[ClassStatistics, ...]
    layers: tuple[int, ...]
    weights: Tensor
    weight: MirroredCdf
    threshold: float

    @property
    def numbers(self) -> int:
        """Numbers kept."""
        return sum(each.numbers for each in self.statistics) + self.weights.numel() + 5

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that is a tensor, by name."""
        found = {"weights": self.weights}
        for place, each in enumerate(self.statistics):
            found |= {f"{place}.{name}": getattr(each, name) for name in _TENSORS}
        return {name: tensor.contiguous().cpu() for name, tensor in found.items()}

    def to(self, device: torch.device) -> "Detector":
        """Return the same on a device."""
        return replace(
            self, statistics=tuple(each.to(device) for each in self.statistics), weights=self.weights.to(device)
        )

    def about(self) -> dict[str, Any]:
        """Return the rest, in plain JSON types."""
        weight = asdict(self.weight)
        return {"version": VERSION, "layers": list(self.layers), "weight": weight, "threshold": self.threshold}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> "Detector":
        """Put together what `tensors` and `about` gave. Raises KeyError, TypeError or ValueError for anything else."""
        places = range(len(about["layers"]))
        statistics = tuple(ClassStatistics(*(tensors[f"{place}.{name}"] for name in _TENSORS)) for place in places)
        weight = MirroredCdf(**about["weight"])
        return cls(statistics, tuple(about["layers"]), tensors["weights"], weight, float(about["threshold"]))

    def save(self, path: Path) -> None:
        """Write one safetensors file, aside and then renamed."""
        write_bytes(path, save(self.tensors(), {"detector": json.dumps(self.about())}))

    @classmethod
    def load(cls, path: Path) -> "Detector":
        """Read what `save` wrote. Raises DataError for anything else."""
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["detector"])
                return cls.of({name: file.get_tensor(name) for name in file.keys()}, about)  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not a detector's file ({error}); make it again with `lethe forget`") from error


@dataclass(frozen=True)
class Detectors:
    """The detectors of all requests, which share features and are asked at once."""

    each: Sequence[Detector]
    thresholds: Tensor = field(init=False, repr=False)
    _stacked: tuple[StackedStatistics, ...] = field(init=False, repr=False)
    _weights: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        layers = {detector.layers for detector in self.each}
        if len(layers) != 1:
            raise DataError(f"detectors of one pass read the same layers, not {sorted(layers)}; make them anew")
        columns = zip(*(detector.statistics for detector in self.each), strict=True)
        object.__setattr__(self, "_stacked", tuple(StackedStatistics.of(list(column)) for column in columns))
        object.__setattr__(self, "_weights", torch.stack([detector.weights for detector in self.each]))
        thresholds = torch.tensor([each.threshold for each in self.each]).double()
        object.__setattr__(self, "thresholds", thresholds.to(self._weights.device))

    def to(self, device: torch.device) -> "Detectors":
        """Return the same on a device: features that are there are asked about without leaving it."""
        return Detectors([each.to(device) for each in self.each])

    def __len__(self) -> int:
        return len(self.each)

    def terms(self, features: Tensor) -> Tensor:
        """Return all distances `[rows, requests, layers, 2]` of features `[rows, layers, d]`."""
        return torch.stack([s.distances(features[:, place]) for place, s in enumerate(self._stacked)], dim=2)

    def distances(self, features: Tensor) -> Tensor:
        """Return the distance of every row to every request, `[rows, requests]`; it rises with distance."""
        return (self.terms(features).double() * self._weights).sum((2, 3))


def fit_detector(
    encoder: SharedEncoder,
    request: AuditedRequest,
    tokens: Tokens,
    *,
    settings: DetectorSettings,
    randomness: Randomness | None = None,
) -> Detector:
    """Make a request's detector: statistics of its used rows, scale of its held-back rows, threshold of left-out ones.

    Nothing but the request's rows and the encoder is read. Raises DataError for too few rows.
    """
    audit = request.audit
    audit.declare("model", [*encoder.adapted.base.parameters(), *encoder.adapted.base.buffers()])
    audit.declare("model", encoder.adapted.frame.matrices.values())
    audit.declare("slots", (encoder.factors or {}).values())
    with audit.watching():
        used = request_features(encoder, request, tokens, request.used)
        held_back = request_features(encoder, request, tokens, request.held_back)
        with audit.reading(()) as made:
            labels = None if tokens.labels is None else torch.from_numpy(tokens.labels[request.used])
            made.append(labels)
        detector = detector_of(used, labels, held_back, encoder=encoder, settings=settings, randomness=randomness)
    audit.check()
    return detector


def detector_of(
    used: Tensor,
    labels: Tensor | None,
    held_back: Tensor,
    *,
    encoder: SharedEncoder,
    settings: DetectorSettings,
    randomness: Randomness | None = None,
) -> Detector:
    """Make a detector of features `[n, layers, d]` of used rows and of held-back rows."""
    layers = tuple(encoder.layers)
    statistics = tuple(
        class_statistics(used[:, place], labels, shape=settings.shape, randomness=randomness)
        for place in range(len(layers))
    )
    raw = Detector(statistics, layers, torch.ones(len(layers), 2).double(), MirroredCdf(0.0, 0.0, 1.0), 0.0)
    asked = Detectors([raw])
    ours, theirs = asked.terms(used)[:, 0].double(), asked.terms(held_back)[:, 0].double()
    weights = _term_weights(ours, theirs, settings)
    near, far = (ours * weights).sum((1, 2)), (theirs * weights).sum((1, 2))
    left_out = None if settings.shape.noise_multiplier else left_out_distances(used, labels, weights, settings=settings)
    threshold = float((far if left_out is None else left_out).quantile(settings.coverage))
    return Detector(statistics, layers, weights, MirroredCdf.of(near, far), threshold)


def left_out_distances(
    used: Tensor, labels: Tensor | None, weights: Tensor, *, settings: DetectorSettings
) -> Tensor | None:
    """Return the distances of used rows `[n, layers, d]` whose neighbours the statistics did not see, float64.

    Every class is divided into clusters; the rows of one cluster of every class are asked about by statistics of all
    others, cluster by cluster. Classes too small to be divided are never left out. None with `folds` below 2, and where
    nothing can be left out.
    """
    fold, layers = _clusters(used.flatten(1), labels, settings), tuple(range(used.shape[1]))
    found = []
    for number in range(int(fold.max()) + 1 if len(fold) else 0):
        out = fold == number
        if int((~out).sum()) < settings.shape.least:
            continue
        rest = None if labels is None else labels[~out]
        seen = tuple(class_statistics(used[~out][:, place], rest, shape=settings.shape) for place in layers)
        asked = Detectors([Detector(seen, layers, weights, MirroredCdf(0.0, 0.0, 1.0), 0.0)])
        found.append(asked.distances(used[out])[:, 0])
    return torch.cat(found) if found else None


def _clusters(features: Tensor, labels: Tensor | None, settings: DetectorSettings) -> Tensor:
    """Return which fold leaves each row out `[n]`; -1: none does. The largest clusters of all classes come first."""
    classes = torch.zeros(len(features), dtype=torch.long) if labels is None else labels
    fold = torch.full((len(features),), -1, dtype=torch.long)
    for each in torch.unique(classes):
        rows = (classes == each).nonzero()[:, 0]
        wanted = min(settings.folds, len(rows) // settings.shape.least)
        if wanted > 1:
            clusters = KMeans(wanted, n_init=3, random_state=0).fit_predict(features[rows].cpu().double().numpy())
            order = np.argsort(-np.bincount(clusters, minlength=wanted), kind="stable")
            fold[rows] = derived(np.argsort(order)[clusters]).long()
    return fold


def _term_weights(used: Tensor, held_back: Tensor, settings: DetectorSettings) -> Tensor:
    """Return the weight of every term `[layers, 2]`: 1 over its spread, times the SVM's primal weight if asked."""
    weights = 1 / held_back.std(0).clamp(min=1e-9)
    for place, term in enumerate(TERMS):
        if term not in settings.terms:
            weights[:, place] = 0.0
    if settings.combine == "svm":
        weights = weights * svm_weights((used * weights).flatten(1), nu=settings.nu).view_as(weights)
    return weights


def svm_weights(terms: Tensor, *, nu: float) -> Tensor:
    """Fit a linear one-class SVM to terms `[n, m]` and return its primal weights `[m]`, of sum 1.

    scikit-learn's `score_samples` of a linear kernel is `terms @ w` with w = sum_i alpha_i terms_i: the support vectors
    are not needed to ask it, and are thrown away. Nothing is lost.
    """
    svm = OneClassSVM(kernel="linear", nu=nu).fit(terms.cpu().numpy())
    primal = derived(svm.coef_[0].copy()).to(terms)
    weights: Tensor = primal / primal.sum()
    return weights


def request_features(
    encoder: SharedEncoder, request: AuditedRequest, tokens: Tokens, rows: Ids, *, size: int = 128
) -> Tensor:
    """Return the features `[rows, layers, d]` of some of a request's rows, in their order, on the CPU.

    Statistics are made there whatever the encoder computes on: scikit-learn reads them, and the labels are there.
    """
    order = tokens.lengths[rows].argsort(kind="stable")
    chunks = [rows[order[start : start + size]] for start in range(0, len(order), size)]
    found = torch.cat([encoder.features(request.batch(tokens, chunk, pad=encoder.pad)).cpu() for chunk in chunks])
    return torch.stack([found[place] for place in order.argsort().tolist()])
