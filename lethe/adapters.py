"""`lethe adapters`: the adapters of a running service, in and out as PEFT directories."""

import io
import os
import shutil
import zipfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lora.errors import DataError, ModelError

app = typer.Typer(no_args_is_help=True, suggest_commands=False, help="List, import and export a service's adapters.")

Url = Annotated[str, typer.Option(envvar="LETHE_URL", help="The service's address.")]
Key = Annotated[str, typer.Option(envvar="LETHE_KEY", help="An API key; better in the environment than here.")]
Name = Annotated[str, typer.Argument(help="The adapter's name, or a user's.")]
Model = Annotated[str | None, typer.Option(help="Of which model, where the service has several.")]
Directory = Annotated[Path, typer.Argument(help="A PEFT directory.")]
_URL = "http://127.0.0.1:8420"


class Engine(StrEnum):
    """Whom an export is for."""

    PEFT = "peft"
    VLLM = "vllm"


@app.command("list")
def list_(key: Key, url: Url = _URL) -> None:
    """List the adapters that the key may use."""
    from lethe.remote import Client

    with Client(url, key) as client:
        for each in client.adapters():
            owner = each.owner or "-"
            typer.echo(
                f"{each.name}  version {each.version}  owner {owner}  rank {each.rank}  {each.state}  {each.base}"
            )


@app.command("import")
def import_(  # noqa: PLR0917 - typer reads options by name
    name: Name,
    directory: Directory,
    key: Key,
    url: Url = _URL,
    owner: Annotated[str | None, typer.Option(help="Whose it is; else everybody's.")] = None,
    model: Model = None,
) -> None:
    """Import a PEFT directory under a name; an adapter of that name and owner is replaced (operators only)."""
    from lethe.remote import Client

    with Client(url, key) as client:
        found = client.bring(name, directory, owner=owner, model=model)
    typer.echo(f"{found.name} is at version {found.version}")


@app.command("export")
def export(  # noqa: PLR0917 - typer reads options by name
    name: Name,
    directory: Directory,
    key: Key,
    url: Url = _URL,
    for_: Annotated[Engine, typer.Option("--for", help="Check that this engine serves all of it.")] = Engine.PEFT,
    model: Model = None,
) -> None:
    """Export an adapter as a PEFT directory, which must not be there; nothing is written that vLLM would drop."""
    from lethe.remote import Client

    if directory.exists():
        raise DataError(f"{directory} is there already; choose another directory, or remove it")
    with Client(url, key) as client:
        typer.echo(unpacked(client.take(name, model=model), directory, name=name, engine=for_))


def unpacked(archive: bytes, directory: Path, *, name: str, engine: Engine = Engine.PEFT) -> str:
    """Write an archive as a directory, aside and renamed, once the engine takes it; returns what to do next.

    Raises ModelError for what the engine would refuse or drop; nothing is there then.
    """
    from lora.vllm import check_for_vllm

    aside = directory.with_name(f".{directory.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as inside:
            inside.extractall(aside)
        told = str(directory)
        if engine is Engine.VLLM:
            told = check_for_vllm(aside).command(name, directory)
        aside.rename(directory)
    except ModelError as error:
        raise ModelError(str(error).replace(str(aside), name)) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return told
