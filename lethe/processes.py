"""The exact command line and environment of every process of a deployment.

Pure functions: `lethe deploy`, docker-compose.yml and the tests all take their commands from here.
"""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lethe.site import CONNECTION, CONTAINERS, Federation, Node, Site, address

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Flower tells nobody, asks nobody, and installs nothing."""

_POLL = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}


@dataclass(frozen=True)
class Command:
    """A process to start: its short name, its command line, and what it adds to the environment."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)

    def shown(self) -> str:
        """Return the command as one would type it, without the settings that are the same for all."""
        extra = [f"{key}={shlex.quote(value)}" for key, value in self.env.items() if key not in QUIET]
        return " ".join([*extra, shlex.join(self.argv)])

    def environment(self) -> dict[str, str]:
        """Return the whole environment; programs of this Python's installation are found first."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        return {**os.environ, "PATH": path, **self.env}


@dataclass(frozen=True)
class SuperLinkPlaces:
    """Where a SuperLink's host keeps things, and under which addresses its processes see each other."""

    ca: str
    certificate: str
    key: str
    secret: str
    database: str
    runs: str
    home: str
    proxy: str
    bind: str
    port: int
    seen_as: str
    """The SuperLink's address for its executor and its proxy."""


@dataclass(frozen=True)
class NodePlaces:
    """Where a node's host keeps things, and under which addresses its processes see each other."""

    ca: str
    key: str
    secret: str
    settings: str
    home: str
    superlink: str
    """The address that the node dials."""
    bind: str
    port: int
    seen_as: str
    """The SuperNode's address for its executor."""


def superlink_places(site: Site, *, runs: Path) -> SuperLinkPlaces:
    """Return the places of a SuperLink that runs on this host; `runs` is the folder of all run directories."""
    folder, federation = site.superlink, site.federation
    return SuperLinkPlaces(
        ca=str(site.ca),
        certificate=str(folder / "server.crt"),
        key=str(folder / "server.key"),
        secret=str(folder / "superexec.secret"),
        database=str(folder / "state" / "superlink.db"),
        runs=str(runs.absolute()),
        home=str(folder / "state" / "flower"),
        proxy=str(folder / "proxy.conf"),
        bind=federation.bind,
        port=federation.port,
        seen_as=federation.control,
    )


def node_places(site: Site, node: Node) -> NodePlaces:
    """Return the places of a node that runs on this host."""
    folder = site.node_folder(node.name)
    return NodePlaces(
        ca=str(site.ca),
        key=str(folder / "auth"),
        secret=str(folder / "executor.secret"),
        settings=str(folder / "node.toml"),
        home=str(folder / "state" / "flower"),
        superlink=site.federation.dialled,
        bind="127.0.0.1",
        port=node.port,
        seen_as=address("127.0.0.1", node.port),
    )


SUPERLINK_CONTAINERS = SuperLinkPlaces(
    ca="/site/ca/ca.crt",
    certificate="/site/superlink/server.crt",
    key="/run/secrets/server.key",
    secret="/run/secrets/superexec.secret",
    database="/site/superlink/state/superlink.db",
    runs="/runs",
    home="/tmp/flower",
    proxy="/site/superlink/proxy.conf",
    bind="0.0.0.0",
    port=8000,
    seen_as="superlink:8000",
)
"""The places inside the compose file's containers, where the site is laid out as on a host."""


def node_containers(node: str) -> NodePlaces:
    """Return the places inside the two containers of one of the compose file's nodes."""
    return NodePlaces(
        ca="/site/ca/ca.crt",
        key="/run/secrets/auth",
        secret="/run/secrets/executor.secret",
        settings=f"/site/nodes/{node}/node.toml",
        home="/tmp/flower",
        superlink="proxy:8443",
        bind="0.0.0.0",
        port=9094,
        seen_as=f"{node}:9094",
    )


def container_proxy_settings() -> str:
    """Return nginx's configuration for the compose file's proxy."""
    return proxy_settings(SUPERLINK_CONTAINERS, listen="0.0.0.0:8443", folder="/tmp")


def superlink(places: SuperLinkPlaces) -> Command:
    """Return the SuperLink: TLS, node authentication, its executor a process of its own that knows the secret."""
    argv = (
        *("flower-superlink", "--host", places.bind, "--port", str(places.port), "--isolation", "process"),
        *("--ssl-ca-certfile", places.ca, "--ssl-certfile", places.certificate, "--ssl-keyfile", places.key),
        *("--enable-supernode-auth", "--superexec-auth-secret-file", places.secret),
        *("--database", places.database, "--disable-runtime-dependency-installation"),
    )
    return Command("superlink", argv, {**QUIET, "FLWR_HOME": places.home})


def superexec(places: SuperLinkPlaces) -> Command:
    """Return the process that starts a server app for every run that is submitted."""
    argv = (
        *("flower-superexec", "--root-certificates", places.ca, "--runtime-api-address", places.seen_as),
        *("--superexec-auth-secret-file", places.secret),
    )
    env = {**QUIET, **_POLL, "FLWR_HOME": places.home, "LETHE_RUNS": places.runs, "LETHE_LOG": "json"}
    return Command("superexec", argv, env)


def proxy(places: SuperLinkPlaces) -> Command:
    """Return nginx, in the foreground, with the configuration of `proxy_settings`."""
    return Command("proxy", ("nginx", "-e", "stderr", "-c", places.proxy))


def supernode(places: NodePlaces, *, partition: int, partitions: int) -> Command:
    """Return a SuperNode that dials the SuperLink under its own key and leaves the work to the executor.

    It is Flower's, with all its options, started by `client.supernode`, which has it look for messages more often.
    """
    argv = (
        *("python", "-m", "client.supernode", "--root-certificates", places.ca, "--superlink", places.superlink),
        *("--auth-supernode-private-key", places.key, "--isolation", "process"),
        *("--host", places.bind, "--port", str(places.port), "--superexec-auth-secret-file", places.secret),
        *("--node-config", f"partition-id={partition} num-partitions={partitions}"),
    )
    return Command("supernode", argv, {**QUIET, "FLWR_HOME": places.home})


def executor(places: NodePlaces) -> Command:
    """Return a node's resident executor, which holds data and model and runs only what is installed at the node."""
    argv = (
        *("python", "-m", "client.executor", "--runtime", places.seen_as),
        *("--secret", places.secret, "--config", places.settings),
    )
    return Command("executor", argv, {**QUIET, "FLWR_HOME": places.home})


def flwr(site: Site, *words: str) -> Command:
    """Return one of Flower's own commands, with the operator's connection."""
    return Command("flwr", ("flwr", *words), {**QUIET, "FLWR_HOME": str(site.home)})


def run(site: Site, *, bundle: Path, settings: Path) -> Command:
    """Return the submission of a run."""
    return flwr(site, "run", str(bundle), CONNECTION, "--run-config", str(settings), "--format", "json")


def proxy_settings(places: SuperLinkPlaces, *, listen: str, folder: str) -> str:
    """Return nginx's whole configuration: TLS, and no path but the fleet's; `folder` takes its temporary files.

    Bodies are passed on as they come, so that no client's update is ever written to the proxy's disk.
    """
    values = {
        "@LISTEN@": listen,
        "@FOLDER@": folder,
        "@CERTIFICATE@": places.certificate,
        "@KEY@": places.key,
        "@CA@": places.ca,
        "@SUPERLINK@": places.seen_as,
        "@NAME@": CONTAINERS[0],
    }
    text = _PROXY
    for mark, value in values.items():
        text = text.replace(mark, value)
    return text


def host_proxy_settings(site: Site) -> str:
    """Return nginx's configuration for a proxy on the SuperLink's own host."""
    federation: Federation = site.federation
    bind = "127.0.0.1" if federation.local else "0.0.0.0"
    listen = address(bind, federation.proxy_port or 8443)
    folder = str(site.superlink / "state" / "proxy")
    return proxy_settings(superlink_places(site, runs=Path("runs")), listen=listen, folder=folder)


# nginx compares a certificate with names only, not with addresses; every server certificate is for `superlink`.
# `$request_uri` is what the client sent, before nginx resolves dots and escapes: only a plain method name passes.
_PROXY = """\
# Made from the template in lethe/processes.py; changes are lost.
# Lets the outside reach the SuperLink's fleet paths, and nothing else.
daemon off;
worker_processes 2;
pid @FOLDER@/nginx.pid;
error_log stderr warn;

events {
    worker_connections 1024;
}

http {
    access_log off;
    server_tokens off;
    client_body_temp_path @FOLDER@/body;
    proxy_temp_path @FOLDER@/proxy;
    fastcgi_temp_path @FOLDER@/fastcgi;
    uwsgi_temp_path @FOLDER@/uwsgi;
    scgi_temp_path @FOLDER@/scgi;

    upstream superlink {
        server @SUPERLINK@;
        keepalive 32;
    }

    server {
        listen @LISTEN@ ssl;
        ssl_certificate "@CERTIFICATE@";
        ssl_certificate_key "@KEY@";
        ssl_protocols TLSv1.2 TLSv1.3;
        client_max_body_size 64m;

        location / {
            return 403;
        }

        location /v1/fleet/ {
            if ($request_uri !~ "^/v1/fleet/[a-z-]+$") {
                return 403;
            }
            limit_except POST {
                deny all;
            }
            proxy_pass https://superlink;
            proxy_ssl_verify on;
            proxy_ssl_trusted_certificate "@CA@";
            proxy_ssl_name @NAME@;
            proxy_ssl_server_name on;
            proxy_http_version 1.1;
            proxy_set_header Host $host;
            proxy_set_header Connection "";
            proxy_request_buffering off;
            proxy_buffering off;
            proxy_max_temp_file_size 0;
            proxy_connect_timeout 10s;
            proxy_read_timeout 300s;
            proxy_send_timeout 300s;
        }
    }
}
"""
