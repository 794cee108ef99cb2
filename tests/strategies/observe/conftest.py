"""Every test has the environment and the meters to itself."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from strategies.observe.exporter import METRICS_VARIABLE
from strategies.observe.logs import FILE_VARIABLE, LOG_VARIABLE
from strategies.observe.watch import node_meters
from tests.sections import Sections, merge


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in (METRICS_VARIABLE, LOG_VARIABLE, FILE_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    node_meters.cache_clear()
    yield
    node_meters.cache_clear()


@pytest.fixture
def sections() -> Callable[..., Sections]:
    """Make the sections of a small run, with changes."""

    def make(**changes: Any) -> Sections:
        tree: Sections = {
            "model": {"name": "tiny-bert"},
            "data": {"max_train": 42, "max_eval": 12},
            "adapter": {"rank": 4},
            "federation": {"clients": 3, "rounds": 3, "timeout": 5.0},
            "training": {"steps": 1, "batch": 6},
        }
        return merge(tree, changes)

    return make
