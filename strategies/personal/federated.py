"""Meta-LoRAs that many clients train while histories stay with them.

What is shared: the meta-LoRAs' B's over the frozen frame, as one flat vector, so that averaging is exact (FFA-LoRA,
Sun et al. 2024) and one round driver, one ClientApp and one ledger serve this setting as they serve every other. What
stays: interactions, prompts, the taste that routes (`Taste`), the weights, and a user's mixture, which is a slot of the
user's own bank. A recommender that learned from everybody's interactions would break this, so there is none: no score
is told or added, and routers are drawn by seed, the same everywhere, and never trained.

What crosses the wire, and nothing else: to a client the B's (and an encoder's head) of a round, its number and the
digests of frame and layout; from a client its B's, its name, its number of questions (public), and its epsilon, or,
without privacy, its mean loss.

Privacy is per question: an example is one target with its label, the prompt with what is told of the history in it, and
the weights that route it; neighbours differ by one of these. An event of a user is the target of one question and is
told in later ones, so epsilon covers a question, not an event or a user. `histories.per_user: 1` with `ratings.core: 1`
leaves one question a user and lets nobody's data decide about another's: then an example is a user. With k questions a
user is a group of k, at k times the epsilon and more than k times the delta.
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from lora.codec import Entry, Layout, Part
from lora.errors import ConfigError, DataError
from lora.gradients import ExampleGradients, GradientSink
from lora.model import AdaptedModel
from lora.overlay import Overlaying
from strategies.federated.job import Job, World
from strategies.personal.asking import Asking
from strategies.personal.config import HistoriesConfig, PersonalConfig
from strategies.personal.fitting import few
from strategies.personal.mixed_gradients import MixedExampleGradients, MixtureSink, mixed
from strategies.personal.personalized import Personalized
from strategies.personal.representation import Drawn, Representation
from strategies.personal.taste import Taste
from tasks.examples import Examples, Splits
from tasks.heads import Head, pool
from tasks.learner import Answers, Blocks, Learner
from tasks.models import load_base
from tasks.recommendation.answers import Answering
from tasks.recommendation.config import RatingsConfig
from tasks.recommendation.files import load_interactions
from tasks.recommendation.interactions import Interactions, Ints
from tasks.recommendation.splits import SPLITS, Split
from tasks.tokens import Batch, Tokens

LABELS = ("No", "Yes")
META = "meta_loras.safetensors"


@dataclass(frozen=True)
class Liking:
    """Would the user like the target: log odds of two answer tokens (decoders) or of a trained head (encoders)."""

    answering: Answering
    head: Head | None

    @classmethod
    def of(cls, answering: Answering) -> "Liking":
        """Answer as `answering` does; an encoder's head starts at zero and trains."""
        if answering.causal:
            return cls(answering, None)
        return cls(answering, Head(torch.zeros(1, len(answering.weight)), torch.zeros(1), trained=True))

    def entries(self) -> tuple[Entry, ...]:
        """Return the trained head's entries, if any."""
        return () if self.head is None else self.head.entries()

    def start(self) -> dict[tuple[Part, str], Tensor]:
        """Return the head as it starts."""
        return {} if self.head is None else {("head", "weight"): self.head.weight, ("head", "bias"): self.head.bias}

    def tokenize(self, examples: Examples) -> Tokens:
        """Refuse: prompts need histories, which `PersonalWorld` holds. Raises DataError."""
        raise DataError(
            f"{len(examples)} texts without histories cannot be asked about; give interactions (ratings.path)"
        )

    def answer(self, base: nn.Module, batch: Batch, blocks: Blocks, sink: GradientSink | None) -> Answers:
        """Answer the questions; the loss is the negative log likelihood of the label, nats."""
        odds = self._odds(base, batch, blocks, sink)
        guess = (odds.detach() > 0).long()
        loss = functional.binary_cross_entropy_with_logits(odds, batch.labels.to(odds.dtype), reduction="none")
        return Answers(loss, (guess == batch.labels).long(), torch.ones_like(guess), guess)

    def _odds(self, base: nn.Module, batch: Batch, blocks: Blocks, sink: GradientSink | None) -> Tensor:
        if self.head is None:
            return self.answering(base, batch)  # type: ignore[no-any-return]
        states = base(input_ids=batch.input_ids, attention_mask=batch.mask).last_hidden_state
        weight, bias = blocks["head", "weight"], blocks["head", "bias"]
        return self.head.logits(pool(states, batch, "mean"), weight=weight, bias=bias, sink=sink)[:, 0]


class MetaLearner(Learner):
    """A learner whose vector holds N B's at every site, `B [N, d_out, r]`, mixed anew for every row of a batch.

    Rows bring their weights with them (`Tokens.beside [rows, sites * N]`), so that training, scoring, clipping and
    averaging are those of every other learner. Privacy: see `MixedExampleGradients`.
    """

    def __init__(self, one: Personalized) -> None:
        task = Liking.of(one.parts.answering)
        super().__init__(one.base, one.adapted, task, trains_frame=False, labels=LABELS)
        self.one, self.count = one, one.config.meta_loras
        self.layout = Layout((*_entries(one.adapted, self.count), *task.entries()))

    @property
    def signature(self) -> str:
        """Fingerprint of what two sides must agree on: also the routers, and what they read."""
        return hashlib.sha256(json.dumps([super().signature, routing_digest(self.one)]).encode()).hexdigest()

    def example_gradients(self, parts: Collection[Part]) -> ExampleGradients:
        """Return an empty sink that keeps one gradient a row for all meta-LoRAs."""
        return MixedExampleGradients(self.layout, parts)

    def answers(
        self, values: Tensor, batch: Batch, *, sink: GradientSink | None = None, overlay: Overlaying | None = None
    ) -> Answers:
        """Answer a batch with one vector `[size]`, or with one for each group of rows, `[groups, size]`."""
        batch, views = batch.to(self.device), self.layout.views(values.to(self.device))
        weights = self._weights(batch)
        groups = values.shape[0] if values.dim() == 2 else 1
        inner = None if sink is None else MixtureSink(sink, weights, groups)
        with self.adapted.bound(mixed(views, weights), sink=inner, overlay=overlay) as model:
            return self.task.answer(model, batch, views, inner)

    def _weights(self, batch: Batch) -> dict[str, Tensor]:
        if batch.beside is None:
            raise DataError("questions without routing weights cannot be answered; take them from PersonalWorld")
        per_site = batch.beside.view(len(batch), len(self.adapted.sites), self.count)
        return {site.name: per_site[:, place] for place, site in enumerate(self.adapted.sites)}

    def peft_blocks(self, values: Tensor) -> Blocks:
        """Return what answers a user without a history: all meta-LoRAs in equal parts."""
        views = self.layout.views(values)
        return {key: view.mean(0) if key[0] == "B" else view for key, view in views.items()}

    def files(self, values: Tensor) -> dict[str, bytes]:
        """Return the meta-LoRAs' B's, `[N, d_out, r]` a site, of which every user's adapter is mixed."""
        views = self.layout.views(values.cpu())
        return {META: save({f"{part}.{name}": view.contiguous() for (part, name), view in views.items()})}

    def personalized(self, values: Tensor) -> Personalized:
        """Return the model that answers users with this vector: their scores, mixtures (slots) and PEFT exports."""
        parts, views = self.one.parts, self.layout.views(values.to(self.device))
        with torch.no_grad():
            for key, own in parts.meta.layout.views(parts.meta.b).items():
                own.copy_(views[key])
            if not parts.answering.causal:
                parts.answering.weight.copy_(views["head", "weight"][0])
                parts.answering.bias.copy_(views["head", "bias"][0])
        return self.one


def _entries(adapted: AdaptedModel, count: int) -> tuple[Entry, ...]:
    return tuple(Entry(entry.part, entry.name, (count, *entry.shape)) for entry in adapted.entries("B"))


def routing_digest(one: Personalized) -> str:
    """Fingerprint of gate and representation (sha256, hex): equal where routing is."""
    found = hashlib.sha256(json.dumps([one.config.gate, one.config.temperature, one.config.history]).encode())
    state = {**one.parts.gate.state_dict(), **one.representation.state()}
    for name in sorted(state):
        found.update(name.encode() + state[name].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


class PersonalWorld(World):
    """Interactions, questions, routing weights and learner of a job with `histories:`; every client holds whole users.

    Validation and test questions are those of the interactions at hand: in a simulation everybody's, on a server only
    what it was given to judge by.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.histories = job.histories or HistoriesConfig()
        self.personal = _checked(job.personal or PersonalConfig(base_score="none"))

    @cached_property
    def log(self) -> Interactions:
        """All interactions at hand."""
        return load_interactions(self.job.ratings or RatingsConfig(), seed=self.job.seed)

    @cached_property
    def split(self) -> Split:
        """Training rows (at most `per_user` of a user), and a sample of the others; a node's own rows all train."""
        found = SPLITS[self.histories.split](self.log)
        if self.job.own:
            nothing = np.empty(0, dtype=np.int64)
            found = Split("own", np.arange(len(self.log)), nothing, nothing)
        held = [few(rows, self.histories.checks, seed=self.job.seed) for rows in (found.validation, found.test)]
        return Split(found.name, self._capped(found.train), *held)

    def _capped(self, rows: Ints) -> Ints:
        """Keep at most `per_user` rows of each user, drawn by seed and name alone."""
        most = self.histories.per_user
        if most is None:
            return rows
        edges = np.flatnonzero(np.diff(self.log.users[rows])) + 1
        return np.concatenate([few(own, most, seed=self._seed_of(own)) for own in np.split(rows, edges)])

    def _seed_of(self, rows: Ints) -> int:
        name = self.log.user_names[self.log.users[rows[0]]] if len(rows) else ""
        return int.from_bytes(hashlib.sha256(f"{self.job.seed}/{name}".encode()).digest()[:8], "little")

    @cached_property
    def splits(self) -> Splits:
        """Texts of the targets, labels, and whose they are; questions are made by `train`, `validation` and `test`."""
        train, validation, test = map(self._examples, (self.split.train, self.split.validation, self.split.test))
        return Splits(train, validation, test, LABELS)

    def _examples(self, rows: Ints) -> Examples:
        log = self.log
        texts = tuple(log.catalogue.texts[item] for item in log.items[rows])
        owners = tuple(log.user_names[user] for user in log.users[rows])
        return Examples(texts, tuple(log.likes[rows].astype(int).tolist()), owners=owners)

    @cached_property
    def shares(self) -> Sequence[Sequence[int]]:
        """Places in the training rows that each client holds: all rows of its users, who are dealt by seed."""
        users = self.log.users[self.split.train]
        dealt = np.random.default_rng(self.job.seed).permutation(len(self.log.user_names))
        client = dealt % self.job.federation.clients
        return [np.flatnonzero(client[users] == index).tolist() for index in range(self.job.federation.clients)]

    @cached_property
    def learner(self) -> MetaLearner:
        """Base model, meta-LoRAs and fixed routers."""
        base = load_base(self.job.model, causal=self.job.task.kind == "causal-lm")
        personal, histories = self.personal, self.histories
        asking = Asking(base, base_score="none", history=personal.history, max_length=personal.max_length)
        taste: Representation = Taste(width=histories.width, seed=histories.text_seed)
        one = Personalized(base, self.job.adapter, personal, asking=asking, representation=taste, name="federated")
        inputs = 2 * histories.width + 2
        if personal.gate == "random":
            inputs = len(one.adapted.sites) * personal.meta_loras
            one.representation = Drawn(width=inputs, seed=self.job.seed)
        one.build(inputs=inputs, seed=self.job.seed).modules().eval().requires_grad_(False)
        return MetaLearner(one)

    @cached_property
    def train(self) -> Tokens:
        """Questions about the training rows."""
        return self.questions(self.split.train)

    @cached_property
    def validation(self) -> Tokens:
        """Questions about the validation rows."""
        return self.questions(self.split.validation)

    @cached_property
    def test(self) -> Tokens:
        """Questions about the test rows."""
        return self.questions(self.split.test)

    def questions(self, rows: Ints) -> Tokens:
        """Return prompts as tokens, labels, and the weights that route each, `beside [rows, sites * N]`."""
        one, queries = self.learner.one, self.log.queries(rows)
        asked = one.asking(self.log, queries)
        weights = one.weights(self.log, queries).transpose(0, 1).flatten(1)
        labels = self.log.likes[rows].astype(np.int64)
        return Tokens(list(asked.tokens.ids), labels, beside=weights.cpu().numpy())


def _checked(personal: PersonalConfig) -> PersonalConfig:
    """Refuse what would need a trained recommender, a moving frame, or a target at the time of mixing."""
    allowed = {"base_score": "none", "frame": "shared", "routing": "user", "told": "latest"}
    for key, value in allowed.items():
        if (given := getattr(personal, key)) != value:
            raise ConfigError(f"personal.{key}={given}: histories stay at the clients; set personal.{key}: {value}")
    return personal
