"""The arms of a comparison by name: RecLoRA in every form, and what each has to beat."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora.config import AdapterConfig
from lora.errors import ConfigError, nearest
from lora.frame import Site
from strategies.personal.config import PersonalConfig


@dataclass(frozen=True)
class Variant:
    """What an arm changes of a common configuration."""

    changes: Mapping[str, object] = field(default_factory=dict)
    widened: bool = False
    """Whether its rank is raised until it trains as many numbers as RecLoRA with its routers, see `equal_rank`."""

    def personal(self, config: PersonalConfig) -> PersonalConfig:
        """Return the configuration of this arm. Raises ConfigError where they do not go together."""
        try:
            return PersonalConfig(**{**config.model_dump(), **self.changes})
        except ValueError as error:
            raise ConfigError(f"personal: {error}") from error


_ONE = {"meta_loras": 1, "gate": "uniform"}

VARIANTS: Mapping[str, Variant] = {
    **{
        f"reclora-{mixing}-{frame}-{routing}": Variant(
            {"mixing": mixing, "frame": frame, "routing": routing, "gate": "router"}
        )
        for mixing in ("product", "factor")
        for frame in ("shared", "own")
        for routing in ("user", "pair")
    },
    "single-lora-equal-rank": Variant(_ONE),
    "single-lora-equal-parameters": Variant(_ONE, widened=True),
    "single-lora-own-equal-parameters": Variant({**_ONE, "frame": "own"}, widened=True),
    "unadapted": Variant({**_ONE, "epochs": 0}),
    "uniform-gate": Variant({"gate": "uniform"}),
    "random-gate": Variant({"gate": "random"}),
    "score-in-prompt": Variant({"base_score": "prompt"}),
    "retrieved-history": Variant({"told": "similar"}),
}
"""Arms that are trained. A swapped gate and a full swap are questions to a trained arm: `logits(routed_as=...)`."""


def variant(name: str) -> Variant:
    """Look up an arm. Raises ConfigError with the nearest name for an unknown one."""
    try:
        return VARIANTS[name]
    except KeyError:
        raise ConfigError(f"unknown variant '{name}'{nearest(name, VARIANTS)}") from None


def parameters_of(sites: tuple[Site, ...], config: PersonalConfig, *, rank: int, inputs: int) -> int:
    """Return how many numbers meta-LoRAs and gates train."""
    widths = sum(site.d_out + (site.d_in if config.frame == "own" else 0) for site in sites)
    count, width = config.meta_loras, config.gate_width
    gate = 2 * inputs + inputs * width + width + width * count + count if config.gate == "router" else 0
    return count * rank * widths + len(sites) * gate


def equal_rank(
    sites: tuple[Site, ...], config: PersonalConfig, *, rank: int, inputs: int, own: bool | None = None
) -> int:
    """Return the least rank of a single LoRA that trains at least as many numbers as `config` does at `rank`.

    It trains an A of its `own` or not, by default as `config` does. No rank above the smallest side of the widest
    matrix: from there on a single LoRA can be any update at all, and more numbers would add nothing.
    """
    wanted = parameters_of(sites, config, rank=rank, inputs=inputs)
    own = config.frame == "own" if own is None else own
    widths = sum(site.d_out + (site.d_in if own else 0) for site in sites)
    return min(-(-wanted // widths), max(min(site.d_in, site.d_out) for site in sites))


def widened(adapter: AdapterConfig, rank: int) -> AdapterConfig:
    """Return the adapter at another rank and the same scale alpha / rank."""
    return adapter.model_copy(update={"rank": rank, "alpha": adapter.alpha * rank / adapter.rank})
