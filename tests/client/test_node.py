"""What a node decides for itself: its settings, its own data, and jobs refused before anything is charged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.app import build
from client.job import ClientJob, Place
from client.node import NodeSettings, read_node
from lora.errors import ConfigError
from privacy.ledger import Ledger
from strategies.federated.wire import DECLINED, GREET, TRAIN, Declined, Order, Update
from strategies.flower import number, take_identity

Sections = dict[str, Any]
MakeSections = Callable[..., Sections]
PRIVATE = {"privacy": {"epsilon": 4.0, "delta": 1e-4}}


def written(directory: Path, text: str) -> Path:
    file = directory / "node.toml"
    file.write_text(text)
    return file


class Node:
    """A node with settings of its own, its app called as the executor would."""

    def __init__(self, settings: NodeSettings, tree: Sections, *, name: str = "pilot") -> None:
        take_identity()
        self.settings, self.job = settings, ClientJob.model_validate(tree)
        self.context = Context(run_id=5, node_id=7, node_config={}, state=RecordDict(), run_config={})
        self.context.run_config |= {"job": json.dumps(tree), "name": name}
        self.app: ClientApp = build(settings=settings)

    def ask(self, kind: str = TRAIN, **changes: Any) -> Message:
        if kind == GREET:
            content = RecordDict({"config": ConfigRecord({})})
        else:
            learner = self.job.world.learner
            plan = {"train": ("B", "head"), "send": ("B", "head"), "layout": learner.signature}
            fields = {"round": 1, "vector": learner.start(), "frame": learner.adapted.frame.digest} | plan | changes
            content = Order(**fields).content()
        message = Message(content, dst_node_id=7, message_type=kind)
        number(message)
        return self.app(message, self.context)

    @property
    def rows(self) -> list[Any]:
        return Ledger(self.settings.ledger).rows() if self.settings.ledger.exists() else []


# --- Settings --------------------------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    text = 'name = "ward-3"\nown = true\ndata = "rows.csv"\nmodel = "/models/base"\n[policy]\nmax_epsilon = 4\n'
    settings = read_node(written(tmp_path, text))
    assert (settings.data, settings.model) == (tmp_path / "rows.csv", Path("/models/base"))
    assert settings.ledger == tmp_path / "state" / "ledger.sqlite"
    assert (settings.federation, settings.policy.max_epsilon, settings.policy.private) == ("lethe", 4.0, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('name = "a"\npartitoin = 1\n', "partitoin: unknown key; did you mean 'partition'"),
        ('name = "a"\n[policy]\nmax_epsilom = 1\n', "policy.max_epsilom: unknown key; did you mean 'max_epsilon'"),
        ('name = "a"\nown = true\n', "own=true needs data=PATH"),
        ('name = "a"\nown = true\ndata = "x"\npartition = 0\n', "own=true and partition=0 contradict"),
        ('name = "a"\npartition = 3\npartitions = 3\n', "partition=3 is outside 0 to 2"),
        ('name = "../a"\n', "name: "),
        ('name = "a"\ndevice = "tpu"\n', "device: "),
        ("name = ", "is not TOML"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_node(written(tmp_path, text))
    assert words in str(raised.value)


def test_all_faults_are_named_at_once_and_a_missing_file_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)name: .*metrics_port: "):
        read_node(written(tmp_path, "metrics_port = 99999\n"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_node(tmp_path / "absent.toml")


# --- Policy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "changes", "words"),
    [
        ({"require_privacy": True}, {}, "does no job without privacy"),
        ({"max_epsilon": 8.0}, {}, "does no job without privacy"),
        ({"max_epsilon": 3.0}, PRIVATE, "allows privacy.epsilon up to 3, the job asks 4"),
        ({"max_delta": 1e-5}, PRIVATE, "allows privacy.delta up to 1e-05, the job asks 0.0001"),
        ({"require_privacy": True}, {"privacy": {"epsilon": 4.0, "test_seed": 1}}, "noise is seeded"),
        ({}, {"data": {"path": "/etc/passwd"}}, "opens no file because a job names it (data.path)"),
        ({}, {"model": {"path": "/models/x"}}, "opens no file because a job names it (model.path)"),
        ({}, {"model": {"name": "/etc"}}, "opens no file because a job names it (model.path)"),
    ],
)
def test_a_job_against_the_policy_is_declined_before_anything_is_charged(
    sections: MakeSections, tmp_path: Path, policy: Sections, changes: Sections, words: str
) -> None:
    settings = NodeSettings(name="ward-3", partition=0, state=tmp_path, policy=policy)
    with pytest.raises(Declined) as raised:
        settings.accept(ClientJob.model_validate(sections(**changes)))
    assert words in str(raised.value) and "'ward-3'" in str(raised.value)


@pytest.mark.parametrize("kind", [GREET, TRAIN])
def test_every_kind_of_message_is_declined(sections: MakeSections, tmp_path: Path, kind: str) -> None:
    settings = NodeSettings(name="ward-3", partition=0, state=tmp_path / "state", policy={"max_epsilon": 3.0})
    node = Node(settings, sections(**PRIVATE))
    reply = node.ask(kind)
    assert reply.error.code == DECLINED
    assert "the job asks 4" in str(reply.error.reason)
    assert not (tmp_path / "state").exists()


def test_another_number_of_clients_is_declined(sections: MakeSections, tmp_path: Path) -> None:
    settings = NodeSettings(name="a", partition=0, partitions=5, state=tmp_path)
    with pytest.raises(Declined, match=r"one of 5 partitions.*federation\.clients=3"):
        settings.accept(ClientJob.model_validate(sections()))


def test_a_job_that_names_only_its_noise_is_held_to_the_node_s_budget(sections: MakeSections, tmp_path: Path) -> None:
    tree = sections(privacy={"noise_multiplier": 4.0, "delta": 1e-4})
    settings = NodeSettings(name="a", partition=0, state=tmp_path, policy={"max_epsilon": 3.0})
    assert settings.accept(ClientJob.model_validate(tree)).privacy.epsilon == 3.0
    node = Node(settings, tree)
    answers = [node.ask(round=each) for each in range(1, 30)]
    refused = [reply for reply in answers if reply.has_error()]
    assert 0 < len(refused) < len(answers)
    assert len(node.rows) == len(answers) - len(refused)
    assert Ledger(settings.ledger).epsilon("0", delta=1e-4) <= 3.0


def test_the_node_s_paths_and_device_win(sections: MakeSections, tmp_path: Path) -> None:
    settings = NodeSettings(
        name="a", partition=0, data=tmp_path / "d.csv", model=tmp_path / "m", device="cpu", state=tmp_path
    )
    tree = sections(data={"path": "/theirs"}, model={"path": "/theirs", "device": "cuda:7"}, own=True)
    job = settings.accept(ClientJob.model_validate(tree))
    assert (job.data.path, job.model.path) == (str(tmp_path / "d.csv"), str(tmp_path / "m"))
    assert (job.model.device, job.own) == ("cpu", False)


# --- Place and ledger ------------------------------------------------------------------------------------------------


def test_charges_are_real_and_say_federation_run_and_round(sections: MakeSections, tmp_path: Path) -> None:
    node = Node(NodeSettings(name="ward-3", partition=1, state=tmp_path, federation="clinics"), sections(**PRIVATE))
    update = Update.read(node.ask(round=2))
    (row,) = node.rows
    assert (row.client, row.purpose, row.simulated) == ("1", "clinics/pilot: round 2", False)
    assert update.client == "1"


def test_a_replayed_order_is_charged_again(sections: MakeSections, tmp_path: Path) -> None:
    node = Node(NodeSettings(name="ward-3", partition=1, state=tmp_path), sections(**PRIVATE))
    assert not node.ask().has_error() and not node.ask().has_error()
    assert len(node.rows) == 2


def test_a_run_without_a_name_goes_by_its_number(sections: MakeSections, tmp_path: Path) -> None:
    context = Context(run_id=5, node_id=1, node_config={"partition-id": 2}, state=RecordDict(), run_config={})
    place = Place.at(NodeSettings(name="ward-3", state=tmp_path), context)
    assert (place.index, place.name, place.node, place.run) == (2, "2", "ward-3", "lethe/run 5")
    context.node_config.clear()
    with pytest.raises(ConfigError, match="partition-id"):
        Place.at(NodeSettings(name="ward-3", state=tmp_path), context)


# --- Data of its own -------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.csv"
    names = ["tea", "milk", "tea", "milk", "tea"]
    file.write_text("text,label\n" + "".join(f"please bring {name} {i},{name}\n" for i, name in enumerate(names)))
    return file


def test_all_rows_of_its_own_file_are_its_share(sections: MakeSections, tmp_path: Path, rows: Path) -> None:
    tree = sections(data={"max_train": None, "labels": ["milk", "soup", "tea"]})
    node = Node(NodeSettings(name="ward-3", own=True, data=rows, state=tmp_path / "state"), tree)
    greeting = node.ask(GREET).content
    assert greeting["metrics"]["num-examples"] == 5
    assert greeting["report"]["client"] == greeting["report"]["node"] == "ward-3"
    node.job = node.settings.accept(node.job)
    assert node.job.world.splits.label_names == ("milk", "soup", "tea")
    update = Update.read(node.ask())
    assert (update.client, update.examples) == ("ward-3", 5)


def test_agreed_labels_make_equal_layouts_of_unequal_data(sections: MakeSections, tmp_path: Path, rows: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("text,label\none soup,soup\nsome milk,milk\n")
    agreed = sections(data={"labels": ["milk", "soup", "tea"]})
    signatures = {
        NodeSettings(name="a", own=True, data=file, state=tmp_path)
        .accept(ClientJob.model_validate(tree))
        .world.learner.signature
        for tree in (agreed,)
        for file in (rows, other)
    }
    assert len(signatures) == 1


def test_a_label_outside_the_agreed_ones_stays_at_the_node(sections: MakeSections, tmp_path: Path, rows: Path) -> None:
    tree = sections(data={"labels": ["milk", "soup"]})
    node = Node(NodeSettings(name="a", own=True, data=rows, state=tmp_path / "state"), tree)
    reason = str(node.ask(GREET).error.reason)
    assert reason.startswith("DataError;")
    assert "tea" not in reason and "rows.csv" not in reason
