"""Run files of both kinds: their sections, how they are read, what contradicts what, and how they are written back.

A file says its kind in one key at its top, `kind: personal`; without it, it is a federation. One explicit word, because
sections are shared between kinds (and more will be): what they imply would change with every section that is added,
and a misspelt section could turn a file into one of the other kind.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from client.config import TrainingConfig
from lethe.faults import Layout, section_faults, unknown_key
from lethe.notation import inline, parse
from lora.config import AdapterConfig, Section
from lora.errors import ConfigError, nearest
from privacy.config import PrivacyConfig
from server.config import ServerConfig
from simulation.config import SimulationConfig
from strategies.federated.config import FederationConfig
from strategies.personal.config import ComparisonConfig, HistoriesConfig, KeptPersonalConfig, PersonalConfig
from tasks.config import DataConfig, ModelConfig, TaskConfig
from tasks.recommendation.config import RatingsConfig, ReadingModelConfig

RECIPE_FOLDERS = (Path("recipes"), Path(__file__).parents[1] / "recipes", Path(__file__).parent / "recipes")
"""Where a bare recipe name is looked up: the working directory, the source tree, the installed package."""

_ENCODERS = ("minilm", "tiny-bert")
_SERVER_MOMENTUM = ("fedavgm", "fedadam", "fedadagrad", "fedyogi")
# Keys of which the outcome of a run does not depend: a checkpoint of one may be resumed under another.
_WITHOUT_EFFECT = frozenset(
    {
        "name",
        "federation.timeout",
        "federation.greeting_timeout",
        "model.device",
        "model.gradient_checkpointing",
        "server.checkpoint_every",
        "server.keep",
        "simulation.engine",
        "simulation.cohort",
        "simulation.threads",
    }
)


class RunKind(Section):
    """The keys above all sections."""

    rules: ClassVar[tuple[tuple[frozenset[str], Callable[[Any], str | None]], ...]] = ()
    """Every rule between sections, with the sections that it reads."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the run and of its directory; null: one is made up."""
    seed: int = Field(0, ge=0, le=2**32 - 1)
    """Seed of everything that is drawn, but for privacy's noise and sampling."""

    @classmethod
    def sections(cls) -> dict[str, type[Section]]:
        """Return the sections by name, in the order in which they are written."""
        fields = {name: field.annotation for name, field in cls.model_fields.items()}
        return {name: kind for name, kind in fields.items() if isinstance(kind, type) and issubclass(kind, Section)}

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if found := conflicts(self):
            raise ValueError("\n".join(found))
        return self


class RunFile(RunKind):
    """A federation: what is learned, from which data, by whom, how privately, on what machine."""

    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    data: DataConfig = DataConfig()
    adapter: AdapterConfig = AdapterConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    federation: FederationConfig = FederationConfig()
    training: TrainingConfig = TrainingConfig()
    server: ServerConfig = ServerConfig()
    simulation: SimulationConfig = SimulationConfig()


class OwnRatingsConfig(RatingsConfig):
    """`ratings:`, where interactions come from, what counts as liking, and who is left out."""

    forgotten: tuple[str, ...] = ()
    """Forgetting stores, directories of users, or folders of services: whoever was asked to be forgotten there is left
    out of all that is fitted and shown, and of the users that a service starts with. Empty: nobody."""

    @field_validator("forgotten", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class PersonalRun(RunKind):
    """A personalisation: whose likes, which language model, how adapters are mixed, and what they are compared with."""

    kind: Literal["personal"] = "personal"
    """What the file is for; a federation has no such key."""
    ratings: OwnRatingsConfig = OwnRatingsConfig()
    model: ReadingModelConfig = ReadingModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    personal: PersonalConfig = PersonalConfig()
    comparison: ComparisonConfig = ComparisonConfig()


class FederatedPersonalRun(RunFile):
    """A federation of clients that keep their users' histories: `ratings:` take the place of `data:`."""

    kind: Literal["federated-personal"] = "federated-personal"
    """What the file is for; a plain federation has no such key."""
    ratings: RatingsConfig = RatingsConfig()
    histories: HistoriesConfig = HistoriesConfig()
    personal: KeptPersonalConfig = KeptPersonalConfig()


SECTIONS = RunFile.sections()
"""The sections of a federation."""

KINDS: Mapping[str, type[RunKind]] = {
    "federation": RunFile,
    "personal": PersonalRun,
    "federated-personal": FederatedPersonalRun,
}
_SIMULATE = "lethe simulate"
_COMMANDS = {"federation": _SIMULATE, "personal": "lethe personalize", "federated-personal": _SIMULATE}
Kind = TypeVar("Kind", bound=RunKind)
S = TypeVar("S", bound=Section)


# --- What contradicts what, across sections --------------------------------------------------------------------------


def _uniform_weights(run: RunFile) -> str | None:
    if run.privacy.private and run.federation.weights == "examples":
        return (
            "federation.weights=examples: with `privacy:` on the weights would publish exact example counts; "
            "use federation.weights=uniform"
        )
    return None


def _no_client_evaluation(run: RunFile) -> str | None:
    if run.privacy.private and run.federation.evaluate_clients:
        return (
            "federation.evaluate_clients=true: a client's own accuracy is not covered by epsilon; "
            "leave it false with `privacy:` on"
        )
    return None


def _alternation_without_momentum(run: RunFile) -> str | None:
    if run.federation.strategy == "rolora" and run.federation.aggregator in _SERVER_MOMENTUM:
        return (
            f"federation.aggregator={run.federation.aggregator}: its momentum would mix the factors that "
            "federation.strategy=rolora alternates; use fedavg, median, trimmed-mean, krum or multi-krum"
        )
    return None


def _no_head_for_causal(run: RunFile) -> str | None:
    task = run.task
    if task.kind == "causal-lm" and (task.head == "frozen" or task.head_init != "random"):
        return (
            f"task.head={task.head}, task.head_init={task.head_init}: task.kind=causal-lm has no classification head; "
            "leave both out"
        )
    return None


def _decoder_for_causal(run: RunFile) -> str | None:
    if run.task.kind == "causal-lm" and run.model.path is None and run.model.name in _ENCODERS:
        return (
            f"model.name={run.model.name}: an encoder cannot do task.kind=causal-lm; name a decoder such as "
            "tiny-llama or a hub model, or give model.path"
        )
    return None


def _labels_to_divide_by(run: RunFile) -> str | None:
    if run.task.kind == "causal-lm" and run.data.partition in ("dirichlet", "shards", "shares"):
        return (
            f"data.partition={run.data.partition}: divides by label, and task.kind=causal-lm has no labels; "
            "use iid or natural"
        )
    return None


def _shares_for_every_client(run: RunFile) -> str | None:
    if run.data.shares is not None and len(run.data.shares) != run.federation.clients:
        return (
            f"data.shares: has {len(run.data.shares)} rows for federation.clients={run.federation.clients}; "
            "give one row per client"
        )
    return None


def _something_to_mix(run: PersonalRun) -> str | None:
    if run.personal.meta_loras == 1 or run.personal.gate != "router":
        return (
            f"personal.meta_loras={run.personal.meta_loras}, personal.gate={run.personal.gate}: nothing would be "
            "personal; use 2 or more and gate: router, and name what it is compared with in comparison.arms"
        )
    return None


def _ratings_alone(run: FederatedPersonalRun) -> str | None:
    if run.data != DataConfig():
        return "data: is not read where histories are personalised; describe the interactions in ratings:"
    return None


PersonalRun.rules = ((frozenset({"personal"}), _something_to_mix),)
RunFile.rules = (
    (frozenset({"privacy", "federation"}), _uniform_weights),
    (frozenset({"privacy", "federation"}), _no_client_evaluation),
    (frozenset({"federation"}), _alternation_without_momentum),
    (frozenset({"task"}), _no_head_for_causal),
    (frozenset({"task", "model"}), _decoder_for_causal),
    (frozenset({"task", "data"}), _labels_to_divide_by),
    (frozenset({"data", "federation"}), _shares_for_every_client),
)
FederatedPersonalRun.rules = (*RunFile.rules, (frozenset({"data"}), _ratings_alone))


def conflicts(run: RunKind, *, broken: Iterable[str] = ()) -> list[str]:
    """Return one line for every contradiction between sections, leaving out rules that read a `broken` section."""
    unreadable = set(broken)
    found = [check(run) for reads, check in run.rules if not reads & unreadable]
    return [line for line in found if line]


# --- Reading ---------------------------------------------------------------------------------------------------------


def load_run_file(recipe: str | Path, overrides: Sequence[str] = ()) -> RunFile:
    """Read a federation by path or by the bare name of a shipped recipe, and apply `key=value` overrides in order.

    Raises ConfigError that names every fault at once, one line each.
    """
    return _load(recipe, overrides, RunFile)


def load_personal_run(recipe: str | Path, overrides: Sequence[str] = ()) -> PersonalRun:
    """Read a personalisation in the same way."""
    return _load(recipe, overrides, PersonalRun)


def load_any(recipe: str | Path, overrides: Sequence[str] = ()) -> RunKind:
    """Read a run file of whichever kind it says it is."""
    return _load(recipe, overrides, None)


def read_kind(path: Path) -> str:
    """Return the kind that a run file says it is, valid or not."""
    return str(_read(path).get("kind", "federation"))


def _load(recipe: str | Path, overrides: Sequence[str], wanted: type[Kind] | None) -> Kind:
    path = find_recipe(recipe)
    tree = _read(path)
    faults = [fault for each in overrides if (fault := _override(tree, each))]
    source = f"{path} with {len(overrides)} override{'s'[: len(overrides) > 1]}" if overrides else str(path)
    return _from_tree(tree, kind=_kind_of(tree, wanted, source), source=source, faults=faults)


def from_mapping(tree: Mapping[str, Any], *, source: str = "run file") -> RunFile:
    """Build a federation from plain values, such as the JSON of a resolved run; `source` names them in messages.

    Raises ConfigError that names every fault at once, one line each.
    """
    own = dict(tree)
    return _from_tree(own, kind=_kind_of(own, RunFile, source), source=source, faults=[])


def _kind_of(tree: dict[str, Any], wanted: type[Kind] | None, source: str) -> type[Kind]:
    """Take the kind out of the tree, and refuse one that is not wanted."""
    name = tree.pop("kind", "federation")
    if name not in KINDS:
        raise ConfigError(
            f"{source}: kind={inline(name)}: must be one of {', '.join(KINDS)}{nearest(str(name), KINDS)}"
        )
    if wanted is not None and not issubclass(KINDS[name], wanted):
        says = f"kind: {name}" if name != "federation" else "no `kind: personal` at its top"
        raise ConfigError(f"{source}: has {says}; it is for `{_COMMANDS[name]}`")
    return KINDS[name]  # type: ignore[return-value]


def read_section(name: str, kind: type[S], overrides: Sequence[str]) -> S:
    """Build one section that no run file holds from `name.key=value` overrides.

    Raises ConfigError that names every fault at once, one line each.
    """
    tree: dict[str, Any] = {}
    faults = [fault for each in overrides if (fault := _override(tree, each))]
    layout: Layout = {name: kind}
    faults += [unknown_key(key, layout) for key in tree if key != name]
    section, found = section_faults(name, layout, tree.get(name, {}))
    if faults or found or not isinstance(section, kind):
        raise ConfigError(_listed("settings", faults + found))
    return section


def find_recipe(recipe: str | Path) -> Path:
    """Return the file of a recipe given by path or bare name; ConfigError names the nearest on a miss."""
    path = Path(recipe)
    if path.is_file():
        return path
    shipped = recipes()
    if path.name == str(recipe) and path.stem in shipped and path.suffix in ("", ".yaml", ".yml"):
        return shipped[path.stem]
    there = sorted(each.stem for each in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    raise ConfigError(f"recipe '{recipe}' was not found{nearest(path.stem, {*shipped, *there})}")


def recipes() -> dict[str, Path]:
    """Return the shipped recipes by bare name; one in the working directory goes first."""
    found = {file.stem: file for folder in reversed(RECIPE_FOLDERS) for file in sorted(folder.glob("*.yaml"))}
    return dict(sorted(found.items()))


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the run file as UTF-8") from None
    tree = parse(text, source=str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}; a run file has sections: {', '.join(SECTIONS)}")
    return {str(key): value for key, value in tree.items()}


def _override(tree: dict[str, Any], override: str) -> str | None:
    """Set one `a.b=value` in the tree; return what is wrong with it, if anything."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        return f"override '{override}': has no key or no `=`; write it as key=value, such as training.rate=0.2"
    try:
        value = parse(text, source=f"override '{override}'")
    except ConfigError as error:
        return str(error)
    return _place(tree, key, value)


def _place(tree: dict[str, Any], key: str, value: object) -> str | None:
    *parents, leaf = key.split(".")
    branch = tree
    for depth, parent in enumerate(parents):
        inner = branch.get(parent)
        if inner is not None and not isinstance(inner, dict):
            above = ".".join(parents[: depth + 1])
            return f"{key}: '{above}' is a value ({inline(inner)}), not a section; override {above} itself"
        branch[parent] = branch = dict(inner or {})
    branch[leaf] = value
    return None


def _from_tree(tree: dict[str, Any], *, kind: type[Kind], source: str, faults: list[str]) -> Kind:
    sections = kind.sections()
    layout: Layout = {"": kind, **sections}
    faults += [unknown_key(key, layout) for key in tree if key not in kind.model_fields]
    loose = {key: value for key, value in tree.items() if key in RunKind.model_fields}
    top, found = section_faults("", {"": RunKind}, loose)
    faults += found
    valid: dict[str, Any] = {}
    for name in sections:
        raw = tree.get(name)
        section, found = section_faults(name, layout, {} if raw is None else raw)
        faults += found
        if section is not None:
            valid[name] = section
    # Sections that are broken stand in with their defaults, and rules that read them are left out.
    draft = kind.model_construct(**valid)
    faults += conflicts(draft, broken=sections.keys() - valid.keys())
    if faults or top is None:
        raise ConfigError(_listed(source, faults))
    return kind(**top.model_dump(), **valid)


def _listed(source: str, faults: Sequence[str]) -> str:
    if len(faults) == 1:
        return f"{source}: {faults[0]}"
    return "\n  ".join([f"{source}: {len(faults)} faults", *faults])


# --- Writing ---------------------------------------------------------------------------------------------------------


def resolved(run: RunKind) -> dict[str, Any]:
    """Return the run with every default filled in, in plain YAML types."""
    return run.model_dump(mode="json")


def to_yaml(run: RunKind) -> str:
    """Return the resolved run as YAML, every key with its documentation as a trailing comment."""
    sections = run.sections()
    blocks = [_lines(run, [name for name in type(run).model_fields if name not in sections], indent="")]
    for name, kind in sections.items():
        purpose = " ".join((kind.__doc__ or "").split()).removeprefix(f"`{name}:`, ").rstrip(".")
        blocks.append([f"{name}:  # {purpose}", *_lines(getattr(run, name), list(kind.model_fields), indent="  ")])
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _lines(section: Section, keys: Sequence[str], *, indent: str) -> list[str]:
    values = section.model_dump(mode="json")
    entries = [f"{indent}{key}: {inline(values[key])}" for key in keys]
    column = max((len(entry) for entry in entries if len(entry) <= 40), default=0)
    notes = [" ".join((type(section).model_fields[key].description or "").split()) for key in keys]
    return [f"{entry:<{column}}  # {note}" if note else entry for entry, note in zip(entries, notes, strict=True)]


def schema(kind: str = "federation") -> dict[str, Any]:
    """Return the JSON schema of run files of one kind, for editors that complete and check YAML.

    Raises ConfigError with the nearest kind for an unknown one.
    """
    if kind not in KINDS:
        raise ConfigError(f"there are no run files of kind '{kind}'{nearest(kind, KINDS)}")
    return KINDS[kind].model_json_schema()


def result_digest(run: RunKind) -> str:
    """Return a SHA-256 over everything in the run file that its result depends on (64 hex digits)."""
    effective = {key: value for key, value in _flat(resolved(run)).items() if key not in _WITHOUT_EFFECT}
    return hashlib.sha256(json.dumps(effective, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(one: RunKind, other: RunKind) -> list[str]:
    """Return the dotted keys in which two runs differ, in the order of the file."""
    left, right = _flat(resolved(one)), _flat(resolved(other))
    return [key for key in {**left, **right} if left.get(key) != right.get(key)]


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys and values; what is below a key, such as options or shares, is that key's value."""
    loose = {key: value for key, value in tree.items() if not isinstance(value, Mapping)}
    sections = {name: keys for name, keys in tree.items() if isinstance(keys, Mapping)}
    return loose | {f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()}
