"""Rows out of a data set of the Hugging Face hub, by way of `datasets`."""

from typing import TYPE_CHECKING, Any

from lora.errors import DataError
from tasks.config import DataConfig
from tasks.files import Table, text_table
from tasks.sources import ROLES, choose

if TYPE_CHECKING:
    from datasets import Dataset

REMEDY = "give a local copy with data.path=... (a CSV, TSV, JSON, JSONL or TXT file, or a directory of them)"


def read_hub(config: DataConfig) -> dict[str, Table]:
    """Read the splits of `data.name` by role; a role that the hub has no split for is left out.

    A split may also be a slice such as `train[:10%]`. Class labels become their names. A split that is one long text
    (tiny_shakespeare) is read as a TXT file is. Raises DataError for anything that fails, with what to do instead.
    """
    loaded = _load(config)
    slices = [name for role in ROLES if (name := getattr(config, role)) and ("[" in name or "+" in name)]
    chosen = choose(config, (*loaded, *slices), source=f"hub data set {config.name}", strict=True)
    return {
        role: _table(
            loaded[name] if name in loaded else _load(config, split=name), f"{config.name}, split {name}", config
        )
        for role, name in chosen.items()
    }


def _load(config: DataConfig, **split: str) -> Any:
    from datasets import load_dataset

    try:
        try:
            return load_dataset(config.name, config.config, **split)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # The hub keeps a converted copy of data sets that came as a Python script.
            return load_dataset(config.name, config.config, revision="refs/convert/parquet", **split)
    except Exception as error:  # the hub client raises many kinds, and its users can do one thing about them
        which = f"'{config.name}'" + (f", configuration '{config.config}'" if config.config else "")
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        raise DataError(f"data.name: the hub data set {which} cannot be loaded ({reason}); {REMEDY}") from error


def _table(data: "Dataset", source: str, config: DataConfig) -> Table:
    columns = _columns(data)
    names = (config.text,) if isinstance(config.text, str) else config.text
    text = next((columns[name][0] for name in names if len(data) == 1 and name in columns), None)
    if isinstance(text, str) and "\n\n" in text:
        return text_table(text, source)
    return Table(source, columns)


def _columns(data: "Dataset") -> dict[str, list[object]]:
    """Return the scalar columns, class labels as names and an absent label (-1) as None."""
    from datasets import ClassLabel, Value

    scalar = [name for name, feature in data.features.items() if isinstance(feature, (ClassLabel, Value))]
    columns: dict[str, list[object]] = data.select_columns(scalar).with_format(None).to_dict()
    for name in scalar:
        feature = data.features[name]
        if isinstance(feature, ClassLabel):
            columns[name] = [_class_name(feature.names, value) for value in columns[name]]
    return columns


def _class_name(names: list[str], value: object) -> str | None:
    return names[value] if isinstance(value, int) and value >= 0 else None
