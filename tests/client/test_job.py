"""The job as a client reads it: where it stands, what it brings, and noise of its own for every client and round."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict

from client.job import DEFAULT_LEDGER, LEDGER_VARIABLE, ClientJob, Place, hash_of, open_ledger, private_plan, work_for
from lora.errors import ConfigError, PrivacyError
from privacy.accounting import Event, calibrate
from privacy.ledger import Charge
from privacy.randomness import SecureRandomness, SeededRandomness
from strategies.federated.wire import Declined

MakeJob = Callable[..., ClientJob]


def context(**config: Any) -> Context:
    return Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config={})


def test_a_place_is_read_from_the_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(LEDGER_VARIABLE, raising=False)
    assert Place.of(context(**{"partition-id": 3})) == Place(3, DEFAULT_LEDGER.expanduser())
    monkeypatch.setenv(LEDGER_VARIABLE, str(tmp_path / "from-environment"))
    assert Place.of(context(**{"partition-id": 3})).ledger == tmp_path / "from-environment"
    named = Place.of(context(**{"partition-id": "3", "ledger": str(tmp_path / "own"), "simulated": True}))
    assert named == Place(3, tmp_path / "own", simulated=True)
    assert named.name == "3"


def test_a_node_that_names_no_partition_is_an_error() -> None:
    with pytest.raises(ConfigError, match="partition-id=N"):
        Place.of(context())


@pytest.mark.parametrize("index", [-1, 3])
def test_a_partition_outside_the_federation_declines(make_job: MakeJob, index: int) -> None:
    with pytest.raises(Declined, match=f"{index} is outside 0 to 2"):
        work_for(make_job(), index, number=1)


def test_open_work_has_no_plan_and_no_noise(make_job: MakeJob) -> None:
    job = make_job()
    work = work_for(job, 1, number=1)
    assert (work.client, work.private, work.randomness) == ("1", None, None)
    assert len(work.tokens) == len(job.world.shares[1])


def test_noise_is_planned_for_all_rounds_and_the_client_s_own_size(make_job: MakeJob) -> None:
    job = make_job(privacy={"epsilon": 3.0, "delta": 1e-4}, federation={"rounds": 5}, training={"steps": 4, "batch": 7})
    plan = private_plan(job, 28)
    assert (plan.rate, plan.lot, plan.steps) == (0.25, 7.0, 20)
    assert plan.mechanism.noise_multiplier == calibrate(epsilon=3.0, delta=1e-4, rate=0.25, steps=20)
    assert plan.epsilon <= 3.0
    assert plan.mechanism.head_clip == 1.0
    assert private_plan(job, 4).rate == 1.0


def test_a_frozen_head_has_no_bound_of_its_own(make_job: MakeJob) -> None:
    job = make_job(privacy={"noise_multiplier": 1.0}, task={"head": "frozen"})
    assert private_plan(job, 28).mechanism.head_clip is None


def test_an_epsilon_that_the_noise_cannot_reach_is_an_error(make_job: MakeJob) -> None:
    with pytest.raises(PrivacyError, match="cannot reach"):
        work_for(make_job(privacy={"epsilon": 0.1, "noise_multiplier": 0.5}), 0, number=1)


def test_noise_is_secret_unless_the_run_is_a_declared_test(make_job: MakeJob) -> None:
    assert isinstance(work_for(make_job(privacy={"epsilon": 5.0}), 0, number=1).randomness, SecureRandomness)
    job = make_job(privacy={"epsilon": 5.0, "test_seed": 1})
    assert isinstance(work_for(job, 0, number=1).randomness, SeededRandomness)


def test_seeded_noise_repeats_and_is_never_shared(make_job: MakeJob) -> None:
    job = make_job(privacy={"epsilon": 5.0, "test_seed": 1})

    def draws() -> torch.Tensor:
        works = [work_for(job, index, number=number) for index, number in product(range(3), (1, 2))]
        return torch.stack([work.randomness.gaussian(4000) for work in works if work.randomness is not None])

    first = draws()
    assert torch.equal(first, draws())
    assert float((torch.corrcoef(first) - torch.eye(6)).abs().max()) < 0.1


def test_no_two_clients_or_rounds_share_a_seed() -> None:
    seeds = [hash_of(*path) for path in product(range(4), range(100), range(100))]
    assert len(set(seeds)) == len(seeds)


def test_a_ledger_s_folder_is_made(tmp_path: Path) -> None:
    assert open_ledger(tmp_path / "deep" / "down" / "ledger.sqlite").position() == 0


def test_a_ledger_that_vanishes_in_mid_run_is_an_error_and_not_begun_anew(tmp_path: Path) -> None:
    """An empty ledger would forget what was spent, and the next charge would pass a budget that is long gone."""
    path = tmp_path / "ledger.sqlite"
    event = Event(rate=0.1, noise_multiplier=1.0, steps=5)
    charge = Charge(client="0", event=event, purpose="round 1", budget=None, delta=1e-5)
    open_ledger(path).charge_many([charge])
    path.unlink()
    with pytest.raises(PrivacyError, match=r"ledger"):
        open_ledger(path).charge_many([charge])
    assert not path.exists()
