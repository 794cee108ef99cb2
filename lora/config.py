"""The base of every section of the run file, and the `adapter:` section."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen section of the run file that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class AdapterConfig(Section):
    """`adapter:`, the shape of the low-rank update and its frozen frame."""

    rank: int = Field(8, ge=1, le=1024)
    """Rank r of every adapted matrix."""
    alpha: float = Field(16.0, gt=0)
    """Scale: the update is multiplied by alpha / rank."""
    targets: str | tuple[str, ...] = "all"
    """Which matrices: attention, ffn, all, or module names such as [query, value]."""
    init: Literal["kaiming", "orthogonal"] = "kaiming"
    """How the frozen frame A is drawn."""
    frame_seed: int = Field(0, ge=0)
    """Seed of the frame; equal on every client by construction."""
