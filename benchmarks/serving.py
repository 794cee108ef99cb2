"""Many users' adapters in one batch, against the bare model and PEFT's mixed batch; and servers under load.

    python -m benchmarks.serving [--parts passes rows load] [--rounds 15] [--model minilm] [--decoder DIRECTORY]
        [--seconds 10] [--device cpu] [--dtype float32] [--smoke]

Passes: a batch of 32 rows of 32 different users, rank 8, in CPU seconds on one thread, variants interleaved. `base` is
the model without adapters, `bank` the adapted model with 32 slots from memory, `peft` PEFT's `adapter_names` with the
same adapters loaded (as many as the batch has; PEFT grows slower with every one that is loaded besides). Before
anything is timed, bank and PEFT must agree to 1e-5. `n10000_over_n32` is the bank with so many users over the bank
with 32, fresh users in every pass. Decoding is steps of one token after a prompt of 32, keys and values kept; the
slots are copied once, when the rows join, and the same is true of PEFT's batch. On a GPU (`--device cuda`, passes
only) all of it is timed by the clock and its figures end in `_gpu`; a half-precision base (`--dtype bfloat16`) adds
`_bf16`. There bank and PEFT must agree far better than they differ from the bare model, and the decoder's prompt alone
is compared, since rounding may choose another token.

Load: two servers of the same make (FastAPI, uvicorn, one process, one torch thread) that embed texts with users'
adapters, asked by a second process over kept connections: the service, and one that calls PEFT for every request (its
adapters are loaded before; it may not batch, since requests come one by one). The client shares the machine with the
server, in both cases. `rps_over_peft_c32_*` compares them at 32 connections with texts of 8 and 32 tokens.

Rows: routing rows and rank-1 slots of a million users (`--million`), in files: bytes, and milliseconds to look 32 up,
from the disk (cold) and again from memory.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.measure import interleaved, paired_ratio, publish, seconds, settings
from lora.codec import Layout
from lora.config import AdapterConfig
from lora.model import AdaptedModel
from server.service.decoding import Decoding
from server.service.lent import Desk
from server.service.sources import BankSource
from server.service.warm import Kept, WarmSlots
from strategies.personal.rows import NUMBERS, NamedRows
from strategies.personal.slots import UserSlots
from tasks.config import ModelConfig
from tasks.device import place
from tasks.models import BaseModel, byte_tokenizer, load_base

ADAPTER = AdapterConfig(rank=8, alpha=16)
ROWS, PROMPT, STEPS = 32, 32, 8
SIZE = 0.02
"""Spread of the numbers of B: answers move, and stay finite."""


def slots_of(layout_size: int, count: int, *, seed: int = 0) -> Tensor:
    """Return slots that differ, `[count, size]`."""
    return SIZE * torch.randn(count, layout_size, generator=torch.Generator().manual_seed(seed))


class Drawn:
    """A source that draws every user's slot anew: what is measured are the warm slots, which need memory enough."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def kept(self, names: Sequence[str]) -> Kept:
        """Return the slots of those names."""
        values = torch.cat([slots_of(self.layout.size, 1, seed=int(name.split("-")[1])) for name in names])
        return Kept(tuple(names), values, (1,) * len(names))

    def versions(self, names: Sequence[str]) -> dict[str, int]:
        """Return that nothing has changed."""
        return dict.fromkeys(names, 1)

    def listen(self, listener: Callable[[Sequence[str]], None]) -> None:
        """Nothing is ever replaced."""


@dataclass
class Work:
    """A base model with a bank, and the same with PEFT's adapters."""

    load: Callable[[], BaseModel]
    """Returns the model, the same in every call."""

    @cached_property
    def bare(self) -> nn.Module:
        """The model without adapters."""
        return self.load().model.eval().requires_grad_(False)

    @cached_property
    def base(self) -> BaseModel:
        """The base of the bank."""
        return self.load()

    @property
    def device(self) -> torch.device:
        """Where all of it computes."""
        return self.base.placement.device

    @property
    def exact(self) -> bool:
        """Whether it computes in float32."""
        return self.base.placement.dtype == torch.float32

    @cached_property
    def adapted(self) -> AdaptedModel:
        """The model of the bank."""
        return AdaptedModel.attach(self.base.model, ADAPTER)

    def bank(self, users: int) -> WarmSlots:
        """Return warm slots of so many users, all in memory."""
        warm = WarmSlots(Drawn(UserSlots.of(self.adapted).layout), rows=users, device=self.device)
        for first in range(0, users, 100):
            names = [f"user-{number}" for number in range(first, min(first + 100, users))]
            warm.gather(names, warm.buffer(len(names)))
        return warm

    @cached_property
    def peft(self) -> PeftModel:
        """PEFT with the first 32 users of the bank."""
        config = LoraConfig(
            r=ADAPTER.rank, lora_alpha=int(ADAPTER.alpha), target_modules=[site.name for site in self.adapted.sites]
        )
        # Its adapters keep the base's precision, as the bank's products do.
        model = get_peft_model(self.load().model, config, adapter_name="user-0", autocast_adapter_dtype=False).eval()
        layout = UserSlots.of(self.adapted).layout
        found = Drawn(layout).kept(USERS).values
        inner: Any = model.base_model.model
        for user in range(ROWS):
            if user:
                model.add_adapter(f"user-{user}", config, autocast_adapter_dtype=False)
            views = layout.views(found[user])
            for site in self.adapted.sites:
                layer = inner.get_submodule(site.name)
                layer.lora_A[f"user-{user}"].weight.data.copy_(self.adapted.frame.matrices[site.name])
                layer.lora_B[f"user-{user}"].weight.data.copy_(views["B", site.name])
        return model.requires_grad_(False)

    def ids(self, tokens: int) -> Tensor:
        """Return random tokens, `[32, tokens]`."""
        config: Any = self.base.model.config
        vocabulary = int(config.vocab_size)
        found = torch.randint(5, vocabulary, (ROWS, tokens), generator=torch.Generator().manual_seed(tokens))
        return found.to(self.device)


USERS = [f"user-{number}" for number in range(ROWS)]


def encoder_of(name: str, where: Mapping[str, Any]) -> Work:
    """Return the work of an encoder by name; `where` has device and dtype."""
    return Work(lambda: load_base(ModelConfig(name=name, **where), causal=False))


def small_llama(where: Mapping[str, Any]) -> BaseModel:
    """Return a Llama of 17 million numbers drawn at random: how long it takes does not depend on what they are."""
    placement = place(ModelConfig(**where))
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
            num_key_value_heads=6,
        )
    )  # fmt: skip
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=source)
            parameter.data = parameter.data.to(placement.dtype)
    return BaseModel(model.to(placement.device), byte_tokenizer(), "small-llama", True, placement)


def decoder_of(path: str | None, where: Mapping[str, Any], *, tiny: bool) -> Work:
    """Return the work of a decoder in a directory, of the small Llama, or of a tiny one."""
    if path is None and not tiny:
        return Work(lambda: small_llama(where))
    found = ModelConfig(name="tiny-llama", path=path, **where)
    return Work(lambda: load_base(found, causal=True))


# --- Passes ----------------------------------------------------------------------------------------------------------


def fresh(count: int) -> Callable[[], list[str]]:
    """Return what draws 32 different users anew in every call."""
    source = torch.Generator().manual_seed(1)
    return lambda: [f"user-{number}" for number in torch.randperm(count, generator=source)[:ROWS].tolist()]


def encoding(work: Work, *, tokens: int, warm: WarmSlots, names: Callable[[], list[str]]) -> Callable[[], Tensor]:
    """Return one pass of the encoder through the bank."""
    ids, desk = work.ids(tokens), Desk(warm.turned, dtype=work.base.placement.dtype)
    mask = torch.ones_like(ids)

    def run() -> Tensor:
        with warm.lent(names()) as lent, work.adapted.bound(desk.blocks(lent)) as model:
            found: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
        return found

    return run


def decoding(
    work: Work, *, warm: WarmSlots, names: Callable[[], list[str]], steps: int = STEPS
) -> Callable[[], Tensor]:
    """Return a prefill and some steps of the decoder through the bank, as the service does it."""
    ids, rows = work.ids(PROMPT).cpu(), Decoding(work.base, work.adapted, warm.turned, rows=ROWS)

    def run() -> Tensor:
        rows.keep([])
        with warm.lent(names()) as lent:
            rows.copy(lent)
        logits = rows.join([*ids])
        for _ in range(steps):
            logits = rows.step(logits.argmax(1))
        return logits

    return run


def stepping(model: nn.Module, ids: Tensor, *, steps: int = STEPS, **more: Any) -> Callable[[], Tensor]:
    """Return the same of a model of transformers; tokens are chosen on the CPU, as the service does it."""

    def run() -> Tensor:
        cache = DynamicCache()
        given = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1, **more}
        logits: Tensor = model(input_ids=ids, **given).logits[:, -1].float().cpu()
        for _ in range(steps):
            token = logits.argmax(1, keepdim=True)
            logits = model(input_ids=token.to(ids.device), **given).logits[:, -1].float().cpu()
        return logits

    return run


def agree(work: Work, what: str, *, bank: Tensor, peft: Tensor, bare: Tensor) -> None:
    """Stop unless bank and PEFT answer the same, and not what the bare model does."""
    worst, effect = float((bank - peft).abs().max()), float((bank - bare).abs().max())
    print(f"{what}: bank and PEFT differ by {worst:.1e}, and from the bare model by {effect:.1e}")
    assert effect > 1e-3, "the adapters change nothing"
    if work.exact:
        # A GPU adds up in another order in every kernel.
        loose = 10.0 if work.device.type == "cuda" else 1.0
        torch.testing.assert_close(bank, peft, rtol=loose * 1e-4, atol=loose * 1e-5)
    else:
        share = float((bank - peft).float().norm() / (bank - bare).float().norm())
        assert share < 0.3, f"bank and PEFT differ by {share:.2f} of what the adapters change"


def silent(call: Callable[[], Tensor]) -> Callable[[], None]:
    """Drop what a call returns."""

    def run() -> None:
        call()

    return run


def encoder_passes(
    work: Work, *, tokens: int, few: WarmSlots, large: WarmSlots, many: int, rounds: int
) -> dict[str, list[float]]:
    """Time the encoder bare, through the bank with 32 and with many users, and through PEFT."""
    ids = work.ids(tokens)
    mask = torch.ones_like(ids)
    bank = encoding(work, tokens=tokens, warm=few, names=lambda: USERS)

    def peft() -> Tensor:
        found: Tensor = work.peft(input_ids=ids, attention_mask=mask, adapter_names=USERS).last_hidden_state
        return found

    def bare() -> Tensor:
        found: Tensor = work.bare(input_ids=ids, attention_mask=mask).last_hidden_state
        return found

    agree(work, f"encoder, {tokens} tokens", bank=bank(), peft=peft(), bare=bare())
    calls: dict[str, Callable[[], Tensor]] = {
        "base": bare,
        "bank": encoding(work, tokens=tokens, warm=few, names=fresh(ROWS)),
        "many": encoding(work, tokens=tokens, warm=large, names=fresh(many)),
        "peft": peft,
    }
    return interleaved({name: silent(call) for name, call in calls.items()}, rounds=rounds, device=work.device.type)


def decoder_passes(work: Work, *, rounds: int) -> dict[str, list[float]]:
    """Time the decoder in the same way."""
    ids = work.ids(PROMPT)
    warm = work.bank(ROWS)

    def calls(steps: int) -> dict[str, Callable[[], Tensor]]:
        return {
            "bare": stepping(work.bare, ids, steps=steps),
            "bank": decoding(work, warm=warm, names=lambda: USERS, steps=steps),
            "peft": stepping(work.peft, ids, steps=steps, adapter_names=USERS),
        }

    found = {name: call() for name, call in calls(STEPS if work.exact else 0).items()}
    agree(work, "decoder", **found)
    timed = {"base" if name == "bare" else name: silent(call) for name, call in calls(STEPS).items()}
    return interleaved(timed, rounds=rounds, device=work.device.type)


def added(work: Work, *, count: int, directory: Path | None = None) -> float:
    """Return the median milliseconds until a new user's slot can answer: written, and gathered once.

    In a directory a slot and its row of the index are on the disk by then.
    """
    slots = UserSlots.of(work.adapted, directory)
    warm, spent = WarmSlots(BankSource(slots), rows=count, device=work.device), []
    values, out = slots_of(slots.layout.size, count), warm.buffer(1)
    for number in range(count):
        began = time.perf_counter()
        slots.add([f"new-{number}"], values[number])
        warm.gather([f"new-{number}"], out)
        seconds(work.device.type)  # On a GPU, until it is there.
        spent.append(1000 * (time.perf_counter() - began))
    return statistics.median(spent)


# --- Many rows -------------------------------------------------------------------------------------------------------


def many_rows(width: int, users: int) -> dict[str, float]:
    """Keep so many rows in files; returns bytes a user on the disk and in memory, and milliseconds to look 32 up."""
    with tempfile.TemporaryDirectory() as name:
        rows = NamedRows(width, kind="benchmark", directory=Path(name))
        source, before = torch.Generator().manual_seed(0), psutil.Process().memory_info().rss
        for first in range(0, users, 20_000):
            names = [f"user-{number}" for number in range(first, min(first + 20_000, users))]
            rows.replace(names, torch.randn(len(names), width, generator=source))
        resident = psutil.Process().memory_info().rss - before
        spent: dict[str, list[float]] = {"cold": [], "lookup32": []}
        for _ in range(50):
            asked = [f"user-{number}" for number in torch.randint(users, (ROWS,), generator=source).tolist()]
            _uncached(Path(name) / NUMBERS)
            for times in spent.values():
                began = time.perf_counter()
                with rows.steady():
                    rows.read([found[0] for user in asked if (found := rows.find(user))])
                times.append(1000 * (time.perf_counter() - began))
        disk = sum(file.stat().st_blocks * 512 for file in Path(name).iterdir())
        held = (Path(name) / NUMBERS).stat().st_size
        rows.close()
    return {"disk_bytes": disk / users, "file_bytes": held / users, "resident_bytes": resident / users,
            "lookup32_ms": statistics.median(spent["lookup32"]),
            "lookup32_cold_ms": statistics.median(spent["cold"])}  # fmt: skip


def _uncached(path: Path) -> None:
    """Have the system drop what it keeps of a file in memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- All of it -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="the encoder: minilm, or tiny-bert")
    parser.add_argument("--decoder", metavar="DIRECTORY", help="a decoder; else a random Llama of 17 million numbers")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--many", type=int, default=10_000, help="users of the larger bank (0.5 MB each for minilm)")
    parser.add_argument("--million", type=int, default=1_000_000, help="users with routing rows and rank-1 slots")
    parser.add_argument("--seconds", type=float, default=10.0, help="of every load")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 32, 100, 1000])
    parser.add_argument("--users", type=int, default=1000, help="users of the loaded service")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS], help="what is measured; all of it")
    parser.add_argument("--device", default="cpu", help="of the passes: cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the passes' base")
    parser.add_argument("--smoke", action="store_true", help="everything tiny, and nothing written")
    chosen = parser.parse_args()
    end = ("" if chosen.device == "cpu" else "_gpu") + ("" if chosen.dtype == "float32" else "_bf16")
    if end and chosen.parts != ["passes"]:
        parser.error("rows and load are measured on the CPU in float32; add --parts passes")
    if chosen.smoke:
        chosen.model, chosen.rounds, chosen.many, chosen.million = "tiny-bert", 2, 100, 1000
        chosen.seconds, chosen.clients, chosen.users = 0.5, [1, 32], 40
    torch.set_num_threads(1)
    about = {key: value for key, value in vars(chosen).items() if key not in ("smoke", "decoder", "parts")}
    for part in chosen.parts:
        with torch.no_grad():
            figures, rows = PARTS[part](chosen)
        figures = {f"{name}{end}": value for name, value in figures.items()}
        rows = [[f"{row[0]}{end}", *row[1:]] for row in rows]
        known = {row[0] for row in rows}
        table = [["what", "median", "spread"], *rows]
        table += [[name, f"{value:.3g}", ""] for name, value in figures.items() if name not in known]
        if chosen.smoke:
            print(json.dumps(figures, indent=1))
        else:
            told = settings(decoder="given" if chosen.decoder else "small-llama", **about)
            publish("serving", figures=figures, rows=table, about=told, part=f"{part}{end}")


Found = tuple[dict[str, float], list[list[str]]]
"""Figures by name, and those rows of the table that have a spread."""


def passes(chosen: argparse.Namespace) -> Found:
    """Measure batches of 32 users, and adding a user."""
    figures: dict[str, float] = {}
    rows: list[list[str]] = []
    where = {"device": chosen.device, "dtype": chosen.dtype}
    encoder = encoder_of(chosen.model, where)
    few, large = encoder.bank(ROWS), encoder.bank(chosen.many)
    for tokens in (8, 32, 128):
        times = encoder_passes(encoder, tokens=tokens, few=few, large=large, many=chosen.many, rounds=chosen.rounds)
        _ratios(times, f"enc{tokens}", figures, rows)
        if tokens == 32:
            _ratio(times, "many", "bank", key=f"n{chosen.many}_over_n32", figures=figures, rows=rows)
    del few, large
    decoder = decoder_of(chosen.decoder, where, tiny=chosen.smoke)
    _ratios(decoder_passes(decoder, rounds=chosen.rounds), "decode", figures, rows)
    figures["add_user_ms"] = added(encoder, count=min(200, chosen.many))
    with tempfile.TemporaryDirectory() as name:
        figures["add_user_durable_ms"] = added(encoder, count=min(200, chosen.many), directory=Path(name))
    return figures, rows


def rows_kept(chosen: argparse.Namespace) -> Found:
    """Measure a million users' rows."""
    return _million(encoder_of(chosen.model, {"device": "cpu", "dtype": "float32"}), chosen.million), []


def load(chosen: argparse.Namespace) -> Found:
    """Measure the servers."""
    # Imported late: the servers' processes import this module for the model and the slots.
    from benchmarks.serving_load import bare_engine, under_load

    model = {"name": chosen.model, "device": "cpu"}
    figures = bare_engine(model, users=chosen.users, seconds=chosen.seconds)
    figures |= under_load(model, clients=chosen.clients, seconds=chosen.seconds, users=chosen.users)
    for tokens in (8, 32):
        for name, figure, over in (("rps", "rps", "bank"), ("cpu", "cpu_ms", "peft")):
            found = {kind: figures[f"{kind}_{figure}_c32_{tokens}tok"] for kind in ("bank", "peft")}
            under = next(kind for kind in found if kind != over)
            figures[f"{name}_over_{'peft' if name == 'rps' else 'bank'}_c32_{tokens}tok"] = found[over] / found[under]
    figures["p99_ms_c32"] = figures["bank_p99_ms_c32_8tok"]
    return figures, []


PARTS: dict[str, Callable[[argparse.Namespace], Found]] = {"passes": passes, "rows": rows_kept, "load": load}


def _million(work: Work, users: int) -> dict[str, float]:
    """Measure routing rows of 8 meta-LoRAs, and slots of rank 1 on attention."""
    attention = AdapterConfig(rank=1, alpha=2, targets="attention")
    small = AdaptedModel.attach(work.load().model, attention)
    widths = {"routing": 8 * len(work.adapted.sites), "rank1": sum(entry.size for entry in small.entries("B"))}
    return {
        f"{name}_{figure}": value for name, width in widths.items() for figure, value in many_rows(width, users).items()
    }


def _ratios(times: Mapping[str, Sequence[float]], work: str, figures: dict[str, float], rows: list[list[str]]) -> None:
    figures[f"base_ms_{work}"] = 1000 * statistics.median(times["base"])
    for name in ("bank", "peft"):
        _ratio(times, name, "base", key=f"{name}_over_base_{work}", figures=figures, rows=rows)


def _ratio(
    times: Mapping[str, Sequence[float]], over: str, under: str, *, key: str, figures: dict[str, float],
    rows: list[list[str]],
) -> None:  # fmt: skip
    middle, low, high = paired_ratio(times, over, under)
    figures[key] = middle
    rows.append([key, f"{middle:.3f}", f"{low:.3f}-{high:.3f}"])


if __name__ == "__main__":
    main()
