"""Users' adapters trained in one batch over the bank, against one PEFT adapter a user; bytes a user; one update.

    python -m benchmarks.personal [--stories DIRECTORY] [--rounds 5] [--users 64] [--events 1 2 20] [--many 100000]
        [--device cuda]

Every user has 1, 2 or 20 new events (prompts of 32 to 64 random tokens with an answer), and gets 3 steps of AdamW on
B of every matrix, rank 8, A frozen. Times run from "events at hand" to "adapters updated", so both sides make the
adapters inside; the base model is loaded before. In CPU seconds on one thread, rivals interleaved. Three rivals:

- bank: `UserSlots` in memory and `SlotTrainer`;
- adapters: one PEFT adapter for every user (`add_adapter`), each trained on a batch of its user's events by torch's
  fused AdamW with the same loss, which looks at the last position only. This is what `bank_over_peft_*` compares;
- loaded: one PEFT adapter into which every user's B is copied, and out of which it is read: the fastest we could make
  PEFT, though no longer an adapter a user (`bank_over_loaded_*`).

Before anything is timed, bank and PEFT must agree (SGD, to 1e-5). Bytes a user are those that the files of a store
really take, with `--many` users: slots of rank 2 on attention (rank 8 on everything would fill the disk with the same
answer; `slot_bytes` is of those that are trained here), and routing rows of 8 meta-LoRAs. The update is of one user
with one event, in a directory of `--update-users` users, read and durably written; retraining trains them all on 20
events each.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from benchmarks.measure import interleaved, paired_ratio, publish, settings
from lora.config import AdapterConfig
from lora.model import AdaptedModel
from strategies.personal.losses import AnswerToken, RowLoss
from strategies.personal.rows import INDEX, NUMBERS, NamedRows
from strategies.personal.slot_batches import UserEvents
from strategies.personal.slot_optimizer import EPSILON, SlotSteps
from strategies.personal.slot_training import SlotTrainer, update_users
from strategies.personal.slots import UserSlots
from tasks.config import ModelConfig
from tasks.heads import pool, random_weight
from tasks.models import BaseModel, load_base
from tasks.tokens import Batch, Tokens, collate

ADAPTER = AdapterConfig(rank=8, alpha=16)
CONFIG = SlotSteps(steps=3, optimizer="adamw", rate=0.01)
STORED = AdapterConfig(rank=2, alpha=4, targets="attention")
SHORTEST, LONGEST = 32, 64
META_LORAS = 8


@dataclass(frozen=True)
class Work:
    """A base model, loaded anew for either side, and the loss of its answers."""

    model: ModelConfig
    causal: bool

    def load(self) -> BaseModel:
        """Load the base model."""
        return load_base(self.model, causal=self.causal)

    @cached_property
    def base(self) -> BaseModel:
        """The bank's own copy."""
        return self.load()

    @cached_property
    def trainer(self) -> SlotTrainer:
        """The bank's trainer."""
        adapted = AdaptedModel.attach(self.base.model, ADAPTER)
        return SlotTrainer(adapted, self.loss, pad=int(self.base.tokenizer.pad_token_id))

    @cached_property
    def loss(self) -> RowLoss:
        """Two answer tokens for a decoder, a frozen head of two classes for an encoder."""
        if self.causal:
            return AnswerToken((5, 9))
        weight = random_weight(2, self.base.width, seed=0).to(self.base.placement.device)

        def head(base: nn.Module, batch: Batch) -> Tensor:
            states = base(input_ids=batch.input_ids, attention_mask=batch.mask).last_hidden_state
            return F.cross_entropy(F.linear(pool(states, batch, "mean"), weight), batch.labels, reduction="none")

        return head

    def events(self, users: int, *, each: int) -> dict[str, UserEvents]:
        """Make events of random tokens."""
        source = np.random.default_rng(each)
        vocabulary = int(self.base.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
        made = {}
        for user in range(users):
            ids = [source.integers(3, vocabulary, size) for size in source.integers(SHORTEST, LONGEST + 1, each)]
            made[f"user-{user}"] = UserEvents(Tokens(ids, labels=source.integers(0, 2, each)))
        return made


@dataclass
class Rival:
    """PEFT on a base of its own, with the bank's A's, frozen."""

    work: Work
    model: PeftModel = field(init=False)

    def __post_init__(self) -> None:
        self.sites = self.work.trainer.adapted.sites
        self.pad = self.work.trainer.pad
        self.config = LoraConfig(
            r=ADAPTER.rank, lora_alpha=int(ADAPTER.alpha), target_modules=[site.name for site in self.sites]
        )
        self.model = get_peft_model(self.work.load().model, self.config).eval()
        self.inner: nn.Module = self.model.base_model.model  # type: ignore[assignment]

    def factors(self, adapter: str) -> list[nn.Parameter]:
        """Give an adapter the bank's A's and return its B's."""
        found = []
        for site in self.sites:
            layer = self.inner.get_submodule(site.name)
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight  # type: ignore[union-attr, index]
            a.requires_grad_(False).copy_(self.work.trainer.adapted.frame.matrices[site.name])
            found.append(b)
        return found

    def train(self, events: UserEvents, own: list[nn.Parameter], make: Callable[..., torch.optim.Optimizer]) -> None:
        """Train the active adapter's B's on a batch of a user's events."""
        optimizer = make(own)
        batch = collate([(events.tokens, row) for row in range(len(events.tokens))], pad=self.pad)
        batch = batch.to(self.work.base.placement.device)
        for _ in range(CONFIG.steps):
            optimizer.zero_grad()
            torch.autograd.backward(self.work.loss(self.inner, batch).mean())
            optimizer.step()

    def adapters(self, events: dict[str, UserEvents]) -> None:
        """Make and train one adapter for every user."""
        for user, own in events.items():
            self.model.add_adapter(user, self.config)
            self.model.set_adapter(user)
            self.train(own, self.factors(user), adamw)

    def loaded(self, events: dict[str, UserEvents], make: Callable[..., torch.optim.Optimizer]) -> Tensor:
        """Train every user in the one adapter; returns their B's `[users, size]`."""
        own, found = self.factors("default"), []
        for each in events.values():
            for b in own:
                b.data.zero_()
            self.train(each, own, make)
            found.append(torch.cat([b.detach().flatten() for b in own]))
        return torch.stack(found).cpu()


def adamw(own: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return torch's fastest AdamW."""
    return torch.optim.AdamW(own, lr=CONFIG.rate, eps=EPSILON, weight_decay=0.0, fused=True)


def agree(work: Work) -> None:
    """Stop unless bank and PEFT do the same."""
    events, config = work.events(3, each=2), SlotSteps(steps=CONFIG.steps, optimizer="sgd", rate=0.1)
    start = torch.zeros(3, work.trainer.layout.size)
    ours = work.trainer(start, list(events.values()), config=config).values
    theirs = Rival(work).loaded(events, lambda own: torch.optim.SGD(own, lr=0.1))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def compared(work: Work, *, users: int, each: int, rounds: int) -> dict[str, list[float]]:
    """Time the three rivals."""
    events, start = work.events(users, each=each), torch.zeros(work.trainer.layout.size)
    fresh, swapped = [Rival(work) for _ in range(rounds + 1)], Rival(work)

    def bank() -> None:
        update_users(UserSlots.of(work.trainer.adapted), work.trainer, events, config=CONFIG, start=start)

    variants = {
        "bank": bank,
        "adapters": lambda: fresh.pop().adapters(events),
        "loaded": lambda: void(swapped.loaded(events, adamw)),
    }
    return interleaved(variants, rounds=rounds, warmup=1, device=work.model.device)


def void(_: Any) -> None:
    """Drop a result."""


# --- Bytes -----------------------------------------------------------------------------------------------------------


def filled(rows: NamedRows, users: int) -> None:
    """Give every user a row of random numbers."""
    source = torch.Generator().manual_seed(0)
    for first in range(0, users, 2000):
        names = [f"user-{number}" for number in range(first, min(first + 2000, users))]
        rows.replace(names, torch.randn(len(names), rows.width, generator=source))


def stored(width: int, users: int) -> dict[str, float]:
    """Fill a store, open it anew and read 64 users: bytes on the disk and in memory, seconds."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        began = time.perf_counter()
        first = NamedRows(width, kind="benchmark", directory=directory)
        filled(first, users)
        wrote = time.perf_counter() - began
        first.close()
        del first
        before, began = psutil.Process().memory_info().rss, time.perf_counter()
        rows = NamedRows(width, kind="benchmark", directory=directory)
        opened = time.perf_counter() - began
        asked = [rows.find(f"user-{number * (users // 64)}") for number in range(64)]
        with rows.steady() as data:
            read = data.index_select(0, torch.tensor([each[0] for each in asked if each is not None]))
        resident = psutil.Process().memory_info().rss - before
        disk = {file: (directory / file).stat().st_blocks * 512 for file in (NUMBERS, INDEX)}
        rows.close()
        assert read.isfinite().all()
    return {
        "disk_bytes_a_user": sum(disk.values()) / users,
        "index_bytes_a_user": disk[INDEX] / users,
        "resident_bytes": float(resident),
        "fill_s": wrote,
        "open_s": opened,
    }


# --- One update ------------------------------------------------------------------------------------------------------


@contextmanager
def kept(work: Work, users: Sequence[str]) -> Iterator[UserSlots]:
    """Slots in a directory, all zero."""
    with tempfile.TemporaryDirectory() as name:
        slots = UserSlots.of(work.trainer.adapted, Path(name))
        slots.add(users, torch.zeros(work.trainer.layout.size))
        yield slots
        slots.close()


def update_against_retraining(work: Work, *, users: int) -> dict[str, float]:
    """Train everybody on everything, then one user on one event, from reading the slot to having it on the disk."""
    whole, new = work.events(users, each=20), work.events(users, each=1)
    with kept(work, list(whole)) as slots:
        cpu, wall = timed(lambda: void(update_users(slots, work.trainer, whole, config=CONFIG)))
        some = [{user: new[user]} for user in list(new)[:20]]
        spent = [timed(lambda own=one: void(update_users(slots, work.trainer, own, config=CONFIG))) for one in some]  # type: ignore[misc]
    update, update_wall = (statistics.median(column) for column in zip(*spent, strict=True))
    return {"retrain_s": cpu, "retrain_wall_s": wall, "update_s": update, "update_wall_s": update_wall}


def timed(call: Callable[[], None]) -> tuple[float, float]:
    """Return CPU and wall seconds of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


# --- All of it -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", metavar="DIRECTORY", help="the stories260k model; else a tiny random Llama")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--events", type=int, nargs="+", default=[1, 2, 20], help="new events of every user")
    parser.add_argument("--many", type=int, default=100_000, help="users of the larger store")
    parser.add_argument("--update-users", type=int, default=200)
    parser.add_argument("--minilm-users", type=int, default=8, help="users of MiniLM, whose rounds take long; 0: none")
    parser.add_argument("--device", default="cpu", help="cuda: users a second alone, in keys that end in _gpu")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    placed = {"device": chosen.device, "dtype": "float32"}
    decoder = {"path": chosen.stories} if chosen.stories else {"name": "tiny-llama"}
    works = {"decoder": (Work(ModelConfig(**decoder, **placed), causal=True), chosen.users)}
    if chosen.minilm_users:
        works["minilm"] = (Work(ModelConfig(name="minilm", **placed), causal=False), chosen.minilm_users)
    figures: dict[str, float] = {}
    rows = [["work", "what", "median", "spread"]]
    for name, (work, users) in works.items():
        agree(work)
        for each in chosen.events:
            times = compared(work, users=users, each=each, rounds=chosen.rounds)
            _report(times, name=name, each=each, users=users, figures=figures, rows=rows)
    part, about = "cpu", settings(**_about(chosen))
    if chosen.device == "cpu":
        _storage(works["decoder"][0], many=chosen.many, figures=figures, rows=rows)
        _update(works["decoder"][0], users=chosen.update_users, figures=figures, rows=rows)
    else:
        part, figures = "gpu", {f"{key}_gpu": value for key, value in figures.items()}
    publish("personal", figures=figures, rows=rows, about=about, part=part)


def _about(chosen: argparse.Namespace) -> dict[str, Any]:
    own = {key: value for key, value in vars(chosen).items() if key != "stories"}
    shared = {"stories": bool(chosen.stories), "rank": ADAPTER.rank, "targets": ADAPTER.targets}
    return own | shared | CONFIG.model_dump() | {"tokens": [SHORTEST, LONGEST], "meta_loras": META_LORAS}


def _report(
    times: dict[str, list[float]],
    *,
    name: str,
    each: int,
    users: int,
    figures: dict[str, float],
    rows: list[list[str]],
) -> None:
    suffix = f"{each}_events" + ("" if name == "decoder" else f"_{name}")
    label = f"{name}, {users} users x {each}"
    for variant, spent in times.items():
        figures[f"{variant}_users_per_s_{suffix}"] = users / statistics.median(spent)
        fastest, slowest = users / max(spent), users / min(spent)
        rows.append(
            [label, f"{variant}, users/s", f"{users / statistics.median(spent):.1f}", f"{fastest:.1f}-{slowest:.1f}"]
        )
    for variant, key in (("adapters", "bank_over_peft"), ("loaded", "bank_over_loaded")):
        middle, low, high = paired_ratio(times, variant, "bank")
        figures[f"{key}_{suffix}"] = middle
        rows.append([label, key, f"{middle:.2f}", f"{low:.2f}-{high:.2f}"])
    print("; ".join(" ".join(row[1:]) for row in rows[-5:]), flush=True)


def _storage(work: Work, *, many: int, figures: dict[str, float], rows: list[list[str]]) -> None:
    trainer = work.trainer
    small = AdaptedModel.attach(work.load().model, STORED)
    widths = {
        "stored_slot": sum(entry.size for entry in small.entries("B")),
        "routing": META_LORAS * len(trainer.adapted.sites),
    }
    figures |= {"slot_bytes": 4.0 * trainer.layout.size}
    for what, width in widths.items():
        figures[f"{what}_bytes"] = 4.0 * width
        for users in (1000, many):
            found = stored(width, users)
            figures |= {f"{what}_{key}_{users}_users": value for key, value in found.items()}
            spent = f"opened in {1000 * found['open_s']:.1f} ms, {found['resident_bytes'] / 2**20:.1f} MiB resident"
            rows.append([f"{what} x {users}", "bytes a user on the disk", f"{found['disk_bytes_a_user']:.0f}", spent])


def _update(work: Work, *, users: int, figures: dict[str, float], rows: list[list[str]]) -> None:
    found = update_against_retraining(work, users=users)
    ratio = found["retrain_s"] / found["update_s"]
    wall = found["retrain_wall_s"] / found["update_wall_s"]
    figures |= found | {"retrain_over_update_s": ratio, "retrain_over_update_wall": wall}
    rows.append([f"{users} users x 20, one x 1", "retrain over update", f"{ratio:.0f}", f"wall {wall:.0f}"])


if __name__ == "__main__":
    main()
