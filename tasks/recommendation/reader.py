"""A small decoder that learns to read here: item texts, histories and answers of the training rows, nothing else.

For machines that reach no hub: it answers hundreds of prompts a second on one thread, where a pretrained encoder takes
a second for some twenty. It is saved as a transformers directory, which `model.path` loads.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from tasks.models import BaseModel
from tasks.recommendation.answers import Answering, answer_tokens, batches, packed, tokenized
from tasks.recommendation.interactions import Floats, Interactions, Ints
from tasks.recommendation.metrics import log_loss
from tasks.recommendation.prompts import Phrasing, events, prompts
from tasks.recommendation.splits import Split
from tasks.tokens import Batch, Tokens

COMPACT = Phrasing(compact=True)


@dataclass(frozen=True)
class ReaderSettings:
    """Sizes and training of the reader."""

    vocabulary: int = 4096
    width: int = 64
    layers: int = 2
    heads: int = 4
    hidden: int = 176
    history: int = 5
    """Events before the question, in training texts as in prompts."""
    positions: int = 512
    rate: float = 3e-3
    decay: float = 0.1
    batch: int = 64
    """Texts of a batch, of `history + 1` events each."""
    epochs: int = 8
    patience: int = 2
    texts: float = 0.1
    """Share of the tokens that are no answers which are learned as well: titles, tags, levels, ratings."""


def reading_tokenizer(texts: Sequence[str], *, size: int) -> PreTrainedTokenizerFast:
    """Fit a byte-level BPE of at most `size` entries; equal texts give equal tokenizers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def new_reader(log: Interactions, settings: ReaderSettings, *, seed: int = 0) -> BaseModel:
    """Return an untrained reader whose tokenizer knows the catalogue's texts and the words of prompts."""
    words = [f"{like}/20 {title} {' '.join(tags)}: Yes 4\n No 3" for like, (title, tags) in
             enumerate(zip(log.catalogue.titles, log.catalogue.tags, strict=True))]  # fmt: skip
    tokenizer = reading_tokenizer(words, size=settings.vocabulary)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=settings.width, num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads, intermediate_size=settings.hidden,
        max_position_embeddings=settings.positions, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(shape)
    return BaseModel(model, tokenizer, "reader", causal=True)


def documents(log: Interactions, rows: Ints, *, lines: int, phase: int, known: Sequence[str]) -> Iterator[str]:
    """Yield every user's rows as texts of `lines` neighbouring events; `phase` moves where texts begin.

    `known` are the lines of all `rows`, which are sorted as interactions are.
    """
    edges = np.flatnonzero(np.diff(log.users[rows])) + 1
    for begin, end in zip([0, *edges], [*edges, len(rows)], strict=True):
        cuts = [begin, *range(begin + 1 + phase % lines, end, lines), end]
        for start, stop in pairwise(cuts):
            yield "\n".join(known[start:stop])


def train_reader(
    log: Interactions, split: Split, settings: ReaderSettings | None = None, *, seed: int = 0
) -> BaseModel:
    """Train a reader on the texts of the training rows; validation rows choose the epoch."""
    settings = settings or ReaderSettings()
    base = new_reader(log, settings, seed=seed)
    training = _Training(base, log, split, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        training.run()
    return base


class _Training:
    def __init__(self, base: BaseModel, log: Interactions, split: Split, settings: ReaderSettings) -> None:
        self.base, self.log, self.settings = base, log, settings
        self.rows = np.sort(split.train)
        self.lines = events(log, self.rows, phrasing=COMPACT)
        queries = log.queries(split.validation)
        asked = prompts(log, queries, queries.latest(settings.history), phrasing=COMPACT)
        self.held = tokenized(asked, base.tokenizer, max_length=settings.positions)
        self.labels = log.likes[split.validation]
        self.colon = int(base.tokenizer(":")["input_ids"][0])
        self.answers = torch.tensor(answer_tokens(base.tokenizer))
        self.curve: list[float] = []

    def run(self) -> None:
        """Learn, and keep the weights that answer validation questions best."""
        model = self.base.model
        steps = sum(-(-len(self._texts(epoch)) // self.settings.batch) for epoch in range(self.settings.epochs))
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.settings.rate, weight_decay=self.settings.decay, betas=(0.9, 0.98)
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.settings.rate, total_steps=max(2, steps + 1))
        best, kept = float("inf"), {name: value.clone() for name, value in model.state_dict().items()}
        for epoch in range(self.settings.epochs):
            model.train()
            for batch in self._batches(epoch):
                optimizer.zero_grad()
                torch.autograd.backward([self._loss(batch)])
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
            self.curve.append(log_loss(self.labels, read(self.base, self.held)))
            if self.curve[-1] < best:
                best, kept = self.curve[-1], {name: value.clone() for name, value in model.state_dict().items()}
            elif len(self.curve) - 1 - int(np.argmin(self.curve)) >= self.settings.patience:
                break
        model.load_state_dict(kept)
        model.eval()

    def _texts(self, epoch: int) -> list[str]:
        lines = 1 + self.settings.history
        return [*documents(self.log, self.rows, lines=lines, phase=epoch, known=self.lines)]

    def _batches(self, epoch: int) -> Iterator[Batch]:
        texts = self._texts(epoch)
        tokens = tokenized(texts, self.base.tokenizer, max_length=self.settings.positions)
        order = torch.randperm(len(texts)).numpy()
        for begin in range(0, len(order), self.settings.batch):
            yield packed(tokens, order[begin : begin + self.settings.batch], pad=0)

    def _loss(self, batch: Batch) -> Tensor:
        ids = batch.input_ids
        states = self.base.model.base_model(input_ids=ids).last_hidden_state[:, :-1]  # type: ignore[operator]
        wanted = ids[:, 1:]
        answer = (ids[:, :-1] == self.colon) & torch.isin(wanted, self.answers)
        other = ~answer & (wanted != 0) & (torch.rand(wanted.shape) < self.settings.texts)
        chosen = answer | other
        head = self.base.model.get_output_embeddings()  # type: ignore[operator]
        losses = functional.cross_entropy(head(states[chosen]), wanted[chosen], reduction="none")
        is_answer = answer[chosen]
        return losses[is_answer].mean() + 0.2 * losses[~is_answer].mean()


@torch.no_grad()
def read(base: BaseModel, tokens: Tokens) -> Floats:
    """Return the log odds of Yes that a decoder gives to prompts, `[prompts]`."""
    answering, found = Answering(base), np.empty(len(tokens))
    base.model.eval()
    for rows, batch in batches(tokens, pad=answering.pad):
        found[rows] = answering(base.model, batch.to(base.placement.device)).double().cpu().numpy()
    return found


def save_reader(base: BaseModel, directory: Path) -> Path:
    """Write the reader as a transformers directory, aside and renamed; one that is there is replaced."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    aside = directory.with_name(f".{directory.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    base.model.save_pretrained(aside)  # type: ignore[operator]
    base.tokenizer.save_pretrained(aside)
    if directory.exists():
        old = aside.with_name(f"{aside.name}.old")
        directory.rename(old)
        shutil.rmtree(old)
    aside.rename(directory)
    return directory
