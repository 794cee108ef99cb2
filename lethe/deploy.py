"""`lethe deploy`: a federation between hosts, by Flower's own commands; every one that is started is printed."""

import os
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from lora.errors import ConfigError, DeploymentError

if TYPE_CHECKING:
    from lethe.operator import Operator
    from lethe.site import Site
    from lethe.supervisor import Child

app = typer.Typer(no_args_is_help=True, suggest_commands=False, help="Run a federation between hosts.")

Place = Annotated[
    Path, typer.Option("--site", envvar="LETHE_SITE", help="The site directory that `lethe deploy init` made.")
]
Control = Annotated[
    str | None,
    typer.Option(
        "--superlink", envvar="LETHE_CONTROL", help="HOST:PORT of the control interface; else the one of the site."
    ),
]
NodeName = Annotated[str, typer.Argument(metavar="NODE", help="A node's name in federation.toml.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name or number.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides such as federation.rounds=3.")
]
SITE = Path("federation")


@app.command()
def init(  # noqa: PLR0917 - typer reads options from parameters
    site: Place = SITE,
    name: Annotated[str, typer.Option(help="Name of the federation; it is part of every ledger entry.")] = "federation",
    host: Annotated[
        list[str] | None, typer.Option(help="Name or address of the SuperLink's host; nodes dial the first. Repeat it.")
    ] = None,
    nodes: Annotated[str, typer.Option(help="How many nodes, or their names: a,b,c.")] = "3",
    port: Annotated[int, typer.Option(help="The SuperLink's port.")] = 8000,
    proxy: Annotated[
        bool | None, typer.Option("--proxy/--no-proxy", help="Nodes come in by nginx; default unless all is loopback.")
    ] = None,
    proxy_port: Annotated[int, typer.Option(help="The proxy's port.")] = 8443,
    node_port: Annotated[int, typer.Option(help="Port of the first node's SuperNode; the others count on.")] = 9094,
) -> None:
    """Make a site: certificate authority, certificates, node keys, secrets, settings. Overwrites nothing."""
    from lethe.founding import found, handing_out
    from lethe.site import LOOPBACK, Federation, new_site

    hosts = tuple(host or LOOPBACK)
    outside = not Federation.model_construct(hosts=hosts).local
    values = {
        "name": name,
        "hosts": hosts,
        "port": port,
        "proxy_port": proxy_port if (outside if proxy is None else proxy) else None,
        "nodes": [
            {"name": each, "partition": number, "port": node_port + number} for number, each in enumerate(_names(nodes))
        ],
    }
    made = new_site(site, values)
    found(made)
    for line in handing_out(made):
        typer.echo(line)


@app.command()
def superlink(
    site: Place = SITE,
    runs: Annotated[Path, typer.Option(envvar="LETHE_RUNS", help="Where run directories go.")] = Path("runs"),
    proxy: Annotated[
        bool | None, typer.Option("--proxy/--no-proxy", help="Start nginx too; default: if the site has a proxy port.")
    ] = None,
) -> None:
    """Keep the SuperLink, its executor and its proxy running until Ctrl-C; registers all nodes of the site."""
    from lethe import processes
    from lethe.founding import check_secrets, write_proxy
    from lethe.operator import Operator, healthy
    from lethe.site import open_site
    from lethe.supervisor import Child, only_one, supervise

    opened = open_site(site)
    with_proxy = opened.federation.proxy_port is not None if proxy is None else proxy
    if with_proxy and opened.federation.proxy_port is None:
        raise ConfigError(f"--proxy: {site}/federation.toml names no proxy_port; add one, such as proxy_port = 8443")
    check_secrets(opened, opened.superlink)
    places = processes.superlink_places(opened, runs=runs)
    runs.mkdir(parents=True, exist_ok=True)

    def ready() -> bool:
        if not healthy(opened.federation.control, opened.ca):
            return False
        try:
            _register(Operator(opened))
        except DeploymentError as error:
            _say(str(error))
            return False
        _say(f"the SuperLink is up; nodes dial {opened.federation.dialled}")
        return True

    children = [Child(processes.superlink(places), ready), Child(processes.superexec(places))]
    if with_proxy:
        write_proxy(opened)
        children.append(Child(processes.proxy(places)))
    with only_one(opened.superlink / "state", what=f"the SuperLink of {site}"):
        supervise(children, say=_say)


@app.command()
def node(
    names: Annotated[list[str], typer.Argument(metavar="NODE...", help="Names of nodes in federation.toml.")],
    site: Place = SITE,
) -> None:
    """Keep the SuperNode and the resident executor of one or more nodes running until Ctrl-C."""
    from lethe.founding import check_secrets
    from lethe.site import open_site
    from lethe.supervisor import only_one, supervise

    opened = open_site(site)
    children = []
    with ExitStack() as stack:
        for name in dict.fromkeys(names):
            opened.node(name)
            folder = opened.node_folder(name)
            check_secrets(opened, folder)
            stack.enter_context(only_one(folder / "state", what=f"node {name}"))
            children += _children(opened, name)
        supervise(children, say=_say)


def _children(site: "Site", name: str) -> "list[Child]":
    """Return a node's processes."""
    from lethe import processes
    from lethe.supervisor import Child

    chosen = site.node(name)
    places = processes.node_places(site, chosen)
    partitions = len(site.federation.nodes)
    started = [
        processes.executor(places),
        processes.supernode(places, partition=chosen.partition, partitions=partitions),
    ]
    return [Child(replace(command, name=f"{name} {command.name}")) for command in started]


@app.command()
def register(site: Place = SITE, superlink: Control = None) -> None:
    """Make the public keys of all nodes of the site known to the SuperLink; `superlink` does so by itself."""
    from lethe.operator import Operator
    from lethe.site import open_site

    _register(Operator(open_site(site), superlink=superlink))


@app.command()
def submit(  # noqa: PLR0917 - typer reads options from parameters
    recipe: Annotated[str, typer.Argument(help="A run file, or the name of a shipped recipe.")],
    overrides: Overrides = None,
    site: Place = SITE,
    superlink: Control = None,
    retries: Annotated[int, typer.Option(min=0, help="How often to submit again when the server side died.")] = 3,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the run's end.")] = False,
) -> None:
    """Run a run file on the federation and follow it; exits with 2 when the run failed."""
    from lethe.config import load_run_file
    from lethe.operator import Operator
    from lethe.site import open_site
    from lethe.submission import Submission

    run = load_run_file(recipe, overrides or [])
    opened = open_site(site)
    operator = Operator(opened, superlink=superlink)
    sent = Submission(opened, run, Path(recipe).stem, operator, _say).send(retries=retries, follow=not detach)
    _outcome(sent)


@app.command()
def forget(  # noqa: PLR0917 - typer reads options from parameters
    run: Annotated[str, typer.Argument(metavar="RUN", help="The finished run whose model is to forget.")],
    site: Place = SITE,
    superlink: Control = None,
    node: Annotated[str | None, typer.Option(help="Take what this node offers; else all that are online.")] = None,
    wait: Annotated[float, typer.Option(min=1, help="Seconds to wait for nodes.")] = 60.0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a node may take for an answer.")] = 1800.0,
    retries: Annotated[int, typer.Option(min=0, help="How often to submit again when the server side died.")] = 3,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the end.")] = False,
) -> None:
    """Let a run's model forget what nodes offer (`lethe forget offer`); exits with 2 when an offer was not served."""
    from lethe.operator import Operator
    from lethe.site import open_site
    from lethe.submission import send_forgetting

    opened = open_site(site)
    if node is not None:
        opened.node(node)
    operator = Operator(opened, superlink=superlink)
    asked = {"run": run, "client": node, "wait": wait, "timeout": timeout}
    send_forgetting(opened, operator, _say, asked, retries=retries, follow=not detach)
    typer.echo(f"the server keeps requests and records in {run}/forgetting; `lethe forget list --in {run}` there")


@app.command()
def status(site: Place = SITE, superlink: Control = None) -> None:
    """Show the nodes and the runs of the federation."""
    from lethe.operator import Operator
    from lethe.site import open_site
    from lethe.submission import Journal

    opened = open_site(site)
    operator = Operator(opened, superlink=superlink)
    names = operator.names()
    typer.echo(f"federation {opened.federation.name}, nodes dial {opened.federation.dialled}")
    for each in operator.nodes():
        if each["status"] != "unregistered":
            identity = str(each["node-id"])
            typer.echo(f"node {names.get(identity, identity):<20} {each['status']}")
    known = {entry.identity: entry.name for entry in Journal(opened).entries()}
    for run in operator.runs():
        traffic = f"{run.bytes_in:,} bytes from nodes, {run.bytes_out:,} to them"
        typer.echo(f"run  {known.get(run.identity, run.identity):<20} {run.status}  {run.elapsed:.0f} s  {traffic}")
        if run.details:
            typer.echo(f"     {run.details}")


@app.command()
def stop(run: RunName, site: Place = SITE, superlink: Control = None) -> None:
    """Stop a run; its checkpoints stay, and submitting it again under its name goes on from them."""
    from lethe.operator import Operator
    from lethe.site import open_site
    from lethe.submission import Journal

    opened = open_site(site)
    entry = Journal(opened).find(run)
    Operator(opened, superlink=superlink).stop(entry.identity)
    _say(f"run {entry.name} is stopped")


@app.command()
def logs(run: RunName, site: Place = SITE, superlink: Control = None) -> None:
    """Show what a run's server side has written, and follow it to its end."""
    from lethe.operator import Operator
    from lethe.site import open_site
    from lethe.submission import Journal, log_lines

    opened = open_site(site)
    Operator(opened, superlink=superlink)  # Leaves the connection where Flower looks for it.
    for line in log_lines(opened, Journal(opened).find(run).identity):
        typer.echo(line)


@app.command("add-node")
def add_node(name: NodeName, site: Place = SITE, superlink: Control = None) -> None:
    """Make keys and a folder for another node, and register it if the SuperLink is up."""
    from lethe.founding import add, handing_out
    from lethe.operator import Operator
    from lethe.site import open_site

    grown = add(open_site(site), name)
    try:
        _register(Operator(grown, superlink=superlink))
    except DeploymentError as error:
        _say(f"{name} is not registered yet ({error}); `lethe deploy register` does it, and so does the next start")
    for line in handing_out(grown, only=name):
        typer.echo(line)


@app.command("remove-node")
def remove_node(name: NodeName, site: Place = SITE, superlink: Control = None) -> None:
    """Unregister a node, so that the SuperLink refuses it; its folder is kept aside."""
    from lethe.founding import remove
    from lethe.operator import Operator
    from lethe.site import open_site

    opened = open_site(site)
    opened.node(name)
    Operator(opened, superlink=superlink).unregister(name)
    _say(f"node {name} is removed; its folder is kept as {remove(opened, name)}")


@app.command()
def rotate(
    name: Annotated[str, typer.Argument(metavar="NODE|superlink", help="Whose keys and secrets to make anew.")],
    site: Place = SITE,
    superlink: Control = None,
) -> None:
    """Make a node's key and secret, or the SuperLink's certificate and secret, anew; the old are kept aside."""
    from lethe.founding import rotate_node, rotate_superlink
    from lethe.operator import Operator
    from lethe.site import open_site

    opened = open_site(site)
    if name == "superlink":
        kept = rotate_superlink(opened)
        _say(f"new certificate and secret; the old are kept as {kept}; restart `lethe deploy superlink`")
        return
    chosen = opened.node(name)
    operator = Operator(opened, superlink=superlink)
    operator.unregister(name)
    kept = rotate_node(opened, name)
    operator.register([chosen])
    _say(f"new key and secret for {name}; the old are kept as {kept}; hand its folder out and restart the node")


def _register(operator: "Operator") -> None:
    if names := operator.register(operator.site.federation.nodes):
        _say(f"registered {', '.join(names)}")


def _names(nodes: str) -> list[str]:
    """Read `--nodes`: a number or names."""
    if nodes.isdigit():
        return [f"node-{number}" for number in range(1, int(nodes) + 1)]
    return [name.strip() for name in nodes.split(",") if name.strip()]


def _outcome(name: str) -> None:
    """Say what came out, where the server writes to this very host."""
    from lethe.progress import outcome_lines
    from lethe.record import read_record

    directory = Path(os.environ.get("LETHE_RUNS", "runs")) / name
    typer.echo(f"run {directory}" if directory.is_dir() else f"run {name}")
    if (directory / "summary.json").is_file():
        for line in outcome_lines({"simulated": False, **read_record(directory).summary}):
            typer.echo(line)


def _say(line: str) -> None:
    console = Console(highlight=False, stderr=True)
    console.print(Text.assemble((time.strftime("%H:%M:%S "), "dim"), line), soft_wrap=True)
