import json
from pathlib import Path

import pytest

from lora.errors import DataError
from tasks.config import DataConfig
from tasks.sources import choose, read_path, role_of

FIELDS = ("text", "label")


def lay(folder: Path, *names: str) -> Path:
    """Write CSV files that say in their text which file they are, and return the folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text,label\n{name},0\n")
    return folder


def lay_splits(folder: Path, name: str, *splits: str) -> Path:
    (folder / name).write_text(json.dumps({split: [[f"{name}:{split}", "0"]] for split in splits}))
    return folder


def found(path: Path, **settings: str) -> dict[str, object]:
    tables = read_path(DataConfig(path=str(path), **settings), fields=FIELDS)
    return {role: table.columns["text"][0] for role, table in tables.items()}


@pytest.mark.parametrize("name", ["train.tsv.gz", "training", "data/train.csv", "Train"])
def test_train_has_aliases(name: str) -> None:
    assert role_of(name) == "train"


@pytest.mark.parametrize("name", ["val", "dev.tsv", "validation", "valid.jsonl.gz"])
def test_validation_has_aliases(name: str) -> None:
    assert role_of(name) == "validation"


@pytest.mark.parametrize("name", [None, "train_sft", "testimony", "oos_test", "device"])
def test_other_names_stand_for_no_role(name: str | None) -> None:
    assert role_of(name) is None


def test_an_exact_name_wins_over_an_alias() -> None:
    known = ("train", "val", "dev", "oos_test")
    chosen = choose(DataConfig(validation="dev", test="oos_test"), known, source="x")
    assert chosen == {"train": "train", "validation": "dev", "test": "oos_test"}


def test_a_standard_name_is_not_used_twice() -> None:
    chosen = choose(DataConfig(test="validation"), ("train", "validation"), source="x")
    assert chosen == {"train": "train", "test": "validation"}


def test_an_unknown_split_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"data\.test: x has no split 'tset'; did you mean 'test'\?"):
        choose(DataConfig(test="tset"), ("train", "test"), source="x")
    with pytest.raises(DataError, match=r"data\.train: x has no split 'train'"):
        choose(DataConfig(), ("forget", "retain"), source="x")


def test_only_strict_sources_must_have_an_aliased_split() -> None:
    config = DataConfig(train="train", test="test")
    assert choose(config, ("train",), source="x") == {"train": "train"}
    with pytest.raises(DataError, match=r"data\.test: x has no split 'test'"):
        choose(config, ("train",), source="x", strict=True)


def test_a_directory_of_standard_names_needs_no_setting(tmp_path: Path) -> None:
    lay(tmp_path, "train.csv", "dev.csv", "test.csv", "test_hard.csv", "README.txt")
    expected = {"train": "train.csv", "validation": "dev.csv", "test": "test.csv"}
    assert found(tmp_path) == found(tmp_path, train="train", validation="validation", test="test") == expected


def test_hub_names_mean_the_files_of_the_same_role(tmp_path: Path) -> None:
    lay(tmp_path, "train-00000-of-00001.csv", "dev.csv", "test.csv")
    assert found(tmp_path, train="train", test="validation") == {
        "train": "train-00000-of-00001.csv",
        "test": "dev.csv",
    }


@pytest.mark.parametrize("below", ["", "glue"])
@pytest.mark.parametrize("train", ["glue/train.csv", "train.csv", "tr*n.csv", "*/train.csv"])
def test_a_file_is_found_from_its_folder_and_from_above(tmp_path: Path, below: str, train: str) -> None:
    lay(tmp_path, "glue/train.csv", "glue/dev.csv", "other/x.csv", "other/validation.csv")
    assert found(tmp_path / below, train=train, test="dev.csv") == {"train": "glue/train.csv", "test": "glue/dev.csv"}


def test_standard_names_are_looked_for_only_beside_the_train_file(tmp_path: Path) -> None:
    lay(tmp_path, "a/train.csv", "b/validation.csv", "b/test.csv")
    assert found(tmp_path, train="a/train.csv", test="test") == {"train": "a/train.csv"}


def test_a_bare_stem_names_its_file(tmp_path: Path) -> None:
    lay(tmp_path, "retain90.csv", "forget10.csv", "forget05.csv")
    assert found(tmp_path, train="retain90", test="forget10") == {"train": "retain90.csv", "test": "forget10.csv"}


def test_a_file_of_splits_serves_every_role(tmp_path: Path) -> None:
    lay_splits(tmp_path, "full.json", "val", "train", "test", "oos_test")
    expected = {"train": "full.json:train", "validation": "full.json:val", "test": "full.json:test"}
    assert found(tmp_path) == found(tmp_path / "full.json") == expected
    assert found(tmp_path, train="train", validation="validation", test="test") == expected
    assert found(tmp_path, test="oos_test")["test"] == "full.json:oos_test"


def test_file_chooses_among_several_files_of_splits(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("full.json", "plus.json"):
        lay_splits(tmp_path / "sub", name, "train", "test")
    with pytest.raises(DataError, match=r"data\.file: .* 2 files .*full\.json, sub/plus\.json; name one"):
        found(tmp_path)
    assert found(tmp_path, file="plus.json") == {"train": "plus.json:train", "test": "plus.json:test"}
    assert found(tmp_path, file="sub/full.json")["train"] == "full.json:train"
    with pytest.raises(DataError, match=r"data\.file: no data file 'pluss\.json'.*did you mean 'plus\.json'"):
        found(tmp_path, file="pluss.json")


def test_file_is_ignored_unless_path_is_a_directory(tmp_path: Path) -> None:
    lay(tmp_path, "mine.csv")
    assert found(tmp_path / "mine.csv", file="data_full.json.gz") == {"train": "mine.csv"}


def test_a_file_of_splits_may_be_joined_by_another_file(tmp_path: Path) -> None:
    lay_splits(tmp_path, "full.json", "train", "val", "test")
    lay(tmp_path, "hard.csv")
    assert found(tmp_path, test="hard.csv") == {
        "train": "full.json:train",
        "validation": "full.json:val",
        "test": "hard.csv",
    }


def test_the_only_file_is_the_train_split(tmp_path: Path) -> None:
    lay(tmp_path, "whatever.csv", "README.txt")
    assert found(tmp_path) == found(tmp_path, train="train", test="test") == {"train": "whatever.csv"}


def test_one_file_may_be_joined_by_a_named_sibling(tmp_path: Path) -> None:
    lay(tmp_path, "mine.csv", "dev.csv")
    assert found(tmp_path / "mine.csv", train="train", test="dev.csv") == {"train": "mine.csv", "test": "dev.csv"}
    assert found(tmp_path / "mine.csv", train="train", test="validation") == {"train": "mine.csv"}
    with pytest.raises(DataError, match=r"data\.test: no data file 'devv2\.csv'"):
        found(tmp_path / "mine.csv", test="devv2.csv")


def test_a_named_split_that_is_held_out_instead_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found(lay(tmp_path, "train.csv"), train="train", test="test")
    assert [record.getMessage() for record in caplog.records] == [
        f"data.test: 'test' is not in {tmp_path}; held out of train"
    ]


def test_ambiguity_lists_the_matches(tmp_path: Path) -> None:
    lay(tmp_path, "a/train.csv", "b/train.csv")
    for settings in ({}, {"train": "train"}, {"train": "train.csv"}):
        with pytest.raises(DataError, match=r"data\.train: .* matches 2 files .*a/train\.csv, b/train\.csv"):
            found(tmp_path, **settings)


@pytest.mark.parametrize("train", ["trian.csv", "trainn"])
def test_a_misspelt_file_is_not_replaced_by_another(tmp_path: Path, train: str) -> None:
    lay(tmp_path, "train.csv", "dev.csv")
    with pytest.raises(DataError, match=r"data\.train: no data file .*did you mean 'train\.csv'"):
        found(tmp_path, train=train)
    with pytest.raises(DataError, match=r"data\.test: no data file 'deev\.csv'.*did you mean 'dev\.csv'"):
        found(tmp_path, test="deev.csv")


def test_slices_and_missing_paths_are_refused(tmp_path: Path) -> None:
    lay(tmp_path, "train.csv")
    with pytest.raises(DataError, match=r"data\.train: 'train\[:10%\]' is a slice"):
        found(tmp_path, train="train[:10%]")
    with pytest.raises(DataError, match=r"data\.path: .*did you mean 'train\.csv'"):
        found(tmp_path / "trian.csv")
