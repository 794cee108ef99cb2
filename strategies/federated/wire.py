"""What passes between server and clients: an order to train, an update, a greeting, a refusal."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from lora.codec import Part
from lora.errors import BudgetExceeded, FrameMismatch, LetheError, WrongUpdate
from strategies.flower import VECTOR, to_record

ARRAYS, CONFIG, METRICS, REPORT = "arrays", "config", "metrics", "report"
WEIGHT = "num-examples"
"""Flower's name for the weight of a reply."""

TRAIN, EVALUATE, GREET = "train", "evaluate", "query.greet"

INTERNAL, DECLINED, BUDGET, FRAME = 100, 101, 102, 103
REASONS = {INTERNAL: "error", DECLINED: "declined", BUDGET: "budget", FRAME: "digest"}
"""What the report calls each error code; every other code is "error"."""


class Declined(LetheError):
    """A client cannot take part, such as with too few examples."""


@dataclass(frozen=True)
class Order:
    """The server's order of a round: start from `vector [layout.size]`, train `train`, send `send`."""

    round: int
    vector: Tensor
    train: tuple[Part, ...]
    send: tuple[Part, ...]
    frame: str
    layout: str

    def content(self) -> RecordDict:
        """Return the message content."""
        config: dict[str, Any] = {
            "round": self.round,
            "train": list(self.train),
            "send": list(self.send),
            "frame": self.frame,
            "layout": self.layout,
        }
        return RecordDict({ARRAYS: to_record(self.vector.numpy()), CONFIG: ConfigRecord(config)})

    @classmethod
    def read(cls, message: Message) -> "Order":
        """Read an order. The vector is a copy: all messages of a round may share their content in memory."""
        config: Any = message.content[CONFIG]
        return cls(
            round=int(config["round"]),
            vector=read_vector(message),
            train=tuple(config["train"]),
            send=tuple(config["send"]),
            frame=str(config["frame"]),
            layout=str(config["layout"]),
        )


@dataclass(frozen=True)
class Update:
    """A client's answer: the sent parts as one vector, and only what law 4 lets out."""

    vector: Tensor
    client: str
    frame: str
    examples: int
    loss: float | None = None
    epsilon: float | None = None
    round: int = 0
    """Which round's order this answers: an update of an earlier one must not count again."""

    def content(self) -> RecordDict:
        """Return the message content."""
        metrics: dict[str, Any] = {WEIGHT: self.examples}
        if self.loss is not None:
            metrics["loss"] = self.loss
        if self.epsilon is not None:
            metrics["epsilon"] = self.epsilon
        report: dict[str, Any] = {"client": self.client, "frame": self.frame, "round": self.round}
        return RecordDict(
            {
                ARRAYS: to_record(self.vector.numpy()),
                METRICS: MetricRecord(metrics),
                REPORT: ConfigRecord(report),
            }
        )

    @classmethod
    def read(cls, message: Message) -> "Update":
        """Read an update. Raises WrongUpdate when records are missing, of a wrong kind or unreadable."""
        try:
            metrics: Any = message.content[METRICS]
            report: Any = message.content[REPORT]
            return cls(
                vector=read_vector(message),
                client=str(report["client"]),
                frame=str(report["frame"]),
                examples=int(metrics[WEIGHT]),
                loss=_optional(metrics, "loss"),
                epsilon=_optional(metrics, "epsilon"),
                round=int(report["round"]),
            )
        except Exception as error:  # What a client sends may break NumPy's reader in ways that no list of types covers.
            raise WrongUpdate(f"the reply is not an update: {type(error).__name__} {error}") from error


def read_vector(message: Message) -> Tensor:
    """Return the flat float32 vector of a message, as a copy."""
    arrays: Any = message.content[ARRAYS]
    return torch.from_numpy(np.array(arrays[VECTOR].numpy(), dtype=np.float32))


def refusal(error: Exception, message: Message) -> Message:
    """Answer with an error that carries no data: Lethe's own reasons in words, all others by their type alone."""
    codes = {BudgetExceeded: BUDGET, FrameMismatch: FRAME, Declined: DECLINED}
    code = next((number for kind, number in codes.items() if isinstance(error, kind)), INTERNAL)
    text = str(error) if code != INTERNAL else f"{type(error).__name__}; the client's own log has the details"
    return Message(Error(code, text), reply_to=message)


def _optional(metrics: Any, key: str) -> float | None:
    return float(metrics[key]) if key in metrics else None
