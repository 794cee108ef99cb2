import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lora.errors import DataError
from tasks.config import DataConfig
from tasks.data import load_splits
from tasks.files import text_table
from tasks.hub import read_hub

datasets = pytest.importorskip("datasets")


class Hub:
    """Stands in for `datasets.load_dataset`, with real data sets by (name, configuration)."""

    def __init__(self, shelf: dict[tuple[str, str | None], Any]) -> None:
        self.shelf = shelf
        self.calls: list[dict[str, Any]] = []

    def __call__(self, name: str, config: str | None = None, **rest: Any) -> Any:
        self.calls.append({"name": name, "config": config, **rest})
        found = self.shelf[name, config]
        if isinstance(found, Exception) and "revision" not in rest:
            raise found
        return found[rest["split"]] if "split" in rest else found


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub({})
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    return stand_in


def clinc() -> Any:
    intents = datasets.ClassLabel(names=["transfer", "oos", "alarm"])
    features = datasets.Features({"text": datasets.Value("string"), "intent": intents})
    rows = {"text": ["send it", "moon", "wake me"], "intent": [0, 1, 2]}
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_dict(rows, features=features) for name in ("train", "validation", "test")}
    )


CLINC = DataConfig(
    name="clinc_oos", config="plus", train="train", validation="validation", test="test", drop_labels=("oos",)
)


def test_class_labels_become_sorted_names(hub: Hub) -> None:
    hub.shelf["clinc_oos", "plus"] = clinc()
    splits = load_splits(CLINC, kind="classification", seed=0)
    assert splits.label_names == ("alarm", "transfer")
    assert (splits.train.texts, splits.train.labels) == (("send it", "wake me"), (1, 0))
    assert hub.calls == [{"name": "clinc_oos", "config": "plus"}]


def test_the_hub_and_a_local_copy_give_the_same_splits(hub: Hub, tmp_path: Path) -> None:
    hub.shelf["clinc_oos", "plus"] = clinc()
    rows = [["send it", "transfer"], ["moon", "oos"], ["wake me", "alarm"]]
    (tmp_path / "data_full.json").write_text(json.dumps({"val": rows, "train": rows, "test": rows, "oos_val": rows}))
    local = CLINC.model_copy(update={"path": str(tmp_path), "file": "data_full.json"})
    assert load_splits(local, kind="classification", seed=0) == load_splits(CLINC, kind="classification", seed=0)


def sst2() -> Any:
    labels = datasets.ClassLabel(names=["negative", "positive"])
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": labels, "idx": datasets.Value("int32")}
    )

    def part(prefix: str, values: list[int]) -> Any:
        sentences = [f"{prefix} {i} " for i in range(len(values))]
        columns = {"sentence": sentences, "label": values, "idx": list(range(len(values)))}
        return datasets.Dataset.from_dict(columns, features=features)

    return datasets.DatasetDict(
        train=part("train", [0, 1] * 10), validation=part("dev", [1, 0]), test=part("test", [-1, -1])
    )


def test_file_names_of_a_local_copy_mean_the_hub_splits(hub: Hub) -> None:
    hub.shelf["glue", "sst2"] = sst2()
    config = DataConfig(name="glue", config="sst2", train="glue_sst2/train.tsv.gz", test="glue_sst2/dev.tsv.gz")
    splits = load_splits(config, kind="classification", seed=0)
    assert splits.test.texts == ("dev 0", "dev 1") and splits.label_names == ("negative", "positive")
    assert len(splits.train) == 18 and len(splits.validation) == 2


def test_an_unlabelled_split_is_an_error_that_names_it(hub: Hub) -> None:
    hub.shelf["glue", "sst2"] = sst2()
    with pytest.raises(DataError, match="glue, split test, row 1: 'label' is missing"):
        load_splits(DataConfig(name="glue", config="sst2"), kind="classification", seed=0)


def test_one_long_text_is_read_as_a_text_file_is(hub: Hub) -> None:
    play = "".join(f"SPEAKER {i % 3}:\nspeech number {i}\n\n" for i in range(30))
    hub.shelf["tiny_shakespeare", None] = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": [play]}))
    table = read_hub(DataConfig(name="tiny_shakespeare"))["train"]
    assert table.columns == text_table(play, "").columns and len(table) == 30
    config = DataConfig(name="tiny_shakespeare", owner="speaker")
    splits = load_splits(config, kind="causal-lm", seed=0)
    assert splits.train.owners is not None and set(splits.train.owners) == {"SPEAKER 0", "SPEAKER 1", "SPEAKER 2"}


def test_an_empty_split_is_an_error(hub: Hub) -> None:
    hub.shelf["x", None] = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": [], "label": []}))
    with pytest.raises(DataError, match="x, split train: there is no row"):
        load_splits(DataConfig(name="x"), kind="classification", seed=0)


def test_columns_that_are_not_scalars_are_left_out(hub: Hub) -> None:
    rows = {"text": ["a", "b"], "label": [0.5, 2.0], "vector": [[1, 2], [3, 4]]}
    hub.shelf["x", None] = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows))
    assert read_hub(DataConfig(name="x"))["train"].columns == {"text": ["a", "b"], "label": [0.5, 2.0]}


def test_a_missing_split_names_the_nearest(hub: Hub) -> None:
    hub.shelf["clinc_oos", "plus"] = clinc()
    with pytest.raises(DataError, match=r"hub data set clinc_oos has no split 'tset'; did you mean 'test'"):
        read_hub(CLINC.model_copy(update={"test": "tset"}))
    del hub.shelf["clinc_oos", "plus"]["validation"]
    with pytest.raises(DataError, match=r"data\.validation: hub data set clinc_oos has no split 'validation'"):
        read_hub(CLINC)


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionError("Couldn't reach 'clinc_oos' on the Hub (LocalEntryNotFoundError)"),
        FileNotFoundError("Dataset 'clinc_oos' doesn't exist on the Hub"),
        ValueError("BuilderConfig 'plus' not found. Available: ['small']\nsecond line"),
    ],
)
def test_every_failure_says_how_to_do_without_the_hub(hub: Hub, failure: Exception) -> None:
    hub.shelf["clinc_oos", "plus"] = failure
    with pytest.raises(DataError, match=r"'clinc_oos', configuration 'plus' cannot be loaded .*data\.path=") as caught:
        read_hub(CLINC)
    assert str(failure).split("\n")[0] in str(caught.value) and "second line" not in str(caught.value)
    assert caught.value.__cause__ is failure


def test_a_scripted_data_set_is_read_from_its_converted_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(name: str, config: str | None = None, **rest: Any) -> Any:
        if rest.get("revision") != "refs/convert/parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found tiny_shakespeare.py")
        return clinc()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(read_hub(CLINC)["train"]) == 3


def test_the_real_loader_reads_splits_and_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for name, count in {"train": 20, "test": 4}.items():
        lines = "".join(f'{{"text": "{name} {i}", "label": "{i % 2}"}}\n' for i in range(count))
        (tmp_path / "set" / f"{name}.jsonl").write_text(lines)
    config = DataConfig(name=str(tmp_path / "set"), train="train[:50%]", test="test")
    tables = read_hub(config)
    assert {role: len(table) for role, table in tables.items()} == {"train": 10, "test": 4}
    assert tables["test"].columns["text"] == [f"test {i}" for i in range(4)]
    with pytest.raises(DataError, match=r"cannot be loaded .*data\.path="):
        read_hub(DataConfig(name=str(tmp_path / "nothing" / "here")))


def test_datasets_is_imported_only_when_a_hub_is_read() -> None:
    import subprocess

    code = (
        "import sys, tasks.data, tasks.partition; sys.exit('datasets' in sys.modules or 'flwr_datasets' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
