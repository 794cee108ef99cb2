"""The `model:`, `task:` and `data:` sections of the run file."""

from typing import Literal

from pydantic import Field, model_validator

from lora.config import Section


class ModelConfig(Section):
    """`model:`, the frozen base model."""

    name: str = "minilm"
    """`minilm` (embedded, needs no hub), `tiny-bert`/`tiny-llama` (random weights, for tests) or a hub name."""
    path: str | None = None
    """A local directory in Hugging Face form; wins over `name`."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")
    """Where the base computes: auto (the first GPU, else the CPU), cpu, cuda, cuda:N or mps; a node may choose."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the frozen base (auto: bfloat16 on GPUs that have it, else float32); B, gradients, clipping, noise
    and sums stay float32. float16 has little range: use it only where a GPU lacks bfloat16."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the base's blocks and run every block twice: far less memory, a third more time."""


class TaskConfig(Section):
    """`task:`, what is learned on top of the base model."""

    kind: Literal["classification", "causal-lm"] = "classification"
    """Text classification or causal language modelling."""
    head: Literal["trained", "frozen", "none"] = "trained"
    """Classification head: trained beside B, frozen at its start, or none (rows answer by label embedding)."""
    head_init: Literal["random", "labels"] = "random"
    """Start of the head: random, or the base model's embeddings of the label names."""
    pooling: Literal["auto", "mean", "first", "last"] = "auto"
    """How token states become one vector; auto: mean for encoders, last token for decoders."""
    max_length: int = Field(64, ge=4, le=8192)
    """Longest input, tokens."""


class DataConfig(Section):
    """`data:`, where examples come from and how they are split among clients."""

    name: str = "builtin"
    """`builtin` (a small generator) or a hub data set; a local copy goes in `path`."""
    config: str | None = None
    """Hub configuration of the data set, such as `plus` of clinc_oos."""
    path: str | None = None
    """A CSV, TSV, JSON, JSONL or TXT file (also .gz), or a directory of them; wins over `name`."""
    file: str | None = None
    """The file to use below a `path` that is a directory, such as data_full.json.gz; ignored otherwise."""
    train: str | None = None
    """Train split: its hub or JSON name, or its file (also a glob) at any depth below `path`."""
    validation: str | None = None
    """Validation split, named in the same way; absent: its standard name, else `holdout` of the train split."""
    test: str | None = None
    """Test split, named in the same way; absent: its standard name, else another `holdout` of the train split."""
    text: str | tuple[str, ...] = ("text", "sentence", "content", "query", "answer", "utterance")
    """Column(s) of the text; the first that a file has."""
    label: str | tuple[str, ...] = ("label", "intent", "class", "target", "category")
    """Column(s) of the label; the first that a file has."""
    prompt: str | tuple[str, ...] | None = None
    """Column(s) of a prompt that conditions the text and is not learned (causal LM)."""
    owner: str | tuple[str, ...] | None = None
    """Column(s) of a natural owner such as `speaker` or `user`, for `partition: natural`."""
    drop_labels: tuple[str, ...] = ()
    """Labels whose rows are left out of every split."""
    labels: tuple[str, ...] | None = None
    """All labels in their agreed order, for nodes with data of their own; null: those of the train split."""
    holdout: float = Field(0.1, gt=0, lt=0.5)
    """Share of the train split kept for a validation or test split that is not given."""
    max_train: int | None = Field(None, ge=1)
    """At most so many training examples (drawn with the run's seed)."""
    max_eval: int | None = Field(None, ge=1)
    """At most so many validation and test examples each."""
    partition: Literal["iid", "dirichlet", "shards", "shares", "natural"] = "iid"
    """How the train split is divided among clients."""
    dirichlet_alpha: float = Field(0.5, gt=0)
    """Concentration of `partition: dirichlet`; small is skewed."""
    shards_per_client: int = Field(2, ge=1)
    """Label-sorted shards that each client gets with `partition: shards`."""
    shares: tuple[tuple[float, ...], ...] | None = None
    """With `partition: shares`: one row per client, its mix of labels (sums to 1); clients are of equal size."""

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> "DataConfig":
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError("`labels: [...]` names two or more labels, each once")
        return self

    @model_validator(mode="after")
    def _shares_go_together(self) -> "DataConfig":
        if (self.partition == "shares") != (self.shares is not None):
            raise ValueError("`partition: shares` and `shares: [[...], ...]` go together: give both or neither")
        return self
