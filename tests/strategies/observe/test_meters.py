import re

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from strategies.observe.meters import LONGEST_NAME, MOST_NAMES, OTHER, Names, NodeMeters, ServerMeters, stated

REGISTRIES = {
    "server": lambda: ServerMeters(run="first", engine="deployment").registry,
    "node": lambda: NodeMeters().registry,
}
STATED = {
    "delta": "1e-05",
    "unit": "example",
    "adjacency": "add/remove one",
    "sampling": "poisson",
    "simulated": "false",
}


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


@pytest.mark.parametrize("kind", REGISTRIES)
def test_names_follow_the_conventions(kind: str) -> None:
    for family in REGISTRIES[kind]().collect():
        assert re.fullmatch(rf"(lethe_{kind}|process)(_[a-z]+)*", family.name), family.name
        assert family.documentation.endswith("."), family.name
        for unit in ("bytes", "seconds", "ratio"):
            assert unit not in family.name or family.name.endswith(unit), family.name
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples if "_created" not in sample.name)


@pytest.mark.parametrize("kind", REGISTRIES)
def test_memory_is_among_the_metrics(kind: str) -> None:
    text = generate_latest(REGISTRIES[kind]()).decode()
    found = re.search(r"^process_resident_memory_bytes (\S+)$", text, flags=re.M)
    assert found is not None
    assert 1e7 < float(found[1]) < 1e11


def test_an_epsilon_says_what_it_means() -> None:
    facts = {"delta": 1e-5, "unit": "example", "adjacency": "add/remove one", "sampling": "poisson", "simulated": False}
    assert stated(facts) == STATED
    assert stated({}) == dict.fromkeys(STATED, "")


def test_a_resumed_run_goes_on_counting_where_it_was() -> None:
    meters = ServerMeters(run="first", engine="deployment")
    meters.hear({"kind": "begun", "rounds": 9, "min_clients": 2, "privacy": None})
    meters.hear({"kind": "resumed", "round": 4})
    meters.hear({"kind": "roster", "round": 5, "online": 3})
    found = {name: value(meters.registry, f"lethe_server_{name}") for name in ("round", "rounds_finished")}
    assert found == {"round": 5, "rounds_finished": 4}


def test_who_waits_for_clients_says_how_many_are_there() -> None:
    meters = ServerMeters(run="first", engine="deployment")
    meters.hear({"kind": "waiting", "online": 1, "wanted": 3})
    assert value(meters.registry, "lethe_server_clients_online") == 1
    assert value(meters.registry, "lethe_server_round") == 0


def test_unknown_records_are_passed_over() -> None:
    meters = ServerMeters(run="first", engine="deployment")
    before = generate_latest(meters.registry).decode().split("process_")[0]
    meters.hear({"kind": "something-new", "texts": ["x"]})
    assert generate_latest(meters.registry).decode().split("process_")[0] == before


def test_names_from_outside_are_bounded_in_number_and_length() -> None:
    names = Names()
    given = [names(f"client-{number}") for number in range(MOST_NAMES + 50)]
    assert given[:MOST_NAMES] == [f"client-{number}" for number in range(MOST_NAMES)]
    assert set(given[MOST_NAMES:]) == {OTHER}
    assert names("client-7") == "client-7"
    assert len(Names()("x" * 500)) == LONGEST_NAME


def test_hostile_names_make_no_metric_of_their_own() -> None:
    meters = NodeMeters()
    meters.trained('a"} 1\nlethe_node_fake 1\n#', examples=3)
    text = generate_latest(meters.registry).decode()
    assert not re.search(r"^lethe_node_fake", text, flags=re.M)


def test_a_node_keeps_its_epsilon_by_ledger_and_client() -> None:
    meters = NodeMeters()
    meters.introduce(node="clinic", federation="north")
    for epsilon in (1.0, 2.5):
        facts = {**STATED, "delta": 1e-5, "simulated": False}
        meters.charged("0", ledger="state/ledger.sqlite", epsilon=epsilon, facts=facts)
    assert value(meters.registry, "lethe_node_epsilon", client="0", ledger="state/ledger.sqlite", **STATED) == 2.5
    assert value(meters.registry, "lethe_node_info", node="clinic", federation="north") == 1
