"""The `privacy:` section of the run file."""

from typing import Literal

from pydantic import Field, model_validator

from lora.config import Section


class PrivacyConfig(Section):
    """`privacy:`, example-level privacy of every client's uploads; off unless `epsilon` or noise is given."""

    epsilon: float | None = Field(None, gt=0)
    """Budget of every client over the whole run; noise is calibrated to it. null: no budget."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """Failure probability that goes with epsilon."""
    clip: float = Field(1.0, gt=0)
    """Bound C on an example's gradient, over all B's together."""
    head_clip: float = Field(1.0, gt=0)
    """Own bound for a trained head; the sensitivity is the root of the sum of squares."""
    noise_multiplier: float | None = Field(None, gt=0)
    """Noise over sensitivity; null: calibrated from epsilon."""
    sampling: Literal["poisson"] = "poisson"
    """How lots are drawn; what is accounted is what runs."""
    test_seed: int | None = None
    """Draw noise from this seed: the run then declares itself a test and claims no privacy."""

    @property
    def private(self) -> bool:
        """Whether training is private at all."""
        return self.epsilon is not None or self.noise_multiplier is not None

    @model_validator(mode="after")
    def _seed_needs_privacy(self) -> "PrivacyConfig":
        if self.test_seed is not None and not self.private:
            raise ValueError("`test_seed` has no meaning without `epsilon` or `noise_multiplier`")
        return self
