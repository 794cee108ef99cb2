"""Sections of what forgets: how long a request trains, GS-LoRA's own settings, and those of a forgetting store."""

from typing import Literal

from pydantic import Field

from lora.config import Section


class FitConfig(Section):
    """How a classifier is trained, at first and anew by the retrain baseline."""

    epochs: int = Field(3, ge=1)
    """Passes over the rows."""
    batch: int = Field(32, ge=1)
    """Rows of a step."""
    rate: float = Field(1e-4, gt=0)
    """AdamW's rate for the encoder; rises over the first tenth of the steps and falls to zero."""
    head_rate: float = Field(1e-2, gt=0)
    """The same for the head, which starts at random."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's decoupled decay."""


class BudgetConfig(Section):
    """What every method may spend on one request: passes over the replay sample, and rows of a step."""

    epochs: int = Field(8, ge=1)
    """Passes over the retained sample; the request's rows are gone through again and again meanwhile."""
    batch: int = Field(32, ge=1)
    """Retained rows of a step, and as many of the request's."""


class GsLoraConfig(Section):
    """GS-LoRA and GS-LoRA++ (papers: CVPR 2024; T-PAMI 2026), for a plain softmax head."""

    rank: int = Field(8, ge=1)
    """Rank of the adapter on both feed-forward matrices of every block."""
    alpha: float = Field(8.0, gt=0)
    """The update is scaled by alpha / rank. The released code has 1/8 and a rate of 1e-2; AdamW's steps do not shrink
    with the scale, so 1 with a smaller rate moves the function as far."""
    rate: float = Field(2e-3, gt=0)
    """AdamW's rate for a model of width 384; about as much smaller as the model is wider. Falls to a thousandth of it
    along a cosine, without warm-up (as the released code)."""
    weight_decay: float = Field(0.05, ge=0)
    """AdamW's decoupled decay (as the released code)."""
    bound: float = Field(2.0, gt=0)
    """The forget loss stops at this many times ln(classes). One time is a guess among all classes; a model that
    never saw a class gives it less. The papers' 105 to 110 belong to a margin head with a scale of 64: here they
    would never be reached."""
    bound_by: Literal["example", "batch"] = "example"
    """Whether every example is bounded, or the mean of a batch (the released code), where some hide behind others."""
    forget_weight: float = Field(0.5, ge=0)
    """beta: weight of the forget loss."""
    hold_weight: float = Field(0.0, ge=0)
    """Weight of the loss that holds the classes of earlier requests down together with this one's, whatever is asked;
    0 (the papers): what was forgotten earlier is in no later loss, and some of it comes back."""
    hold_bound: float = Field(3.0, gt=0)
    """That loss stops where a row gives all forgotten classes together a probability of classes^-hold_bound."""
    sparsity: float = Field(0.3, ge=0)
    """alpha of the group lasso; 0 leaves plain LoRA."""
    warmup: float = Field(0.3, ge=0, le=1)
    """Share of the steps without the group lasso: held down from the first step, nothing would be forgotten."""
    wait: float = Field(0.5, ge=0, le=1)
    """The group lasso starts no sooner than this share of the last steps' forgotten rows is at the bound (8 steps, or
    a pass if it has fewer); 0: by steps alone, as the papers do. A short request would otherwise be held at zero before
    it has forgotten anything."""
    structure: Literal["proximal", "subgradient"] = "proximal"
    """A proximal step sets whole groups to exactly zero; the papers' subgradient never does."""
    group: Literal["block", "adapter", "matrix"] = "block"
    """What is kept or dropped together: the four factors of a block, the two of a matrix, or each factor."""
    selected_share: float = Field(0.05, ge=0, lt=1)
    """With `structure: subgradient`: a group counts as selected from this share of the largest update's norm."""
    prototypes: bool = False
    """GS-LoRA++: hold features near (and push forgotten ones away from) class means of the original model."""
    prototype_forget: float = Field(0.1, ge=0)
    """w_f, in units of the mean divergence between classes; with a few rows a class, 3 forgets unseen rows better."""
    prototype_retain: float = Field(1.0, ge=0)
    """w_r, in the same units; the papers describe it, their scripts set it to 0."""
    prototype_spread: bool = True
    """Pull retained rows only as far as the original model's own spread about the means; false (the papers): to the
    means themselves, which draws every class together and costs the classes that are not in the sample."""
    prototype_bound: float | None = Field(None, gt=0)
    """BND_pro, nats; null: the mean divergence between two classes' prototypes."""


class ForgettingConfig(Section):
    """`forgetting:`, how a served classifier forgets; fixed when its store is made."""

    rank: int = Field(8, ge=1, le=256)
    """Rank of a request's slot; requests have blocks of so many rows of one orthonormal frame."""
    epochs: int = Field(1, ge=1)
    """Passes over a request's used rows."""
    least_steps: int = Field(24, ge=0)
    """A request too small to fill so many steps is gone through more often."""
    batch: int = Field(32, ge=1)
    """Rows of a step."""
    rate: float = Field(3e-3, gt=0)
    """AdamW's rate for a slot."""
    objective: Literal["runner-up", "random"] = "runner-up"
    """What a slot learns to say: the model's own next best label, or labels drawn at random (the paper)."""
    gate: Literal["hard", "soft", "cut", "always"] = "hard"
    """How a distance becomes a weight: 1 within the threshold, the paper's soft weight, or its far side alone."""
    coverage: float = Field(0.97, gt=0, le=1)
    """Share of a request's left-out rows within the threshold of the hard gate."""
    folds: int = Field(8, ge=0)
    """Clusters of every class that are left out in turn, for the threshold; 0: the held-back rows give it."""
    layers: tuple[int, ...] = (-1,)
    """Hidden states that detectors read; 0 the embeddings, -1 the last."""
    shrinkage: float = Field(0.8, ge=0, le=1)
    """Share of the mean variance in a detector's covariance."""
    statistics_noise: float = Field(0.0, ge=0)
    """Noise multiplier of the statistics that a client sends; charged to the client's ledger. 0: none,
    or for a private answer what a third of its epsilon allows."""
    private_steps: int = Field(60, ge=1)
    """Steps of a private answer's slot."""
    private_lot: int = Field(128, ge=1)
    """Rows expected in the Poisson lot of such a step."""
    private_clip: float = Field(1.0, gt=0)
    """Bound of a row's gradient over all B's."""
    private_rate: float = Field(2.0, gt=0)
    """SGD's rate for a private slot; falls to zero in a straight line."""
    replay: int = Field(20, ge=1)
    """Rows of every class that stays, for `gs-lora`."""
    replay_epochs: int = Field(1, ge=1)
    """Passes over the replay sample, for `gs-lora`."""
    replay_steps: int = Field(150, ge=0)
    """A replay sample too small to fill so many steps of 16 rows is gone through more often."""
    seed: int = Field(0, ge=0)
    """Seed of the orthonormal frame, and of what requests draw."""
