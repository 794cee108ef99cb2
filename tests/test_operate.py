"""The operating guide says what is there: every metric, every reason for a refusal, every error, no other command."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from typer.main import get_command

from lethe.cli import app
from lora.errors import LetheError
from strategies.federated.wire import REASONS
from strategies.observe.logs import Fields
from strategies.observe.meters import STATED, NodeMeters, ServerMeters

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
PACKAGES = ("lora", "tasks", "privacy", "strategies", "client", "server", "simulation", "lethe")
REGISTRIES = [ServerMeters(run="first", engine="deployment").registry, NodeMeters().registry]


def section(title: str) -> str:
    (found,) = re.findall(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#+ |\Z)", TEXT, flags=re.M | re.S)
    return str(found[1])


def rows(title: str) -> dict[str, list[str]]:
    """Return the lines of a section's table by the name in the first column."""
    lines = [line.strip("|").split("|") for line in section(title).splitlines() if line.startswith("| `")]
    return {re.findall(r"`([^`]+)`", line[0])[0]: [cell.strip() for cell in line[1:]] for line in lines}


def fences() -> list[Any]:
    return [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```", TEXT, flags=re.M | re.S)]


def exposed(registry: CollectorRegistry) -> dict[str, tuple[str, ...]]:
    """Return the metrics of a registry as they are shown, and their labels."""
    suffix = {"counter": "_total", "info": "_info"}
    names = {metric.name + suffix.get(metric.type, ""): metric.name for metric in registry.collect()}
    collectors = {
        getattr(each, "_name", ""): tuple(getattr(each, "_labelnames", ())) for each in registry._collector_to_names
    }
    return {shown: collectors.get(name, ()) for shown, name in names.items()}


ALL = {name: labels for registry in REGISTRIES for name, labels in exposed(registry).items()}


# --- Metrics ---------------------------------------------------------------------------------------------------------


def test_the_table_has_every_metric_and_no_other() -> None:
    assert {name for name in ALL if name.startswith("lethe_")} == rows("Metrics").keys()
    assert {name for name in ALL if not name.startswith("lethe_")} <= {*re.findall(r"`(process_\w+)`", TEXT)}


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("lethe_") and not name.endswith("_info")])
def test_the_table_has_a_metric_s_labels(name: str) -> None:
    shown = rows("Metrics")[name][0]
    expected = rows("Metrics")["lethe_server_epsilon_max"][0] if shown == "the same" else shown
    assert tuple(re.findall(r"`(\w+)`", expected)) == ALL[name]


def test_every_epsilon_says_what_it_means() -> None:
    for name, labels in ALL.items():
        assert "epsilon" not in name or {*STATED} <= {*labels}, name


def test_alerts_are_rules_over_metrics_that_exist() -> None:
    (groups,) = [found["groups"] for found in fences() if "groups" in found]
    (group,) = groups
    assert len({rule["alert"] for rule in group["rules"]}) == len(group["rules"]) >= 5
    for rule in group["rules"]:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["annotations"]["summary"].endswith(".")
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))
        assert rule["expr"].count("(") == rule["expr"].count(")")
        used = {*re.findall(r"\b(?:lethe|process)_\w+", rule["expr"])}
        assert used <= {*ALL} and (used or "up{" in rule["expr"]), rule["alert"]
        for reasons in re.findall(r'reason=~?"([^"]+)"', rule["expr"]):
            assert {*reasons.split("|")} <= reasons_in_the_code()


def test_alerts_ask_for_jobs_that_prometheus_scrapes() -> None:
    (scraped,) = [{each["job_name"] for each in found["scrape_configs"]} for found in fences() if "groups" not in found]
    assert {*re.findall(r'job="([\w-]+)"', TEXT)} <= scraped


def test_fields_of_the_log_are_fields_of_the_log() -> None:
    (listed,) = re.findall(r"what is known of: (.*?)\. There", section("Logs"), flags=re.S)
    assert {*re.findall(r"`(\w+)`", listed)} <= Fields.__annotations__.keys()


def test_events_of_the_log_are_all_there() -> None:
    named: set[str] = set()
    for line in section("Logs").splitlines():
        if line.startswith("| `"):
            named |= {*re.findall(r"`(\w+)`", line.split("|")[1])}
    assert named == {*events_in_the_code()}


# --- Refusals and errors ---------------------------------------------------------------------------------------------


@cache
def trees() -> dict[str, ast.Module]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def calls(*names: str) -> Iterator[ast.Call]:
    """Yield every call in the library of a function or method of these names."""
    for tree in trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = node.func
                name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", None)
                if name in names:
                    yield node


def literals(nodes: Iterator[ast.expr]) -> set[str]:
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def reasons_in_the_code() -> set[str]:
    unusable = literals(call.args[0] for call in calls("_Unusable") if call.args)
    refused = literals(call.args[1] for call in calls("Refused") if len(call.args) > 1)
    assert unusable and refused
    return {*REASONS.values(), *unusable, *refused}


def events_in_the_code() -> set[str]:
    records = (
        call
        for call in calls("write", "tell")
        if isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Attribute)
        and call.func.value.attr == "records"
    )
    told = literals(call.args[0] for call in records if call.args)
    logged = literals(call.args[0] for call in calls("event") if call.args)
    return {*told, *logged, "failed"}


def test_every_reason_for_a_refusal_has_its_cause_and_its_remedy() -> None:
    table = rows("Refused replies")
    assert table.keys() == reasons_in_the_code()
    assert all(len(cause) > 20 and len(remedy) > 20 for cause, remedy in table.values())


def errors() -> set[str]:
    """Return the public errors of the library by name: LetheError, and every class that derives from one of them."""
    classes = [node for tree in trees().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    parents = {node.name: {ast.unparse(base).split(".")[-1] for base in node.bases} for node in classes}
    found, more = set[str](), {LetheError.__name__}
    while more:
        found |= more
        more = {name for name, bases in parents.items() if bases & found} - found
    return {name for name in found if name[0] != "_"}


def test_every_error_has_its_meaning_and_its_remedy() -> None:
    table = rows("Errors")
    assert table.keys() == errors()
    assert all(meaning and remedy for meaning, remedy in table.values())


# --- Commands and files ----------------------------------------------------------------------------------------------


def test_commands_are_commands() -> None:
    root = get_command(app)
    prose = " ".join(re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S).split())
    quoted = " ".join(re.findall(r"`[^`]+`", prose))
    named = {*re.findall(r"lethe ((?:deploy|config|privacy) [a-z-]+|[a-z]+)", quoted)}
    assert {f"deploy {name}" for name in root.commands["deploy"].commands} <= named  # type: ignore[attr-defined]
    for words in named:
        found: Any = root
        for word in words.split():
            found = found.commands[word]


def test_settings_of_a_node_are_its_settings() -> None:
    from client.node import NodeSettings, Policy

    (listed,) = re.findall(r"decides for itself in `[^`]+`: (.*?)\. A coordinator", TEXT, flags=re.S)
    known = {*NodeSettings.model_fields, *(f"policy.{key}" for key in Policy.model_fields)}
    assert {*re.findall(r"`([\w.]+)`", listed)} <= known


def test_keys_of_the_run_file_are_keys() -> None:
    from lethe.config import RunFile

    sections = {name: field.annotation for name, field in RunFile.model_fields.items()}
    named = {*re.findall(r"`(federation|privacy|training|adapter|data|model)\.(\w+)[`=]", TEXT)} - {
        ("federation", "toml")
    }
    wrong = [f"{home}.{key}" for home, key in named if key not in sections[home].model_fields]  # type: ignore[union-attr]
    assert wrong == []


def test_the_place_for_faults_is_marked() -> None:
    assert TEXT.count("<!-- faults -->") == 1
