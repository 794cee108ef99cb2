"""Making and changing a site: keys, certificates and secrets of a federation, its nodes, and their replacement."""

import time
from pathlib import Path

from lethe import credentials
from lethe.credentials import make_folder, write_new
from lethe.processes import host_proxy_settings
from lethe.site import Node, Site, replace, write_node
from lora.errors import ConfigError

SERVER_FILES = ("server.crt", "server.key", "superexec.secret")
_SOON = 30  # days


def found(site: Site) -> None:
    """Make a site's files, federation.toml last: what has it is whole. Raises ConfigError for a file that is there."""
    signer = credentials.authority(site.federation.name)
    write_new(site.ca_key, signer.private)
    write_new(site.ca, signer.public, private=False)
    _write_server(site)
    write_new(site.superlink / "database.secret", credentials.secret())
    for node in site.federation.nodes:
        write_node(site, node, keys=credentials.node_key(), secret=credentials.secret())
    write_proxy(site)
    site.write_connection()
    site.save()


def write_proxy(site: Site) -> None:
    """Write the proxy's configuration for the SuperLink's own host, and the folder of its temporary files."""
    make_folder(site.superlink / "state" / "proxy")
    replace(site.superlink / "proxy.conf", host_proxy_settings(site))


def add(site: Site, name: str) -> Site:
    """Add a node under the first free partition and port; returns the site as it is then."""
    nodes = site.federation.nodes
    partition = next(number for number in range(len(nodes) + 1) if number not in {node.partition for node in nodes})
    node = Node.model_construct(name=name, partition=partition, port=max((n.port for n in nodes), default=9093) + 1)
    grown = site.with_federation(nodes=[*(each.model_dump() for each in nodes), node.model_dump()])
    write_node(grown, grown.node(name), keys=credentials.node_key(), secret=credentials.secret())
    grown.save()
    return grown


def remove(site: Site, name: str) -> Path:
    """Take a node out of federation.toml and put its folder aside; returns where it is kept."""
    left = [node.model_dump() for node in site.federation.nodes if node.name != name]
    site.with_federation(nodes=left).save()
    return _aside(site.node_folder(name), what="removed")


def rotate_node(site: Site, name: str) -> Path:
    """Give a node a new key and a new executor secret; returns where the old are kept."""
    folder = site.node_folder(name)
    kept = _keep(folder, ("auth", "auth.pub", "executor.secret"))
    keys = credentials.node_key()
    write_new(folder / "auth", keys.private)
    write_new(folder / "auth.pub", keys.public, private=False)
    write_new(folder / "executor.secret", credentials.secret())
    return kept


def rotate_superlink(site: Site) -> Path:
    """Give the SuperLink a new certificate of the same authority and a new secret; returns where the old are kept."""
    kept = _keep(site.superlink, SERVER_FILES)
    _write_server(site)
    return kept


def check_secrets(site: Site, folder: Path) -> None:
    """Refuse to start with secrets that others can read, are missing, or with a certificate that does not fit.

    Raises ConfigError.
    """
    secrets = {
        site.superlink: [site.superlink / name for name in SERVER_FILES],
    }.get(folder, [folder / "auth", folder / "executor.secret", folder / "node.toml"])
    if missing := [path for path in [site.ca, *secrets] if not path.is_file()]:
        raise ConfigError(f"{missing[0]} is missing; copy it from where `lethe deploy init` was run")
    if open_ones := credentials.exposed(path for path in secrets if path.suffix != ".crt"):
        raise ConfigError(f"{open_ones[0]} can be read by others; chmod 600 {open_ones[0]}")
    if folder == site.superlink:
        _check_certificate(site)


def handing_out(site: Site, *, only: str | None = None) -> list[str]:
    """Say what goes where, and what to start there."""
    federation, root = site.federation, _shown(site.root)
    option = "" if root == "federation" else f" --site {root}"
    lines = (
        []
        if only
        else [
            f"{root}: federation '{federation.name}', {len(federation.nodes)} nodes, which dial {federation.dialled}",
            f"  SuperLink: keep this directory there, back up {root}/ca/ca.key, and start",
            f"    lethe deploy superlink{option}",
        ]
    )
    for node in federation.nodes:
        if only in (None, node.name):
            lines += [
                f"  {node.name}: its host gets federation.toml, ca/ca.crt and nodes/{node.name}, and nothing else:",
                f"    tar -C {root} -cf {node.name}.tar federation.toml ca/ca.crt nodes/{node.name}",
                f"    lethe deploy node {node.name}{option}",
            ]
    return lines


def _write_server(site: Site) -> None:
    server = credentials.server_certificate(site.authority(), site.federation.certified)
    write_new(site.superlink / "server.key", server.private)
    write_new(site.superlink / "server.crt", server.public, private=False)
    write_new(site.superlink / "superexec.secret", credentials.secret())


def _check_certificate(site: Site) -> None:
    certificate = (site.superlink / "server.crt").read_bytes()
    if missing := {*site.federation.certified} - credentials.hosts_of(certificate):
        raise ConfigError(
            f"superlink/server.crt is not for {', '.join(sorted(missing))}; `lethe deploy rotate superlink` makes one"
        )
    if (days := credentials.days_left(certificate)) < _SOON:
        raise ConfigError(
            f"superlink/server.crt expires in {days} days; `lethe deploy rotate superlink` makes a new one"
        )


def _keep(folder: Path, names: tuple[str, ...]) -> Path:
    """Move files into a folder of their own beside them."""
    kept = folder / f"before-{_now()}"
    make_folder(kept)
    for name in names:
        if (folder / name).exists():
            (folder / name).rename(kept / name)
    return kept


def _aside(folder: Path, *, what: str) -> Path:
    kept = folder.with_name(f".{folder.name}.{what}-{_now()}")
    if folder.exists():
        folder.rename(kept)
    return kept


def _now() -> str:
    return time.strftime("%Y%m%d-%H%M%S")


def _shown(root: Path) -> str:
    try:
        return str(root.relative_to(Path.cwd()))
    except ValueError:
        return str(root)
