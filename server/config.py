"""The `server:` section of the run file."""

from pydantic import Field

from lora.config import Section


class ServerConfig(Section):
    """`server:`, checkpoints and evaluation of the global adapter."""

    evaluate_every: int = Field(1, ge=1)
    """Rounds between evaluations on the validation split (the last round is always evaluated)."""
    checkpoint_every: int = Field(1, ge=1)
    """Rounds between checkpoints (the last round is always saved)."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept."""
