"""Where lots and noise come from: the operating system's generator, or a declared test's seed."""

import hashlib
import os
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora.errors import PrivacyError

_PAIRS = 16_384
_UNIT = 2.0**-53
_Bytes = Callable[[int], bytes]


class Randomness(Protocol):
    """A source of Poisson lots and Gaussian noise; `secure` says whether a guarantee may rest on it."""

    @property
    def secure(self) -> bool:
        """Whether the draws are unpredictable and never repeat."""
        ...

    def gaussian(self, size: int) -> Tensor:
        """Draw standard normals, float32 `[size]`."""
        ...

    def lot(self, population: int, *, rate: float) -> NDArray[np.int64]:
        """Draw a Poisson sample of `range(population)`: sorted indices, each in with probability `rate`."""
        ...


class SecureRandomness:
    """Draws from the operating system's cryptographic generator.

    **Guarantee**: every draw reads fresh bytes of `os.urandom`; the object holds no state, so a fork, a snapshot, a
    checkpoint or a copy can repeat no draw, and there is nothing to seed.

    | case | what happens |
    |---|---|
    | a seed is given | PrivacyError: a guarantee cannot rest on a seed |
    | copied, forked, pickled | the copies draw independently |
    | size 0, population 0, rate 0 | an empty result |
    | rate 1 | everybody |
    """

    __slots__ = ()

    def __init__(self, seed: int | None = None) -> None:
        if seed is not None:
            raise PrivacyError(
                f"noise that protects people cannot come from a seed (seed={seed}); "
                "remove the seed, or declare a test with `privacy.test_seed`"
            )

    @property
    def secure(self) -> bool:
        """True: a guarantee may rest on these draws."""
        return True

    def gaussian(self, size: int) -> Tensor:
        """Draw standard normals, float32 `[size]` (about 8 ms for 190,000)."""
        return _gaussian(os.urandom, size)

    def lot(self, population: int, *, rate: float) -> NDArray[np.int64]:
        """Draw a Poisson sample of `range(population)`: sorted indices, possibly none."""
        return _lot(os.urandom, population, rate)


class SeededRandomness:
    """Draws that a seed repeats, for tests; a run that uses it claims no privacy.

    `path` names who draws and when (client, round), so that no two of them share their noise.
    """

    def __init__(self, seed: int, *path: int | str) -> None:
        digest = hashlib.sha256(repr((int(seed), *path)).encode()).digest()
        self._generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))

    @property
    def secure(self) -> bool:
        """False: whoever knows the seed can subtract the noise."""
        return False

    def gaussian(self, size: int) -> Tensor:
        """Draw standard normals, float32 `[size]`."""
        return _gaussian(self._generator.bytes, size)

    def lot(self, population: int, *, rate: float) -> NDArray[np.int64]:
        """Draw a Poisson sample of `range(population)`: sorted indices, possibly none."""
        return _lot(self._generator.bytes, population, rate)


def _uniform(source: _Bytes, count: int) -> NDArray[np.float64]:
    """Draw multiples of 2^-53 in [0, 1), float64 `[count]`."""
    words = np.frombuffer(source(8 * count), dtype="<u8")
    return (words >> np.uint64(11)).astype(np.float64) * _UNIT


def _gaussian(source: _Bytes, size: int) -> Tensor:
    """Box and Muller (1958) in float64, cast last; in pieces that stay in the cache."""
    drawn = np.empty(size, dtype=np.float32)
    for start in range(0, size, 2 * _PAIRS):
        piece = drawn[start : start + 2 * _PAIRS]
        pairs = (len(piece) + 1) // 2
        uniform = _uniform(source, 2 * pairs)
        # 1 - u lies in (0, 1], so that the logarithm is finite.
        radius = np.sqrt(-2.0 * np.log(1.0 - uniform[:pairs]))
        angle = (2.0 * np.pi) * uniform[pairs:]
        piece[:pairs] = radius * np.cos(angle)
        piece[pairs:] = (radius * np.sin(angle))[: len(piece) - pairs]
    return torch.from_numpy(drawn)


def _lot(source: _Bytes, population: int, rate: float) -> NDArray[np.int64]:
    if not 0.0 <= rate <= 1.0 or population < 0:
        raise PrivacyError(
            f"no Poisson lot with rate={rate} of {population} examples; "
            "the rate lies between 0 and 1 and the population is not negative"
        )
    return np.flatnonzero(_uniform(source, population) < rate)
