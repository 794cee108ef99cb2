"""The `ratings:` section of the run file, and `model:` where a language model reads ratings."""

from typing import Literal

from pydantic import Field, model_validator

from lora.config import Section
from tasks.config import ModelConfig


class RatingsConfig(Section):
    """`ratings:`, where interactions come from and what counts as liking."""

    path: str | None = None
    """A folder with ratings.csv and movies.csv as MovieLens has them, or one CSV, TSV or JSONL file with all columns
    (any of them also .gz); null: a small generator."""
    user: str = "user"
    """Column of the user (one file; the MovieLens folder has names of its own)."""
    item: str = "item"
    """Column of the item."""
    rating: str = "rating"
    """Column of the rating, a number from `lowest` to `highest`."""
    time: str = "time"
    """Column of the time: seconds since 1970, or a date and time in ISO 8601 (UTC where it names no zone). Numbers too
    great for seconds are milli-, micro- or nanoseconds, in a whole file. Cut to whole seconds; events of a user in the
    same second do not know of each other. Rows may come in any order."""
    title: str = "title"
    """Column of the item's text."""
    tags: str | None = None
    """Column of the item's tags, separated by `|`; null: items have none."""
    lowest: float = 0.5
    """Least possible rating."""
    highest: float = 5.0
    """Greatest possible rating."""
    like_from: float = 4.0
    """Ratings from here on are likes (label 1)."""
    core: int = Field(5, ge=1)
    """Keep users and items with at least so many interactions, repeated until nothing changes; 1 keeps all."""
    duplicates: Literal["error", "first"] = "error"
    """A user, an item and a time that come twice: an error, or the first row counts. Rating an item again later is
    no duplicate but a new event."""

    @model_validator(mode="after")
    def _scale_is_one(self) -> "RatingsConfig":
        if not self.lowest < self.like_from <= self.highest:
            raise ValueError(
                f"lowest < like_from <= highest must hold, not {self.lowest:g}, {self.like_from:g}, {self.highest:g}"
            )
        return self


class ReadingModelConfig(ModelConfig):
    """`model:`, the frozen language model that reads histories."""

    name: str = "reader"
    """`reader` (a small decoder that learns here, from the training rows' texts), `minilm` (embedded), `tiny-bert` or
    `tiny-llama` (random weights, for tests) or a hub name."""
    encoder: bool | None = None
    """Whether it answers by a trained head over mean token states, as encoders do, and not by the tokens Yes and No;
    null: minilm and tiny-bert do, all others are decoders."""
