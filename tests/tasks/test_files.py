import csv
import gzip
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.errors import DataError
from tasks.files import Table, read_file, text_table

CELL = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=12)
ROWS = st.lists(st.tuples(CELL, CELL), min_size=1, max_size=6)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def read(folder: Path, name: str, content: str | bytes) -> Table:
    table = read_file(write(folder, name, content))
    assert isinstance(table, Table)
    return table


def columns(table: Table) -> dict[str, list[object]]:
    return {name: list(values) for name, values in table.columns.items()}


EXPECTED = {"text": ["one, two", 'a "word"'], "label": ["0", "1"]}
SAME_ROWS = {
    "x.csv": 'text,label\n"one, two",0\n"a ""word""",1\n',
    "x.tsv": 'text\tlabel\r\none, two\t0\r\na "word"\t1\r\n',
    "x.jsonl": '{"text": "one, two", "label": "0"}\n\n{"text": "a \\"word\\"", "label": "1"}\n',
    "rows.json": '[{"text": "one, two", "label": "0"}, {"text": "a \\"word\\"", "label": "1"}]',
    "lists.json": '[["one, two", "0"], ["a \\"word\\"", "1"]]',
    "columns.json": '{"text": ["one, two", "a \\"word\\""], "label": ["0", "1"]}',
    "lines.json": '{"text": "one, two", "label": "0"}\n{"text": "a \\"word\\"", "label": "1"}\n',
}


@pytest.mark.parametrize("name", SAME_ROWS)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, bom: bytes, suffix: str) -> None:
    assert columns(read(tmp_path, name + suffix, bom + SAME_ROWS[name].encode())) == EXPECTED


@given(ROWS)
def test_csv_reads_back_what_the_csv_module_writes(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    table = read(tmp_path_factory.mktemp("csv"), "x.csv", buffer.getvalue())
    assert list(zip(*columns(table).values(), strict=True)) == rows


@given(ROWS)
def test_jsonl_and_json_rows_agree(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    folder = tmp_path_factory.mktemp("json")
    objects = [{"text": text, "label": label} for text, label in rows]
    lines = read(folder, "x.jsonl", "\n".join(json.dumps(row) for row in objects))
    for indent in (None, 2):
        listed = read(folder, "x.json", json.dumps(objects, indent=indent))
        assert columns(listed) == columns(lines) == {"text": [r[0] for r in rows], "label": [r[1] for r in rows]}


def test_tsv_has_no_quotes_and_breaks_only_at_newlines(tmp_path: Path) -> None:
    table = read(tmp_path, "x.tsv", 'label\ttext\n0\t"open\n1\tform\x0cfeed\u2028 kept\n')
    assert columns(table)["text"] == ['"open', "form\x0cfeed\u2028 kept"]


def test_json_of_splits_gives_a_table_per_split_with_lines(tmp_path: Path) -> None:
    document = {"train": [["hi, [you]", "a"], ['so \\ "]', "b"]], "oos_test": [["x", "oos"]], "none": []}
    splits = read_file(write(tmp_path, "x.json", json.dumps(document, indent=4)))
    assert isinstance(splits, dict)
    assert list(splits) == ["train", "oos_test"]
    assert columns(splits["train"]) == {"text": ["hi, [you]", 'so \\ "]'], "label": ["a", "b"]}
    assert splits["train"].where(1) == "x.json (split 'train'), line 7"
    assert splits["oos_test"].where(0) == "x.json (split 'oos_test'), line 13"


def test_a_csv_record_is_named_by_its_first_line(tmp_path: Path) -> None:
    table = read(tmp_path, "x.csv", 'text,label\n"two\nlines",0\n\nlast,1\n')
    assert [table.where(row) for row in range(2)] == ["x.csv, line 2", "x.csv, line 5"]


MALFORMED = {
    "too few fields": ("x.csv", "text,label\na,0\nb\n", r"x\.csv, line 3: 1 fields where the header has 2"),
    "too many fields": ("x.tsv", "text\tlabel\na\t0\t9\n", r"x\.tsv, line 2: 3 fields where the header has 2"),
    "open quote": ("x.csv", 'text,label\na,0\n"b,1\n', r"x\.csv, line 3: not valid CSV"),
    "same column twice": ("x.csv", "text,text\na,0\n", r"x\.csv, line 1: the header names column 'text' twice"),
    "only a header": ("x.tsv", "text\tlabel\n", "a header but no row"),
    "bad jsonl": ("x.jsonl", '{"text": "a"}\n\n{"text": \n', r"x\.jsonl, line 3: not valid JSON"),
    "bad json": ("x.json", '[\n{"text": "a"},\n{"text" "b"}]', r"x\.json, line 3: not valid JSON"),
    "bad second json line": ("x.json", '{"text": "a"}\n{"text" "b"}\n', r"x\.json, line 2: not valid JSON"),
    "scalar row": ("x.jsonl", '{"text": "a"}\n7\n', r"x\.jsonl, line 2: a row is an object or a list, not 7"),
    "short plain row": ("x.json", '[["a", "0"],\n["b"]]', r"x\.json, line 2: a plain row has 1 values"),
    "uneven columns": ("x.json", '{"text": ["a", "b"], "label": ["0"]}', "different lengths: text 2, label 1"),
    "scalar document": ("x.json", "3", "a list of rows, an object of columns"),
    "no rows": ("x.json", "[]", "there is no row"),
    "empty": ("x.csv", "", "the file is empty"),
    "blank": ("x.txt", " \n\n", "the file is empty"),
    "latin-1": ("x.csv", b"text,label\na,0\ncaf\xe9,1\n", r"x\.csv, line 3: byte 0xe9 is not UTF-8"),
    "latin-1 after a BOM": ("x.csv", b"\xef\xbb\xbft\n\xe9\n", r"x\.csv, line 2: byte 0xe9"),
    "unknown kind": ("x.parquet", "PAR1", r"use one of \.csv, \.tsv"),
    "giant number": ("x.jsonl", "{}\n" + "9" * 5000, r"x\.jsonl, line 2: JSON that cannot be read"),
    "too deep": ("x.json", "[" * 200_000, r"x\.json, line 1: JSON that cannot be read"),
    "mute speakers": ("x.txt", "A:\n\nB:\n", "speakers but no speech"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_input_is_named_by_file_and_line(tmp_path: Path, case: str) -> None:
    name, content, message = MALFORMED[case]
    with pytest.raises(DataError, match=message):
        read_file(write(tmp_path, name, content))


@pytest.mark.parametrize("keep", [5, 30, -1])
def test_a_cut_gzip_is_an_error(tmp_path: Path, keep: int) -> None:
    whole = gzip.compress(b"text,label\n" + b"".join(b"row %d,0\n" % i for i in range(99)))
    (tmp_path / "x.csv.gz").write_bytes(whole[:keep])
    with pytest.raises(DataError, match=r"x\.csv\.gz: the gzip stream is cut off or damaged"):
        read_file(tmp_path / "x.csv.gz")


def test_plain_bytes_under_a_gz_name_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.csv.gz").write_bytes(b"text,label\na,0\n")
    with pytest.raises(DataError, match=r"x\.csv\.gz: cannot be read"):
        read_file(tmp_path / "x.csv.gz")


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path, "train.csv", "text,label\na,0\n")
    with pytest.raises(DataError, match=r"did you mean 'train\.csv'"):
        read_file(tmp_path / "trian.csv")


def test_speeches_have_speakers_and_lines() -> None:
    play = "FIRST:\nSpeak: now.\nAnd again.\n\nSECOND:\n\nTHIRD MAN: \nAye.\n\nstill talking\n"
    table = text_table(play, "play")
    assert columns(table) == {
        "speaker": ["FIRST", "THIRD MAN"],
        "text": ["Speak: now.\nAnd again.", "Aye.\n\nstill talking"],
    }
    assert table.where(1) == "play, line 7"


def test_a_play_cut_inside_a_speech_keeps_its_first_words() -> None:
    table = text_table("rest of a speech\n\nA:\none\n\nB:\ntwo", "cut")
    assert columns(table) == {"speaker": ["unknown", "A", "B"], "text": ["rest of a speech", "one", "two"]}


def test_prose_is_read_by_paragraph_and_a_list_by_line() -> None:
    prose = text_table("One\nparagraph.\n\n\nHe said:\nyes.\n \nThe end.\n", "prose")
    assert columns(prose) == {"text": ["One\nparagraph.", "He said:\nyes.", "The end."]}
    assert prose.lines == [1, 5, 8]
    listing = text_table("first\nsecond\nthird", "list")
    assert columns(listing) == {"text": ["first", "second", "third"]}
    assert listing.lines == [1, 2, 3]


DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not beside the checkout")
def test_real_files_have_the_rows_that_their_readmes_state() -> None:
    clinc = read_file(DATA / "clinc150" / "data_full.json.gz")
    assert isinstance(clinc, dict)
    sizes = {"oos_val": 100, "val": 3000, "train": 15000, "oos_test": 1000, "test": 4500, "oos_train": 100}
    assert {name: len(table) for name, table in clinc.items()} == sizes
    for name, rows in {
        "glue_sst2/train.tsv.gz": 67349,
        "glue_sst2/dev.tsv.gz": 872,
        "gsm8k/train.jsonl.gz": 7473,
    }.items():
        assert len(table_of(DATA / name)) == rows
    assert len(table_of(DATA / "movielens_latest_small" / "ratings.csv.gz")) == 100836
    assert "" not in table_of(DATA / "shakespeare" / "tinyshakespeare.txt.gz").columns["text"]


def table_of(path: Path) -> Table:
    table = read_file(path)
    assert isinstance(table, Table)
    return table
