"""Rows out of CSV, TSV, JSON, JSONL and TXT files, plain or gzipped; a fault is named with its file and line."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora.errors import DataError, nearest

KINDS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt")
"""Suffixes that are understood, each also with `.gz`."""

Row = tuple[int, object]
"""1-based line on which the row starts, and the row: an object or a plain list."""


@dataclass(frozen=True)
class Table:
    """Named columns of equal length; a value that a row lacks is None."""

    source: str
    """What the rows came from, for messages: a file, or a split of a hub data set."""
    columns: Mapping[str, Sequence[object]]
    lines: Sequence[int] | None = None
    """1-based line of every row, where the source has lines."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def where(self, row: int) -> str:
        """Name row `row` (0-based) for a message: `train.csv, line 7`."""
        return f"{self.source}, line {self.lines[row]}" if self.lines else f"{self.source}, row {row + 1}"


def kind_of(path: Path) -> str:
    """Return the kind suffix of a data file, `.gz` aside; empty for a file of no known kind."""
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    return suffix if suffix in KINDS else ""


def stem_of(path: Path) -> str:
    """Return the file name in lower case without its kind suffix and `.gz`."""
    return Path(path.name.removesuffix(".gz")).stem.lower()


def read_file(path: Path, *, fields: tuple[str, ...] = ("text", "label")) -> Table | dict[str, Table]:
    """Read one data file: a table, or the tables by name of a JSON file that holds splits.

    `fields` names the values of rows that are plain lists. Raises DataError with the file and the 1-based line of
    whatever cannot be read: a missing, empty, cut-off, undecodable or malformed file.
    """
    kind = kind_of(path)
    if not kind:
        raise DataError(f"{path}: not a kind of data file that is read; use one of {', '.join(KINDS)}, also with .gz")
    text = _text(path)
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    if kind == ".json":
        return _json(text, path.name, fields)
    if kind == ".txt":
        return text_table(text, path.name)
    readers = {".csv": _csv, ".tsv": _tsv}
    return readers[kind](text, path.name) if kind in readers else _jsonl(text, path.name, fields)


def _text(path: Path) -> str:
    data = _bytes(path).removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save it as UTF-8") from None


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except FileNotFoundError:
        raise DataError(missing(path)) from None
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path}: the gzip stream is cut off or damaged ({error}); copy the file again") from None
    except OSError as error:  # gzip.BadGzipFile, a directory, no permission
        raise DataError(f"{path}: cannot be read ({error})") from None


def missing(path: Path) -> str:
    """Return the message for a path that does not exist, with the nearest name that does."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    there = sorted(entry.name for entry in folder.iterdir())[:200]
    lost = path.relative_to(folder).parts[0] if folder in path.parents else path.name
    return f"{path}: no such file or directory; {folder} has none of that name{nearest(lost, there)}"


# --- CSV and TSV -----------------------------------------------------------------------------------------------------


def _csv(text: str, source: str) -> Table:
    return _with_header(_csv_records(text, source, _separator(text)), source)


def _separator(text: str) -> str:
    """Return what separates the fields of the first line that is not blank: a comma, unless it has none but another."""
    header = next((line for line in text.split("\n") if line.strip()), "")
    return "," if "," in header else next((each for each in ";\t|" if each in header), ",")


def _csv_records(text: str, source: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses documents of more than 131,072 characters
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
    start = 1
    while True:
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{source}, line {start}: not valid CSV ({error})") from None
        yield start, record
        start = reader.line_num + 1


def _tsv(text: str, source: str) -> Table:
    return _with_header(_tsv_records(text), source)


def _tsv_records(text: str) -> Iterator[tuple[int, list[str]]]:
    # Not splitlines(), which would also break a line at a form feed or a Unicode line separator.
    for number, line in enumerate(text.split("\n"), 1):
        bare = line.removesuffix("\r")
        yield number, bare.split("\t") if bare else []


def _with_header(records: Iterator[tuple[int, list[str]]], source: str) -> Table:
    at, header = next((record for record in records if record[1]), (1, []))
    names = [name.strip() for name in header]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{source}, line {at}: the header names column '{twice[0]}' twice")
    lines, rows = [], []
    for line, record in records:
        if not record:  # a blank line
            continue
        if len(record) != len(names):
            raise DataError(f"{source}, line {line}: {len(record)} fields where the header has {len(names)}")
        lines.append(line)
        rows.append(record)
    if not rows:
        raise DataError(f"{source}: there is a header but no row")
    return Table(source, dict(zip(names, zip(*rows, strict=True), strict=True)), lines)


# --- JSON and JSONL --------------------------------------------------------------------------------------------------


def _jsonl(text: str, source: str, fields: tuple[str, ...]) -> Table:
    return _from_rows(_jsonl_rows(text, source), source, fields)


def _jsonl_rows(text: str, source: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _not_json(error, source, number) from None


def _not_json(error: Exception, source: str, first: int) -> DataError:
    """Name the line of a JSON fault in text that starts on line `first` of its file."""
    if isinstance(error, json.JSONDecodeError):
        line = first + error.lineno - 1
        return DataError(f"{source}, line {line}: not valid JSON ({error.msg}, column {error.colno})")
    return DataError(f"{source}, line {first}: JSON that cannot be read ({error})")  # too deep, or a giant number


def _json(text: str, source: str, fields: tuple[str, ...]) -> Table | dict[str, Table]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":  # one object per line: JSONL under the name .json
            return _jsonl(text, source, fields)
        raise _not_json(error, source, 1) from None
    if isinstance(document, list):
        return _from_rows(_numbered(document, _lines_of(text)[""]), source, fields)
    if isinstance(document, dict) and document and all(isinstance(value, list) for value in document.values()):
        if any(document.values()) and all(_are_rows(value) for value in document.values()):
            return _splits(document, _lines_of(text), source, fields)
        return _from_columns(document, source)
    raise DataError(
        f"{source}: JSON data is a list of rows, an object of columns ({{'text': [...], 'label': [...]}}) "
        f"or an object of splits ({{'train': [row, ...], 'test': [row, ...]}})"
    )


def _are_rows(values: list[object]) -> bool:
    return all(isinstance(value, (dict, list)) for value in values)


def _numbered(rows: list[object], lines: list[int]) -> Iterator[Row]:
    return zip(lines, rows, strict=True)


def _splits(
    document: dict[str, list[object]], lines: dict[str, list[int]], source: str, fields: tuple[str, ...]
) -> dict[str, Table]:
    return {
        name: _from_rows(_numbered(rows, lines[name]), f"{source} (split '{name}')", fields)
        for name, rows in document.items()
        if rows
    }


def _from_columns(document: dict[str, list[object]], source: str) -> Table:
    sizes = {name: len(values) for name, values in document.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"{source}: columns of different lengths: {', '.join(f'{k} {n}' for k, n in sizes.items())}")
    if not any(sizes.values()):
        raise DataError(f"{source}: there are columns but no row")
    return Table(source, document)


def _from_rows(rows: Iterable[Row], source: str, fields: tuple[str, ...]) -> Table:
    lines, objects = [], []
    for line, row in rows:
        lines.append(line)
        objects.append(_as_object(row, f"{source}, line {line}", fields))
    if not objects:
        raise DataError(f"{source}: there is no row")
    names = dict.fromkeys(name for row in objects for name in row)  # in the order of first appearance
    return Table(source, {name: [row.get(name) for row in objects] for name in names}, lines)


def _as_object(row: object, where: str, fields: tuple[str, ...]) -> Mapping[str, object]:
    if isinstance(row, dict):
        return row
    if not isinstance(row, list):
        raise DataError(f"{where}: a row is an object or a list, not {json.dumps(row)[:60]}")
    if len(row) != len(fields):
        raise DataError(f"{where}: a plain row has {len(row)} values; [{', '.join(fields)}] is expected")
    return dict(zip(fields, row, strict=True))


_SPACE = re.compile(r"[\s,]*")


def _lines_of(text: str) -> dict[str, list[int]]:
    """Return the line of every row of a valid document, by split; a bare list of rows has the split ""."""
    decoder = json.JSONDecoder()
    start = _skip(text, 0)
    if text[start] == "[":
        return {"": _row_lines(text, start, decoder)[0]}
    lines: dict[str, list[int]] = {}
    position = _skip(text, start + 1)
    while text[position] != "}":
        name, position = decoder.raw_decode(text, position)
        opening = text.index("[", position)
        lines[name], position = _row_lines(text, opening, decoder)
        position = _skip(text, position)
    return lines


def _row_lines(text: str, opening: int, decoder: json.JSONDecoder) -> tuple[list[int], int]:
    """Return the lines of the rows of the list that opens at `opening`, and the position after it."""
    lines, line, counted = [], text.count("\n", 0, opening) + 1, opening
    position = _skip(text, opening + 1)
    while text[position] != "]":
        line += text.count("\n", counted, position)
        counted = position
        lines.append(line)
        position = _skip(text, decoder.raw_decode(text, position)[1])
    return lines, position + 1


def _skip(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


# --- TXT -------------------------------------------------------------------------------------------------------------


def text_table(text: str, source: str) -> Table:
    """Read running text: speeches (columns speaker, text) or paragraphs (column text).

    Blocks are separated by blank lines. Where at least half of them start with a line that ends with ":", that line
    names the speaker; a block without one goes on with the speech before it, or is owned by "unknown" at the start
    of a cut text; a speaker's line without words is left out. Any other text gives one row per block, or one row per
    line when it has no blank line at all.
    """
    blocks = list(_blocks(text))
    named = sum(block[0].rstrip().endswith(":") for _, block in blocks)
    if named and 2 * named >= len(blocks):
        return _speeches(blocks, source)
    if len(blocks) == 1:
        blocks = [(blocks[0][0] + i, [line]) for i, line in enumerate(blocks[0][1])]
    texts = ["\n".join(block).strip() for _, block in blocks]
    return Table(source, {"text": texts}, [line for line, _ in blocks])


def _blocks(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line number and the lines of every run of lines that are not blank."""
    block: list[str] = []
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.rstrip()
        if line:
            block.append(line)
        elif block:
            yield number - len(block), block
            block = []
    if block:
        yield text.count("\n") + 2 - len(block), block


def _speeches(blocks: list[tuple[int, list[str]]], source: str) -> Table:
    speakers: list[str] = []
    texts: list[str] = []
    lines: list[int] = []
    for line, block in blocks:
        named = block[0].endswith(":")
        words = "\n".join(block[1:] if named else block).strip()
        if not named and texts:
            texts[-1] += "\n\n" + words
        elif words:
            speakers.append(block[0][:-1].strip() if named else "unknown")
            texts.append(words)
            lines.append(line)
    if not texts:
        raise DataError(f"{source}: there are speakers but no speech")
    return Table(source, {"speaker": speakers, "text": texts}, lines)
