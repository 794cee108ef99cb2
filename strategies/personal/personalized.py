"""RecLoRA as a recommender: a frozen language model, meta-LoRAs, a gate, and the score of two answers.

Source: RecLoRA (Zhu et al., 2024): a frozen recommender's representation routes, and few samples tune what is mixed.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lora.config import AdapterConfig
from lora.errors import ModelError
from lora.model import AdaptedModel
from lora.peft_files import export_adapter
from strategies.personal.asking import Asked, Asking
from strategies.personal.config import PersonalConfig
from strategies.personal.meta import Factors, MetaLoRAs
from strategies.personal.recommenders.protocol import unfitted
from strategies.personal.representation import Representation
from strategies.personal.router import GateReport, Random, Router, Uniform, gate_of, gate_report
from tasks.models import BaseModel
from tasks.recommendation.answers import Answering, batches, beginnings, packed
from tasks.recommendation.interactions import Floats, Interactions, Ints, Queries
from tasks.recommendation.splits import Split
from tasks.tokens import Batch, Tokens

BlocksOf = Callable[[Ints], Factors]
"""Indices of groups of rows -> the factors that answer them."""


class Calibration(nn.Module):
    """score = offset weight * recommender's log odds + language weight * the model's log odds + bias."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.ones(()))
        self.language = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, offsets: Tensor, odds: Tensor) -> Tensor:
        """Return log odds `[rows]`."""
        return self.offset * offsets + self.language * odds + self.bias


@dataclass
class Parts:
    """Everything that trains."""

    meta: MetaLoRAs
    gate: Router | Uniform | Random
    answering: Answering
    calibration: Calibration

    def modules(self) -> nn.ModuleDict:
        """Return them as one module."""
        return nn.ModuleDict(vars(self))


class Personalized:
    """An adapted language model that answers every user with a mixture of their own; a `Recommender`.

    The base is changed in place (`AdaptedModel`): give every one that lives at the same time a copy.
    """

    def __init__(
        self,
        base: BaseModel,
        adapter: AdapterConfig,
        config: PersonalConfig | None = None,
        *,
        asking: Asking,
        representation: Representation,
        name: str = "RecLoRA",
    ) -> None:
        self.base, self.adapter, self.config = base, adapter, config or PersonalConfig()
        self.asking, self.representation, self.name = asking, representation, name
        self.adapted = AdaptedModel.attach(base.model, adapter)
        self.curve: list[float] = []
        """Log loss on the checked validation rows, before training and after every epoch."""
        self.inputs = 0
        """Numbers of a vector that routes."""
        self._parts: Parts | None = None

    @property
    def parts(self) -> Parts:
        """What was trained. Raises ModelError before `fit`."""
        if self._parts is None:
            raise unfitted(self.name)
        return self._parts

    @property
    def trained_parameters(self) -> int:
        """Numbers that train, routers included."""
        return sum(parameter.numel() for parameter in self.parts.modules().parameters())

    def build(self, *, inputs: int, seed: int) -> Parts:
        """Make the parts for vectors of `inputs` numbers, untrained."""
        config, device, self.inputs = self.config, self.base.placement.device, inputs
        meta = MetaLoRAs(self.adapted, count=config.meta_loras, mixing=config.mixing, frame=config.frame, seed=2 * seed)
        gate = gate_of(config, sites=len(self.adapted.sites), inputs=inputs, seed=2 * seed + 1)
        self._parts = Parts(meta, gate.to(device), Answering(self.base).to(device), Calibration().to(device))
        return self._parts

    def fit(
        self, log: Interactions, split: Split, *, seed: int | None = None, training_scores: Floats | None = None
    ) -> None:
        """Tune the parts on a sample of the training rows (Few2Many); validation rows choose the epoch.

        The scorer and the recommenders of the representation are fitted already. `training_scores [len(log)]` are the
        scorer's log odds of training rows from models that did not learn from them (`cross_fitted`); without them the
        scorer's own are used, which are too sure of rows that it has seen.
        """
        from strategies.personal.fitting import Fitting

        Fitting(self, log, split, seed=self.config.seed if seed is None else seed, scores=training_scores).run()

    def logits(self, log: Interactions, queries: Queries, *, routed_as: Queries | None = None) -> Floats:
        """Return the log odds of a like, `[queries]`; `routed_as` takes the mixture of other queries' users only."""
        self.parts  # noqa: B018 (an unfitted one says so, not its representation)
        group = shared_run(queries if routed_as is None else routed_as) if self._by_user else 1
        vectors = self._vectors(log, routed_as or queries, every=group)
        return self.answered(self.asking(log, queries), lambda found: self.mixed(vectors[found]), group=group)

    def evenly(self) -> "Personalized":
        """Return the same model with equal weights in place of its gate's: what is left is not the gate's doing.

        It shares base and meta-LoRAs with this one, and changes with it.
        """
        one, gate = copy.copy(self), Uniform(sites=len(self.adapted.sites), count=self.config.meta_loras)
        one._parts, one.name = replace(self.parts, gate=gate), f"{self.name}, evenly"
        return one

    def logits_of_slots(self, log: Interactions, queries: Queries, slots: Tensor) -> Floats:
        """Return the log odds when mixtures are given, `slots [queries, size]`, such as rows of a bank of users."""
        self._check_slots()
        views = self.parts.meta.layout.views(slots.to(self.base.placement.device))
        return self.answered(self.asking(log, queries), lambda found: {key: view[found] for key, view in views.items()})

    @torch.no_grad()
    def answered(self, asked: Asked, blocks_of: BlocksOf, *, group: int = 1) -> Floats:
        """Answer questions, `group` neighbours by one mixture each; a decoder reads once how their prompts begin."""
        answering, found = self.parts.answering, np.empty((len(asked) // group, group))
        alike = beginnings(asked.tokens, group=group) if answering.causal else np.zeros(len(found), dtype=np.int64)
        for one in np.flatnonzero(alike).tolist():
            rows = np.arange(one * group, (one + 1) * group)
            ids = asked.tokens.ids[one * group : (one + 1) * group]
            begun = torch.from_numpy(ids[0][: alike[one]])
            rests = Tokens([row[alike[one] :] for row in ids])
            batch = packed(rests, np.arange(group), pad=answering.pad)
            scores = self.scored(batch, asked.offsets[rows], blocks_of(np.array([one])), begun=begun)
            found[one] = scores.double().cpu().numpy()
        others = np.flatnonzero(alike == 0)
        rest = asked.take((others[:, None] * group + np.arange(group)).reshape(-1))
        for rows, batch in batches(rest.tokens, pad=answering.pad, group=group):
            groups = others[rows[::group] // group]
            scores = self.scored(batch, rest.offsets[rows], blocks_of(groups))
            found[groups] = scores.double().cpu().numpy().reshape(-1, group)
        return found.reshape(-1)

    def scored(self, batch: Batch, offsets: Floats, blocks: Factors, *, begun: Tensor | None = None) -> Tensor:
        """Return log odds `[rows]` of one batch under given factors, whose rows all begin with `begun [tokens]`."""
        device = self.base.placement.device
        with self.adapted.bound(blocks) as model:
            odds = self.parts.answering(model, batch.to(device), begun=None if begun is None else begun.to(device))
        beside = torch.from_numpy(np.ascontiguousarray(offsets, dtype=np.float32)).to(device)
        return self.parts.calibration(beside, odds)  # type: ignore[no-any-return]

    def mixed(self, vectors: Tensor) -> Factors:
        """Return the factors for groups of rows with `vectors [groups, d]`."""
        if isinstance(self.parts.gate, Uniform):
            return self.parts.meta.one(self.parts.gate(vectors[:1])[:, 0])
        return self.parts.meta.blocks(self.parts.gate(vectors))

    @property
    def _by_user(self) -> bool:
        return self.config.routing == "user" or self.config.gate != "router"

    def _vectors(self, log: Interactions, queries: Queries, *, every: int = 1) -> Tensor:
        return self.representation(log, queries.take(slice(0, None, every))).to(self.base.placement.device)

    @torch.no_grad()
    def weights(self, log: Interactions, queries: Queries) -> Tensor:
        """Return the gate's weights `[sites, queries, N]`."""
        return self.parts.gate(self._vectors(log, queries))  # type: ignore[no-any-return]

    def routing(self, log: Interactions, queries: Queries) -> GateReport:
        """Report on the gate over the given queries."""
        return gate_report(self.weights(log, queries), self.parts.meta)

    @torch.no_grad()
    def adapter_of(self, vectors: Tensor) -> Tensor:
        """Return the mixtures of users as slots of a bank, `[size]` for one vector `[d]`, `[users, size]` for many.

        Raises ModelError where a mixture is no slot: routing by pair, or A's of their own.
        """
        self._check_slots()
        many = vectors if vectors.dim() == 2 else vectors[None]
        blocks = self.parts.meta.blocks(self.parts.gate(many))
        slots = torch.cat([blocks[e.part, e.name].flatten(1) for e in self.parts.meta.layout.entries], dim=1)
        return slots if vectors.dim() == 2 else slots[0]

    def _check_slots(self) -> None:
        if not self._by_user or self.config.frame != "shared":
            raise ModelError(
                f"personal.routing={self.config.routing}, personal.frame={self.config.frame}: a user's mixture is one "
                "slot of the bank only with routing: user and frame: shared"
            )

    @torch.no_grad()
    def export(self, vector: Tensor, directory: Path) -> Path:
        """Write the mixture of one vector `[d]` (a user, or a user with a target) as a PEFT directory.

        Rank r, or N r where products over own A's are mixed. `answering.json` beside it says how scores are made of
        the model's answers.
        """
        blocks = self.parts.meta.one(self.parts.gate(vector[None])[:, 0])
        return export_adapter(
            self.adapted,
            blocks,
            directory,
            reference=self.base.reference,
            task_type="CAUSAL_LM" if self.base.causal else "FEATURE_EXTRACTION",
            extra={"answering.json": json.dumps(self._answers(), indent=1).encode()},
        )

    def _answers(self) -> dict[str, object]:
        parts = self.parts
        found: dict[str, object] = {name: float(value) for name, value in parts.calibration.named_parameters()}
        if not parts.answering.causal:
            found |= {"head_weight": parts.answering.weight.tolist(), "head_bias": float(parts.answering.bias)}
        return found


def shared_run(queries: Queries) -> int:
    """Return how many neighbouring queries always have the same history, such as the candidates of one ranking.

    1 where runs differ in length: groups of rows that share a mixture are equally long.
    """
    if len(queries) == 0:
        return 1
    new = np.flatnonzero((np.diff(queries.first) != 0) | (np.diff(queries.end) != 0)) + 1
    lengths = np.diff([0, *new, len(queries)])
    return int(lengths[0]) if (lengths == lengths[0]).all() else 1
