"""`lethe forget`: ask a served classifier, or users' files, to forget; follow requests, and check their records."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from lora.errors import ConfigError, RunError

if TYPE_CHECKING:
    from client.offers import Offer
    from server.forgetting.asking import Accepted, Wish
    from server.forgetting.files import RequestFile
    from server.forgetting.requests import ForgetRequests, Status
    from server.forgetting.store import Store
    from strategies.unlearning.config import ForgettingConfig

NODE_FILE = "node.toml"

app = typer.Typer(no_args_is_help=True, suggest_commands=False, help="Forget on request, durably and with a record.")

Place = Annotated[
    str,
    typer.Option("--in", envvar="LETHE_FORGET", help="A run's name or directory, one of users, or a forgetting store."),
]
Request = Annotated[
    str | None, typer.Argument(metavar="[ID]", help="A request's id, or the start of it; else the latest request.")
]
Rows = Annotated[Path | None, typer.Option("--examples", help="A file of rows with text and label (CSV, JSONL, …).")]
Classes = Annotated[str | None, typer.Option("--class", help="One or more classes: NAME,NAME.")]
ClientName = Annotated[str, typer.Option("--client", help="The client whose rows are to be forgotten.")]
Database = Annotated[
    str | None,
    typer.Option(
        envvar="LETHE_FORGET_DATABASE", help="PostgreSQL by URL to keep the steps in; else a file of the store."
    ),
]
NodeFolder = Annotated[
    Path, typer.Option("--node", envvar="LETHE_NODE", help=f"The node's folder, where its {NODE_FILE} is.")
]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings such as forgetting.rank=4.")
]


@app.command()
def init(  # noqa: PLR0917 - typer reads options from parameters
    directory: Annotated[Path, typer.Argument(help="The store to make.")],
    settings: Settings = None,
    run: Annotated[str | None, typer.Option(help="The finished run to make it of.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Or an exported adapter, with --model.")] = None,
    model: Annotated[str, typer.Option(help="The base model of --adapter: its name, or a local directory.")] = "minilm",
    max_length: Annotated[int, typer.Option(min=4, help="Longest input of --adapter, tokens.")] = 64,
    users: Annotated[Path | None, typer.Option(help="Directory of the users that --user is about.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="Rows that nothing was trained on.")] = None,
) -> None:
    """Make a forgetting store with settings of its own; `add --in RUN` makes one with the defaults by itself."""
    from server.forgetting.sources import store_of_run
    from server.forgetting.store import new_store

    config = _settings(settings or [])
    if (run is None) == (adapter is None) and not (users is not None and run is None):
        raise ConfigError("a store is made of --run RUN, of --adapter DIRECTORY, or of --users DIRECTORY; give one")
    if run is not None:
        from lethe.record import find_run

        store = store_of_run(find_run(run), directory=directory, config=config, users=users, evaluation=evaluation)
    else:
        parts = None if adapter is None else (_model(model), adapter, max_length)
        store = new_store(directory, classifier=parts, users=users, evaluation=evaluation, config=config)
    typer.echo(f"store {store.directory}: {_about(store)}")


@app.command()
def add(  # noqa: PLR0917 - typer reads options from parameters
    place: Place,
    user: Annotated[str | None, typer.Option(help="Delete a user: slot and history.")] = None,
    classes: Classes = None,
    examples: Rows = None,
    client: Annotated[str | None, typer.Option(help="Serve what a client trained by an order; with --answer.")] = None,
    answer: Annotated[Path | None, typer.Option(help="The file that `lethe forget answer` wrote.")] = None,
    method: Annotated[str, typer.Option(help="For --class: o3 (needs no other rows), gs-lora, gs-lora++.")] = "o3",
    database: Database = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Carry it out now, or only accept it.")] = True,
) -> None:
    """Accept a request to forget, once, and carry out whatever waits. The same request again gives the first one."""
    requests = _requests(place)
    wish = _wish(requests, user=user, classes=classes, examples=examples, client=(client, answer), method=method)
    accepted = requests.add(wish)
    _say_accepted(requests, accepted)
    if wait:
        _carry_out(requests, database)
        _end(requests, requests.status(accepted.request.id))


@app.command()
def work(place: Place, database: Database = None) -> None:
    """Carry out all requests that wait or were interrupted."""
    requests = _requests(place, make=False)
    waiting = requests.store.unfinished()
    _carry_out(requests, database)
    typer.echo(f"{len(waiting)} request{'s' * (len(waiting) != 1)} carried out")


@app.command()
def status(place: Place, request: Request = None) -> None:
    """Show where a request stands, step by step, and what its record measured."""
    requests = _requests(place, make=False)
    found = requests.status(_named(requests, request))
    typer.echo(f"request {found.request.id}: {_what(found.request)}")
    typer.echo(f"{found.state}{f': {found.why}' if found.why else ''}  (accepted {found.request.accepted})")
    for step, done in requests.steps(found.request):
        typer.echo(f"  {'x' if done else ' '} {step}")
    _show(requests, found)


@app.command("list")
def list_requests(place: Place) -> None:
    """List all requests of a store in the order of their acceptance."""
    requests = _requests(place, make=False)
    known = requests.store.requests()
    for each in known:
        typer.echo(f"{each.id}  {requests.status(each.id).state:<8} {each.accepted}  {_what(each)}")
    if not known:
        typer.echo(f"nothing was asked of {requests.store.directory} yet; ask by lethe forget add --in {place}")


@app.command()
def verify(
    place: Place,
    request: Request = None,
    examples: Rows = None,
    subject: Annotated[str | None, typer.Option(help="The user or client whom the record should be of.")] = None,
) -> None:
    """Check a record's signature and that it still holds, and measure again; exits with 2 when something does not."""
    from server.forgetting.sources import Sources

    requests = _requests(place, make=False)
    rows = None if examples is None else Sources(requests.store).read(examples)
    name = _named(requests, request)
    verdict = requests.verify(name, rows=rows, subject=subject)
    typer.echo(f"request {requests.store.request(name).id}: {_what(requests.store.request(name))}")
    for line in verdict.holds:
        typer.echo(f"holds   {line}")
    for line in verdict.broken:
        typer.echo(f"BROKEN  {line}")
    for line in _measured(verdict.measured):
        typer.echo(f"now     {line}")
    if not verdict.good:
        raise typer.Exit(2)


@app.command()
def ask(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="What to classify.")],
    place: Place,
) -> None:
    """Classify texts with what is served now; shows the weight of every request whose slot was mixed in."""
    from tasks.examples import Examples

    requests = _requests(place)
    served, labels = requests.stage.served, requests.store.classifier.labels
    asked = served.asked(Examples(tuple(texts)))
    names = [each.request for each in served.requests]
    for text, guess, weights in zip(texts, asked.guess.tolist(), asked.weights.tolist(), strict=True):
        gates = [f"{name} {weight:.2f}" for name, weight in zip(names, weights, strict=True)]
        typer.echo("\t".join([labels[guess], text, *gates]))


@app.command()
def order(
    client: ClientName,
    out: Annotated[Path, typer.Option(help="File to write the order to.")],
    place: Place,
) -> None:
    """Write the order by which a client forgets its own rows; an open one is given again."""
    from lora.files import write_bytes
    from server.forgetting.asking import new_order

    made = new_order(_requests(place).store, client)
    write_bytes(out, made.to_bytes())
    typer.echo(f"order {made.request} for {client}: {out}; at the client: lethe forget answer {out} --examples FILE")


@app.command()
def answer(  # noqa: PLR0917 - typer reads options from parameters
    order: Annotated[Path, typer.Argument(metavar="ORDER", help="The file that `lethe forget order` wrote.")],
    examples: Annotated[Path, typer.Option(help="The client's rows to forget, with text and label.")],
    out: Annotated[Path, typer.Option(help="File to write the answer to.")],
    classes: Classes = None,
    model: Annotated[str, typer.Option(help="The base model here: its name, or a local directory.")] = "minilm",
    ledger: Annotated[Path | None, typer.Option(help="The client's ledger, for noise.")] = None,
    client: Annotated[str, typer.Option(help="The client's name in the ledger.")] = "client",
    epsilon: Annotated[float | None, typer.Option(help="The ledger's budget; none: no limit.")] = None,
    delta: Annotated[float, typer.Option(help="Delta of the budget.")] = 1e-5,
    private: Annotated[
        float | None, typer.Option(metavar="EPSILON", help="Make the whole answer private, at this epsilon.")
    ] = None,
) -> None:
    """At the client: train slot and detector on its own rows, and write what may leave: tensors, no row."""
    from client.forgetting import Spending, answer_order
    from lora.files import write_bytes
    from privacy.ledger import Ledger
    from server.forgetting.sources import read_rows
    from strategies.unlearning.remote import ForgetOrder
    from tasks.models import load_base

    asked = ForgetOrder.from_bytes(_read(order))
    rows = read_rows(examples, asked.classifier.labels)
    spending = None if ledger is None else Spending(Ledger(ledger), client, epsilon, delta)
    base = load_base(_model(model).model_copy(update={"dtype": asked.dtype}), causal=False)
    made = answer_order(asked, base, rows, classes=_names(classes), spending=spending, private=private)
    write_bytes(out, made.to_bytes())
    typer.echo(f"answer to order {made.request} from {len(rows)} rows, none of them in it: {out}")
    if made.epsilon is not None:
        typer.echo(
            f"privacy  epsilon {made.epsilon:.4g} at delta {made.delta:g} per row, add/remove one; ledger {ledger}"
        )


@app.command()
def offer(  # noqa: PLR0917 - typer reads options from parameters
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of the federation's run whose model learned them.")],
    examples: Annotated[Path, typer.Option(help="The node's rows to forget, with text and label.")],
    node: NodeFolder = Path(),
    classes: Classes = None,
    private: Annotated[float | None, typer.Option(metavar="EPSILON", help="Answer privately, at this epsilon.")] = None,
    delta: Annotated[float | None, typer.Option(help="Delta of --private; default 1e-5.")] = None,
    answers: Annotated[int, typer.Option(help="How many private answers may be charged.")] = 1,
) -> None:
    """At a node: offer rows to be forgotten. `lethe deploy forget RUN` has the node answer, without any row."""
    from client.node import read_node
    from client.offers import Offers

    offers = Offers(read_node(node / NODE_FILE))
    made = offers.make(run, examples, classes=_names(classes), epsilon=private, delta=delta, answers=answers)
    typer.echo(f"offer {made.id}: {made.rows} rows{_terms(made)}; the operator's side: lethe deploy forget {run}")


@app.command("offers")
def list_offers(
    node: NodeFolder = Path(),
    withdraw: Annotated[str | None, typer.Option(metavar="ID", help="Delete this offer with its rows.")] = None,
) -> None:
    """At a node: list what is offered, what was answered, and what is done; or withdraw an offer."""
    from client.node import read_node
    from client.offers import Offers

    offers = Offers(read_node(node / NODE_FILE))
    if withdraw is not None:
        offers.withdraw(withdraw)
        return
    known = offers.all()
    for each in known:
        typer.echo(f"{each.id}  {offers.state(each):<8} {each.run}  {each.made}  {each.rows} rows{_terms(each)}")
        if each.problem is not None:
            typer.echo(f"              not answered: {each.problem}")
    if not known:
        typer.echo("nothing is offered here; lethe forget offer RUN --examples FILE does")


# --- Opening ---------------------------------------------------------------------------------------------------------


def _requests(place: str, *, make: bool = True) -> "ForgetRequests":
    """Open the requests of a place; with `make`, a run or a directory of users gets its store."""
    from lethe.record import RUNS, find_run
    from server.forgetting.requests import ForgetRequests
    from server.forgetting.sources import open_store

    named = next((each for each in (Path(place), RUNS / place) if each.is_dir()), None)
    return ForgetRequests(open_store(find_run(place) if named is None else named, make=make))


def _named(requests: "ForgetRequests", request: str | None) -> str:
    known = requests.store.requests()
    if request is None and not known:
        raise RunError(f"nothing was asked of {requests.store.directory} yet; ask by lethe forget add")
    return known[-1].id if request is None else request


def _model(name: str) -> Any:
    from tasks.config import ModelConfig

    return ModelConfig(path=name) if Path(name).is_dir() else ModelConfig(name=name)


def _settings(overrides: Sequence[str]) -> "ForgettingConfig":
    """Read `forgetting.KEY=VALUE`. Raises ConfigError that names every fault at once."""
    from lethe.config import read_section
    from strategies.unlearning.config import ForgettingConfig

    return read_section("forgetting", ForgettingConfig, overrides)


def _names(classes: str | None) -> tuple[str, ...]:
    return () if classes is None else tuple(name.strip() for name in classes.split(",") if name.strip())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); name the file that was sent") from error


def _wish(
    requests: "ForgetRequests",
    *,
    user: str | None,
    classes: str | None,
    examples: Path | None,
    client: tuple[str | None, Path | None],
    method: str,
) -> "Wish":
    """Check what is asked for: exactly one of a user, classes, examples and a client's answer."""
    from server.forgetting import asking
    from server.forgetting.sources import Sources

    store, (name, answer_file) = requests.store, client
    given = [user is not None, classes is not None or examples is not None, name is not None]
    if sum(given) != 1:
        raise ConfigError("a request is for --user NAME, --class NAME,NAME, --examples FILE or --client NAME; give one")
    if (name is None) != (answer_file is None):
        raise ConfigError("--client NAME and --answer FILE go together; `lethe forget order` begins such a request")
    if user is not None:
        return asking.wish_user(store, user, users=requests.stage.users)
    if name is not None and answer_file is not None:
        return asking.wish_client(store, name, _read(answer_file))
    rows = None if examples is None else Sources(store).read(examples)
    if classes is None and rows is not None:
        asking.check_method(method, whole_classes=False)
        return asking.wish_examples(store, rows)
    return asking.wish_classes(store, _names(classes), rows=rows, method=asking.check_method(method))


# --- Saying ----------------------------------------------------------------------------------------------------------


def _carry_out(requests: "ForgetRequests", database: str | None) -> None:
    def told(request: str, step: str) -> None:
        _note(f"{request}  {step}")

    requests.carry_out(database=database, told=told, say=_note)


def _say_accepted(requests: "ForgetRequests", accepted: "Accepted") -> None:
    request = accepted.request
    typer.echo(f"request {request.id}: {_what(request)}")
    if accepted.again:
        typer.echo("it had stopped, and is begun again")
    elif not accepted.new:
        typer.echo(f"the same was asked for on {request.accepted}; that request is {requests.status(request.id).state}")


def _end(requests: "ForgetRequests", found: "Status") -> None:
    if found.state == "stopped":
        raise RunError(f"request {found.request.id} stopped at {found.why}; when that is mended, ask for it again")
    _show(requests, found)


def _show(requests: "ForgetRequests", found: "Status") -> None:
    if found.record is None:
        return
    before, after = found.record["measured"]["before"] or {}, found.record["measured"]["after"] or {}
    for was, now in zip(_measured(before), _measured(after), strict=False):
        typer.echo(f"before  {was}\nafter   {now}")
    typer.echo(f"record  {requests.store.record(found.request.id)}")


def _measured(found: Mapping[str, Any]) -> list[str]:
    if "files_holding" in found:
        return [f"{found['events']} events, {found['files_holding']} files that hold the name or slot"]
    told = {
        "forgotten": "accuracy on the request's rows",
        "caught": "of them answered around",
        "forgotten_unseen": "accuracy on other rows of its classes",
        "utility": "accuracy on what stays",
        "touched": "of that answered around",
    }
    parts = [f"{name} {found[key]:.1%}" for key, name in told.items() if found.get(key) is not None]
    earlier = [f"request {name} {value:.1%}" for name, value in found.get("earlier", {}).items() if value is not None]
    return [", ".join([*parts, *earlier])] if parts or earlier else []


def _what(request: "RequestFile") -> str:
    if request.kind == "user":
        return f"delete user {str(request.subject)[:12]} (keyed digest)"
    what = {
        "class": f"forget {', '.join(request.classes)}",
        "examples": f"forget examples of {', '.join(request.classes)}",
        "client": f"forget rows of client {str(request.subject)[:12]} (keyed digest)",
    }[request.kind]
    return f"{what}: {request.rows} rows, {request.method}"


def _terms(offer: "Offer") -> str:
    whole = f" for all of {', '.join(offer.classes)}" if offer.classes else ""
    return whole + ("" if offer.epsilon is None else f", epsilon {offer.epsilon:g} at delta {offer.delta:g}")


def _about(store: "Store") -> str:
    part = store.about.classifier
    parts = [] if part is None else [f"{len(part.labels)} classes over {part.reference}"]
    return ", ".join(parts + (["users"] if store.about.users else []))


def _note(line: str) -> None:
    Console(highlight=False, stderr=True).print(Text(line, style="dim"), soft_wrap=True)
