"""Tiny models with users' slots that differ, made once."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from sqlalchemy import create_engine, text

from lora.codec import Layout
from lora.config import AdapterConfig
from lora.model import AdaptedModel
from server.service.engine import Limits
from server.service.http import create_app
from server.service.identity import RateLimits
from server.service.queue import Work
from server.service.registry import Registry
from server.service.service import Service, Writer
from strategies.personal.asking import Asking
from strategies.personal.config import PersonalConfig
from strategies.personal.lifelong import LifelongUsers
from strategies.personal.personalized import Personalized
from strategies.personal.recommenders.factors import FactorSettings, FoldedFactors
from strategies.personal.representation import Recommended
from strategies.personal.slots import UserSlots
from tasks.config import ModelConfig, TaskConfig
from tasks.learner import Learner, build_learner
from tasks.models import BaseModel, load_base
from tasks.recommendation.builtin import builtin_interactions
from tasks.recommendation.interactions import Interactions
from tasks.recommendation.reader import ReaderSettings, new_reader
from tasks.recommendation.splits import per_user
from tests.server.service.postgres import Postgres, binaries, running
from tests.server.service.site import Site

USERS = tuple(f"user-{number}" for number in range(12))


def drawn(layout: Layout, count: int, *, seed: int = 0, size: float = 0.5) -> torch.Tensor:
    """Slots that move the answers a lot."""
    return size * torch.randn(count, layout.size, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Encoder:
    """A classifier over the tiny encoder, and a slot for every user."""

    learner: Learner
    slots: UserSlots


@dataclass(frozen=True)
class Decoder:
    """The tiny decoder, and a slot for every user."""

    base: BaseModel
    adapted: AdaptedModel
    slots: UserSlots


@pytest.fixture(scope="session", params=["frozen", "trained"])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    task = TaskConfig(head=request.param, max_length=48)
    adapter = AdapterConfig(rank=2, alpha=4)
    learner = build_learner(
        ModelConfig(name="tiny-bert"), task, adapter, labels=("dull", "fair", "good"), trains_frame=False
    )
    slots = UserSlots(learner.layout, frame=learner.adapted.frame.digest)
    slots.add(USERS, drawn(learner.layout, len(USERS)))
    return Encoder(learner, slots)


@pytest.fixture(scope="session")
def decoder() -> Decoder:
    base = load_base(ModelConfig(name="tiny-llama"), causal=True)
    adapted = AdaptedModel.attach(base.model, AdapterConfig(rank=2, alpha=4))
    slots = UserSlots.of(adapted)
    slots.add(USERS, drawn(slots.layout, len(USERS), size=0.2))
    return Decoder(base, adapted, slots)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def in_threads() -> Iterator[Callable[..., None]]:
    """Runs functions in threads of their own until the test ends; what they raise fails the test."""
    threads: list[threading.Thread] = []
    wrong: list[BaseException] = []

    def start(*functions: Callable[[], Any]) -> None:
        for function in functions:

            def run(call: Callable[[], Any] = function) -> None:
                try:
                    call()
                except BaseException as error:
                    wrong.append(error)

            threads.append(threading.Thread(target=run))
            threads[-1].start()

    yield start
    for thread in threads:
        thread.join(60)
    assert wrong == []


def works(*asked: Any) -> list[Work[Any]]:
    """Requests of one owner each."""
    return [Work(number, each) for number, each in enumerate(asked)]


@pytest.fixture(scope="session")
def personal() -> Personalized:
    """A personalised reader over a little world, with parts at random: it answers differently for every user."""
    log = builtin_interactions(users=12, items=30, events=12, seed=3)
    split = per_user(log)
    scorer = FoldedFactors(FactorSettings(factors=4, lengths=(10,), ridges=(1.0,), epochs=5))
    scorer.fit(log, split, seed=0)
    base = new_reader(log, ReaderSettings(vocabulary=400, width=16, layers=1, heads=2, hidden=24))
    config = PersonalConfig(meta_loras=3, sample=64, epochs=1, checks=32, history=2)
    asking = Asking(base, scorer=scorer, history=2)
    representation = Recommended([scorer], "user")
    one = Personalized(base, AdapterConfig(rank=2, alpha=3), config, asking=asking, representation=representation)
    one.fit(log, split, seed=0)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        one.parts.meta.b.copy_(torch.randn(one.parts.meta.b.shape, generator=source))
    return one


@pytest.fixture(scope="session")
def log() -> Interactions:
    return builtin_interactions(users=12, items=30, events=12, seed=3)


@pytest.fixture
def people(personal: Personalized, log: Interactions) -> Iterator[LifelongUsers]:
    """Everybody of the little world, in memory."""
    users = LifelongUsers(personal, log)
    users.start(log)
    yield users
    users.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    if binaries() is None:
        pytest.skip("PostgreSQL is not installed (no initdb and pg_ctl on the path or below /usr/lib/postgresql)")
    with running() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def registry_url(request: pytest.FixtureRequest) -> str | None:
    """Of a registry without tables: None for SQLite in the registry's own folder."""
    if request.param == "sqlite":
        return None
    return emptied(request.getfixturevalue("postgres"))


def emptied(postgres: Postgres) -> str:
    """Return the URL of the database, without tables."""
    with create_engine(postgres.url).connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    return postgres.url


@pytest.fixture
def registry(registry_url: str | None, tmp_path: Path) -> Iterator[Registry]:
    opened = Registry(registry_url, tmp_path / "registry")
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def text_encoder() -> Encoder:
    learner = build_learner(
        ModelConfig(name="tiny-bert"), TaskConfig(head="frozen", max_length=48), AdapterConfig(rank=2, alpha=4),
        labels=("dull", "good"), trains_frame=False,
    )  # fmt: skip
    return Encoder(learner, UserSlots(learner.layout, frame=learner.adapted.frame.digest))


@pytest.fixture
def site_url(request: pytest.FixtureRequest) -> str | None:
    """Of the site's registry; modules that say so are played over both databases, `make test-postgres` plays all."""
    if os.environ.get("LETHE_TEST_REGISTRY") == "postgresql":
        return emptied(request.getfixturevalue("postgres"))
    return None


@pytest.fixture
def site(
    personal: Personalized, log: Interactions, text_encoder: Encoder, tmp_path: Path, site_url: str | None
) -> Iterator[Site]:
    registry = Registry(site_url, tmp_path / "registry")
    users = LifelongUsers(personal, log, directory=tmp_path / "users")
    users.start(log)
    service = Service(
        registry, users=users, learner=text_encoder.learner, writer=Writer(personal.base, personal.adapted),
        rates=RateLimits(rate=1e6, burst=10**6), candidates=8, limits=Limits(rows=8, wait=0.001),
    )  # fmt: skip
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        yield Site(service, client)


@pytest.fixture
def url(site: Site, free_port: int) -> Iterator[str]:
    """The site's address, at a real port."""
    app = create_app(site.service)
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=free_port, lifespan="off", log_level="error", access_log=False)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{free_port}"
    server.should_exit = True
    thread.join()
