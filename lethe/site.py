"""The site: one directory with all that a federation's deployment consists of, in folders that can be handed out.

    federation.toml              names, addresses, ports, nodes: the one place that every command reads; no secrets
    ca/ca.crt  ca/ca.key         the certificate authority; the key stays with the operator
    superlink/server.crt  server.key  superexec.secret  proxy.conf
    nodes/NAME/auth  auth.pub  executor.secret  node.toml
    home/config.toml             Flower's home of the operator

A node's host gets `federation.toml`, `ca/ca.crt` and its own folder below `nodes/`, and nothing else.
"""

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from lethe.credentials import Pair, make_folder, write_new
from lora.config import Section
from lora.errors import ConfigError, nearest

DEFAULT_SITE = Path("federation")
CONNECTION = "lethe"
"""Name of the operator's connection in Flower's configuration."""
NAME = r"^[a-z0-9][a-z0-9-]{0,39}$"
LOOPBACK = ("127.0.0.1", "localhost")
CONTAINERS = ("superlink", "proxy")
"""Host names of the compose file, in every server certificate."""

_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")


class Node(Section):
    """A `[[nodes]]` entry: a node by name, its share of the job's data, and where its executor finds its SuperNode."""

    name: str = Field(pattern=NAME)
    partition: int = Field(ge=0)
    port: int = Field(9094, ge=1, le=65535)


class Federation(Section):
    """federation.toml."""

    name: str = Field("federation", pattern=NAME)
    hosts: tuple[str, ...] = LOOPBACK
    """Names and addresses of the SuperLink's host; nodes dial the first."""
    port: int = Field(8000, ge=1, le=65535)
    """The SuperLink's port: control, fleet and runtime paths share it."""
    proxy_port: int | None = Field(None, ge=1, le=65535)
    """The reverse proxy's port, which shows fleet paths only; without it nodes dial the SuperLink itself."""
    nodes: tuple[Node, ...] = ()

    @field_validator("hosts")
    @classmethod
    def _hosts_are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [host for host in hosts if not is_host(host)]:
            raise ValueError(f"{wrong[0]!r} is neither a host name nor an address; leave out port and https://")
        if not hosts:
            raise ValueError("there is none; name at least one, such as localhost")
        return hosts

    @model_validator(mode="after")
    def _nodes_differ(self) -> "Federation":
        for key in ("name", "partition"):
            values = [getattr(node, key) for node in self.nodes]
            if twice := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"two nodes have the {key} {twice[0]}; give each its own")
        if self.proxy_port == self.port:
            raise ValueError(f"port and proxy_port are both {self.port}; give each its own")
        return self

    @property
    def local(self) -> bool:
        """Whether every host is this very machine."""
        return all(_is_loopback(host) for host in self.hosts)

    @property
    def dialled(self) -> str:
        """The address that nodes dial."""
        return address(self.hosts[0], self.proxy_port or self.port)

    @property
    def control(self) -> str:
        """The address of the control interface, as seen on the SuperLink's own host."""
        return address("127.0.0.1", self.port)

    @property
    def bind(self) -> str:
        """Where the SuperLink listens: on the loopback, unless nodes elsewhere dial it without a proxy."""
        return "127.0.0.1" if self.local or self.proxy_port else "0.0.0.0"

    @property
    def certified(self) -> list[str]:
        """What the server certificate is for."""
        return list(dict.fromkeys([*self.hosts, *LOOPBACK, *CONTAINERS]))


class Site:
    """A site directory: where everything in it is, and what federation.toml says."""

    def __init__(self, root: Path, federation: Federation) -> None:
        self.root = root.absolute()
        self.federation = federation

    @property
    def ca(self) -> Path:
        """The authority's certificate."""
        return self.root / "ca" / "ca.crt"

    @property
    def ca_key(self) -> Path:
        """The authority's key."""
        return self.root / "ca" / "ca.key"

    @property
    def superlink(self) -> Path:
        """The folder of the SuperLink's host."""
        return self.root / "superlink"

    @property
    def home(self) -> Path:
        """Flower's home of the operator."""
        return self.root / "home"

    def node_folder(self, name: str) -> Path:
        """Return the folder of a node."""
        return self.root / "nodes" / name

    def node(self, name: str) -> Node:
        """Return a node by name; ConfigError names the nearest."""
        for node in self.federation.nodes:
            if node.name == name:
                return node
        raise ConfigError(f"there is no node '{name}'{nearest(name, [node.name for node in self.federation.nodes])}")

    def authority(self) -> Pair:
        """Read the certificate authority. Raises ConfigError on a host that does not have its key."""
        try:
            return Pair(self.ca_key.read_bytes(), self.ca.read_bytes())
        except OSError as error:
            raise ConfigError(
                f"{error.filename}: cannot be read ({error.strerror}); only the operator has it"
            ) from None

    def write_connection(self, *, superlink: str | None = None) -> None:
        """Write Flower's config.toml for the operator: made from federation.toml, so it is written anew each time."""
        make_folder(self.home)
        lines = [
            "# Made by `lethe deploy` from federation.toml; changes are lost.",
            f'[superlink]\ndefault = "{CONNECTION}"\n',
            f"[superlink.{CONNECTION}]",
            toml_line("address", superlink or self.federation.control),
            toml_line("root-certificates", str(self.ca)),
        ]
        replace(self.home / "config.toml", "\n".join(lines) + "\n")

    def save(self) -> None:
        """Write federation.toml aside and rename it."""
        replace(self.root / "federation.toml", to_toml(self.federation))

    def with_federation(self, **changes: Any) -> "Site":
        """Return the site with some of federation.toml's values changed, not yet saved; ConfigError if they clash."""
        values = self.federation.model_dump() | changes
        return Site(self.root, _checked(values, source=self.root / "federation.toml"))


def open_site(root: Path) -> Site:
    """Read a site directory. Raises ConfigError where there is none, or federation.toml is wrong."""
    file = root / "federation.toml"
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{root}: holds no federation.toml; `lethe deploy init` makes one, --site names another"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from None
    return Site(root, _checked(values, source=file))


def new_site(root: Path, federation: Mapping[str, Any]) -> Site:
    """Return a site that is to be made. Raises ConfigError when there is one already, or values are wrong."""
    if (root / "federation.toml").exists():
        raise ConfigError(
            f"{root} is a site already and is never overwritten; name another by --site, or `lethe deploy add-node`"
        )
    return Site(root, _checked(federation, source=root / "federation.toml"))


def write_node(site: Site, node: Node, *, keys: Pair, secret: bytes) -> None:
    """Write a node's folder: all that its host gets beside federation.toml and ca.crt."""
    folder = site.node_folder(node.name)
    write_new(folder / "auth", keys.private)
    write_new(folder / "auth.pub", keys.public, private=False)
    write_new(folder / "executor.secret", secret)
    write_new(folder / "node.toml", node_settings(site.federation, node).encode())


def node_settings(federation: Federation, node: Node) -> str:
    """Return a new node's own settings, for its host to complete; what is commented out is not set."""
    given = {"name": node.name, "federation": federation.name, "partition": node.partition, "state": "state"}
    return _NODE + "".join(f"{toml_line(key, value)}\n" for key, value in given.items()) + _NODE_CHOICES


_NODE = """\
# What this node decides for itself: no coordinator sees or changes it. Relative paths are below this file's folder.
"""
_NODE_CHOICES = """\
# partitions = 3           # refuse a job of another number of clients
# data = "data.csv"        # this node's data; wins over the job's data.path
# own = true               # all rows of `data` are this node's own, with no `partition` above
# model = "model"          # directory of the base model; wins over the job's model
# device = "auto"          # auto, cpu, cuda or cuda:1
# metrics_port = 9464      # Prometheus endpoint
# log = "node.log"         # JSON lines

[policy]
# require_privacy = true   # refuse a job without differential privacy
# max_epsilon = 8.0        # refuse a job of a larger epsilon, and any charge beyond it
# max_delta = 1e-3         # refuse a private job of a larger delta
# job_paths = true         # let a job name files of this machine
"""


def to_toml(federation: Federation) -> str:
    """Return federation.toml."""
    lines = [
        "# A Lethe federation; holds no secrets. Restart superlink and nodes after a change.",
        toml_line("name", federation.name),
        toml_line("hosts", list(federation.hosts), note="the SuperLink's host; nodes dial the first"),
        toml_line("port", federation.port, note="SuperLink: control, fleet and runtime paths"),
    ]
    if federation.proxy_port:
        lines.append(toml_line("proxy_port", federation.proxy_port, note="what nodes dial: fleet paths only"))
    for node in federation.nodes:
        lines += ["", "[[nodes]]", *(toml_line(key, value) for key, value in node.model_dump().items())]
    return "\n".join(lines) + "\n"


def toml_line(key: str, value: object, *, note: str = "") -> str:
    """Return `key = value` in TOML; text, whole numbers and lists of text are written as in JSON."""
    line = f"{key} = {json.dumps(value, ensure_ascii=False)}"
    return f"{line}  # {note}" if note else line


def replace(path: Path, text: str) -> None:
    """Write a file aside, readable to its owner only, and rename it. Raises ConfigError where that fails."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        make_folder(path.parent)
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        aside.rename(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); name a writable place") from None
    finally:
        aside.unlink(missing_ok=True)


def address(host: str, port: int) -> str:
    """Return host:port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_host(host: str) -> bool:
    """Whether this is a host name or an address, without a port."""
    try:
        ip_address(host)
    except ValueError:
        return _HOST.fullmatch(host) is not None and not re.fullmatch(r"[\d.]+", host)
    return True


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _checked(values: Mapping[str, Any], *, source: Path) -> Federation:
    try:
        return Federation.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_faults(error.errors())}") from None


def _faults(errors: Sequence[Any]) -> str:
    return "; ".join(f"{'.'.join(str(part) for part in each['loc']) or 'nodes'}: {_fault(each)}" for each in errors)


def _fault(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        known = {*Federation.model_fields, *(Node.model_fields if len(error["loc"]) > 1 else ())}
        return f"there is no such key{nearest(str(error['loc'][-1]), known)}"
    if error["type"] == "string_pattern_mismatch":
        return f"{error['input']!r} is no name; use up to 40 lower-case letters, digits and hyphens, such as node-1"
    return str(error["msg"]).removeprefix("Value error, ")
