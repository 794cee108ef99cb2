import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.errors import ConfigError, DataError
from tasks.config import DataConfig
from tasks.data import hold_out, label_order, labelled_rows, load_splits
from tasks.examples import Examples, Splits


def csv_file(folder: Path, name: str, rows: list[tuple[str, ...]], header: str = "text,label") -> str:
    (folder / name).write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")
    return str(folder / name)


def many(count: int, start: int = 0) -> list[tuple[str, ...]]:
    return [(f"text {i}", "yes" if i % 2 else "no") for i in range(start, start + count)]


def classify(path: str | Path, seed: int = 0, **settings: object) -> Splits:
    config = DataConfig.model_validate({"path": str(path), **settings})
    return load_splits(config, kind="classification", seed=seed)


def rows_of(examples: Examples) -> Counter[tuple[object, ...]]:
    columns = (examples.texts, examples.labels or [None] * len(examples), examples.owners or [None] * len(examples))
    return Counter(zip(*columns, strict=True))


# --- holding out -----------------------------------------------------------------------------------------------------

EXAMPLES = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2)), min_size=8, max_size=60).map(
    lambda rows: Examples(texts=tuple(r[0] for r in rows), labels=tuple(r[1] for r in rows))
)


@given(train=EXAMPLES, given_roles=st.sets(st.sampled_from(["validation", "test"])), seed=st.integers())
def test_held_out_splits_hold_every_row_exactly_once(train: Examples, given_roles: set[str], seed: int) -> None:
    other = Examples(texts=("other",), labels=(0,))
    before = {"train": train, **dict.fromkeys(given_roles, other)}
    after = hold_out(before, share=0.2, seed=seed)
    assert sum((rows_of(part) for part in after.values()), Counter()) == sum(map(rows_of, before.values()), Counter())
    absent = {"validation", "test"} - given_roles
    assert all(len(after[role]) == round(0.2 * len(train)) for role in absent)
    assert all(after[role] is other for role in given_roles)
    assert after == hold_out(before, share=0.2, seed=seed)


def test_held_out_splits_are_disjoint_rows_and_depend_on_the_seed() -> None:
    train = Examples(texts=tuple(map(str, range(1000))))
    one, two = (hold_out({"train": train}, share=0.1, seed=seed) for seed in (1, 2))
    texts = [set(part.texts) for part in one.values()]
    assert not texts[0] & texts[1] and not texts[1] & texts[2] and not texts[0] & texts[2]
    assert set(one["test"].texts) != set(two["test"].texts)


def test_holding_out_in_excess_or_of_nothing_is_refused(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "x.csv", many(4))
    with pytest.raises(DataError, match=r"data\.holdout: 0\.1 of 4 training rows leaves an empty split"):
        classify(path)
    with pytest.raises(DataError, match=r"leaves an empty split"):
        classify(path, holdout=0.49)
    assert len(classify(path, holdout=0.25).test) == 1


PRINT_SPLITS = """
import sys
from tasks.config import DataConfig
from tasks.data import load_splits
for path in (None, sys.argv[1]):
    print(load_splits(DataConfig(path=path, max_train=50), kind="classification", seed=3))
"""


def test_splits_do_not_depend_on_the_hash_seed_of_the_process(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "x.csv", many(200))
    root = Path(__file__).parents[2]
    printed = {
        subprocess.run(
            [sys.executable, "-c", PRINT_SPLITS, path],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(printed) == 1 and "text 1" in printed.pop()


# --- labels ----------------------------------------------------------------------------------------------------------


@given(st.sets(st.integers(-50, 50), min_size=1))
def test_numbers_are_ordered_by_value(labels: set[int]) -> None:
    assert label_order(map(str, labels)) == tuple(map(str, sorted(labels)))


def test_names_are_ordered_as_strings() -> None:
    assert label_order(["b", "10", "9", "b", "a"]) == ("10", "9", "a", "b")


def test_labels_index_the_names_of_the_train_split(tmp_path: Path) -> None:
    csv_file(tmp_path, "train.csv", [("a", "10"), ("b", "9"), ("c", "10")])
    csv_file(tmp_path, "test.csv", [("d", "9")])
    csv_file(tmp_path, "dev.csv", [("e", "10")])
    splits = classify(tmp_path)
    assert splits.label_names == ("9", "10")
    assert (splits.train.labels, splits.validation.labels, splits.test.labels) == ((1, 0, 1), (1,), (0,))


def test_int_and_string_labels_are_the_same_labels(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(
        json.dumps({"train": [["a", 0], ["b", 1]], "val": [["c", "1"]], "test": [["d", 0]]})
    )
    splits = classify(tmp_path)
    assert (splits.label_names, splits.validation.labels) == (("0", "1"), (1,))


def test_an_unseen_label_names_its_line_and_the_nearest(tmp_path: Path) -> None:
    csv_file(tmp_path, "train.csv", many(20))
    csv_file(tmp_path, "test.csv", [("a", "yes"), ("b", "yess")])
    with pytest.raises(DataError, match=r"test\.csv, line 3: label 'yess' is not among the 2 .*did you mean 'yes'"):
        classify(tmp_path)


def test_agreed_labels_come_in_the_agreed_order(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "all.csv", many(20))
    found = set(classify(path).label_names)
    agreed = ("never-seen", *sorted(found, reverse=True))
    splits = classify(path, labels=agreed)
    assert splits.label_names == agreed
    plain = classify(path)
    assert splits.train.labels is not None and plain.train.labels is not None
    assert [agreed[k] for k in splits.train.labels] == [plain.label_names[k] for k in plain.train.labels]


def test_a_label_that_was_not_agreed_is_named(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "all.csv", [("one", "tea"), ("two", "milk"), ("three", "tee")])
    with pytest.raises(DataError, match=r"label 'tee' is not among the 2 labels.*did you mean 'tea'"):
        classify(path, labels=("tea", "milk"))


@pytest.mark.parametrize("labels", [("one",), ("a", "b", "a")])
def test_agreed_labels_are_two_or_more_and_distinct(labels: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="two or more labels"):
        DataConfig(labels=labels)


def test_rows_of_one_label_can_be_read_with_its_name(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "one.csv", [("hello", "greeting"), ("good day", "greeting")])
    assert labelled_rows(DataConfig(path=path)) == (("hello", "good day"), ("greeting", "greeting"))
    with pytest.raises(DataError, match="no column 'text'"):
        labelled_rows(DataConfig(path=csv_file(tmp_path, "other.csv", [("a", "b")], header="words,label")))


def test_a_client_s_own_rows_all_train(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "all.csv", many(20))
    splits = load_splits(DataConfig(path=path), kind="classification", seed=0, own=True)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (20, 0, 0)
    csv_file(tmp_path, "test.csv", many(3))
    assert len(load_splits(DataConfig(path=path), kind="classification", seed=0, own=True).test) == 0


def test_label_names_do_not_depend_on_sampling(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "x.csv", [(f"t{i}", f"label {i}") for i in range(40)])
    splits = classify(path, max_train=1)
    assert len(splits.label_names) == 40
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [1, 4, 4]


def test_one_label_alone_cannot_be_classified(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.csv: every label is 'yes'"):
        classify(csv_file(tmp_path, "x.csv", [("a", "yes")] * 20))


def test_dropped_labels_leave_every_split(tmp_path: Path) -> None:
    csv_file(tmp_path, "train.csv", [("a", "x"), ("b", "y"), ("", "oos")])
    csv_file(tmp_path, "dev.csv", [("c", "x"), ("d", "oos")])
    csv_file(tmp_path, "test.csv", [("e", "oos"), ("f", "y")])
    splits = classify(tmp_path, drop_labels=["oos", "never there"])
    assert splits.label_names == ("x", "y")
    assert (splits.train.texts, splits.validation.texts, splits.test.texts) == (("a", "b"), ("c",), ("f",))
    csv_file(tmp_path, "test.csv", [("e", "oos")])
    with pytest.raises(DataError, match=r"test\.csv: data\.drop_labels \(oos\) leaves no row"):
        classify(tmp_path, drop_labels=["oos"])


# --- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [("only text,", "'label' is missing or empty"), (" ,yes", "'text' is missing or empty")],
)
def test_an_empty_cell_is_named_by_its_line(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "x.csv").write_text(f"text,label\na,no\n{row}\n")
    with pytest.raises(DataError, match=rf"x\.csv, line 3: {message}"):
        classify(tmp_path)


def test_a_row_without_the_column_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl, line 2: 'label' is missing"):
        classify(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"text": ["a"], "label": 0}\n')
    with pytest.raises(DataError, match=r"x\.jsonl, line 1: 'text' is a list"):
        classify(tmp_path)


def test_a_missing_column_names_the_columns_and_the_setting(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "x.csv", many(20), header="body,label")
    with pytest.raises(DataError, match=r"x\.csv: no column 'text' or .*it has 'body', 'label'; set data\.text="):
        classify(path)
    with pytest.raises(DataError, match=r"no column 'bodi'; did you mean 'body'\?"):
        classify(path, text="bodi")
    assert classify(path, text="body").train.texts[0].startswith("text ")


def test_every_split_finds_its_own_first_column(tmp_path: Path) -> None:
    csv_file(tmp_path, "train.csv", many(20), header="sentence,label")
    csv_file(tmp_path, "dev.csv", many(3, start=90), header="content,label")
    assert classify(tmp_path, train="train", test="validation").test.texts == ("text 90", "text 91", "text 92")


def test_plain_rows_take_the_configured_names(tmp_path: Path) -> None:
    rows = [[f"t{i}", f"i{i % 2}"] for i in range(20)]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    assert classify(tmp_path, text="utterance", label=["intent", "label"]).label_names == ("i0", "i1")


def test_owners_are_needed_in_the_train_split_only(tmp_path: Path) -> None:
    csv_file(tmp_path, "train.csv", [("a", "0", "ann"), ("b", "1", "bob")] * 10, header="text,label,user")
    csv_file(tmp_path, "test.csv", [("c", "1")])
    splits = classify(tmp_path, owner="user")
    assert splits.train.owners is not None and set(splits.train.owners) == {"ann", "bob"}
    assert splits.test.owners is None and classify(tmp_path).train.owners is None
    with pytest.raises(DataError, match=r"train\.csv: no column 'usr'; did you mean 'user'"):
        classify(tmp_path, owner="usr")


def test_prompts_belong_to_causal_lm(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"q": f"q{i}", "answer": f"a{i}"}) for i in range(10)))
    config = DataConfig(path=str(tmp_path), prompt="q")
    splits = load_splits(config, kind="causal-lm", seed=0)
    assert splits.label_names == () and splits.train.labels is None and splits.train.prompts is not None
    pairs = {pair for part in (splits.train, splits.validation, splits.test) for pair in zip(part.prompts, part.texts)}  # type: ignore[arg-type]  # noqa: B905
    assert pairs == {(f"q{i}", f"a{i}") for i in range(10)}
    with pytest.raises(ConfigError, match=r"data\.prompt is for task\.kind: causal-lm"):
        load_splits(config, kind="classification", seed=0)


def test_limits_draw_without_touching_smaller_splits(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "x.csv", many(200))
    full, cut = classify(path), classify(path, max_train=50, max_eval=10)
    assert [len(part) for part in (cut.train, cut.validation, cut.test)] == [50, 10, 10]
    assert set(cut.train.texts) < set(full.train.texts) and set(cut.test.texts) < set(full.test.texts)
    assert cut == classify(path, max_train=50, max_eval=10) != classify(path, max_train=50, max_eval=10, seed=1)
    assert classify(path, max_train=1000) == full


def test_the_builtin_data_obeys_the_same_settings() -> None:
    splits = load_splits(DataConfig(drop_labels=("play music",), max_train=99), kind="classification", seed=0)
    assert "play music" not in splits.label_names and len(splits.label_names) == 11
    assert len(splits.train) == 99 and splits.train.owners is not None
    with pytest.raises(DataError, match=r"data\.train: builtin has no split 'my\.csv'"):
        load_splits(DataConfig(train="my.csv"), kind="classification", seed=0)


# --- real data -------------------------------------------------------------------------------------------------------

DATA = Path(__file__).parents[2].parent / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not beside the checkout")


@pytest.mark.data
@real
@pytest.mark.parametrize("below", ["", "clinc150"])
@pytest.mark.parametrize("file", ["data_full.json.gz", "data_oos_plus.json.gz"])
def test_clinc_from_either_folder_with_hub_names(below: str, file: str) -> None:
    settings = {"train": "train", "validation": "validation", "test": "test", "label": "intent", "config": "plus"}
    splits = classify(DATA / below, file=file, name="clinc_oos", drop_labels=["oos"], **settings)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [15000, 3000, 4500]
    assert len(splits.label_names) == 150 and "oos" not in splits.label_names


@pytest.mark.data
@real
@pytest.mark.parametrize(
    ("below", "train", "test"),
    [
        ("glue_sst2", "train", "validation"),
        ("glue_sst2", "train.tsv.gz", "dev.tsv.gz"),
        ("glue_sst2", "glue_sst2/train.tsv.gz", "glue_sst2/dev.tsv.gz"),
        ("", "glue_sst2/train.tsv.gz", "dev.tsv.gz"),
    ],
)
def test_sst2_reports_on_dev_and_holds_validation_out_of_train(below: str, train: str, test: str) -> None:
    splits = classify(DATA / below, train=train, test=test)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [67349 - 6735, 6735, 872]
    assert Counter(splits.test.labels) == {0: 428, 1: 444}


@pytest.mark.data
@real
def test_shakespeare_speeches_are_owned_by_their_speakers() -> None:
    config = DataConfig(path=str(DATA / "shakespeare"), name="tiny_shakespeare", owner="speaker")
    splits = load_splits(config, kind="causal-lm", seed=0)
    assert splits.train.texts[0].startswith("Before we proceed any further")
    assert splits.train.owners is not None and splits.train.owners[0] == "First Citizen"


@pytest.mark.data
@real
def test_question_answer_pairs_become_prompts_and_texts() -> None:
    gsm = DataConfig(path=str(DATA / "gsm8k"), prompt="question", train="train", test="test")
    splits = load_splits(gsm, kind="causal-lm", seed=0)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [7473 - 747, 747, 1319]
    assert splits.test.texts[0].endswith("#### 18")
    tofu = DataConfig(path=str(DATA / "tofu"), prompt="question", train="retain90", test="forget10")
    assert len(load_splits(tofu, kind="causal-lm", seed=0).test) == 400


@pytest.mark.data
@real
def test_ratings_are_ordered_classes_with_user_owners() -> None:
    settings = {"train": "ratings", "text": "movieId", "label": "rating", "owner": "userId"}
    splits = classify(DATA / "movielens_latest_small", **settings)
    assert splits.label_names[:3] == ("0.5", "1.0", "1.5") and len(splits.label_names) == 10
    assert splits.train.owners is not None and len(set(splits.train.owners)) == 610
