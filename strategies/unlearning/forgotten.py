"""What a served classifier was asked to forget: one gated slot a request, answered around all of them in one pass."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lora.bank import Bank
from lora.errors import DataError, FrameMismatch, ModelError
from lora.files import write_bytes
from lora.frame import Frame, Site
from lora.gate import Gate
from lora.overlay import Overlay
from privacy.randomness import Randomness
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.class_statistics import Shape
from strategies.unlearning.config import ForgettingConfig
from strategies.unlearning.detector import Detector, Detectors, DetectorSettings, fit_detector
from strategies.unlearning.encoder import SharedEncoder
from strategies.unlearning.frames import OrthogonalFrames
from strategies.unlearning.gate import ForgettingGate
from strategies.unlearning.o3 import Slot, SlotSettings, Unlearned, slot_bank, unlearn
from strategies.unlearning.objectives import Objective, RandomLabels, own_runner_up, runner_up
from tasks.examples import Examples
from tasks.learner import Learner
from tasks.tokens import Batch, Ids

VERSION = 1
LEAST_ROWS = 8
"""Fewest rows of a request: a mean stands for five used ones, and a spread needs two held-back ones."""


@dataclass(frozen=True)
class GatedSlot:
    """What is served of one request: its slot, whose A is block `block` of the frame, and its detector."""

    request: str
    block: int
    slot: Slot
    detector: Detector


@dataclass(frozen=True)
class Asked:
    """What became of questions: class indices `[n]`, and the weight of every request `[n, requests]`."""

    guess: Ids
    weights: Tensor

    def accuracy(self, examples: Examples) -> float:
        """Return the share of right answers. Raises DataError where nothing was asked."""
        if not len(self.guess):
            raise DataError("nothing was asked, so nothing can be measured; give rows")
        return float((self.guess == np.asarray(examples.labels, dtype=np.int64)).mean())

    @property
    def touched(self) -> float:
        """Share of rows into which any request's slot was mixed."""
        return float((self.weights > 0).any(1).double().mean()) if self.weights.shape[1] else 0.0


@dataclass
class Forgotten:
    """A classifier of texts with the slots and detectors of all accepted requests.

    Detectors read the frozen base in one pass that all share; the slots of the requests that a row is near to are mixed
    into it on top of the classifier's own adapter. `own_rank` is the rank of the adapter as it was at first: slots are
    orthogonal to it, and to each other.

    **Guarantee**: a row that no request is near to is answered by the same operations, to the bit, as without any
    request; a later request changes neither slot nor detector of an earlier one.
    """

    learner: Learner
    values: Tensor
    config: ForgettingConfig
    own_rank: int
    requests: tuple[GatedSlot, ...] = ()
    encoder: SharedEncoder = field(init=False)

    def __post_init__(self) -> None:
        self.encoder = SharedEncoder(self.learner.adapted, layers=self.config.layers, pad=self.learner.pad)

    def beside(self, *requests: GatedSlot) -> "Forgotten":
        """Return the same classifier with more requests."""
        return replace(self, requests=(*self.requests, *requests))

    def without(self) -> "Forgotten":
        """Return the same classifier as if nothing had been asked of it."""
        return replace(self, requests=())

    @cached_property
    def frames(self) -> OrthogonalFrames:
        """The blocks that requests get, orthogonal to the classifier's first frame."""
        first = {name: a[: self.own_rank] for name, a in self.learner.adapted.frame.matrices.items()}
        # A site that was adapted only when a request was folded in has no rows of its own here.
        own = [site for site in self.learner.adapted.sites if bool(first[site.name].any())]
        beside = Frame({site.name: first[site.name].cpu() for site in own}, self.own_rank)
        return OrthogonalFrames(own, rank=self.config.rank, seed=self.config.seed, beside=beside)

    @property
    def sites(self) -> Sequence[Site]:
        """Matrices that slots adapt."""
        return self.frames.sites

    @cached_property
    def gate(self) -> ForgettingGate | None:
        """The gate over all requests; None where there are none."""
        if not self.requests:
            return None
        detectors = Detectors([each.detector for each in self.requests])
        return ForgettingGate(detectors, slot_bank([each.slot for each in self.requests]), self.config.gate)

    def weights(self, batch: Batch) -> Tensor:
        """Return the weight of every request for every row, `[rows, requests]`."""
        if self.gate is None:
            return torch.zeros(len(batch), 0)
        return self.gate.weights(self.encoder.features(batch))

    @torch.no_grad()
    def asked(self, examples: Examples) -> Asked:
        """Answer texts; labels, where there are none, do not matter."""
        if examples.labels is None:
            examples = Examples(examples.texts, (0,) * len(examples))
        tokens = self.learner.task.tokenize(examples)
        guess = np.zeros(len(tokens), dtype=np.int64)
        weights = torch.zeros(len(tokens), len(self.requests))
        for rows, batch in self.learner.batches([(tokens, row) for row in range(len(tokens))]):
            here = batch.to(self.learner.device)
            mine = self.weights(here)
            answers = self.learner.answers(self.values, here, overlay=self.overlay(mine))
            weights[torch.from_numpy(rows)] = mine.cpu()
            if answers.guess is not None:
                guess[rows] = answers.guess.cpu().numpy()
        return Asked(guess, weights)

    def overlay(self, weights: Tensor) -> Overlay | None:
        """Return what requests of these weights `[rows, requests]` add to a batch."""
        slots: Bank | None = None if self.gate is None else self.gate.slots
        return None if slots is None else Overlay.of(slots, Gate.mixture(weights))

    def train_slot(
        self, request: AuditedRequest, *, block: int, avoid: Collection[int], whole_classes: bool, seed: int
    ) -> Unlearned:
        """Train the slot of a request on its used rows alone, over the classifier without any other request.

        `avoid` are labels that are not to be answered any more; unless the request is of whole classes, a row's own
        label is avoided as well. Raises DataError where no label is left.
        """
        settings = slot_settings(self.config)
        start = Slot.fresh(self.sites, self.frames.block(block))
        objective = self.objective(request, avoid, whole_classes=whole_classes)
        return unlearn(self.learner, request, objective, model=self.values, slot=start, settings=settings, seed=seed)

    def objective(self, request: AuditedRequest, avoid: Collection[int], *, whole_classes: bool) -> Objective:
        """Return what a request's slot learns to say. Raises DataError where no label is left."""
        if self.config.objective == "random":
            return RandomLabels(range(len(self.learner.labels)), avoid=avoid, own=not whole_classes)
        ask = runner_up if whole_classes else own_runner_up
        return ask(self.learner, request, model=self.values, avoid=avoid)

    def fit_detector(self, request: AuditedRequest, *, randomness: Randomness | None = None) -> Detector:
        """Make the detector of a request: statistics of its used rows, the threshold of left-out ones.

        Raises DataError for fewer than `LEAST_ROWS` rows.
        """
        check_rows(len(request.examples))
        noise = self.config.statistics_noise if randomness is not None else 0.0
        settings = detector_settings(self.config, noise=noise)
        tokens = request.tokens(self.learner.task)
        return fit_detector(self.encoder, request, tokens, settings=settings, randomness=randomness)


def slot_settings(config: ForgettingConfig) -> SlotSettings:
    """Return how a store trains slots."""
    return SlotSettings(
        rank=config.rank, epochs=config.epochs, batch=config.batch, rate=config.rate, least_steps=config.least_steps
    )


def detector_settings(config: ForgettingConfig, *, noise: float = 0.0) -> DetectorSettings:
    """Return how a store makes detectors, with noise on their statistics or without."""
    shape = Shape(shrinkage=config.shrinkage, noise_multiplier=noise)
    return DetectorSettings(shape=shape, coverage=config.coverage, folds=config.folds)


def check_rows(count: int) -> None:
    """Raise DataError for too few rows to forget."""
    if count < LEAST_ROWS:
        raise DataError(
            f"a request of {count} rows is too small: means of fewer than 5 used rows would be copies of them, and "
            f"thresholds need 2 held-back ones; give at least {LEAST_ROWS}"
        )


def save_slot(path: Path, gated: GatedSlot, *, frames: OrthogonalFrames) -> None:
    """Write the B's of a slot as one safetensors file, aside and renamed; its A is known by block and digest."""
    b = gated.slot.values[gated.slot.layout.span("B")].contiguous().cpu()
    about = {"version": VERSION, "block": gated.block, "a": frames.block(gated.block).digest,
             "layout": gated.slot.layout.digest}  # fmt: skip
    write_bytes(path, save({"b": b}, {"slot": json.dumps(about)}))


def load_slot(path: Path, *, frames: OrthogonalFrames) -> tuple[int, Slot]:
    """Read what `save_slot` wrote; returns block and slot.

    Raises ModelError for a file that is none, FrameMismatch where the frame is not the one that it was trained over.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["slot"])
            b = file.get_tensor("b")
        block, digest = int(about["block"]), str(about["a"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: not a slot's file ({error}); restore it, or ask for the request again") from error
    return block, slot_of(b, block=block, digest=digest, frames=frames, who=str(path))


def slot_of(b: Tensor, *, block: int, digest: str, frames: OrthogonalFrames, who: str) -> Slot:
    """Return the slot with these B's over a block of the frame.

    Raises FrameMismatch for another frame, ModelError for B's of another size or that are not finite.
    """
    frame = frames.block(block)
    if frame.digest != digest:
        raise FrameMismatch(
            f"{who}: was trained over block {block} of frame {digest[:12]}, and here it is {frame.digest[:12]}; "
            "use the same adapter, forgetting.rank and forgetting.seed"
        )
    slot = Slot.fresh(frames.sites, frame)
    span = slot.layout.span("B")
    if b.shape != (span.stop - span.start,) or not bool(b.isfinite().all()):
        raise ModelError(f"{who}: {tuple(b.shape)} numbers, {span.stop - span.start} finite ones are a slot")
    slot.values[span] = b.float()
    return slot
