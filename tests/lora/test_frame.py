"""The frame is the same everywhere: derived again here from its definition, in plain Python."""

import hashlib
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from scipy.stats import ks_2samp
from torch import nn

from lora.errors import FrameMismatch, ModelError
from lora.frame import INITIALISERS, Frame, Site, Stream

SITES = (Site("layer.0.query", 7, 5), Site("layer.1.out", 12, 3))
WORD = 2**64 - 1


def philox(key: int, count: int) -> list[int]:
    """Philox4x64-10 (Salmon et al., 2011) with the counter starting at 1, as NumPy's does."""
    drawn: list[int] = []
    block = 0
    while len(drawn) < count:
        block += 1
        c, low, high = [block, 0, 0, 0], key & WORD, key >> 64
        for _ in range(10):
            p, q = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [(q >> 64) ^ c[1] ^ low, q & WORD, (p >> 64) ^ c[3] ^ high, p & WORD]
            low, high = (low + 0x9E3779B97F4A7C15) & WORD, (high + 0xBB67AE8584CAA73B) & WORD
        drawn += c
    return drawn[:count]


def uniforms(seed: int, name: str, count: int) -> list[float]:
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    return [(raw >> 40) / 2**23 - 1 for raw in philox(key, count)]


def halves(terms: list[float]) -> float:
    while len(terms) > 1:
        middle = len(terms) // 2
        folded = [terms[i] + terms[middle + i] for i in range(middle)]
        terms = folded + terms[-1:] if len(terms) % 2 else folded
    return terms[0]


def plain_kaiming(seed: int, site: Site, rank: int) -> list[list[float]]:
    drawn = uniforms(seed, site.name, rank * site.d_in)
    scaled = [value / math.sqrt(site.d_in) for value in drawn]
    return [scaled[row * site.d_in : (row + 1) * site.d_in] for row in range(rank)]


def plain_orthogonal(seed: int, site: Site, rank: int) -> list[list[float]]:
    drawn, block = uniforms(seed, site.name, 12 * rank * site.d_in), rank * site.d_in
    flat = [sum(drawn[i + block * layer] for layer in range(12)) for i in range(block)]
    rows: list[list[float]] = []
    for index in range(rank):
        row = flat[index * site.d_in : (index + 1) * site.d_in]
        for earlier in rows * 2:
            along = halves([x * y for x, y in zip(row, earlier, strict=True)])
            row = [x - along * y for x, y in zip(row, earlier, strict=True)]
        length = math.sqrt(halves([x * x for x in row]))
        rows.append([x / length for x in row])
    return rows


PLAIN = {"kaiming": plain_kaiming, "orthogonal": plain_orthogonal}


def plain_digest(init: str, *, rank: int, seed: int) -> str:
    whole = hashlib.sha256()
    for site in sorted(SITES, key=lambda each: each.name):
        whole.update(f"{site.name}:({rank}, {site.d_in}):".encode())
        for row in PLAIN[init](seed, site, rank):
            whole.update(struct.pack(f"<{len(row)}f", *row))
    return whole.hexdigest()


@pytest.mark.parametrize("init", INITIALISERS)
@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_the_digest_is_the_one_that_the_definition_gives(init: str, seed: int) -> None:
    assert Frame.draw(SITES, rank=5, seed=seed, init=init).digest == plain_digest(init, rank=5, seed=seed)


@pytest.mark.parametrize("init", INITIALISERS)
@pytest.mark.parametrize("site", SITES)
def test_every_bit_of_a_before_its_rounding_is_the_one_that_the_definition_gives(init: str, site: Site) -> None:
    found = INITIALISERS[init](site, 6, Stream(4, site.name))
    assert found.tolist() == PLAIN[init](4, site, 6)


class NearlyParallel(Stream):
    """Rows that differ in their tenth digit: one pass of Gram-Schmidt would leave them aslant."""

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        return np.ones(shape) + 1e-10 * super().uniform(*shape)


def test_nearly_parallel_rows_become_orthogonal_too() -> None:
    rows = INITIALISERS["orthogonal"](Site("x", 40, 3), 8, NearlyParallel(0, "x"))
    assert np.abs(rows @ rows.T - np.eye(8)).max() < 1e-12


SCRIPT = """
import torch
torch.manual_seed({seed})
torch.set_num_threads({threads})
from lora.frame import Frame, Site
sites = [Site("a", 768, 4), Site("b", 33, 4)]
print(*(Frame.draw(sites, rank=8, seed=3, init=init).digest for init in ("kaiming", "orthogonal")))
"""


def test_processes_and_thread_counts_agree() -> None:
    found = set()
    for threads in (1, 4):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(seed=threads, threads=threads)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": str(threads)},
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(done.stdout.strip())
    sites = [Site("a", 768, 4), Site("b", 33, 4)]
    own = [Frame.draw(sites, rank=8, seed=3, init=init).digest for init in ("kaiming", "orthogonal")]
    assert found == {" ".join(own)}


def test_kaiming_is_distributed_as_pefts_own_start() -> None:
    torch.manual_seed(0)
    twin = get_peft_model(nn.Sequential(nn.Linear(256, 4)), LoraConfig(r=64, target_modules=["0"]))
    theirs = dict(twin.named_parameters())["base_model.model.0.lora_A.default.weight"].detach().numpy().ravel()
    ours = Frame.draw([Site("0", 256, 4)], rank=64, seed=0).matrices["0"].numpy().ravel()
    assert ks_2samp(ours, theirs).pvalue > 0.01
    assert ks_2samp(1.05 * ours, theirs).pvalue < 1e-3
    assert np.abs(ours).max() <= 1 / 16


@given(st.integers(1, 12), st.integers(0, 30), st.integers(0, 2**63))
@settings(max_examples=40)
def test_orthogonal_rows_are_orthonormal(rank: int, more: int, seed: int) -> None:
    site = Site("x", rank + more, 3)
    rows = Frame.draw([site], rank=rank, seed=seed, init="orthogonal").matrices["x"].double()
    assert (rows @ rows.T - torch.eye(rank)).abs().max() < 1e-6


def test_orthogonal_rows_are_nearly_uniform_in_direction() -> None:
    rows = Frame.draw([Site("x", 400, 3)], rank=50, seed=0, init="orthogonal").matrices["x"].numpy()
    normal = np.random.default_rng(0).standard_normal(20_000)
    assert ks_2samp(rows.ravel() * 20, normal).pvalue > 0.01


def test_more_orthogonal_rows_than_columns_are_refused() -> None:
    with pytest.raises(ModelError, match=r"adapter\.rank=8 exceeds the width 7 of 'layer\.0\.query'; lower"):
        Frame.draw(SITES, rank=8, seed=0, init="orthogonal")


@given(st.integers(0, 2**63), st.text(max_size=8))
@settings(max_examples=50)
def test_the_stream_stays_in_its_range_and_on_its_grid(seed: int, name: str) -> None:
    drawn = Stream(seed, name).uniform(5, 40)
    assert drawn.shape == (5, 40)
    assert (drawn >= -1).all() and (drawn < 1).all()
    assert (drawn * 2**23 == np.round(drawn * 2**23)).all()


def test_seeds_names_and_shapes_each_give_another_frame() -> None:
    base = Frame.draw(SITES, rank=4, seed=0)
    renamed = Frame.draw([SITES[0], Site("layer.1.in", 12, 3)], rank=4, seed=0)
    others = [Frame.draw(SITES, rank=4, seed=1), Frame.draw(SITES, rank=5, seed=0), renamed]
    assert len({frame.digest for frame in (base, *others)}) == 4
    assert torch.equal(base.matrices["layer.0.query"], renamed.matrices["layer.0.query"])
    reordered = Frame.draw(SITES[::-1], rank=4, seed=0)
    assert reordered.digest == base.digest


def test_values_moved_from_one_site_to_another_change_the_digest() -> None:
    one, two = torch.ones(2, 3), torch.zeros(2, 3)
    assert Frame({"a": one, "b": two}, 2).digest != Frame({"a": two, "b": one}, 2).digest
    assert Frame({"a": one}, 2).digest != Frame({"a": one.reshape(3, 2)}, 2).digest


@given(st.integers(0, 4 * 7 - 1), st.integers(0, 31))
@settings(max_examples=60)
def test_the_fingerprint_sees_one_flipped_bit(place: int, bit: int) -> None:
    frame = Frame.draw(SITES, rank=4, seed=0)
    digest = frame.digest
    words = frame.matrices["layer.0.query"].view(torch.int32).view(-1)
    words[place] ^= torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)
    assert frame.fingerprint() != digest
    assert frame.digest == digest


def test_check_names_both_frames_and_what_makes_them_equal() -> None:
    frame, other = Frame.draw(SITES, rank=4, seed=0), Frame.draw(SITES, rank=4, seed=1)
    frame.check(frame.digest, who="client 3")
    with pytest.raises(FrameMismatch) as caught:
        frame.check(other.digest, who="client 3")
    for part in ("client 3", other.digest[:12], frame.digest[:12], "adapter.rank", "adapter.frame_seed"):
        assert part in str(caught.value)
