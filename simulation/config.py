"""The `simulation:` section of the run file."""

from typing import Literal

from pydantic import Field

from lora.config import Section


class SimulationConfig(Section):
    """`simulation:`, how one machine plays all clients."""

    engine: Literal["cohort", "sequential", "ray"] = "cohort"
    """cohort: all clients in one batch; sequential: the real ClientApp one by one; ray: Flower's engine."""
    cohort: int = Field(32, ge=1)
    """Clients trained in one batch (memory grows with it by their slots only)."""
    threads: int | None = Field(None, ge=1)
    """Cores to use, one batch at a time on each; null: as many as torch would."""
