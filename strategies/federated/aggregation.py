"""Combining updates: Flower's aggregators over the sent factors, and the error that averaging makes."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy.fedopt import FedOpt
from torch import Tensor

from lora.codec import Layout
from lora.errors import ConfigError, nearest
from lora.frame import Frame
from strategies.federated.config import FederationConfig
from strategies.federated.wire import ARRAYS, METRICS, WEIGHT, Update
from strategies.flower import VECTOR, tell_start, to_record

AGGREGATORS: dict[str, type[flower.FedAvg]] = {
    "fedavg": flower.FedAvg,
    "fedavgm": flower.FedAvgM,
    "fedadam": flower.FedAdam,
    "fedadagrad": flower.FedAdagrad,
    "fedyogi": flower.FedYogi,
    "median": flower.FedMedian,
    "trimmed-mean": flower.FedTrimmedAvg,
    "krum": flower.Krum,
    "multi-krum": flower.MultiKrum,
}
_RANGES = {
    "beta": (0.0, 0.5),
    "beta_1": (0.0, 1.0),
    "beta_2": (0.0, 1.0),
    "server_momentum": (0.0, 1.0),
    "tau": (1e-12, math.inf),
    "num_nodes_to_select": (1.0, math.inf),
}
"""Smallest value, and the first one too large, of an option; the others are finite and not negative."""
_OWN = ("fraction", "min_", "weighted_by", "record_key", "metrics_aggr_fn", "arrayrecord", "configrecord")


def build_aggregator(config: FederationConfig) -> flower.FedAvg:
    """Make Flower's aggregator of the configured name.

    Raises ConfigError for an option or a value that it does not take, and for one whose memory of a round's factor
    would be applied to the other factor in the next.
    """
    kind = AGGREGATORS[config.aggregator]
    if config.strategy == "rolora" and issubclass(kind, flower.FedAvgM | FedOpt):
        raise ConfigError(
            f"federation.aggregator={config.aggregator}: its momentum would mix the factors that "
            "federation.strategy=rolora alternates; use fedavg, median, trimmed-mean, krum or multi-krum"
        )
    names = inspect.signature(kind.__init__).parameters
    known = [name for name in names if name != "self" and not any(own in name for own in _OWN)]
    for option in config.aggregator_options:
        if option not in known:
            hint = nearest(option, known) if known else "; it takes none"
            raise ConfigError(f"federation.aggregator_options.{option}: '{config.aggregator}' has no such option{hint}")
    options = {name: _checked_option(name, value) for name, value in config.aggregator_options.items()}
    return kind(**options)


def _checked_option(name: str, value: float) -> Any:
    """Return the value as Flower's constructor wants it; Flower itself would only fail rounds later, or never."""
    key = f"federation.aggregator_options.{name}={value:g}"
    low, high = _RANGES.get(name, (0.0, math.inf))
    whole = name.startswith("num_")
    if not low <= value < high or (whole and value % 1):
        limit = f" and below {high:g}" if high < math.inf else ""
        raise ConfigError(f"{key}: must be a {'whole ' if whole else ''}number, {low:g} or above{limit}")
    return int(value) if whole else value


def aggregate(
    aggregator: flower.FedAvg, updates: Sequence[tuple[Message, Update]], *, start: Tensor, number: int, uniform: bool
) -> Tensor:
    """Return the new value `[sent]` of the sent parts.

    Replies are handed on with nothing but their vector and their weight (1 each, if `uniform`), so that one client's
    odd metrics cannot end the run. The result is float32 whatever the aggregator makes of it.
    """
    tell_start(aggregator, start.numpy())
    # Krum's distances are differences of squared norms: far from zero, float32 has no digits left for them.
    origin = start if isinstance(aggregator, flower.MultiKrum) else torch.zeros(())
    replies = [_reduced(m, u, origin=origin, uniform=uniform) for m, u in updates]
    arrays, _ = aggregator.aggregate_train(number, replies)
    if arrays is None:
        return start
    return torch.from_numpy(np.array(arrays[VECTOR].numpy(), dtype=np.float32)) + origin


def _reduced(message: Message, update: Update, *, origin: Tensor, uniform: bool) -> Message:
    weight = 1 if uniform else update.examples
    vector = (update.vector - origin).numpy()
    content = RecordDict({ARRAYS: to_record(vector), METRICS: MetricRecord({WEIGHT: weight})})
    message.content = content
    return message


def aggregation_error(
    vectors: Sequence[Tensor], result: Tensor, *, weights: Sequence[float], layout: Layout, frame: Frame
) -> float:
    """Return ||sum_k w_k B_k A_k - B A||_F / ||sum_k w_k B_k A_k||_F over all sites, for full vectors `[layout.size]`.

    Zero (to rounding) where one factor is shared; the discordance of plain LoRA averaging where both move (Sun et al.,
    ICLR 2024, section 3). `result` holds the averaged B and A. 0 where no update has moved anything.
    """
    shares = [weight / sum(weights) for weight in weights]
    views = [layout.views(vector) for vector in vectors]
    mean = layout.views(result)
    wrong = whole = 0.0
    for name, matrix in frame.matrices.items():
        error, exact = _site_error(views, mean, name, shares, matrix)
        wrong += float(error.square().sum())
        whole += float(exact.square().sum())
    return float((wrong / whole) ** 0.5) if whole > 0 else 0.0


def _site_error(
    views: Sequence[Any], mean: Any, name: str, shares: Sequence[float], frozen: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the error and the exact mean of products of one site, `[d_out, d_in]` (or a factor of equal norms)."""
    b = [view["B", name].double() * share for view, share in zip(views, shares, strict=True)]
    if ("A", name) not in mean:
        # One A for all: the root of its Gram matrix has the same effect on every norm, and is only r x r.
        root = torch.linalg.qr(frozen.double().T, mode="r").R.T
        exact = torch.stack(b).sum(0) @ root
        return exact - mean["B", name].double() @ root, exact
    a = [view["A", name] for view in views]
    exact = torch.cat(b, dim=1).float() @ torch.cat(a, dim=0)
    return exact - mean["B", name] @ mean["A", name], exact
