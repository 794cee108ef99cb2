"""The `lethe` command. Heavy libraries are imported only by the commands that need them."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lethe.adapters import app as adapters_app
from lethe.deploy import app as deploy_app
from lethe.forget import app as forget_app
from lora.errors import ConfigError, LetheError, RunError

if TYPE_CHECKING:
    from lethe.config import RunFile
    from lethe.progress import Progress
    from server.service.warm import Warm

USER_ERROR = 2
INTERRUPTED = 130

app = typer.Typer(
    name="lethe",
    help="Federated, private, personal fine-tuning that can also forget.",
    no_args_is_help=True,
    add_completion=False,
    suggest_commands=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(no_args_is_help=True, suggest_commands=False, help="Show or check a run file.")
privacy_app = typer.Typer(no_args_is_help=True, suggest_commands=False, help="Show what privacy was spent.")
app.add_typer(config_app, name="config")
app.add_typer(privacy_app, name="privacy")
app.add_typer(deploy_app, name="deploy")
app.add_typer(forget_app, name="forget")
app.add_typer(adapters_app, name="adapters")

Recipe = Annotated[str, typer.Argument(help="A run file, or the name of a shipped recipe (`lethe recipes`).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides such as training.rate=0.2 name=first.")
]
Run = Annotated[str, typer.Argument(help="A run's name below runs/, or its directory.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the run's directory only.")]


def _version(asked: bool) -> None:
    if asked:
        try:
            typer.echo(f"lethe {version('lethe')}")
        except PackageNotFoundError:
            typer.echo("lethe (source tree, not installed)")
        raise typer.Exit


@app.callback()
def _options(
    asked: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Federated, private, personal fine-tuning that can also forget."""


@app.command()
def simulate(recipe: Recipe, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Run a whole federation on this machine; results go to runs/NAME."""
    from lethe.config import load_run_file

    run = load_run_file(recipe, overrides or [])
    with _progress(run, quiet=quiet) as progress:
        from lethe.run import simulate as start

        start(run, recipe=Path(recipe).stem, progress=progress)


@app.command()
def personalize(recipe: Recipe, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Mix an adapter for every user of a recommender, and compare; results go to runs/NAME."""
    from lethe.config import load_personal_run
    from lethe.progress import Progress

    run = load_personal_run(recipe, overrides or [])
    with Progress(rounds=0, unit="part", quiet=quiet) as progress:
        from lethe.personal_run import personalize as start

        try:
            start(run, recipe=Path(recipe).stem, progress=progress)
        except (LetheError, KeyboardInterrupt):
            if progress.directory is not None:
                kept = _run_name(progress.directory)
                found = f"what it found is in {progress.directory} (`lethe report {kept}` shows it)"
                _complain(f"the run stopped; {found}, and a new run needs another name", style="yellow")
            raise


@app.command()
def serve(  # noqa: PLR0917 - typer reads options by name
    run: Annotated[
        str | None,
        typer.Option("--run", help="A finished run (runs/NAME, or its name), personal or a classifier's; else a demo."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=1, max=65535)] = 8420,
    grpc_port: Annotated[
        int | None, typer.Option(help="Serve the same calls over gRPC at this port.", min=1, max=65535)
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Users, adapters, registry; else `service` in the run.")] = None,
    registry: Annotated[
        str | None, typer.Option(envvar="LETHE_REGISTRY", help="A database's URL; else SQLite in the data directory.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Federation runs that the console shows.")] = Path("runs"),
    warm: Annotated[int, typer.Option(min=1, help="Adapters that are kept in memory.")] = 4096,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Keep them in half the bytes.")] = False,
    pin: Annotated[list[str] | None, typer.Option(help="An adapter that stays in memory; may be repeated.")] = None,
    rate: Annotated[float, typer.Option(help="Requests a second that one key may ask in the long run.")] = 50.0,
    burst: Annotated[int, typer.Option(help="Requests that one key may ask at once.")] = 200,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are told to come back.")] = 1024,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Serve by so many replicas of a Ray Serve deployment.")
    ] = None,
    most_replicas: Annotated[
        int | None, typer.Option(min=1, help="Start more replicas under load, up to so many (classifiers only).")
    ] = None,
    ray: Annotated[str | None, typer.Option(help="A Ray cluster's address; else one of this machine.")] = None,
) -> None:
    """Serve every user's own adapter over HTTP, with a web console; with no arguments, a built-in demo."""
    from lethe.record import find_run
    from lethe.serve import Place

    if replicas is None and (ray is not None or most_replicas is not None):
        raise ConfigError("--ray, --most-replicas: say how many replicas there are by --replicas, or leave these out")
    kept = _warm(warm, bfloat16=bfloat16, pinned=pin or [])
    if rate <= 0 or burst < 1:
        raise ConfigError(f"--rate {rate:g}, --burst {burst}: give a rate above 0 and a burst of at least 1")
    place = Place(host, port, data, registry, runs, grpc_port, kept, rate, burst, waiting)
    found = None if run is None else find_run(run)
    if replicas is not None:
        from lethe.replicas import Replicas, serve_replicas

        serve_replicas(found, place, Replicas(replicas, most_replicas, ray=ray), say=typer.echo)
        return
    from lethe.serve import serve as start

    start(found, place, say=typer.echo)


def _warm(rows: int, *, bfloat16: bool, pinned: Sequence[str]) -> "Warm":
    import torch

    from server.service.warm import Warm

    return Warm(rows, torch.bfloat16 if bfloat16 else torch.float32, tuple(pinned))


@app.command()
def resume(run: Run, quiet: Quiet = False) -> None:
    """Go on with a run that was interrupted, from its last checkpoint."""
    from lethe.config import load_run_file, read_kind
    from lethe.record import find_run

    directory = find_run(run)
    if read_kind(directory / "config.yaml") == "personal":
        raise RunError(f"{directory} is a personal run, which cannot be resumed; start it again under another name: "
                       f"lethe personalize {directory}/config.yaml name=…")  # fmt: skip
    with _progress(load_run_file(directory / "config.yaml"), quiet=quiet) as progress:
        from lethe.run import resume as go_on

        go_on(directory, progress=progress)


@contextmanager
def _progress(run: "RunFile", *, quiet: bool) -> "Iterator[Progress]":
    """Follow a run; when it breaks off, say how to go on."""
    from lethe.progress import Progress

    with Progress(rounds=run.federation.rounds, quiet=quiet) as progress:
        try:
            yield progress
        except (LetheError, KeyboardInterrupt):
            if progress.directory is not None:
                _complain(f"the run stopped; `lethe resume {_run_name(progress.directory)}` goes on", style="yellow")
            raise


def _run_name(directory: Path) -> str:
    return directory.name if directory.parent == Path("runs") else str(directory)


@app.command()
def report(run: Run) -> None:
    """Write a run's report.html anew from its files, finished or not."""
    from lethe.record import find_run
    from lethe.report import write_report

    typer.echo(write_report(find_run(run)))


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from lethe.config import recipes as shipped

    table = _table("recipe", "what it does", "file")
    for name, path in shipped().items():
        table.add_row(name, _purpose(path), str(path))
    _print(table)


def _purpose(path: Path) -> str:
    """Return the first sentence of a recipe's header comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header = [line.lstrip("# ") for line in lines[: next((i for i, x in enumerate(lines) if not x.startswith("#")), 0)]]
    return " ".join(header).split(". ")[0].rstrip(".")


@config_app.command("show")
def config_show(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print the run file with overrides applied, all defaults filled in, and every key explained."""
    from lethe.config import load_any, to_yaml

    typer.echo(to_yaml(load_any(recipe, overrides or [])), nl=False)


@config_app.command("validate")
def config_validate(recipe: Recipe, overrides: Overrides = None) -> None:
    """Check a run file and overrides; every fault is named at once."""
    from lethe.config import find_recipe, load_any, result_digest

    run = load_any(recipe, overrides or [])
    typer.echo(f"{find_recipe(recipe)} is valid (digest {result_digest(run)[:12]})")


@config_app.command("schema")
def config_schema(
    kind: Annotated[str, typer.Argument(help="Which run files: federation or personal.")] = "federation",
) -> None:
    """Print the JSON schema of run files, for editors that complete and check YAML."""
    from lethe.config import schema

    typer.echo(json.dumps(schema(kind), indent=2))


@config_app.command("memory")
def config_memory(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print what training a run's model takes in memory and on the wire, from its shapes: no weights are read."""
    from lethe.config import load_run_file
    from lethe.memory import memory_lines

    run = load_run_file(recipe, overrides or [])
    table = _table("what", "bytes", "of")
    for what, size, of in memory_lines(run):
        table.add_row(what, size, of)
    _print(table)


@privacy_app.command("show")
def privacy_show(
    ledger: Annotated[
        str | None, typer.Argument(metavar="[PATH|RUN]", help="A ledger, or a run; else the latest.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Delta of the epsilons shown; else the run's own.")] = None,
) -> None:
    """Print what every client has spent, with all that an epsilon rests on."""
    from lethe.spending import find_ledger, spent

    path = find_ledger(ledger)
    figures = spent(path, delta=delta)
    table = _table("client", "charged", "epsilon", "delta", "unit", "adjacency", "sampling", "simulated")
    for each in figures:
        simulated = "yes" if each.simulated else "no"
        row = (each.client, each.charged, f"{each.epsilon:.4g}", f"{each.delta:g}", each.unit, each.adjacency)
        table.add_row(*row, each.sampling, simulated)
    _print(table)
    typer.echo(f"ledger {path}")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print(table: Table) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 200
    console.print(table)


def _complain(message: str, *, style: str = "bold red") -> None:
    Console(stderr=True, highlight=False).print(Text(message, style=style), soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for what a user can mend, 130 when interrupted."""
    try:
        code = typer.main.get_command(app).main(
            args=list(sys.argv[1:] if arguments is None else arguments), prog_name="lethe", standalone_mode=False
        )
    except LetheError as error:
        _complain(f"error: {error}")
        return USER_ERROR
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return USER_ERROR
    except click.ClickException as error:
        _complain(f"error: {error.format_message()}")
        return USER_ERROR
    except (KeyboardInterrupt, click.Abort):
        _complain("interrupted", style="yellow")
        return INTERRUPTED
    if code == INTERRUPTED:  # typer has caught the interrupt
        _complain("interrupted", style="yellow")
    return code if isinstance(code, int) else 0
