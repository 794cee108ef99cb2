"""The frame: the frozen factor A of every adapted matrix, the same everywhere, known by its digest."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora.errors import FrameMismatch, ModelError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Site:
    """One adapted matrix of the base model: its module path and its shape."""

    name: str
    d_in: int
    d_out: int


class Stream:
    """Uniform numbers from a seed and a name, bit-identical on every platform.

    Only Philox's raw integers and exactly rounded operations are used, never a library's transformed draws.
    """

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    def uniform(self, *shape: int) -> Array:
        """Draw from [-1, 1), in steps of 2^-23."""
        raw: NDArray[np.uint64] = self._bits.random_raw(math.prod(shape))
        drawn: Array = (raw >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1.0
        return drawn.reshape(shape)


Initialiser = Callable[[Site, int, Stream], Array]
"""Draws A `[rank, d_in]` for a site."""


def kaiming(site: Site, rank: int, stream: Stream) -> Array:
    """Kaiming-uniform with a = sqrt(5), PEFT's own start: U(-1/sqrt(d_in), 1/sqrt(d_in))."""
    return stream.uniform(rank, site.d_in) / math.sqrt(site.d_in)


def orthogonal(site: Site, rank: int, stream: Stream) -> Array:
    """Orthonormal rows: Gram-Schmidt, done twice, over nearly normal rows (each a sum of twelve uniforms)."""
    if rank > site.d_in:
        raise ModelError(f"adapter.rank={rank} exceeds the width {site.d_in} of '{site.name}'; lower adapter.rank")
    rows: Array = stream.uniform(12, rank, site.d_in).sum(axis=0)
    for index in range(rank):
        for _ in range(2):
            for earlier in rows[:index]:
                rows[index] -= dot(rows[index], earlier) * earlier
        rows[index] /= math.sqrt(dot(rows[index], rows[index]))
    return rows


def dot(left: Array, right: Array) -> float:
    """Sum products by halves: the same rounding everywhere, which a BLAS does not promise."""
    terms = left * right
    while len(terms) > 1:
        half = len(terms) // 2
        folded = terms[:half] + terms[half : 2 * half]
        terms = np.append(folded, terms[-1]) if len(terms) % 2 else folded
    return float(terms[0])


INITIALISERS: dict[str, Initialiser] = {"kaiming": kaiming, "orthogonal": orthogonal}


@dataclass(frozen=True)
class Frame:
    """The frozen A `[rank, d_in]` (float32) of every site.

    Guarantee: nothing in Lethe writes to `matrices`; `digest` tells any change of a bit, a name or a shape.
    """

    matrices: Mapping[str, Tensor]
    rank: int

    @classmethod
    def draw(cls, sites: Iterable[Site], *, rank: int, seed: int, init: str = "kaiming") -> "Frame":
        """Derive the frame from a seed; equal on every machine. Raises ModelError for an impossible rank."""
        make = INITIALISERS[init]
        return cls(
            {
                site.name: torch.from_numpy(make(site, rank, Stream(seed, site.name)).astype(np.float32))
                for site in sites
            },
            rank,
        )

    def to(self, device: torch.device) -> "Frame":
        """Return the frame on a device; itself where it is there already."""
        if all(matrix.device == device for matrix in self.matrices.values()):
            return self
        return type(self)({name: matrix.to(device) for name, matrix in self.matrices.items()}, self.rank)

    @cached_property
    def digest(self) -> str:
        """Fingerprint of the frame as it was when first asked for (sha256, hex)."""
        return self.fingerprint()

    def fingerprint(self) -> str:
        """Compute the digest anew from the numbers as they are now."""
        whole = hashlib.sha256()
        for name in sorted(self.matrices):
            matrix = self.matrices[name].detach().to("cpu", torch.float32).contiguous()
            whole.update(f"{name}:{tuple(matrix.shape)}:".encode())
            whole.update(matrix.numpy().astype("<f4", copy=False).tobytes())
        return whole.hexdigest()

    def check(self, digest: str, *, who: str) -> None:
        """Raise FrameMismatch unless the other side holds this very frame."""
        if digest != self.digest:
            raise FrameMismatch(
                f"{who} holds frame {digest[:12]}, expected {self.digest[:12]}; "
                "use the same model, adapter.rank, adapter.targets, adapter.init and adapter.frame_seed"
            )
