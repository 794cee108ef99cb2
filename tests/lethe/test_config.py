"""The run file: every default, every fault named at once, written and read back the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lethe import config as run_files
from lethe.config import (
    SECTIONS,
    FederatedPersonalRun,
    PersonalRun,
    RunFile,
    conflicts,
    differences,
    find_recipe,
    from_mapping,
    load_any,
    load_personal_run,
    load_run_file,
    recipes,
    resolved,
    result_digest,
    schema,
    to_yaml,
)
from lora.errors import ConfigError

RECIPES = Path(__file__).parents[2] / "recipes"
KEYS = ["name", "seed", *(f"{name}.{key}" for name, kind in SECTIONS.items() for key in kind.model_fields)]


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty.yaml"
    path.touch()
    return path


def fault(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run_file(path, overrides)
    return str(caught.value)


def test_an_empty_file_is_all_defaults(empty: Path) -> None:
    assert load_run_file(empty) == RunFile() == from_mapping({})


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("privacy.delta=1e-5", ("privacy", "delta"), 1e-5),
        ("privacy.epsilon=3", ("privacy", "epsilon"), 3.0),
        ("privacy.epsilon=", ("privacy", "epsilon"), None),
        ("model.path=null", ("model", "path"), None),
        ("model.name=a=b", ("model", "name"), "a=b"),
        ("data.drop_labels=[oos, no, 7]", ("data", "drop_labels"), ("oos", "no", "7")),
        ("data.text=[title, body]", ("data", "text"), ("title", "body")),
        ("data.label=3", ("data", "label"), "3"),
        ("training.batch=100_0", ("training", "batch"), 1000),
        ("federation.aggregator_options={tau: 1e-3}", ("federation", "aggregator_options"), {"tau": 1e-3}),
        ("federation.aggregator_options.tau=0.5", ("federation", "aggregator_options"), {"tau": 0.5}),
        ("federation.evaluate_clients=true", ("federation", "evaluate_clients"), True),
        ("federation={clients: 9}", ("federation", "clients"), 9),
    ],
)
def test_overrides_are_yaml(empty: Path, override: str, key: tuple[str, str], value: Any) -> None:
    run = load_run_file(empty, [override])
    found = getattr(getattr(run, key[0]), key[1])
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_wins_over_earlier_ones_and_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: old\ntraining:\n  rate: 1e-3\n  steps: 2\n")
    run = load_run_file(path, ["training.rate=2", "training.rate=3", "name=2024"])
    assert (run.name, run.training.rate, run.training.steps) == ("2024", 3.0, 2)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("epsilon=3", "privacy.epsilon"),
        ("privacy.epsilom=3", "privacy.epsilon"),
        ("training.epsilon=3", "privacy.epsilon"),
        ("rate=1", "training.rate"),
        ("lr=1", "training.rate"),
        ("training.learning_rate=1", "training.rate"),
        ("batch_size=3", "training.batch"),
        ("num_clients=3", "federation.clients"),
        ("training.num_rounds=3", "federation.rounds"),
        ("traning.rate=1", "training"),
        ("sed=1", "seed"),
        ("data.dirichlet_alfa=1", "data.dirichlet_alpha"),
        ("federation.min_client=1", "federation.min_clients"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(empty: Path, wrong: str, meant: str) -> None:
    message = fault(empty, wrong)
    assert f"did you mean '{meant}'?" in message


def test_a_key_like_no_other_lists_what_there_is(empty: Path) -> None:
    assert "sections and keys: name, seed, model" in fault(empty, "zzz=1")
    assert "keys of server: evaluate_every" in fault(empty, "server.zzz=1")


@given(st.sampled_from(KEYS), st.data())
def test_a_known_key_with_one_letter_missing_is_recognised(key: str, data: st.DataObject) -> None:
    home, _, leaf = key.rpartition(".")
    if len(leaf) < 5:
        return
    at = data.draw(st.integers(1, len(leaf) - 1))
    misspelt = (f"{home}." if home else "") + leaf[:at] + leaf[at + 1 :]
    if misspelt in KEYS:  # `data.labels` without its last letter is a key of its own.
        return
    with pytest.raises(ConfigError) as caught:
        from_mapping({home: {misspelt.rpartition(".")[2]: 1}} if home else {misspelt: 1})
    assert f"did you mean '{key}'?" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.steps=0", "training.steps=0: must be a whole number, at least 1; left out, it is 5"),
        ("training.rate=-1", "training.rate=-1: must be a number, above 0; left out, it is 0.1"),
        ("training.batch=2.5", "training.batch=2.5: must be a whole number, at least 1"),
        ("training.batch=many", "training.batch=many: must be a whole number, at least 1"),
        ("training.rate=", "training.rate=null: must be a number, above 0"),
        ("training.momentum=1", "must be a number, at least 0 and below 1"),
        ("privacy.delta=true", "privacy.delta=true: must be a number, above 0 and below 1"),
        ("privacy.epsilon=inf", "privacy.epsilon=inf: must be a number, above 0, or null"),
        ("privacy.epsilon=.inf", "privacy.epsilon=.inf: must be a number, above 0, or null"),
        ("privacy.clip=nan", "privacy.clip=nan: must be a number, above 0"),
        ("data.shares=[[1, .nan]]", "data.shares=[[1, .nan]]: must be a list of lists of numbers, or null"),
        ("data.shares=[[1, x]]", "data.shares=[[1, x]]: must be a list of lists of numbers, or null"),
        ("data.text={a: 1}", "data.text={a: 1}: must be text or a list of texts"),
        ("model.name=true", "model.name=true: must be text; put it in quotes; left out, it is minilm"),
        ("federation.clients=1", "at least 2 and at most 100000 (a federation needs at least 2 clients)"),
        ("federation.clients=0", "(a federation needs at least 2 clients)"),
        ("federation.aggregator=krm", "did you mean 'krum'?"),
        ("federation.strategy=3", "must be one of ffa-lora, lora, rolora; left out, it is ffa-lora"),
        ("federation.evaluate_clients=perhaps", "must be true or false; left out, it is false"),
        ("federation.aggregator_options={a: b}", "must be a mapping from names to numbers"),
        ("federation.aggregator_options={a: true}", "must be a mapping from names to numbers"),
        ("privacy=off", "`privacy` is a section, not a value; give keys of it: epsilon, delta"),
        ("name=a/b", "must be text, or null (letters, digits, dots, dashes and underscores"),
        ("name=..", "must be text, or null (letters"),
        ("seed=-1", "seed=-1: must be a whole number, at least 0 and at most 4294967295"),
        ("training.rate.x=1", "training.rate={x: 1}: must be a number, above 0"),
        ("rate", "override 'rate': has no key or no `=`; write it as key=value"),
        ("=1", "override '=1': has no key or no `=`"),
        ("data.shares=[1,", "override 'data.shares=[1,', line 1"),
    ],
)
def test_a_wrong_value_names_key_value_limit_and_remedy(empty: Path, override: str, words: str) -> None:
    message = fault(empty, override)
    assert words in message
    assert "pydantic" not in message
    assert "Input should" not in message


def test_an_override_below_a_value_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("training:\n  rate: 0.1\n")
    assert "'training.rate' is a value (0.1), not a section" in fault(path, "training.rate.x=1")


def test_all_faults_come_at_once_one_line_each(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("epsilon: 3\ntraining:\n  steps: 0\n  rate: -1\n  nope: 1\nmodel: 3\nprivacy:\n  epsilon: 1\n")
    overrides = ["federation.weights=examples", "federation.strategy=rolora", "federation.aggregator=fedadam", "bare"]
    head, *lines = fault(path, *overrides, "seed=x").split("\n")
    assert head == f"{path} with 5 overrides: 9 faults"
    starts = (
        "override 'bare'",
        "epsilon:",
        "seed=x",
        "model=3",
        "training.nope",
        "training.steps=0",
        "training.rate=-1",
    )
    for start in (*starts, "federation.weights=examples", "federation.aggregator=fedadam"):
        assert sum(line.strip().startswith(start) for line in lines) == 1, start
    assert len(lines) == 9


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["privacy.epsilon=1", "federation.weights=examples"], "federation.weights=examples: with `privacy:` on"),
        (["privacy.noise_multiplier=1", "federation.weights=examples"], "use federation.weights=uniform"),
        (["privacy.epsilon=1", "federation.evaluate_clients=true"], "federation.evaluate_clients=true: a client's own"),
        (["task.kind=causal-lm", "model.name=tiny-llama", "task.head=frozen"], "task.head=frozen"),
        (["task.kind=causal-lm", "model.name=tiny-llama", "task.head_init=labels"], "task.head_init=labels"),
        (["task.kind=causal-lm"], "model.name=minilm: an encoder cannot do"),
        (
            ["task.kind=causal-lm", "model.path=x", "data.partition=dirichlet"],
            "data.partition=dirichlet: divides by label",
        ),
        (["data.partition=shares", "data.shares=[[1, 0], [0, 1]]"], "data.shares: has 2 rows for federation.clients=4"),
        (["training.weight_decay=1"], "training.weight_decay=1.0 belongs to `optimizer: adamw`"),
        (["federation.min_clients=9"], "federation.min_clients=9 exceeds clients=4"),
    ]
    + [
        (["federation.strategy=rolora", f"federation.aggregator={each}"], f"federation.aggregator={each}: its momentum")
        for each in ("fedavgm", "fedadam", "fedadagrad", "fedyogi")
    ],
)
def test_contradictions_are_refused(empty: Path, overrides: list[str], words: str) -> None:
    assert words in fault(empty, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["federation.weights=examples"],
        ["federation.evaluate_clients=true"],
        ["federation.strategy=rolora", "federation.aggregator=krum"],
        ["federation.strategy=lora", "federation.aggregator=fedadam"],
        ["task.kind=causal-lm", "model.name=tiny-llama", "task.head=none", "data.partition=natural"],
        ["data.partition=shares", "data.shares=[[1, 0], [0, 1]]", "federation.clients=2"],
        ["privacy.epsilon=1", "task.head=none"],
    ],
)
def test_what_does_not_contradict_is_let_through(empty: Path, overrides: list[str]) -> None:
    assert conflicts(load_run_file(empty, overrides)) == []


def test_a_rule_between_sections_waits_until_both_are_sound(empty: Path) -> None:
    message = fault(empty, "data.partition=shares", "data.shares=[[1], [1]]", "federation.clients=0")
    assert "rows for" not in message


def test_sections_that_contradict_cannot_be_built_by_hand_either() -> None:
    with pytest.raises(ValueError, match="an encoder cannot do"):
        RunFile(task=SECTIONS["task"](kind="causal-lm"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- a\n- b\n", "holds a list; a run file has sections: model, task"),
        (b"just words", "holds a str"),
        (b"a: \xff\xfe", "byte 3 is not UTF-8"),
        (b"privacy:\n  epsilon: 1\n  epsilon: 2\n", "line 3, column 3: the key 'epsilon' is given twice"),
        (b"1: 2\n", "1: there is no such key"),
    ],
)
def test_a_file_that_is_no_run_file_says_why(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    assert words in fault(path)


def test_a_null_section_is_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("privacy:\ntraining: {steps: 2}\n")
    assert load_run_file(path, ["privacy.epsilon=2"]).privacy.epsilon == 2


# --- Recipes ---------------------------------------------------------------------------------------------------------


COMMANDS = {RunFile: "lethe simulate", PersonalRun: "lethe personalize", FederatedPersonalRun: "lethe simulate"}


def leaves(tree: object) -> int:
    return sum(map(leaves, tree.values())) if isinstance(tree, Mapping) else 1


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.y*ml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_short_and_introduced(path: Path) -> None:
    text = path.read_text()
    run = load_any(path)
    assert leaves(yaml.safe_load(text)) <= 15
    header = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"{COMMANDS[type(run)]} {path.stem}" in header


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.y*ml")), ids=lambda path: path.stem)
def test_the_overrides_that_a_recipe_suggests_are_valid(path: Path) -> None:
    start = f"{COMMANDS[type(load_any(path))]} "
    commands = [line for line in path.read_text().splitlines() if line.startswith("#") and start in line]
    assert commands
    for command in commands:
        words = command.partition(start)[2].split()
        load_any(path, words[1:])


def test_recipes_are_found_by_bare_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"quickstart", "clinc150", "sst2", "shakespeare"} <= recipes().keys()
    assert find_recipe("quickstart").samefile(RECIPES / "quickstart.yaml")
    assert load_run_file("quickstart").privacy.epsilon == 8


def test_a_file_wins_over_a_recipe_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("seed: 77")
    assert load_run_file("quickstart").seed == 77
    Path("quickstart").unlink()
    Path("quickstart").mkdir()
    assert find_recipe("quickstart").samefile(RECIPES / "quickstart.yaml")


@pytest.mark.parametrize("wrong", ["quikstart", "quikstart.yaml", "recipes/quikstart.yaml", "/nowhere/quikstart.yaml"])
def test_a_missing_recipe_names_the_nearest(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"was not found; did you mean 'quickstart'\?"):
        find_recipe(wrong)


# --- Writing ---------------------------------------------------------------------------------------------------------

UNUSUAL = [
    "name=run-1",
    "seed=5",
    "privacy.epsilon=3",
    "privacy.delta=1e-7",
    "data.drop_labels=[oos, '1e5', 'no']",
    "model.path='a: # b'",
    "data.partition=shares",
    "data.shares=[[1, 0], [0, 1], [0.5, 0.5], [0.25, 0.75]]",
    "federation.aggregator_options={tau: 1e-3}",
]


def test_what_is_written_reads_back_the_same(empty: Path, tmp_path: Path) -> None:
    for overrides in ([], UNUSUAL):
        run = load_run_file(empty, overrides)
        written = tmp_path / "config.yaml"
        written.write_text(to_yaml(run), encoding="utf-8")
        assert load_run_file(written) == run
        assert yaml.safe_load(to_yaml(run)) == resolved(run)
        assert from_mapping(resolved(run)) == run


def test_every_key_is_written_with_its_documentation() -> None:
    lines = to_yaml(RunFile()).splitlines()
    for name, kind in SECTIONS.items():
        assert sum(line.startswith(f"{name}:  # ") for line in lines) == 1
        for key, field in kind.model_fields.items():
            assert field.description, f"{name}.{key} has no docstring"
            note = " ".join(field.description.split())
            assert sum(line.startswith(f"  {key}:") and line.endswith(f"  # {note}") for line in lines) >= 1


def test_the_schema_knows_every_key_and_its_documentation() -> None:
    described = schema()
    assert described["properties"].keys() == RunFile.model_fields.keys()
    privacy = described["$defs"]["PrivacyConfig"]
    assert privacy["additionalProperties"] is False
    assert privacy["properties"]["delta"]["description"] == SECTIONS["privacy"].model_fields["delta"].description


def test_the_digest_depends_on_the_result_alone(empty: Path) -> None:
    digest = result_digest(RunFile())
    same = ["name=x", "simulation.engine=sequential", "simulation.threads=1", "simulation.cohort=2", "server.keep=9"]
    for override in same:
        assert result_digest(load_run_file(empty, [override])) == digest, override
    other = ["seed=1", "training.rate=0.2", "adapter.rank=4", "privacy.epsilon=1", "federation.rounds=6", "data.path=x"]
    digests = {result_digest(load_run_file(empty, [override])) for override in other}
    assert len(digests | {digest}) == len(other) + 1


def test_every_key_without_effect_exists() -> None:
    assert set(KEYS) >= run_files._WITHOUT_EFFECT


def test_differences_name_dotted_keys(empty: Path) -> None:
    one, other = RunFile(), load_run_file(empty, ["seed=1", "training.rate=0.2", "name=x", "data.drop_labels=[a]"])
    assert differences(one, other) == ["name", "seed", "data.drop_labels", "training.rate"]
    assert differences(other, other) == []


# --- Personal runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def personal(tmp_path: Path) -> Path:
    path = tmp_path / "personal.yaml"
    path.write_text("kind: personal\n")
    return path


def personal_fault(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_personal_run(path, overrides)
    return str(caught.value)


def test_a_federation_may_keep_histories_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("kind: federated-personal\nhistories: {per_user: 1}\nratings: {core: 1}\n")
    run = load_run_file(path, ["privacy.epsilon=2", "privacy.delta=1e-5"])
    assert isinstance(run, FederatedPersonalRun)
    assert (run.histories.per_user, run.personal.base_score, run.privacy.epsilon) == (1, "none", 2)
    assert from_mapping(resolved(run)) == run
    assert "histories: there is no such key" in fault(path, "kind=federation", "ratings=null")
    assert "personal.routing=pair: must be one of user" in fault(path, "personal.routing=pair")
    assert "personal.base_score=offset: must be one of none" in fault(path, "personal.base_score=offset")
    assert "data: is not read where histories are personalised" in fault(path, "data.name=x")
    assert "has kind: federated-personal; it is for `lethe simulate`" in personal_fault(path)


def test_a_file_says_its_kind_and_only_its_command_takes_it(empty: Path, personal: Path) -> None:
    assert load_any(personal) == load_personal_run(personal) == PersonalRun()
    assert load_any(empty) == load_run_file(empty, ["kind=federation"]) == RunFile()
    assert "has kind: personal; it is for `lethe personalize`" in fault(personal)
    assert "has no `kind: personal` at its top; it is for `lethe simulate`" in personal_fault(empty)
    kinds = "federation, personal, federated-personal; did you mean 'personal'?"
    assert f"kind=persona: must be one of {kinds}" in fault(empty, "kind=persona")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("personal.meta_lora=3", "personal.meta_lora: there is no such key; did you mean 'personal.meta_loras'?"),
        ("comparisons.seeds=3", "comparisons: there is no such key; did you mean 'comparison'?"),
        ("lr=3", "lr: there is no such key; did you mean 'personal.rate'?"),
        ("dataset=x", "dataset: there is no such key; did you mean 'ratings.path'?"),
        ("federation.clients=3", "federation: there is no such key"),
        ("comparison.scorer=mf", "comparison.scorer=mf: must be one of MF, DIN, SASRec, boosted"),
        ("comparison.routers=[MF, boosted]", "must be a list of MF, DIN, SASRec"),
        ("comparison.routers=[]", "comparison.routers=[]: name one or more, each once"),
        ("comparison.arms=[uniform-gate, uniform-gate]", "comparison.arms=['uniform-gate', 'uniform-gate']: name"),
        ("comparison.seeds=0", "comparison.seeds=0: must be a whole number, at least 1"),
        ("personal.meta_loras=1", "personal.gate=router has nothing to choose with meta_loras=1"),
        ("personal.gate=random", "personal.gate=random: nothing would be personal"),
        ("ratings.like_from=9", "ratings"),
    ],
)
def test_a_fault_of_a_personal_run_is_named_in_its_own_keys(personal: Path, override: str, words: str) -> None:
    assert words in personal_fault(personal, override)


def test_a_personal_run_reads_back_the_same_with_every_key_explained(personal: Path, tmp_path: Path) -> None:
    run = load_personal_run(
        personal, ["comparison.show_user=5", "comparison.routers=[DIN]", "name=x", "ratings.path=d"]
    )
    assert run.comparison.show_user == "5"
    written = tmp_path / "config.yaml"
    written.write_text(to_yaml(run), encoding="utf-8")
    assert load_personal_run(written) == run
    assert yaml.safe_load(to_yaml(run)) == resolved(run)
    lines = to_yaml(run).splitlines()
    for name, kind in PersonalRun.sections().items():
        for key, field in kind.model_fields.items():
            note = " ".join((field.description or "").split())
            assert note and any(line.startswith(f"  {key}:") and line.endswith(f"# {note}") for line in lines), name


def test_the_schema_of_each_kind_knows_its_keys() -> None:
    assert schema("personal")["properties"].keys() == PersonalRun.model_fields.keys()
    assert "show_user" in schema("personal")["$defs"]["ComparisonConfig"]["properties"]
    with pytest.raises(ConfigError, match="there are no run files of kind 'persnal'; did you mean 'personal'"):
        schema("persnal")


def test_the_digest_of_a_personal_run_depends_on_the_result_alone(personal: Path) -> None:
    assert result_digest(load_personal_run(personal, ["name=x"])) == result_digest(PersonalRun())
    assert result_digest(load_personal_run(personal, ["comparison.seeds=2"])) != result_digest(PersonalRun())
