"""Everything that touches Flower's internals, in one place; written against flwr 1.41.0.

Flower gives a process its identity when its own runtime starts it, numbers messages when its own Grid sends them, and
keeps an aggregator's running state in attributes. Lethe does all three from outside: a simulation has no runtime, and a
checkpoint has to hold what the aggregator remembers.
"""

import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message
from flwr.serverapp.strategy import FedAvg, FedAvgM
from flwr.serverapp.strategy.fedopt import FedOpt
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

VECTOR = "vector"
"""Key of the one array that travels."""

Vector = NDArray[np.float32]


def take_identity() -> None:
    """Make this process the sender of messages, as Flower's runtime would."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


def number(message: Message) -> str:
    """Give a message the id that Flower's Grid would give it, and return it."""
    identity = uuid.uuid4().hex
    message.metadata.__dict__["_message_id"] = identity
    return identity


def to_record(vector: Vector) -> ArrayRecord:
    """Wrap the flat vector; one array, because many small ones are about five times slower on the wire."""
    return ArrayRecord({VECTOR: Array(np.ascontiguousarray(vector, dtype="<f4"))})


def tell_start(aggregator: FedAvg, start: Vector) -> None:
    """Tell an aggregator with server-side optimisation what the clients started from."""
    if isinstance(aggregator, FedOpt):
        aggregator.current_arrays = {VECTOR: start}
    elif isinstance(aggregator, FedAvgM):
        aggregator.current_arrays = to_record(start)


def remembered(aggregator: FedAvg) -> dict[str, Vector]:
    """Return what the aggregator carries from round to round."""
    if isinstance(aggregator, FedOpt):
        moments: dict[str, Mapping[str, Any] | None] = {"m": aggregator.m_t, "v": aggregator.v_t}
        return {key: value[VECTOR] for key, value in moments.items() if value}
    if isinstance(aggregator, FedAvgM) and aggregator.momentum_vector is not None:
        return {"momentum": aggregator.momentum_vector[0]}
    return {}


def remember(aggregator: FedAvg, state: Mapping[str, Vector]) -> None:
    """Give an aggregator back what `remembered` returned."""
    if isinstance(aggregator, FedOpt) and state:
        aggregator.m_t = {VECTOR: state["m"]}
        aggregator.v_t = {VECTOR: state["v"]}
    elif isinstance(aggregator, FedAvgM) and state:
        aggregator.momentum_vector = [state["momentum"]]
