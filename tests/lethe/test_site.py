"""The site directory: read back as written, wrong values named, node settings that a node accepts."""

import re
import tomllib
from pathlib import Path

import pytest

from client.node import NodeSettings, Policy, read_node
from lethe import credentials
from lethe.site import Federation, Node, Site, address, is_host, new_site, node_settings, open_site, to_toml, write_node
from lora.errors import ConfigError

NODES = (Node(name="north", partition=0), Node(name="south", partition=1, port=9095))


def test_federation_toml_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    site = Site(tmp_path, Federation(name="clinic", hosts=("fl.example", "::1"), proxy_port=8443, nodes=NODES))
    site.save()
    assert open_site(tmp_path).federation == site.federation
    assert tomllib.loads(to_toml(Federation())) == {
        "name": "federation",
        "hosts": ["127.0.0.1", "localhost"],
        "port": 8000,
    }


def test_a_directory_that_is_no_site_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lethe deploy init"):
        open_site(tmp_path / "nowhere")


def test_a_site_is_never_made_over_another(tmp_path: Path) -> None:
    new_site(tmp_path, {"nodes": []}).save()
    with pytest.raises(ConfigError, match="never overwritten"):
        new_site(tmp_path, {"nodes": []})


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('nane = "x"', "did you mean 'name'"),
        ('name = "A b"', "is no name"),
        ('hosts = ["fl.example/x"]', "neither a host name nor an address"),
        ('hosts = ["fl.example:8000"]', "neither a host name nor an address"),
        ('hosts = ["1.2.3"]', "neither a host name nor an address"),
        ("hosts = []", "there is none"),
        ("port = 70000", "65535"),
        ("proxy_port = 8000", "both 8000"),
        ('[[nodes]]\nname = "a"\npartition = 0\n[[nodes]]\nname = "a"\npartition = 1', "two nodes have the name a"),
        (
            '[[nodes]]\nname = "a"\npartition = 0\n[[nodes]]\nname = "b"\npartition = 0',
            "two nodes have the partition 0",
        ),
        ('[[nodes]]\nname = "a"\npartition = 0\nprot = 1', "did you mean 'port'"),
        ("port = ", "cannot be read"),
    ],
)
def test_what_is_wrong_is_said(line: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text(line + "\n")
    with pytest.raises(ConfigError, match=re.escape(told)):
        open_site(tmp_path)


def test_an_unknown_node_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'north'"):
        Site(Path("x"), Federation(nodes=NODES)).node("noth")


@pytest.mark.parametrize(
    ("federation", "bind", "dialled"),
    [
        (Federation(), "127.0.0.1", "127.0.0.1:8000"),
        (Federation(hosts=("fl.example",)), "0.0.0.0", "fl.example:8000"),
        (Federation(hosts=("fl.example",), proxy_port=8443), "127.0.0.1", "fl.example:8443"),
        (Federation(hosts=("::1",), proxy_port=443), "127.0.0.1", "[::1]:443"),
    ],
)
def test_control_is_for_this_host_alone_wherever_there_is_a_proxy(
    federation: Federation, bind: str, dialled: str
) -> None:
    assert (federation.bind, federation.dialled, federation.control) == (bind, dialled, "127.0.0.1:8000")
    assert {"superlink", "localhost", *federation.hosts} <= {*federation.certified}


@pytest.mark.parametrize("host", ["fl.example", "a", "127.0.0.1", "::1", "x-1.y"])
def test_hosts_are_hosts(host: str) -> None:
    assert is_host(host)


@pytest.mark.parametrize("host", ["", "a b", "-a", "a/b", "a:1", "1.2.3", "a..b"])
def test_others_are_not(host: str) -> None:
    assert not is_host(host)


def test_ipv6_addresses_get_brackets() -> None:
    assert address("::1", 5) == "[::1]:5" and address("a.example", 5) == "a.example:5"


def test_a_new_node_folder_is_what_a_node_accepts(tmp_path: Path) -> None:
    site = Site(tmp_path, Federation(name="clinic", nodes=NODES))
    write_node(site, NODES[1], keys=credentials.node_key(), secret=credentials.secret())
    settings = read_node(site.node_folder("south") / "node.toml")
    assert (settings.name, settings.federation, settings.partition) == ("south", "clinic", 1)
    assert settings.state == tmp_path / "nodes" / "south" / "state"
    assert credentials.exposed((tmp_path / "nodes" / "south").glob("[!a]*")) == []


def test_the_choices_that_are_shown_are_all_that_there_are() -> None:
    text = node_settings(Federation(nodes=NODES), NODES[0])
    shown = {*re.findall(r"^(?:# )?(\w+) = ", text, flags=re.M)}
    assert shown == {*NodeSettings.model_fields, *Policy.model_fields} - {"policy"}
    chosen = re.sub(r"^partition = .*\n", "", re.sub(r"^# (\w+ = )", r"\1", text, flags=re.M), flags=re.M)
    NodeSettings.model_validate(tomllib.loads(chosen))


def test_the_operators_connection_names_address_and_certificate(tmp_path: Path) -> None:
    site = Site(tmp_path, Federation(port=8123))
    site.write_connection()
    read = tomllib.loads((tmp_path / "home" / "config.toml").read_text())["superlink"]
    assert read == {"default": "lethe", "lethe": {"address": "127.0.0.1:8123", "root-certificates": str(site.ca)}}
    site.write_connection(superlink="superlink:8000")
    assert "superlink:8000" in (tmp_path / "home" / "config.toml").read_text()
