"""Forgetting where the data may not leave their client: an order goes out, a slot and statistics come back.

Two records, each one safetensors file with its meaning as JSON and a SHA-256 over both. An order holds what every
client may know: the served adapter, settings, and which block of the frame is the request's. An answer holds the B's
of the slot, the digest of the A that they were trained over, and the detector's class statistics; no text, no feature,
no loss.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lora.errors import WrongUpdate
from strategies.unlearning.config import ForgettingConfig
from strategies.unlearning.detector import Detector
from strategies.unlearning.forgotten import Forgotten, GatedSlot, slot_of
from tasks.exported import ExportedClassifier
from tasks.models import BaseModel

VERSION = 1
_FORMAT = "lethe-forgetting"
_DAMAGED = (
    SafetensorError, KeyError, TypeError, ValueError, ValidationError, AttributeError, OverflowError, RecursionError,
    RuntimeError,
)  # fmt: skip


@dataclass(frozen=True)
class ForgetOrder:
    """What a client needs to forget some of its rows: the served classifier, settings, and the block of its slot."""

    request: str
    block: int
    base: str
    """Digest of the base model's weights."""
    reference: str
    """Name by which the base model is known; the client decides where it takes it from."""
    adapter: str
    """Digest of the served adapter; an answer is refused when another one is served by then."""
    classifier: ExportedClassifier
    own_rank: int
    config: ForgettingConfig
    key: str
    """The public key of whoever orders, 64 hex digits: the record of the answer will be signed by it."""
    dtype: str = "auto"
    """Precision that the base model is loaded in, which is part of its digest."""
    forgotten: tuple[str, ...] = ()
    """Classes that earlier requests have forgotten as a whole; they are no answers any more."""

    def to_bytes(self) -> bytes:
        """Return the record."""
        whole = self.classifier
        tensors = {f"A.{name}": a for name, a in whole.a.items()} | {f"B.{name}": b for name, b in whole.b.items()}
        tensors |= {"head.weight": whole.weight, "head.bias": whole.bias}
        about = {
            "request": self.request,
            "block": self.block,
            "base": self.base,
            "reference": self.reference,
            "adapter": self.adapter,
            "own_rank": self.own_rank,
            "key": self.key,
            "dtype": self.dtype,
            "config": self.config.model_dump(mode="json"),
            "forgotten": list(self.forgotten),
            "alpha": whole.alpha,
            "labels": list(whole.labels),
            "pooling": whole.pooling,
            "max_length": whole.max_length,
        }
        return _sealed("order", tensors, about)

    @classmethod
    def from_bytes(cls, data: bytes) -> "ForgetOrder":
        """Read a record. Raises WrongUpdate for anything else, another version, or a digest that differs."""
        tensors, about = _opened("order", data)
        try:
            factors = {part: _named(tensors, f"{part}.") for part in ("A", "B")}
            classifier = ExportedClassifier(
                factors["A"],
                factors["B"],
                float(about["alpha"]),
                tensors["head.weight"],
                tensors["head.bias"],
                tuple(about["labels"]),
                about["pooling"],
                int(about["max_length"]),
            )
            config = ForgettingConfig.model_validate(about["config"])
            return cls(
                request=str(about["request"]),
                block=int(about["block"]),
                base=str(about["base"]),
                reference=str(about["reference"]),
                adapter=str(about["adapter"]),
                classifier=classifier,
                own_rank=int(about["own_rank"]),
                config=config,
                key=str(about["key"]),
                dtype=str(about["dtype"]),
                forgotten=tuple(map(str, about["forgotten"])),
            )
        except _DAMAGED as error:
            raise WrongUpdate(f"the order cannot be read ({error}); ask for a new one") from error

    def over(self, base: BaseModel) -> Forgotten:
        """Put the classifier over the client's copy of the base model."""
        learner, values = self.classifier.over(base)
        return Forgotten(learner, values, self.config, self.own_rank)


@dataclass(frozen=True)
class ForgetAnswer:
    """What a client made of its rows: B's of a slot `[size]`, the digest of their A, and a detector."""

    request: str
    block: int
    adapter: str
    """Digest of the adapter that it was trained over."""
    a: str
    """Digest of the block of the frame."""
    b: Tensor
    detector: Detector
    classes: tuple[str, ...]
    """Classes that the request forgets as a whole; empty for single examples."""
    rows: int
    noise: float = 0.0
    """Noise multiplier of the statistics; 0: none."""
    epsilon: float | None = None
    """What the answer as a whole costs at `delta`, per row, add/remove one; None: it is not private."""
    delta: float | None = None

    @classmethod
    def of(cls, order: ForgetOrder, gated: GatedSlot, *, digest: str, **rest: Any) -> "ForgetAnswer":
        """Take what travels out of a slot and a detector that were made by an order; `digest` is of its A."""
        b = gated.slot.values[gated.slot.layout.span("B")].clone()
        return cls(order.request, gated.block, order.adapter, digest, b, gated.detector, **rest)

    def to_bytes(self) -> bytes:
        """Return the record."""
        tensors = {"b": self.b} | {f"detector.{name}": tensor for name, tensor in self.detector.tensors().items()}
        about = {
            "request": self.request,
            "block": self.block,
            "adapter": self.adapter,
            "a": self.a,
            "classes": list(self.classes),
            "rows": self.rows,
            "noise": self.noise,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "detector": self.detector.about(),
        }
        return _sealed("answer", tensors, about)

    @classmethod
    def from_bytes(cls, data: bytes) -> "ForgetAnswer":
        """Read a record. Raises WrongUpdate for anything else, another version, a digest that differs, or NaN."""
        tensors, about = _opened("answer", data)
        wrong = sorted(name for name, tensor in tensors.items() if not bool(tensor.isfinite().all()))
        if wrong:
            raise WrongUpdate(f"the answer's '{wrong[0]}' is not finite; let the client train again")
        try:
            detector = Detector.of(_named(tensors, "detector."), about["detector"])
            place = (str(about["request"]), int(about["block"]), str(about["adapter"]), str(about["a"]))
            rest = (tuple(map(str, about["classes"])), int(about["rows"]), float(about["noise"]))
            spent = tuple(None if about[name] is None else float(about[name]) for name in ("epsilon", "delta"))
            if rest[1] < 1 or not all(math.isfinite(each) for each in (rest[2], *spent) if each is not None):
                raise ValueError("rows, noise, epsilon or delta is no such number")
            return cls(*place, tensors["b"], detector, *rest, *spent)
        except _DAMAGED as error:
            raise WrongUpdate(f"the answer cannot be read ({error}); let the client train again") from error

    def gated(self, name: str, served: Forgotten) -> GatedSlot:
        """Return what is to be served of it. Raises FrameMismatch, ModelError and WrongUpdate where it does not fit."""
        slot = slot_of(self.b, block=self.block, digest=self.a, frames=served.frames, who="the client's answer")
        expected = [tuple(layer) for layer in (served.config.layers,)]
        width = served.learner.base.width
        if [self.detector.layers] != expected or any(s.pulled.shape[1:] != (width,) for s in self.detector.statistics):
            raise WrongUpdate(
                f"the client's detector reads layers {list(self.detector.layers)}, and forgetting.layers is "
                f"{list(served.config.layers)} at width {width}; let the client train again with the present order"
            )
        return GatedSlot(name, self.block, slot, self.detector)


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _sealed(kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"version": VERSION, "kind": kind, **about}, sort_keys=True)
    return save(own, {_FORMAT: text, "sha256": _seal(own, text)})


def _opened(kind: str, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        meta = json.loads(data[8 : 8 + size])["__metadata__"]
        text, seal = meta[_FORMAT], meta["sha256"]
        about = json.loads(text)
        version, kinds = about["version"], about.get("kind")
        found = _seal(tensors, text)
    except _DAMAGED as error:
        raise WrongUpdate(f"not a forgetting {kind} ({type(error).__name__}); give the file that was sent") from error
    if version != VERSION or kinds != kind:
        raise WrongUpdate(
            f"a forgetting {kinds} of version {version}, and a {kind} of version {VERSION} is read here; "
            "use the same release on both sides"
        )
    if seal != found:
        raise WrongUpdate(f"the forgetting {kind} was damaged on its way (its digest differs); send it again")
    return tensors, about


def _seal(tensors: Mapping[str, Tensor], text: str) -> str:
    whole = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        whole.update(f"\0{name}:{tuple(tensors[name].shape)}:{tensors[name].dtype}:".encode())
        whole.update(tensors[name].numpy().tobytes())
    return whole.hexdigest()
