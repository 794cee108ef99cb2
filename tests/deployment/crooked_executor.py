"""A node's resident executor that does one thing wrong: a real process that speaks the real protocol.

    python crooked_executor.py (as `python -m client.executor`), with LETHE_TEST_FAULT=FILE

FILE names the fault, and is read before every message; without it the executor is an honest one.
"""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

from client import app, executor
from client.job import ClientJob
from lora.errors import DataError
from strategies.federated.wire import ARRAYS, METRICS, REPORT, WEIGHT, Order, read_vector
from strategies.flower import to_record
from strategies.flower_runtime import Assignment

PLACE = Path(os.environ["LETHE_TEST_FAULT"])
TIMES = 100.0
SENT_S = 5.0
"""Seconds in which a SuperNode has surely sent what it was given."""


def fault() -> str:
    return PLACE.read_text().strip() if PLACE.is_file() else ""


# --- What is wrong with an update ------------------------------------------------------------------------------------


def with_value(content: RecordDict, value: float) -> None:
    vector = read_vector(Message(content, dst_node_id=1, message_type="train"))
    vector[7] = value
    content[ARRAYS] = to_record(vector.numpy())


def shortened(content: RecordDict, order: Message) -> None:
    content[ARRAYS] = to_record(read_vector(Message(content, dst_node_id=1, message_type="train"))[:-1].numpy())


def enlarged(content: RecordDict, order: Message) -> None:
    """Make the update, not the whole vector, a hundred times as large."""
    vector = read_vector(Message(content, dst_node_id=1, message_type="train"))
    start = Order.read(order).vector
    start = start if start.shape == vector.shape else torch.zeros_like(vector)
    content[ARRAYS] = to_record((start + TIMES * (vector - start)).numpy())


def reported(content: RecordDict, order: Message, *, key: str, value: str) -> None:
    content[REPORT] = ConfigRecord({**dict(content[REPORT]), key: value})  # type: ignore[arg-type]


def boasting(content: RecordDict, order: Message) -> None:
    content[METRICS] = MetricRecord({**dict(content[METRICS]), WEIGHT: 10**9})  # type: ignore[arg-type]


SPOILED: dict[str, Callable[[RecordDict, Message], None]] = {
    "nan": lambda content, order: with_value(content, float("nan")),
    "infinite": lambda content, order: with_value(content, float("inf")),
    "short": shortened,
    "loud": enlarged,
    "foreign-frame": partial(reported, key="frame", value="f" * 64),
    "another's-name": partial(reported, key="client", value="0"),
    "boast": boasting,
}


# --- What is wrong with the node -------------------------------------------------------------------------------------


def stale(job: ClientJob) -> ClientJob:
    """The job as a node sees it that has kept another frame than the server's."""
    return job.model_copy(update={"adapter": job.adapter.model_copy(update={"frame_seed": 777})})


def strange(read: Callable[..., ClientJob], *given: Any) -> ClientJob:
    job = read(*given)
    return stale(job) if fault() == "stale-frame" else job


def quoting(fit: Callable[..., Any], job: ClientJob, *rest: Any) -> Any:
    """Fail as careless code does: with the data in the error's text."""
    text = job.world.splits.train.texts[0]
    if fault() == "quoting":
        raise ValueError(f"cannot tokenize {text!r}")
    if fault() == "quoting-own":
        raise DataError(f"row 1 holds {text!r}")
    return fit(job, *rest)


class Crooked(executor.Executor):
    """Answers as the fault says, where the message is an order to train."""

    earlier: Message | None = None
    """The last honest answer to an order to train."""

    def _reply(self, assignment: Assignment, message: Message, context: Context) -> Message:
        reply = super()._reply(assignment, message, context)
        if message.metadata.message_type != "train" or reply.has_error():
            return reply
        name, before, self.earlier = fault(), self.earlier, reply
        sys.stderr.write(f"crooked: {name or 'honest'}\n")
        if name in SPOILED:
            SPOILED[name](reply.content, message)
        elif name in ("replayed", "resent") and before is not None:
            self.earlier = before
            return Message(before.content, reply_to=message) if name == "replayed" else before
        elif name in ("twice", "twice-later", "second"):
            assignment.answer = partial(self._twice, assignment.answer, name, message)  # type: ignore[method-assign]
        return reply

    def _twice(self, answer: Callable[..., None], name: str, order: Message, reply: Message, context: Context) -> None:
        """Push two answers to one order: the same at once or later, or another one later."""
        push = vars(sys.modules["strategies.flower_runtime"])["push_message"]
        push(answer.__self__._client, reply, context)  # type: ignore[attr-defined]
        if name == "twice":
            answer(reply, context)
            return
        time.sleep(SENT_S)
        if name == "second":
            content = RecordDict(dict(reply.content))
            enlarged(content, order)
            reply = Message(content, reply_to=order)
        answer(reply, context)


if __name__ == "__main__":
    vars(app)["read_job"] = partial(strange, app.read_job)
    vars(app)["fit_one"] = partial(quoting, app.fit_one)
    vars(executor)["Executor"] = Crooked
    sys.exit(executor.main())
