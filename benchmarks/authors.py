"""A small causal model that has learned TOFU's fictitious authors by heart, and questions to it through slots."""

import gzip
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.measure import seconds
from lora.bank import Bank
from lora.config import AdapterConfig
from lora.gate import Gate
from lora.model import AdaptedModel
from lora.overlay import Overlay
from strategies.unlearning.encoder import SharedEncoder
from strategies.unlearning.gate import ForgettingGate
from tasks.config import ModelConfig, TaskConfig
from tasks.examples import Examples
from tasks.learner import Learner, build_learner
from tasks.models import load_base
from tasks.tokens import IGNORED, Tokens, collate, tokenize_causal, tokenize_classification

VOCABULARY = 4096
HEAD = 32
"""Width of an attention head."""
LONGEST = 192
ANSWER = 80
"""Tokens that an answer may have."""
TOGETHER = 64
"""Questions that are answered in one batch, padded on the left."""
TOGETHER_ON_GPU = 256
"""The same where a step takes as long for all of them as for a few."""


@dataclass(frozen=True)
class Training:
    """How large the model is and how it learns the pairs; the defaults make 2 M parameters."""

    epochs: int = 20
    width: int = 192
    """A multiple of 32, which is the width of a head."""
    layers: int = 3
    batch: int = 8
    """Pairs of a step."""
    rate: float = 2e-3
    """AdamW's largest rate; it rises to it over a twentieth of the steps and falls to zero."""
    device: str = "cpu"

    @property
    def key(self) -> str:
        """What a trained model's folder is named by: the passes, and whatever is not as by default."""
        usual = Training(epochs=self.epochs)
        other = [f"{name}{getattr(self, name):g}" for name in ("width", "layers", "batch", "rate")
                 if getattr(self, name) != getattr(usual, name)]  # fmt: skip
        where = [] if self.device == "cpu" else [self.device.partition(":")[0]]
        return "-".join([str(self.epochs), *other, *where])


def prompt(question: str) -> str:
    """Return what the model is asked."""
    return f"Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Pairs:
    """Questions and answers of authors, with the paraphrased and the wrong answers of those to be forgotten."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    authors: tuple[int, ...]
    paraphrased: tuple[str, ...] = ()
    wrong: tuple[tuple[str, ...], ...] = ()
    other_questions: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.questions)

    def take(self, rows: Sequence[int]) -> "Pairs":
        """Return some rows."""
        columns = (self.questions, self.answers, self.authors, self.paraphrased, self.wrong, self.other_questions)
        return Pairs(*(tuple(column[row] for row in rows) if column else () for column in columns))  # type: ignore[arg-type]

    @property
    def examples(self) -> Examples:
        """Prompts and answers."""
        return Examples(self.answers, prompts=tuple(map(prompt, self.questions)))

    @property
    def asked(self) -> Examples:
        """Questions with their authors: what detectors see."""
        return Examples(self.questions, self.authors)


def read(folder: Path) -> tuple[Pairs, list[Pairs]]:
    """Return the pairs that stay and those of the three requests: forget01, the rest of 05, the rest of 10."""
    rest = _pairs(_lines(folder, "retain90"), first=0)
    whole = _pairs(_lines(folder, "forget10"), first=len(rest) // 20)
    seen: set[str] = set()
    requests = []
    for name in ("forget01", "forget05", "forget10"):
        wanted = {row["question"] for row in _lines(folder, name)} - seen
        seen |= wanted
        requests.append(whole.take([row for row, question in enumerate(whole.questions) if question in wanted]))
    return rest, requests


def _lines(folder: Path, name: str) -> list[dict[str, Any]]:
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _pairs(rows: Sequence[dict[str, Any]], *, first: int) -> Pairs:
    def column(name: str) -> tuple[Any, ...]:
        return tuple(row[name] for row in rows) if name in rows[0] else ()

    authors = tuple(first + place // 20 for place in range(len(rows)))
    wrong = tuple(tuple(each) for each in column("perturbed_answer"))
    return Pairs(
        column("question"), column("answer"), authors, column("paraphrased_answer"), wrong,
        column("paraphrased_question"),
    )  # fmt: skip


@dataclass
class World:
    """The model before any request and the detectors' encoder."""

    learner: Learner
    encoder: SharedEncoder
    tokenizer: Any
    """The encoder's."""
    training_s: float

    def features(self, questions: Sequence[str]) -> Tensor:
        """Return the encoder's features of questions, in their order, on the CPU."""
        tokens = tokenize_classification(
            Examples(tuple(questions), (0,) * len(questions)), self.tokenizer, max_length=64
        )
        order = tokens.lengths.argsort(kind="stable")
        chunks = [order[start : start + 128] for start in range(0, len(order), 128)]
        batches = (collate([(tokens, int(row)) for row in chunk], pad=self.encoder.pad) for chunk in chunks)
        found = torch.cat([self.encoder.features(batch).cpu() for batch in batches])
        return found[torch.from_numpy(order.argsort())]


def made_world(folder: Path, pairs: Pairs, *, name: str, how: Training, seed: int, texts: Sequence[str]) -> World:
    """Train the model on pairs, or take it from the folder; `texts` are what the tokenizer is made of."""
    place = folder / f"tofu-{name}-{how.key}-{seed}"
    if not (place / "seconds").is_file():
        _train(place, pairs, texts, how=how, seed=seed)
    config = ModelConfig(path=str(place), device=how.device, dtype="float32")
    task = TaskConfig(kind="causal-lm", max_length=LONGEST)
    learner = build_learner(config, task, AdapterConfig(rank=8, targets="all"), labels=(), trains_frame=False)
    base = load_base(ModelConfig(name="minilm", device=how.device, dtype="float32"), causal=False)
    adapted = AdaptedModel.attach(base.model, AdapterConfig(rank=8))
    encoder = SharedEncoder(adapted, layers=(6,), pad=int(base.tokenizer.pad_token_id))
    return World(learner, encoder, base.tokenizer, float((place / "seconds").read_text()))


def _tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<pad>", "<end>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>"
    )


def drawn_model(tokenizer: PreTrainedTokenizerFast, how: Training, *, seed: int) -> LlamaForCausalLM:
    """Draw the model, the same numbers on every device."""
    torch.manual_seed(seed)
    width = how.width
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=how.layers,
        num_attention_heads=width // HEAD, max_position_embeddings=LONGEST, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    ))  # fmt: skip


def _train(place: Path, pairs: Pairs, texts: Sequence[str], *, how: Training, seed: int) -> None:
    begun, device, epochs = seconds(how.device), torch.device(how.device), how.epochs
    tokenizer = _tokenizer(texts)
    model = drawn_model(tokenizer, how, seed=seed)
    model.to(device)  # type: ignore[arg-type]
    tokens = tokenize_causal(pairs.examples, tokenizer, max_length=LONGEST)
    lots = list(_lots(tokens, epochs=epochs, seed=seed, size=how.batch))
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=how.rate, total_steps=len(lots), pct_start=0.05)
    for number, lot in enumerate(lots):
        batch = collate([(tokens, int(row)) for row in lot], pad=int(tokenizer.pad_token_id)).to(device)
        labels = batch.input_ids if batch.mask is None else batch.input_ids.masked_fill(batch.mask == 0, IGNORED)
        loss = model(input_ids=batch.input_ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if number % (len(lots) // epochs) == 0:
            taken_s = seconds(how.device) - begun
            print(f"{place.name}: step {number} of {len(lots)}, loss {float(loss):.3f}, {taken_s:.0f} s", flush=True)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    (place / "seconds").write_text(str(seconds(how.device) - begun))


def _lots(tokens: Tokens, *, epochs: int, seed: int, size: int) -> Iterator[np.ndarray[Any, Any]]:
    """Yield lots of rows of like length, in a new order in every epoch."""
    source = np.random.default_rng(seed)
    for _ in range(epochs):
        order = (tokens.lengths + source.uniform(0, 8, len(tokens))).argsort()
        lots = [order[start : start + size] for start in range(0, len(order), size)]
        yield from (lots[place] for place in source.permutation(len(lots)))


Weights = Tensor | None


def _overlay(
    gate: ForgettingGate | None, weights: Weights, rows: Sequence[int], device: torch.device
) -> Overlay | None:
    if gate is None or weights is None:
        return None
    slots = Bank(gate.slots.layout, gate.slots.data.to(device))
    return Overlay.of(slots, Gate.mixture(weights[torch.as_tensor(rows)].to(device)))


@torch.no_grad()
def likelihoods(world: World, examples: Examples, gate: ForgettingGate | None, weights: Weights) -> Tensor:
    """Return every row's likelihood of its answer, p(answer | question) ^ (1 / tokens), on the CPU."""
    learner = world.learner
    values = learner.start().to(learner.device)
    tokens = learner.task.tokenize(examples)
    found = torch.zeros(len(tokens))
    for rows, batch in learner.batches([(tokens, row) for row in range(len(tokens))]):
        overlay = _overlay(gate, weights, rows.tolist(), learner.device)
        answers = learner.answers(values, batch, overlay=overlay)
        found[torch.from_numpy(rows)] = torch.exp(-answers.loss).cpu()
    return found


@torch.no_grad()
def greedy(
    learner: Learner, prompts: Sequence[Sequence[int]], gate: ForgettingGate | None, weights: Weights, *, together: int
) -> list[list[int]]:
    """Return the greedy `ANSWER` tokens after every prompt's tokens, padded behind the end; `together` in a batch."""
    device, tokenizer = learner.device, learner.base.tokenizer
    views = learner.layout.views(learner.start().to(device))
    found: list[list[int]] = [[]] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for start in range(0, len(order), together):
        rows = order[start : start + together]
        longest = len(prompts[rows[-1]])
        given = torch.full((len(rows), longest), learner.pad)
        mask = torch.zeros_like(given)
        for place, row in enumerate(rows):
            given[place, longest - len(prompts[row]) :] = torch.tensor(prompts[row])
            mask[place, longest - len(prompts[row]) :] = 1
        with learner.adapted.bound(views, overlay=_overlay(gate, weights, rows, device)) as base:
            made = base.generate(  # type: ignore[operator]
                input_ids=given.to(device), attention_mask=mask.to(device), max_new_tokens=ANSWER, do_sample=False,
                use_cache=True, pad_token_id=learner.pad, eos_token_id=int(tokenizer.eos_token_id),
            )  # fmt: skip
        for row, answer in zip(rows, made[:, longest:].tolist(), strict=True):
            found[row] = answer
    return found


def said(world: World, questions: Sequence[str], gate: ForgettingGate | None, weights: Weights) -> list[str | None]:
    """Return the greedy answer to every question, None where it does not end within `ANSWER` tokens."""
    learner, tokenizer = world.learner, world.learner.base.tokenizer
    ids = [tokenizer(prompt(question), add_special_tokens=True)["input_ids"] for question in questions]
    together = TOGETHER if learner.device.type == "cpu" else TOGETHER_ON_GPU
    end = tokenizer.eos_token_id
    answers = greedy(learner, ids, gate, weights, together=together)
    return [tokenizer.decode(each[: each.index(end)]).strip() if end in each else None for each in answers]


def recall(reference: str, candidate: str | None) -> float:
    """Return ROUGE-L recall by words in lower case: the longest common subsequence over the reference's words."""
    wanted, given = _words(reference), _words(candidate or "")
    longest = [0] * (len(given) + 1)
    for word in wanted:
        before = 0
        for place, other in enumerate(given, start=1):
            above = longest[place]
            longest[place] = before + 1 if word == other else max(above, longest[place - 1])
            before = above
    return longest[-1] / max(1, len(wanted))


def _words(text: str) -> list[str]:
    return "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()


def truth_ratios(world: World, pairs: Pairs, gate: ForgettingGate | None, weights: Weights) -> np.ndarray[Any, Any]:
    """Return TOFU's truth ratio of every row: mean likelihood of its wrong answers over that of its paraphrased one."""
    prompts = tuple(map(prompt, pairs.questions))
    right = likelihoods(world, Examples(pairs.paraphrased, prompts=prompts), gate, weights)
    wrong = [
        likelihoods(world, Examples(tuple(each[place] for each in pairs.wrong), prompts=prompts), gate, weights)
        for place in range(min(map(len, pairs.wrong)))
    ]
    ratios: np.ndarray[Any, Any] = (torch.stack(wrong).mean(0) / right.clamp(min=math.ulp(1.0))).numpy()
    return ratios


def losses_of(likelihood: Tensor) -> Tensor:
    """Return nats a token."""
    return -likelihood.clamp(min=torch.finfo(torch.float32).tiny).log()
