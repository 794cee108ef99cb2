"""A strategy over two small sites, and rounds of made-up replies."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message
from torch import Tensor

from lora.codec import Entry, Layout
from lora.frame import Frame, Site
from lora.plan import PLANS
from strategies.federated.config import FederationConfig
from strategies.federated.strategy import FederatedLoRA, read_vector_of
from strategies.federated.wire import Order, Update
from strategies.flower import number, to_record

SITES = (Site("q", 7, 5), Site("v", 4, 6))
RANK = 2


@pytest.fixture
def frame() -> Frame:
    return Frame.draw(SITES, rank=RANK, seed=0)


@pytest.fixture
def layout_of() -> Callable[..., Layout]:
    def make(*, moves_frame: bool = False, head: bool = False) -> Layout:
        a = [Entry("A", site.name, (RANK, site.d_in)) for site in SITES] if moves_frame else []
        b = [Entry("B", site.name, (site.d_out, RANK)) for site in SITES]
        return Layout((*a, *b, *([Entry("head", "weight", (3,))] if head else [])))  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_strategy(frame: Frame, layout_of: Callable[..., Layout]) -> Callable[..., FederatedLoRA]:
    def make(*, head: bool = False, private: bool = False, seed: int = 0, **config: Any) -> FederatedLoRA:
        settings = FederationConfig(**{"clients": 4, **config})
        plan = PLANS[settings.strategy]
        return FederatedLoRA(
            settings,
            plan=plan,
            layout=layout_of(moves_frame=plan.moves_frame, head=head),
            frame=frame,
            seed=seed,
            private=private,
            # Node ids in another order than the clients' names.
            roster={900 - 7 * place: str(place) for place in range(settings.clients)},
        )

    return make


Answer = Update | Error | Callable[[Message], Message]


@pytest.fixture
def play() -> Callable[..., Tensor | None]:
    """Play one round: every ordered client answers by `answers`, in reverse order; returns the new vector."""

    def round_of(strategy: FederatedLoRA, number_: int, start: Tensor, answers: Mapping[str, Answer]) -> Tensor | None:
        orders = list(strategy.configure_train(number_, to_record(start.numpy()), ConfigRecord(), None))  # type: ignore[arg-type]
        strategy.asked = {number(order): strategy.roster[order.metadata.dst_node_id] for order in orders}
        replies = [
            _reply(order, answers[client]) for order, client in zip(orders, strategy.asked.values(), strict=True)
        ]
        arrays, _ = strategy.aggregate_train(number_, replies[::-1])
        return None if arrays is None else read_vector_of(arrays)

    return round_of


def _reply(order: Message, answer: Answer) -> Message:
    if isinstance(answer, Update):
        stamped = answer if answer.round else replace(answer, round=Order.read(order).round)
        return Message(stamped.content(), reply_to=order)
    return Message(answer, reply_to=order) if isinstance(answer, Error) else answer(order)


@pytest.fixture
def make_update(frame: Frame) -> Callable[..., Update]:
    """An update of `length` random numbers around `start`; the client's name is its seed."""

    def make(client: str, length: int, *, start: Tensor | None = None, examples: int = 5, **traits: Any) -> Update:
        source = torch.Generator().manual_seed(1000 * traits.pop("round", 0) + int(client))
        vector = torch.randn(length, generator=source) + (0.0 if start is None else start)
        return Update(**{"vector": vector, "client": client, "frame": frame.digest, "examples": examples, **traits})

    return make
