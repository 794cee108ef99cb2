"""The splits of a run: read from wherever they are, checked, held out where missing, cut to size."""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lora.errors import ConfigError, DataError, nearest
from tasks.builtin import builtin_tables
from tasks.config import DataConfig
from tasks.examples import Examples, Splits
from tasks.files import Table
from tasks.hub import read_hub
from tasks.sources import ROLES, choose, read_path

Kind = Literal["classification", "causal-lm"]
Names = str | tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """The wanted columns of a table, checked row by row; labels are still names."""

    table: Table
    numbers: Sequence[int]
    """Row of the table that each row came from, for messages."""
    texts: tuple[str, ...]
    labels: tuple[str, ...] | None = None
    prompts: tuple[str, ...] | None = None
    owners: tuple[str, ...] | None = None


def load_splits(config: DataConfig, *, kind: Kind, seed: int, own: bool = False) -> Splits:
    """Load train, validation and test examples as `data:` describes them.

    Label names are `data.labels`, else those of the whole train split, in numeric order if all are numbers, else
    sorted. A split that is not given is held out of train: rows drawn with `seed`, disjoint, the rest stays in train.
    With `own` all training rows stay there, and the other splits are empty. Equal arguments and equal data give equal
    splits on every platform. Raises DataError for data and ConfigError for settings that cannot be used.
    """
    if kind == "classification" and config.prompt is not None:
        raise ConfigError("data.prompt is for task.kind: causal-lm; leave it out or set task.kind=causal-lm")
    tables = _read(config, kind=kind, seed=seed)
    if own:
        tables = {"train": tables["train"]}
    rows = {role: _rows(table, config, kind=kind, role=role) for role, table in tables.items()}
    names = (config.labels if kind == "classification" else None) or label_order(rows["train"].labels or ())
    if kind == "classification" and len(names) < 2:
        raise DataError(f"{tables['train'].source}: every label is '{names[0]}'; classification needs two or more")
    given = {role: _encode(rows[role], names) for role in rows}
    if own:
        nothing = given["train"].take([])
        whole: Mapping[str, Examples] = {**given, "validation": nothing, "test": nothing}
    else:
        whole = hold_out(given, share=config.holdout, seed=seed)
    return Splits(
        train=_at_most(whole["train"], config.max_train, salt=f"{seed}:max_train"),
        validation=_at_most(whole["validation"], config.max_eval, salt=f"{seed}:max_validation"),
        test=_at_most(whole["test"], config.max_eval, salt=f"{seed}:max_test"),
        label_names=names,
    )


def labelled_rows(config: DataConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return texts and label names of the training rows, in their order; one label may be all there is.

    Raises DataError and ConfigError as `load_splits` does.
    """
    rows = _rows(_read(config, kind="classification", seed=0)["train"], config, kind="classification", role="train")
    return rows.texts, rows.labels or ()


def label_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct labels in their fixed order: numbers by value, anything else as strings."""
    names = set(labels)
    if all(re.fullmatch(r"[+-]?\d+(\.\d+)?", name) for name in names):
        return tuple(sorted(names, key=lambda name: (float(name), name)))
    return tuple(sorted(names))


def hold_out(given: Mapping[str, Examples], *, share: float, seed: int) -> dict[str, Examples]:
    """Complete the splits: each that is missing takes `round(share * len(train))` rows of train, drawn with `seed`.

    Guarantee: the completed splits hold every given row exactly once. Raises DataError if a split would be empty.
    """
    train = given["train"]
    absent = [role for role in ROLES if role not in given]
    size = round(share * len(train))
    if absent and (size == 0 or size * len(absent) >= len(train)):
        raise DataError(
            f"data.holdout: {share:g} of {len(train)} training rows leaves an empty split ({' and '.join(absent)} are "
            f"held out of train); give data.{absent[0]}=..., change data.holdout, or add rows"
        )
    order = _shuffled(len(train), salt=f"{seed}:holdout")
    carved = {role: sorted(order[i * size : (i + 1) * size]) for i, role in enumerate(absent)}
    kept = sorted(order[size * len(absent) :])
    return {**given, "train": train.take(kept), **{role: train.take(rows) for role, rows in carved.items()}}


def _shuffled(count: int, *, salt: str) -> list[int]:
    order = list(range(count))
    random.Random(salt).shuffle(order)  # a string seeds by SHA-512: the same everywhere
    return order


def _at_most(examples: Examples, limit: int | None, *, salt: str) -> Examples:
    if limit is None or len(examples) <= limit:
        return examples
    return examples.take(sorted(_shuffled(len(examples), salt=salt)[:limit]))


def _read(config: DataConfig, *, kind: Kind, seed: int) -> dict[str, Table]:
    if config.path is not None:
        return read_path(config, fields=_plain_fields(config, kind))
    if config.name != "builtin":
        return read_hub(config)
    tables = builtin_tables(kind, seed=seed)
    return {role: tables[name] for role, name in choose(config, ROLES, source="builtin", strict=True).items()}


def _plain_fields(config: DataConfig, kind: Kind) -> tuple[str, ...]:
    """Name the values of rows that are plain lists: [text, label], [prompt, text] or [text]."""
    text = _names(config.text)[0]
    if kind == "classification":
        return (text, _names(config.label)[0])
    return (_names(config.prompt)[0], text) if config.prompt else (text,)


def _names(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _rows(table: Table, config: DataConfig, *, kind: Kind, role: str) -> Rows:
    """Take the wanted columns of a split; rows with a dropped label are left out, any other bad row is an error."""
    everything = range(len(table))
    if not everything:
        raise DataError(f"{table.source}: there is no row")
    labels = _values(table, config.label, everything, key="label") if kind == "classification" else None
    rows = _kept(labels, config.drop_labels, table) if labels and config.drop_labels else everything
    return Rows(
        table=table,
        numbers=rows,
        texts=_values(table, config.text, rows, key="text"),
        labels=labels and tuple(labels[row] for row in rows),
        prompts=_values(table, config.prompt, rows, key="prompt") if config.prompt else None,
        owners=_owners(table, config, rows, role=role),
    )


def _kept(labels: Sequence[str], dropped: Sequence[str], table: Table) -> tuple[int, ...]:
    kept = tuple(row for row, label in enumerate(labels) if label not in dropped)
    if not kept:
        raise DataError(f"{table.source}: data.drop_labels ({', '.join(dropped)}) leaves no row")
    return kept


def _owners(table: Table, config: DataConfig, rows: Sequence[int], *, role: str) -> tuple[str, ...] | None:
    names = config.owner or (("user", "speaker") if config.path is None and config.name == "builtin" else None)
    if not names or (role != "train" and not any(name in table.columns for name in _names(names))):
        return None  # only training rows are divided among clients
    return _values(table, names, rows, key="owner")


def _values(table: Table, names: Names, rows: Sequence[int], *, key: str) -> tuple[str, ...]:
    """Return the first of the named columns that the table has, as strings that are not empty."""
    column = next((name for name in _names(names) if name in table.columns), None)
    if column is None:
        tried = " or ".join(f"'{name}'" for name in _names(names))
        has = ", ".join(f"'{name}'" for name in table.columns)
        close = nearest(names, table.columns) if isinstance(names, str) and len(table.columns) > 1 else ""
        raise DataError(f"{table.source}: no column {tried}{close}; it has {has}; set data.{key}=<one of them>")
    values = table.columns[column]
    return tuple(_value(values[row], table, row, column) for row in rows)


def _value(value: object, table: Table, row: int, column: str) -> str:
    if isinstance(value, (str, int, float)):
        value = str(value).strip()
        if value:
            return value
    if value is None or value == "":
        raise DataError(f"{table.where(row)}: '{column}' is missing or empty; fill it in or remove the row")
    raise DataError(f"{table.where(row)}: '{column}' is a {type(value).__name__}; text or a number is expected")


def _encode(rows: Rows, names: tuple[str, ...]) -> Examples:
    labels = None if rows.labels is None else _indices(rows, rows.labels, names)
    return Examples(texts=rows.texts, labels=labels, prompts=rows.prompts, owners=rows.owners)


def _indices(rows: Rows, labels: Sequence[str], names: tuple[str, ...]) -> tuple[int, ...]:
    index = {name: i for i, name in enumerate(names)}
    for label, number in zip(labels, rows.numbers, strict=True):
        if label not in index:
            raise DataError(
                f"{rows.table.where(number)}: label '{label}' is not among the {len(names)} labels of data.labels "
                f"or the train split{nearest(label, names)}; mend the row, or leave the label out with data.drop_labels"
            )
    return tuple(index[label] for label in labels)
