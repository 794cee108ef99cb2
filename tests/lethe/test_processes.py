"""Command lines: what is secret stays in files, what is started is shown, and Flower's own parsers take them."""

import re
from pathlib import Path

import pytest

from lethe import processes
from lethe.processes import Command
from lethe.site import Federation, Node, Site

NODE = Node(name="north", partition=1, port=9100)
SITE = Site(Path("/there/site"), Federation(hosts=("fl.example",), proxy_port=8443, nodes=(NODE,)))
SUPERLINK = processes.superlink_places(SITE, runs=Path("/there/runs"))
NORTH = processes.node_places(SITE, NODE)


def commands() -> dict[str, Command]:
    made = [processes.superlink(SUPERLINK), processes.superexec(SUPERLINK), processes.proxy(SUPERLINK)]
    made += [processes.supernode(NORTH, partition=1, partitions=3), processes.executor(NORTH)]
    return {command.name: command for command in made}


def flags(command: Command) -> dict[str, str]:
    argv = command.argv
    return {word: argv[place + 1] for place, word in enumerate(argv[:-1]) if word.startswith("--")}


def test_the_superlink_trusts_nobody() -> None:
    found = flags(commands()["superlink"])
    assert found["--isolation"] == "process" and found["--host"] == "127.0.0.1" and found["--port"] == "8000"
    assert found["--superexec-auth-secret-file"] == "/there/site/superlink/superexec.secret"
    assert {"--enable-supernode-auth", "--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certfile", "--database"} <= {*found}
    assert "--insecure" not in commands()["superlink"].argv


def test_a_node_dials_the_proxy_under_its_own_key() -> None:
    found = flags(commands()["supernode"])
    assert found["--superlink"] == "fl.example:8443" and found["--host"] == "127.0.0.1" and found["--port"] == "9100"
    assert found["--auth-supernode-private-key"] == "/there/site/nodes/north/auth"
    assert found["--node-config"] == "partition-id=1 num-partitions=3"
    assert "--insecure" not in commands()["supernode"].argv


def test_the_executor_asks_its_own_supernode() -> None:
    found = flags(commands()["executor"])
    assert found["--runtime"] == "127.0.0.1:9100"
    assert found["--secret"] == flags(commands()["supernode"])["--superexec-auth-secret-file"]
    assert found["--config"] == "/there/site/nodes/north/node.toml"


@pytest.mark.parametrize("name", sorted(commands()))
def test_nothing_is_asked_of_the_internet_and_homes_are_apart(name: str) -> None:
    command = commands()[name]
    if name != "proxy":
        assert command.env.items() >= processes.QUIET.items()
        assert command.env["FLWR_HOME"].startswith("/there/site/")
    assert "/there/site/home" not in command.env.get("FLWR_HOME", "")


def test_a_command_is_shown_as_one_would_type_it() -> None:
    command = Command("x", ("flwr", "run", "a b"), {**processes.QUIET, "FLWR_HOME": "/x y"})
    assert command.shown() == "FLWR_HOME='/x y' flwr run 'a b'"


def test_programs_of_this_installation_are_found_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/elsewhere")
    first, *others = Command("x", ("x",), {"A": "1"}).environment()["PATH"].split(":")
    assert (Path(first) / "python").exists() and others == ["/elsewhere"]


def test_the_proxy_shows_fleet_paths_only() -> None:
    text = processes.host_proxy_settings(SITE)
    assert "listen 0.0.0.0:8443 ssl;" in text and "server 127.0.0.1:8000;" in text and "@" not in text
    assert re.findall(r"location (\S+) {", text) == ["/", "/v1/fleet/"]
    assert "proxy_ssl_verify on;" in text and "proxy_request_buffering off;" in text


def test_a_proxy_of_this_host_alone_listens_to_this_host_alone() -> None:
    site = Site(Path("/there/site"), Federation(proxy_port=9443))
    assert "listen 127.0.0.1:9443 ssl;" in processes.host_proxy_settings(site)


def test_secrets_are_never_on_a_command_line(tmp_path: Path) -> None:
    from lethe.founding import found

    site = Site(tmp_path / "site", Federation(nodes=(NODE,)))
    found(site)
    secrets = [path.read_bytes() for path in site.root.rglob("*") if path.is_file() and path.stat().st_mode & 0o77 == 0]
    secret_words = {word for text in secrets for word in re.findall(rb"[0-9a-f]{64,}", text)}
    assert len(secret_words) == 3
    places = processes.superlink_places(site, runs=tmp_path)
    own = processes.node_places(site, NODE)
    made = [
        processes.superlink(places),
        processes.superexec(places),
        processes.supernode(own, partition=0, partitions=1),
    ]
    text = " ".join(command.shown() for command in made)
    assert [word for word in secret_words if word.decode() in text] == []
