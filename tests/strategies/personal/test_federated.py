"""Federated personalisation: its gradients against autograd's, whole users, and what a round's messages hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from peft import PeftModel
from torch import Tensor

from client.job import ClientJob
from client.node import NodeSettings
from client.training import Work, train
from lora.codec import Part
from lora.errors import ConfigError
from privacy.ledger import Ledger
from privacy.mechanism import Mechanism
from privacy.plan import PrivatePlan
from privacy.randomness import SeededRandomness
from server.checkpoint import Checkpoints
from simulation.config import SimulationConfig
from simulation.engine import Stage, play
from simulation.grid import SequentialGrid
from strategies.federated.wire import Declined
from strategies.personal.federated import META, MetaLearner, PersonalWorld
from tasks.models import load_base
from tasks.recommendation.reader import save_reader
from tasks.tokens import Tokens
from tests.sections import Sections, merge

MakeJob = Callable[..., ClientJob]
PRIVATE = {"privacy": {"epsilon": 8.0, "test_seed": 1}}


@pytest.fixture(scope="session")
def sections(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Sections]:
    """Make the sections of a small job over the reader, with changes."""
    path = save_reader(world.base, tmp_path_factory.mktemp("base") / "reader")
    small: Sections = {
        "model": {"path": str(path), "device": "cpu"},
        "task": {"kind": "causal-lm"},
        "adapter": {"rank": 2, "alpha": 4.0},
        "histories": {"per_user": 2, "checks": 16, "width": 8},
        "ratings": {},
        "personal": {"meta_loras": 3, "history": 2, "base_score": "none", "temperature": 0.1},
        "federation": {"clients": 3, "rounds": 2},
        "training": {"steps": 2, "batch": 8, "rate": 0.5},
    }
    return lambda **changes: merge(small, changes)


@pytest.fixture(scope="session")
def make_job(sections: Callable[..., Sections]) -> MakeJob:
    return lambda **changes: ClientJob.model_validate(sections(**changes))


def parts_of(job: ClientJob) -> tuple[Part, ...]:
    return ("B", "head") if job.trains_head else ("B",)


def begin(job: ClientJob) -> Tensor:
    learner = job.world.learner
    return 0.1 * torch.randn(learner.layout.size, generator=torch.Generator().manual_seed(5))


def losses(learner: MetaLearner, values: Tensor, tokens: Tokens, row: int) -> tuple[Tensor, list[Tensor]]:
    """One question's loss by autograd through the mixture of RecLoRA's own meta-LoRAs, and what it depends on."""
    one = learner.personalized(values)
    blocks = {key: view.clone().requires_grad_() for key, view in learner.layout.views(values).items()}
    weights = torch.from_numpy(tokens.beside[row]).view(len(one.adapted.sites), -1)  # type: ignore[index]
    bound = {
        ("B", site.name): torch.einsum("n,nor->or", weights[place], blocks["B", site.name])
        for place, site in enumerate(one.adapted.sites)
    }
    ids = torch.from_numpy(tokens.ids[row])[None]
    with one.adapted.bound(bound) as model:  # type: ignore[arg-type]
        if one.base.causal:
            logits = model(input_ids=ids).logits[0, -1]
            no, yes = (one.base.tokenizer(answer)["input_ids"][0] for answer in (" No", " Yes"))
            odds = logits[yes] - logits[no]
        else:
            states = model(input_ids=ids).last_hidden_state.mean(1)
            feature = torch.nn.functional.normalize(states, dim=-1) * 20**0.5
            odds = (feature @ blocks["head", "weight"][0] + blocks["head", "bias"])[0]
    label = torch.tensor(float(tokens.labels[row]))  # type: ignore[index]
    return torch.nn.functional.binary_cross_entropy_with_logits(odds, label), [*blocks.values()]


def gradient(learner: MetaLearner, values: Tensor, tokens: Tokens, row: int) -> Tensor:
    loss, blocks = losses(learner, values, tokens, row)
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, blocks)])


BASES: dict[str, Sections] = {
    "decoder": {},
    "encoder": {"model": {"path": None, "name": "tiny-bert"}, "task": {"kind": "classification"}},
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("clip", [0.01, 1e3])
def test_private_training_equals_gradients_of_all_meta_loras_clipped_one_by_one(
    make_job: MakeJob, clip: float, base: str
) -> None:
    job = make_job(**BASES[base])
    learner, parts, start = job.world.learner, parts_of(job), begin(job)
    assert isinstance(learner, MetaLearner)
    tokens = [job.world.client(index).take(range(10)) for index in range(2)]
    mechanism = Mechanism(clip, clip / 2 if "head" in parts else None, 0.5 if clip < 1 else 1e-4)
    plan = PrivatePlan(mechanism, 0.4, 4.0, 10, None, 1e-5)
    works = [Work(str(index), own, plan, SeededRandomness(9, index)) for index, own in enumerate(tokens)]
    ours = train(learner, works, start=start, config=job.training, parts=parts, seed=0, number=1).values
    head = learner.layout.span("head")
    for index, own in enumerate(tokens):
        values, draws = start.clone(), SeededRandomness(9, index)
        for _ in range(job.training.steps):
            total = torch.zeros_like(values)
            for row in draws.lot(len(own), rate=plan.rate):
                each = gradient(learner, values, own, int(row))
                for span, bound in ((learner.layout.span("B"), clip), (head, clip / 2)):
                    if len(each[span]):
                        total[span] += each[span] * min(1.0, bound / float(each[span].norm()))
            values -= job.training.rate * (total + draws.gaussian(len(total)) * mechanism.deviation) / plan.lot
        torch.testing.assert_close(ours[index], values, rtol=1e-4, atol=1e-5)
        assert (values - start).norm() > 1e-3


@pytest.mark.parametrize("base", BASES)
def test_open_training_of_many_equals_mean_gradients_of_each(make_job: MakeJob, base: str) -> None:
    job = make_job(**BASES[base], training={"batch": 1000})
    learner, parts, start = job.world.learner, parts_of(job), begin(job)
    tokens = [job.world.client(index).take(range(7 + index)) for index in range(2)]
    works = [Work(str(index), own) for index, own in enumerate(tokens)]
    together = train(learner, works, start=start, config=job.training, parts=parts, seed=0, number=1).values
    for index, own in enumerate(tokens):
        values = start.clone()
        for _ in range(job.training.steps):
            each = [gradient(learner, values, own, row) for row in range(len(own))]
            values = values - job.training.rate * torch.stack(each).mean(0)
        torch.testing.assert_close(together[index], values, rtol=1e-4, atol=1e-5)
        alone = train(
            learner, works[index : index + 1], start=start, config=job.training, parts=parts, seed=0, number=1
        )
        torch.testing.assert_close(alone.values[0], values, rtol=1e-4, atol=1e-5)


def test_the_learner_answers_as_recloras_model_and_as_a_users_slot(make_job: MakeJob) -> None:
    world = make_job().world
    assert isinstance(world, PersonalWorld)
    learner, values = world.learner, begin(make_job())
    one, queries = learner.personalized(values), world.log.queries(world.split.test)
    expected = one.logits(world.log, queries)
    slots = one.adapter_of(one.representation(world.log, queries))
    np.testing.assert_allclose(one.logits_of_slots(world.log, queries, slots), expected, atol=1e-5)
    scores = learner.score(values, world.test)
    labels = world.log.likes[world.split.test]
    assert scores.accuracy == pytest.approx(((expected > 0) == labels).mean())
    assert scores.loss == pytest.approx(np.logaddexp(0, np.where(labels, -expected, expected)).mean(), abs=1e-5)
    assert np.ptp(slots.numpy(), axis=0).max() > 1e-3


def test_clients_hold_whole_users_and_at_most_the_allowed_questions(make_job: MakeJob) -> None:
    for most in (1, 3):
        world = make_job(histories={"per_user": most}).world
        assert isinstance(world, PersonalWorld)
        users = world.log.users[world.split.train]
        held = [set(users[list(share)].tolist()) for share in world.shares]
        assert sum(map(len, held)) == len(set(users.tolist())) == len(world.log.user_names)
        assert sorted(place for share in world.shares for place in share) == list(range(len(users)))
        assert int(np.bincount(users).max()) == most
        assert len(world.client(1)) == len(world.share(1))


def test_a_nodes_own_interactions_all_train(make_job: MakeJob) -> None:
    world = make_job().model_copy(update={"own": True}).world
    assert isinstance(world, PersonalWorld)
    assert len(world.share(0)) == 2 * len(world.log.user_names)
    assert len(world.split.validation) == len(world.split.test) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"personal": {"temperature": 0.2}},
        {"personal": {"gate": "uniform"}},
        {"histories": {"text_seed": 1}},
    ],
)
def test_two_sides_that_route_differently_are_told_apart(make_job: MakeJob, changes: Sections) -> None:
    learner = make_job().world.learner
    assert make_job().world.learner.signature == learner.signature
    assert make_job(**changes).world.learner.signature != learner.signature


@pytest.mark.parametrize("changes", [{"base_score": "offset"}, {"frame": "own"}, {"routing": "pair"}])
def test_what_would_need_more_than_bs_is_refused(make_job: MakeJob, changes: Sections) -> None:
    key, value = next(iter(changes.items()))
    with pytest.raises(ConfigError, match=f"personal.{key}={value}: histories stay at the clients"):
        _ = make_job(personal=changes).world


def test_a_node_opens_no_interactions_because_a_job_names_them(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(ratings={"path": "somebody.csv"}, model={"path": None, "name": "tiny-llama"})
    with pytest.raises(Declined, match=r"ratings\.path"):
        NodeSettings(name="a").accept(job)
    own = NodeSettings(name="a", data=tmp_path / "mine.csv", own=True).accept(job)
    assert own.ratings is not None and own.ratings.path == str(tmp_path / "mine.csv")


def played(tree: Sections, directory: Path, engine: str = "cohort") -> Tensor:
    directory.mkdir()
    play(Stage(tree, directory), SimulationConfig(engine=engine, threads=1))
    found = Checkpoints(directory / "checkpoints").latest()
    assert found is not None
    return found.vector


def test_both_engines_train_the_same_and_what_leaves_loads_in_peft(
    sections: Callable[..., Sections], make_job: MakeJob, tmp_path: Path
) -> None:
    vector = played(sections(), tmp_path / "cohort")
    torch.testing.assert_close(vector, played(sections(), tmp_path / "sequential", "sequential"), rtol=1e-4, atol=1e-6)
    assert vector.norm() > 1e-3
    world = make_job().world
    assert isinstance(world, PersonalWorld)
    one, adapter = world.learner.personalized(vector), tmp_path / "cohort" / "adapter"
    nobody = world.log.queries(world.split.test[:1]).without_history()
    asked = one.asking(world.log, nobody)
    expected = float(one.logits(world.log, nobody)[0])
    with one.adapted.bound(world.learner.peft_blocks(vector)) as model:
        assert float(one.parts.answering(model, next(world_batches(world, asked.tokens)))[0]) == pytest.approx(expected)
    fresh = load_base(make_job().model, causal=True).model
    twin = PeftModel.from_pretrained(fresh, str(adapter)).eval()  # type: ignore[arg-type]
    logits = twin(input_ids=torch.from_numpy(asked.tokens.ids[0])[None]).logits[0, -1]
    no, yes = (one.base.tokenizer(answer)["input_ids"][0] for answer in (" No", " Yes"))
    assert float(logits[yes] - logits[no]) == pytest.approx(expected, abs=2e-5)
    assert (adapter / META).is_file()


def world_batches(world: PersonalWorld, tokens: Tokens) -> Any:
    with_labels = Tokens(tokens.ids, np.zeros(len(tokens), dtype=np.int64))
    return (batch for _, batch in world.learner.batches([(with_labels, row) for row in range(len(tokens))]))


def test_a_private_run_charges_every_client_once_a_round_within_its_budget(
    sections: Callable[..., Sections], tmp_path: Path
) -> None:
    played(sections(**PRIVATE), tmp_path / "run")
    ledger = Ledger(tmp_path / "run" / "ledger.sqlite")
    assert ledger.clients() == ["0", "1", "2"]
    for client in ledger.clients():
        assert [event.steps for event in ledger.events(client)] == [2, 2]
        assert 7.5 < ledger.epsilon(client, delta=1e-5) <= 8.0


@pytest.mark.parametrize("privacy", [{}, PRIVATE])
def test_messages_hold_bs_counts_and_digests_and_nothing_of_a_history(
    sections: Callable[..., Sections], make_job: MakeJob, tmp_path: Path, privacy: Sections
) -> None:
    tree = sections(**privacy)
    world = make_job(**privacy).world
    replies: list[RecordDict] = []
    assert isinstance(world, PersonalWorld)

    def seen(index: int, reply: Message) -> Message:
        replies.append(RecordDict(dict(reply.content)))  # The server empties what it has read.
        return reply

    stage = Stage(tree, tmp_path)
    grid = SequentialGrid(clients=3, run_config=stage.run_config, ledger=stage.ledger, tamper=seen)
    orders: list[Message] = []
    handle = grid.handle
    grid.handle = lambda messages: (orders.extend(messages), handle(messages))[1]  # type: ignore[method-assign]
    context = next(iter(grid.contexts.values()))
    stage.server("sequential")(grid, context)
    size = world.learner.layout.size
    trained = [reply for reply in replies if "arrays" in reply]
    assert len(trained) == 6
    content: Any
    for content in trained:
        assert set(content) == {"arrays", "metrics", "report"}
        assert set(content["metrics"]) == {"num-examples", "epsilon" if privacy else "loss"}
        assert set(content["report"]) == {"client", "frame", "round"}
        assert [array.numpy().shape for array in content["arrays"].values()] == [(size,)]
    for order in (order for order in orders if "arrays" in order.content):
        asked: Any = order.content
        assert set(asked) == {"arrays", "config"}
        assert set(asked["config"]) == {"round", "train", "send", "frame", "layout"}
        assert [array.numpy().shape for array in asked["arrays"].values()] == [(size,)]
    wire = b"".join(_bytes(content) for content in [*(order.content for order in orders), *replies])
    tokens = world.train
    secrets = [
        name.encode() for name in (*world.log.catalogue.titles, *world.log.user_names, *world.log.catalogue.names)
    ]
    secrets += [row.tobytes() for row in tokens.beside[:100]]  # type: ignore[index]
    secrets += [ids.tobytes() for ids in tokens.ids[:100]]
    assert len(wire) > 12 * 4 * size
    assert not [secret for secret in secrets if secret in wire]


def _bytes(content: RecordDict) -> bytes:
    found = []
    for record in content.values():
        for value in record.values():
            found.append(value.data if hasattr(value, "data") else repr(value).encode())
    return b"".join(found)
