"""The `personal:` and `comparison:` sections of the run file."""

from typing import Literal

from pydantic import Field, model_validator

from lora.config import Section

Mixing = Literal["product", "factor"]
FrameKind = Literal["shared", "own"]
Routing = Literal["user", "pair"]
GateKind = Literal["router", "uniform", "random"]
BaseScore = Literal["offset", "prompt", "none"]
Told = Literal["latest", "similar"]


class HistoriesConfig(Section):
    """`histories:`, interactions that stay at the clients of a federation, each of which holds whole users."""

    split: Literal["per-user", "global-time"] = "per-user"
    """Which end of time is kept for validation and testing."""
    per_user: int | None = Field(None, ge=1)
    """Training questions of a user at most, drawn once. Privacy is per question: with 1 it is per user, with k a user
    is protected as a group of k. null: all."""
    width: int = Field(32, ge=4, le=4096)
    """Numbers of a text's vector, of which the router reads two means."""
    text_seed: int = Field(0, ge=0)
    """Seed of the words' vectors; equal on every client by construction."""
    checks: int = Field(4096, ge=2)
    """Validation and test questions that the server's own scores use, each."""


class PersonalConfig(Section):
    """`personal:`, how meta-LoRAs are mixed for every user, and how they are trained.

    Source: RecLoRA (Zhu et al., 2024), where paper and released code differ: the paper mixes products, the code
    factors; both have A's of their own. The shared frozen frame is Lethe's.
    """

    meta_loras: int = Field(8, ge=1, le=256)
    """Meta-LoRAs N of every adapted matrix; 1 is a single LoRA for everybody."""
    mixing: Mixing = "product"
    """product: sum w_i B_i A_i (the paper). factor: (sum w_i B_i)(sum w_i A_i) (the released code). Over a shared frame
    both are the same, because weights sum to one."""
    frame: FrameKind = "shared"
    """shared: one frozen A, a user's mixture is one B, a slot of the bank. own: every meta-LoRA trains an A."""
    routing: Routing = "user"
    """user: by the history alone, so that a user's mixture can be kept. pair: by history and target (the code)."""
    gate: GateKind = "router"
    """router: learned. uniform and random (fixed for each user) are what it has to beat."""
    gate_width: int = Field(60, ge=1, le=4096)
    """Hidden width of a router."""
    gate_dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout inside a router, in training only."""
    temperature: float = Field(0.3, gt=0, le=1000)
    """Softmax temperature. At high ones (the code's 5 to 15) all start with equal weights, and B's that start equal
    and get equal gradients stay equal."""
    base_score: BaseScore = "offset"
    """Where the recommender's score goes: offset adds its log odds, prompt tells it in words, none leaves it out."""
    history: int = Field(5, ge=0, le=200)
    """Events told in a prompt."""
    told: Told = "latest"
    """Which: the latest, or those whose item texts mean most nearly what the target's does, in order of time (by
    MiniLM, whatever model reads the prompt)."""
    max_length: int = Field(256, ge=8, le=100_000)
    """Tokens of a prompt; a longer one loses its oldest events."""
    sample: int = Field(16_384, ge=1)
    """Training rows that the adapters see, drawn once at random (Few2Many); all where there are fewer."""
    epochs: int = Field(1, ge=0, le=1000)
    """Passes over the sample; 0 only weighs the recommender and the unadapted model."""
    batch: int = Field(64, ge=1, le=65_536)
    """Prompts of a step."""
    rate: float = Field(4e-3, gt=0)
    """Learning rate of meta-LoRAs and head at the start; falls to zero in a straight line (AdamW)."""
    gate_rate: float = Field(2e-3, gt=0)
    """The same of the routers."""
    decay: float = Field(0.0, ge=0)
    """Weight decay of everything that trains."""
    checks: int = Field(4096, ge=2)
    """Validation rows by which the best epoch is chosen."""
    seed: int = Field(0, ge=0)
    """Seed of the starting values, the sample and the order; `fit(seed=)` wins."""

    @model_validator(mode="after")
    def _gate_has_a_choice(self) -> "PersonalConfig":
        if self.meta_loras == 1 and self.gate != "uniform":
            raise ValueError(f"gate={self.gate} has nothing to choose with meta_loras=1; set gate: uniform")
        return self


class KeptPersonalConfig(PersonalConfig):
    """`personal:` where histories stay at the clients: no recommender knows them, and a user's mixture is one slot."""

    base_score: Literal["none"] = "none"
    """No recommender has learned from everybody's interactions, so there is no score to add or tell."""
    frame: Literal["shared"] = "shared"
    """One frozen A, so that averaging the clients' B's is exact."""
    routing: Literal["user"] = "user"
    """By the history alone: a user's mixture is known before the target."""


RouterName = Literal["MF", "DIN", "SASRec"]
RecommenderName = Literal["MF", "DIN", "SASRec", "boosted"]


class ComparisonConfig(Section):
    """`comparison:`, what personal adapters stand on and are measured against: split, recommenders, arms, rankings."""

    split: Literal["per-user", "global-time"] = "per-user"
    """per-user: the last fifth of every user's events is asked about. global-time: the last tenth of all."""
    seeds: int = Field(1, ge=1, le=100)
    """How often everything is trained, with `seed`, `seed` + 1, ...; figures are means."""
    recommenders: tuple[RecommenderName, ...] = ("MF", "DIN", "SASRec", "boosted")
    """Members of the stack, fitted to all training rows."""
    scorer: RecommenderName = "MF"
    """The recommender whose score every language model gets (personal.base_score)."""
    routers: tuple[RouterName, ...] = ("MF", "DIN")
    """The recommenders whose vectors of a user route."""
    folds: int = Field(3, ge=2, le=100)
    """Parts of the training rows; the scorer's scores of each come from a fit to the others."""
    arms: tuple[str, ...] = ()
    """Further arms beside RecLoRA and the single LoRA of equal parameters, such as uniform-gate, random-gate,
    single-lora-equal-rank or reclora-factor-own-pair."""
    ranked: int = Field(100, ge=1)
    """Test rows of which the item that came next is ranked (NDCG)."""
    candidates: int = Field(100, ge=1)
    """Items that its user never rates, which it is ranked among; fewer where the catalogue is small."""
    draws: int = Field(300, ge=20, le=100_000)
    """Redraws of whole users behind every interval."""
    show_user: str | None = None
    """The user whose adapter is exported and whose recommendations the report shows; null: who has most test rows."""

    @model_validator(mode="after")
    def _members_are_there(self) -> "ComparisonConfig":
        for key, named in (("recommenders", self.recommenders), ("routers", self.routers), ("arms", self.arms)):
            if len(set(named)) < len(named) or (not named and key != "arms"):
                raise ValueError(f"{key}={list(named)}: name one or more, each once")
        for name in (self.scorer, *self.routers):
            if name not in self.recommenders:
                raise ValueError(f"{name} scores or routes and is no member; add it to recommenders")
        return self
