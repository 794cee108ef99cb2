"""Gates: which meta-LoRAs answer a row, for every adapted matrix; and a report on whether they do anything."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora.errors import ModelError
from strategies.personal.config import PersonalConfig
from strategies.personal.meta import MetaLoRAs

SAME_ENTROPY, SAME_COSINE = 0.02, 0.98
ONE_USAGE = 0.98
NO_INFORMATION = 1e-3


class PersonalGate(Protocol):
    """Weights of the meta-LoRAs for rows that are described by vectors; they are positive and sum to one."""

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return weights `[sites, rows, N]` for `vectors [rows, d]`."""
        ...


class Router(nn.Module):
    """A small network per adapted matrix: LayerNorm, Linear, ReLU, dropout, Linear, softmax(. / temperature).

    All matrices' networks run as one batched product. Linear layers start Kaiming-uniform (a = sqrt 5) with biases at
    zero. Source: RecLoRA's released code.
    """

    def __init__(
        self, *, sites: int, inputs: int, count: int, width: int = 60, dropout: float = 0.1, temperature: float = 1.0,
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        source = torch.Generator().manual_seed(seed)
        self.scale = nn.Parameter(torch.ones(sites, 1, inputs))
        self.shift = nn.Parameter(torch.zeros(sites, 1, inputs))
        self.first = nn.Parameter(_kaiming(sites, inputs, width, source))
        self.first_bias = nn.Parameter(torch.zeros(sites, 1, width))
        self.second = nn.Parameter(_kaiming(sites, width, count, source))
        self.second_bias = nn.Parameter(torch.zeros(sites, 1, count))
        self.dropout, self.temperature = dropout, temperature

    def forward(self, vectors: Tensor) -> Tensor:
        """Return weights `[sites, rows, N]`. Raises ModelError for vectors of another width."""
        if vectors.shape[-1] != self.scale.shape[-1]:
            raise ModelError(
                f"the router reads vectors of {self.scale.shape[-1]} numbers, not {vectors.shape[-1]}; "
                "give it the representation it was trained with"
            )
        known = functional.layer_norm(vectors, vectors.shape[-1:])[None] * self.scale + self.shift
        hidden = torch.relu(torch.baddbmm(self.first_bias, known, self.first))
        hidden = functional.dropout(hidden, self.dropout, training=self.training)
        return torch.softmax(torch.baddbmm(self.second_bias, hidden, self.second) / self.temperature, dim=-1)


def _kaiming(sites: int, inputs: int, outputs: int, source: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(inputs)
    return torch.empty(sites, inputs, outputs).uniform_(-bound, bound, generator=source)


class Uniform(nn.Module):
    """Equal weights for everybody; with one meta-LoRA it is the single LoRA."""

    def __init__(self, *, sites: int, count: int) -> None:
        super().__init__()
        self.sites, self.count = sites, count

    def forward(self, vectors: Tensor) -> Tensor:
        """Return weights `[sites, rows, N]`, all 1 / N."""
        return vectors.new_full((self.sites, len(vectors), self.count), 1 / self.count)


class Random(nn.Module):
    """Weights that are drawn once for each user and tell nothing of them: softmax of the vectors themselves."""

    def __init__(self, *, sites: int, count: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.sites, self.count, self.temperature = sites, count, temperature

    def forward(self, vectors: Tensor) -> Tensor:
        """Return weights `[sites, rows, N]` for normal numbers `vectors [rows, sites * N]`."""
        logits = vectors.view(len(vectors), self.sites, self.count).transpose(0, 1)
        return torch.softmax(logits / self.temperature, dim=-1)


def gate_of(config: PersonalConfig, *, sites: int, inputs: int, seed: int) -> Router | Uniform | Random:
    """Return the configured gate, untrained."""
    if config.gate == "uniform":
        return Uniform(sites=sites, count=config.meta_loras)
    if config.gate == "random":
        return Random(sites=sites, count=config.meta_loras, temperature=config.temperature)
    return Router(
        sites=sites, inputs=inputs, count=config.meta_loras, width=config.gate_width, dropout=config.gate_dropout,
        temperature=config.temperature, seed=seed,
    )  # fmt: skip


@dataclass(frozen=True)
class GateReport:
    """What a gate does over the rows it was shown; entropies and information are means over matrices, in nats."""

    entropy: float
    """Of the weights of a row."""
    relative_entropy: float
    """The same over ln N: 1 is uniform."""
    information: float
    """Entropy of the mean weights less the mean entropy: how much the weights say about whose row it is."""
    usage: tuple[float, ...]
    """Mean weight of every meta-LoRA."""
    cosine: float
    """Mean pairwise cosine of the meta-LoRAs' updates; NaN before they learned anything."""
    collapsed: bool
    """Whether RecLoRA is one LoRA in disguise: N > 1 and one of
    (a) relative entropy above 0.98 and cosine above 0.98: all alike and alike mixed;
    (b) one meta-LoRA has more than 0.98 of the weight;
    (c) information below 0.001 nats: everybody gets the same mixture."""


@torch.no_grad()
def gate_report(weights: Tensor, meta: MetaLoRAs) -> GateReport:
    """Report on weights `[sites, rows, N]` and the meta-LoRAs they mix. Raises ModelError without rows."""
    if weights.shape[1] == 0:
        raise ModelError("a gate report needs rows; give it queries of at least one user")
    mean = weights.double().mean(1)
    entropy = float(_entropy(weights.double()).mean())
    information = max(0.0, float(_entropy(mean).mean()) - entropy)
    count = weights.shape[-1]
    relative = entropy / math.log(count) if count > 1 else 1.0
    usage, cosine = mean.mean(0), float(meta.cosines())
    alike = relative > 1 - SAME_ENTROPY and cosine > SAME_COSINE
    one = float(usage.max()) > ONE_USAGE
    collapsed = count > 1 and (alike or one or information < NO_INFORMATION)
    return GateReport(entropy, relative, information, tuple(usage.tolist()), cosine, collapsed)


def _entropy(weights: Tensor) -> Tensor:
    return -torch.xlogy(weights, weights).sum(-1)
