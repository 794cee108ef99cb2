"""docker-compose.yml: valid, closed to the outside, and its command lines are those of lethe/processes.py.

No container engine is needed: tests/deployment/test_fleet.py runs the same command lines as processes.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lethe import processes

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
NODES = ("node-1", "node-2", "node-3")
OURS = sorted({*SERVICES} - {"proxy", "database"})


def test_it_follows_the_schema_of_compose_files() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run(
        [*command, str(ROOT / "docker-compose.yml")], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_compose_file_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "wrong.yml").write_text("services:\n  a:\n    comand: [x]\n")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    assert subprocess.run([*command, "wrong.yml"], cwd=tmp_path, capture_output=True, check=False).returncode != 0


def expected(service: str) -> processes.Command | None:
    """Return what lethe/processes.py says of a service."""
    places = processes.SUPERLINK_CONTAINERS
    host = {"superlink": processes.superlink, "superexec": processes.superexec, "proxy": processes.proxy}
    if service in host:
        return host[service](places)
    number = re.search(r"\d+", service)
    if number is None:
        return None
    own = processes.node_containers(f"node-{number[0]}")
    if service.startswith("node-"):
        return processes.supernode(own, partition=int(number[0]) - 1, partitions=len(NODES))
    return processes.executor(own)


@pytest.mark.parametrize("service", sorted({*SERVICES} - {"register", "operator", "database"}))
def test_command_and_environment_are_those_of_the_one_source(service: str) -> None:
    command = expected(service)
    assert command is not None
    assert SERVICES[service]["command"] == list(command.argv)
    assert SERVICES[service].get("environment", {}) == dict(command.env)


@pytest.mark.parametrize("service", ["register", "operator"])
def test_the_operator_runs_this_projects_own_command(service: str) -> None:
    from lethe.deploy import app

    lethe, deploy, name = SERVICES[service]["command"]
    assert (lethe, deploy) == ("lethe", "deploy")
    assert name in {each.name or (each.callback and each.callback.__name__) for each in app.registered_commands}


def test_the_proxys_configuration_is_the_template() -> None:
    assert (ROOT / "docker" / "proxy.conf").read_text() == processes.container_proxy_settings()


def test_only_the_proxy_is_published() -> None:
    assert [name for name, service in SERVICES.items() if service.get("ports")] == ["proxy"]
    assert not any(service.get("privileged") or service.get("network_mode") for service in SERVICES.values())


def networks(service: str) -> set[str]:
    return {*SERVICES[service]["networks"]}


def test_nodes_reach_the_proxy_and_never_the_superlink() -> None:
    for node in NODES:
        assert networks(node) == {"fleet", node}
        assert networks(node) & networks("superlink") == set()
        assert networks(node) & networks("proxy") == {"fleet"}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_who_sees_data_reaches_its_own_supernode_and_nothing_else(number: int) -> None:
    for service in (f"executor-{number}", f"executor-{number}-gpu"):
        assert networks(service) == {f"node-{number}"}
        assert COMPOSE["networks"][f"node-{number}"] == {"internal": True}
        volumes = SERVICES[service]["volumes"]
        assert f"node-{number}:/site/nodes/node-{number}/state" in volumes
        others = [volume for other in {1, 2, 3} - {number} for volume in volumes if f"node-{other}" in volume]
        assert others == []
    assert SERVICES[f"node-{number}"].get("volumes") is None


def test_control_is_internal() -> None:
    assert COMPOSE["networks"]["control"] == {"internal": True}
    assert networks("superlink") == networks("superexec") == {"control"}


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_service_is_limited_and_comes_back(name: str) -> None:
    service = SERVICES[name]
    assert {"cpus", "memory", "pids"} <= {*service["deploy"]["resources"]["limits"]}
    assert service["restart"] == {"register": "on-failure", "operator": "no"}.get(name, "unless-stopped")
    assert service["logging"]["options"]["max-size"]


@pytest.mark.parametrize("name", [*OURS, "proxy"])
def test_no_service_of_ours_is_root_or_can_become_it(name: str) -> None:
    service = SERVICES[name]
    assert service["user"] == "${LETHE_UID:-10001}:${LETHE_GID:-10001}"
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]


@pytest.mark.parametrize("name", ["superlink", "proxy", "database", *NODES])
def test_services_with_a_port_have_health_checks(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"


def test_who_waits_waits_for_a_service_with_a_health_check() -> None:
    for service in SERVICES.values():
        for other, condition in service.get("depends_on", {}).items():
            assert other in SERVICES
            assert condition["condition"] != "service_healthy" or "healthcheck" in SERVICES[other]


def test_what_is_used_is_defined_and_what_is_defined_is_used() -> None:
    for kind in ("secrets", "configs", "networks"):
        entries = [entry for service in SERVICES.values() for entry in service.get(kind, ())]
        used = {entry["source"] if isinstance(entry, dict) else entry for entry in entries}
        assert used == {*COMPOSE[kind]}
    volumes = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", ())}
    assert {volume for volume in volumes if not volume.startswith("$")} == {*COMPOSE["volumes"]}


def test_every_file_of_the_site_is_one_that_init_makes(tmp_path: Path) -> None:
    from lethe.cli import main

    site = tmp_path / "federation"
    assert main(["deploy", "init", "--site", str(site), "--proxy"]) == 0
    for kind in ("secrets", "configs"):
        for entry in COMPOSE[kind].values():
            file = entry["file"].replace("${LETHE_SITE:-./federation}", str(site)).replace("./", f"{ROOT}/")
            assert Path(file).is_file(), file


def test_secrets_are_files_and_never_in_the_environment() -> None:
    for service in SERVICES.values():
        named = [key for key in service.get("environment", {}) if re.search("SECRET|PASSWORD|KEY", key)]
        assert all(key.endswith("_FILE") for key in named)
    private = [
        entry["file"] for entry in COMPOSE["configs"].values() if re.search(r"\.key|secret|/auth\"?$", entry["file"])
    ]
    assert private == []


def test_without_a_profile_nothing_trains_twice() -> None:
    (line,) = [each for each in (ROOT / ".env").read_text().splitlines() if each.startswith("COMPOSE_PROFILES=")]
    assert line == "COMPOSE_PROFILES=cpu"
    for number in (1, 2, 3):
        cpu, gpu = SERVICES[f"executor-{number}"], SERVICES[f"executor-{number}-gpu"]
        assert (cpu["profiles"], gpu["profiles"]) == (["cpu"], ["gpu"])
        assert cpu["command"] == gpu["command"] and cpu["volumes"] == gpu["volumes"]
        (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"] and "cu1" in gpu["build"]["args"]["TORCH_INDEX"]


# --- The image -------------------------------------------------------------------------------------------------------


def instructions(name: str) -> list[str]:
    """Return the Dockerfile's instructions of a kind."""
    text = re.sub(r"\\\n(\s*#.*\n)*", " ", (ROOT / "Dockerfile").read_text())
    return [line.partition(" ")[2].strip() for line in text.splitlines() if line.startswith(f"{name} ")]


def test_the_image_is_slim_pinned_and_not_root() -> None:
    assert {line.split()[0] for line in instructions("FROM")} == {"python:3.11-slim"}
    assert any("--constraint constraints.txt" in line for line in instructions("RUN"))
    assert instructions("USER") == ["10001:10001"]
    assert instructions("ARG")[0].startswith("TORCH_INDEX=")


def test_the_builder_sees_packages_only() -> None:
    kept = {line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks", "tests"}
    assert kept == {*packages, "recipes", "LICENSE", "README.md", "pyproject.toml", "constraints.txt"}
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()


def test_the_image_has_every_place_that_a_volume_is_put(tmp_path: Path) -> None:
    made = " ".join(instructions("RUN"))
    targets = [
        volume.split(":")[1] for name in OURS for volume in SERVICES[name].get("volumes", ()) if volume[0] != "$"
    ]
    assert [target for target in targets if f" {target}" not in made] == []
