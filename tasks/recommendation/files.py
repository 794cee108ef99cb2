"""Interactions out of files: a MovieLens folder, or any one table with user, item, rating, time and title."""

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from lora.errors import DataError, nearest
from tasks.files import Table, missing, read_file
from tasks.recommendation.builtin import builtin_interactions
from tasks.recommendation.config import RatingsConfig
from tasks.recommendation.interactions import Interactions, Items

_MOVIELENS = {"user": "userId", "item": "movieId", "rating": "rating", "time": "timestamp", "title": "title"}
_NO_GENRE = "(no genres listed)"
_UNITS = (
    *((1e11, 1, "seconds"), (1e14, 10**3, "milliseconds")),
    *((1e17, 10**6, "microseconds"), (1e20, 10**9, "nanoseconds")),
)
"""Numbers up to which a time has so many units in a second; 1e11 seconds are the year 5138, 1e11 ms are 1973."""


def load_interactions(config: RatingsConfig, *, seed: int = 0) -> Interactions:
    """Load interactions as `ratings:` describes them, cut to their core.

    Raises DataError with the file and the 1-based line of whatever cannot be used: a missing column or value, a rating
    that is no number or out of range, a time that does not parse or is of another unit than the others, an event that
    comes twice, an item without a title.
    """
    if config.path is None:
        return builtin_interactions(seed=seed).core(config.core)
    path = Path(config.path).expanduser()
    if not path.exists():
        raise DataError(f"ratings.path: {missing(path)}")
    if path.is_dir():
        events, catalogue = _movielens(path)
        names: Mapping[str, str] = _MOVIELENS
    else:
        events = _table(path)
        names = {each: getattr(config, each) for each in _MOVIELENS}
        catalogue = _titles(events, names, config.tags)
    return _interactions(events, names, catalogue, config).core(config.core)


def _movielens(folder: Path) -> tuple[Table, Mapping[str, tuple[str, tuple[str, ...]]]]:
    ratings, movies = (_table(_found(folder, name)) for name in ("ratings.csv", "movies.csv"))
    columns = {"item": "movieId", "title": "title", "tags": "genres"}
    return ratings, _titles(movies, columns, "genres")


def _found(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise DataError(f"ratings.path: {folder} has no {name} or {name}.gz (it has {there}); name one file instead")


def _table(path: Path) -> Table:
    table = read_file(path)
    if not isinstance(table, Table):
        raise DataError(f"{path.name}: holds several splits; give one table of all interactions")
    return table


def _titles(table: Table, names: Mapping[str, str], tags: str | None) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Read title and tags by item; the first row of an item counts."""
    items, titles = (_column(table, names[each], each) for each in ("item", "title"))
    labels = _column(table, tags, "tags") if tags else [""] * len(table)
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for row in range(len(table)):
        item = _word(items[row], table, row, names["item"])
        if item not in found:
            words = (word.strip() for word in str(labels[row] or "").split("|"))
            # A line of its own would end the event's line in a prompt.
            title = " ".join(_word(titles[row], table, row, names["title"]).split())
            found[item] = (title, tuple(word for word in words if word and word != _NO_GENRE))
    return found


def _column(table: Table, name: str, key: str) -> Sequence[object]:
    if name not in table.columns:
        if {"userId", "movieId"} <= set(table.columns) and "title" not in table.columns:
            raise DataError(f"{table.source}: looks like a part of MovieLens; give its folder, with movies.csv in it")
        raise DataError(f"{table.source}: no column '{name}'{nearest(name, table.columns)}; set ratings.{key}=...")
    return table.columns[name]


def _word(value: object, table: Table, row: int, column: str) -> str:
    if isinstance(value, (str, int, float)) and str(value).strip():
        return str(value).strip()
    raise DataError(f"{table.where(row)}: '{column}' is empty")


def _interactions(
    table: Table,
    names: Mapping[str, str],
    titles: Mapping[str, tuple[str, tuple[str, ...]]],
    config: RatingsConfig,
) -> Interactions:
    columns = {each: _column(table, names[each], each) for each in ("user", "item", "rating", "time")}
    users = [_word(value, table, row, names["user"]) for row, value in enumerate(columns["user"])]
    items = [_word(value, table, row, names["item"]) for row, value in enumerate(columns["item"])]
    ratings = [_rating(value, table, row, config) for row, value in enumerate(columns["rating"])]
    times = _times(columns["time"], table)
    rows = _distinct(list(zip(users, items, times, strict=True)), table, config)
    user_of, item_of = _numbers(users), _numbers(items)
    return Interactions.arranged(
        np.array([user_of[users[row]] for row in rows], dtype=np.int64),
        np.array([item_of[items[row]] for row in rows], dtype=np.int64),
        np.array([ratings[row] for row in rows], dtype=np.float64),
        np.array([times[row] for row in rows], dtype=np.int64),
        tuple(user_of),
        _catalogue(item_of, items, titles, table),
        like_from=config.like_from,
        scale=(config.lowest, config.highest),
    )


def _numbers(names: Iterable[str]) -> dict[str, int]:
    """Number names in their order: numbers by value, before all others."""
    ordered = sorted(set(names), key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
    return {name: index for index, name in enumerate(ordered)}


def _rating(value: object, table: Table, row: int, config: RatingsConfig) -> float:
    try:
        rating = float(str(value))
    except ValueError:
        raise DataError(f"{table.where(row)}: rating '{value}' is not a number") from None
    if not config.lowest <= rating <= config.highest:  # also refuses NaN
        raise DataError(
            f"{table.where(row)}: rating {rating:g} is outside {config.lowest:g} to {config.highest:g}; "
            "correct it, or set ratings.lowest and ratings.highest"
        )
    return rating


def _times(values: Sequence[object], table: Table) -> list[int]:
    """Read times as whole seconds; those written as numbers are all of one unit."""
    moments = [_time(value, table, row) for row, value in enumerate(values)]
    rows = [row for row, (_, is_number) in enumerate(moments) if is_number]
    if not rows:
        return [math.floor(moment) for moment, _ in moments]
    sizes = {row: abs(moments[row][0]) for row in rows if moments[row][0]} or {rows[0]: 0.0}
    least, most = min(sizes, key=lambda row: sizes[row]), max(sizes, key=lambda row: sizes[row])
    (_, _, one), (_, units, other) = _unit(sizes[least]), _unit(sizes[most])
    if one != other:
        raise DataError(
            f"{table.where(least)}: time '{values[least]}' looks like {one}, and '{values[most]}' "
            f"({table.where(most)}) like {other}; write all in one unit"
        )
    return [math.floor(moment / units if is_number else moment) for moment, is_number in moments]


def _unit(size: float) -> tuple[float, int, str]:
    return next(unit for unit in _UNITS if size < unit[0])


def _time(value: object, table: Table, row: int) -> tuple[float, bool]:
    """Return a time and whether it was written as a number."""
    text = str(value).strip()
    try:
        moment, is_number = float(text), True
    except ValueError:
        moment, is_number = _moment(text), False
    if not abs(moment) < _UNITS[-1][0]:  # also refuses NaN
        raise DataError(
            f"{table.where(row)}: time '{text}' is neither seconds since 1970 nor a date and time such as "
            "2024-05-31T18:00:00"
        )
    return moment, is_number


def _moment(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return math.nan
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _distinct(events: Sequence[tuple[str, str, int]], table: Table, config: RatingsConfig) -> list[int]:
    seen: dict[tuple[str, str, int], int] = {}
    for row, event in enumerate(events):
        if event in seen and config.duplicates == "error":
            raise DataError(
                f"{table.where(row)}: user '{event[0]}' rated item '{event[1]}' at this time already "
                f"({table.where(seen[event])}); remove one, or set ratings.duplicates=first"
            )
        seen.setdefault(event, row)
    return list(seen.values())


def _catalogue(
    item_of: Mapping[str, int], items: Sequence[str], titles: Mapping[str, tuple[str, tuple[str, ...]]], table: Table
) -> Items:
    lost = next((row for row, item in enumerate(items) if item not in titles), None)
    if lost is not None:
        raise DataError(f"{table.where(lost)}: item '{items[lost]}' has no title; add its row to movies.csv")
    names = tuple(item_of)
    return Items(names, tuple(titles[name][0] for name in names), tuple(titles[name][1] for name in names))
