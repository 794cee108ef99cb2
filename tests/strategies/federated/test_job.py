"""The job that server and clients read, and the one world that a process makes of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.config import Section
from lora.errors import ConfigError
from lora.plan import PLANS
from strategies.federated.job import Job, read_job

SMALL: dict[str, Any] = {
    "seed": 3,
    "model": {"name": "tiny-bert"},
    "adapter": {"rank": 2},
    "federation": {"clients": 3},
    "data": {"max_train": 30, "max_eval": 6},
}


class Extra(Section):
    speed: int = 1


class Wider(Job):
    """A job with a section of another package."""

    extra: Extra = Extra()


def job(**changes: Any) -> Job:
    return Job.model_validate({**SMALL, **changes})


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_job_is_read_from_json_and_leaves_other_sections_to_their_owners() -> None:
    text = json.dumps({**SMALL, "extra": {"speed": 4}, "unknown": {"a": 1}})
    narrow, wide = read_job(Job, {"job": text}), read_job(Wider, {"job": text})
    assert narrow == job()
    assert (wide.extra.speed, wide.seed) == (4, 3)
    assert wide.shared_json() == narrow.shared_json()


def test_shared_json_reads_back_as_the_same_job() -> None:
    own = job(privacy={"epsilon": 3.0}, federation={"clients": 5, "strategy": "rolora"})
    assert read_job(Job, {"job": own.shared_json()}) == own


@pytest.mark.parametrize(
    "recipe",
    sorted(p.name for p in (Path(__file__).parents[3] / "recipes").glob("*.yaml") if "kind:" not in p.read_text()),
)
def test_every_recipe_is_read(recipe: str) -> None:
    found = read_job(Job, {"recipe": f"recipes/{recipe}", "job": ""})
    assert found.federation.clients >= 2
    assert found.plan is PLANS[found.federation.strategy]


def test_without_a_word_the_quickstart_is_read_and_a_job_wins_over_a_recipe() -> None:
    assert read_job(Job, {}) == read_job(Job, {"recipe": "recipes/quickstart.yaml"})
    assert read_job(Job, {"recipe": "recipes/quickstart.yaml", "job": json.dumps(SMALL)}) == job()


@pytest.mark.parametrize(
    ("run_config", "message"),
    [
        ({"recipe": "recipes/quikstart.yaml"}, r"recipe=recipes/quikstart.yaml: .*did you mean 'recipes/quickstart"),
        ({"job": "{"}, "the run config's job cannot be used"),
        ({"job": '{"federation": {"clients": 0}}'}, r"federation\.clients"),
        ({"job": '{"federation": {"client": 4}}'}, r"federation\.client\b"),
        ({"recipe": "pyproject.toml"}, "the run config's recipe cannot be used"),
    ],
)
def test_what_cannot_be_read_is_an_error_of_ours(run_config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_job(Job, run_config)


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({}, True),
        ({"task": {"head": "frozen"}}, False),
        ({"task": {"head": "none"}}, False),
        ({"task": {"kind": "causal-lm"}, "model": {"name": "tiny-llama"}}, False),
    ],
)
def test_a_head_trains_only_where_there_is_one_to_train(changes: dict[str, Any], trained: bool) -> None:
    own = job(**changes)
    assert own.trains_head == trained
    assert ("head" in own.world.learner.layout.parts) == trained


# -- the world ---------------------------------------------------------------------------------------------------------


def test_a_process_has_one_world_for_equal_jobs() -> None:
    first = job()
    world = first.world
    assert world.learner is first.world.learner
    assert job().world is world
    assert Wider.model_validate({**SMALL, "extra": {"speed": 9}}).world is world
    assert job(seed=4).world is not world


def test_the_world_shares_the_train_split_out() -> None:
    world = job().world
    rows = sorted(row for share in world.shares for row in share)
    assert rows == list(range(len(world.splits.train)))
    assert len(world.shares) == 3
    for index, share in enumerate(world.shares):
        tokens = world.client(index)
        assert tokens.labels is not None and world.splits.train.labels is not None
        assert tokens.labels.tolist() == [world.splits.train.labels[row] for row in share]
        assert all(np.array_equal(tokens.ids[i], world.train.ids[row]) for i, row in enumerate(share))


def test_splits_are_tokenized_each_for_itself() -> None:
    world = job().world
    found = {name: len(getattr(world, name)) for name in ("train", "validation", "test")}
    assert found == {name: len(getattr(world.splits, name)) for name in found}
    assert found == {"train": 30, "validation": 6, "test": 6}


@pytest.mark.parametrize(("strategy", "moves"), [("ffa-lora", False), ("lora", True), ("rolora", True)])
def test_a_moving_frame_is_in_the_layout(strategy: str, moves: bool) -> None:
    own = job(federation={"clients": 3, "strategy": strategy})
    assert ("A" in own.world.learner.layout.parts) == moves
