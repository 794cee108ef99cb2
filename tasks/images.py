"""Images with class labels: read from an NPZ file as MNIST comes in, or drawn here."""

import random
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lora.errors import DataError, nearest
from tasks.tokens import Ids

Pixels = NDArray[np.uint8]
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
"""What an NPZ file holds: images `[n, height, width]` or `[n, height, width, channels]`, labels `[n]`."""


@dataclass(frozen=True)
class Images:
    """Pixels `[n, channels, height, width]` (0 to 255) and class indices `[n]`."""

    pixels: Pixels
    labels: Ids

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int] | Ids) -> "Images":
        """Return copies of the given rows."""
        rows = np.asarray(indices, dtype=np.int64)
        return Images(self.pixels[rows], self.labels[rows])


@dataclass(frozen=True)
class ImageSplits:
    """The three splits of an image task; `label_names[i]` is the name of label i."""

    train: Images
    validation: Images
    test: Images
    label_names: tuple[str, ...]


def load_images(path: Path, *, holdout: float = 0.1, seed: int = 0) -> ImageSplits:
    """Read an NPZ file; validation is a share of its training images, drawn with `seed`.

    Labels are numbered as they sort in the training images. Raises DataError for a file that is missing, damaged or
    holds something else.
    """
    arrays = _arrays(path)
    names, _ = np.unique(arrays["y_train"], return_inverse=True)
    train, test = (_images(path, arrays, role, names) for role in ("train", "test"))
    size = round(holdout * len(train))
    if not 0 < size < len(train):
        raise DataError(f"{path}: holdout={holdout:g} of {len(train)} training images leaves an empty split")
    order = list(range(len(train)))
    random.Random(f"{seed}:holdout").shuffle(order)
    kept, held = sorted(order[size:]), sorted(order[:size])
    return ImageSplits(train.take(kept), train.take(held), test, tuple(str(name) for name in names))


def _arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        with np.load(path, allow_pickle=False) as opened:
            absent = [name for name in ARRAYS if name not in opened.files]
            if absent:
                raise DataError(f"{path}: no array '{absent[0]}'{nearest(absent[0], opened.files)}")
            return {name: opened[name] for name in ARRAYS}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read as an NPZ file of images ({error})") from error


def _images(path: Path, arrays: dict[str, NDArray[np.generic]], role: str, names: NDArray[np.generic]) -> Images:
    pixels, labels = arrays[f"x_{role}"], arrays[f"y_{role}"]
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or labels.ndim != 1 or len(pixels) != len(labels):
        raise DataError(
            f"{path}: x_{role} is {pixels.dtype}{list(pixels.shape)} and y_{role} {list(labels.shape)}; "
            "uint8 [n, height, width] (or with channels last) and [n] are expected"
        )
    unknown = np.setdiff1d(labels, names)
    if len(unknown):
        raise DataError(f"{path}: y_{role} has label {unknown[0]}, which no training image has")
    spread = pixels[:, None] if pixels.ndim == 3 else np.moveaxis(pixels, 3, 1)
    return Images(np.ascontiguousarray(spread, dtype=np.uint8), np.searchsorted(names, labels).astype(np.int64))


OPERATIONS = ("rotate", "shear x", "shear y", "shift x", "shift y", "brightness", "contrast")
_LARGEST = {"rotate": np.pi / 6, "shear x": 0.3, "shear y": 0.3, "shift x": 0.45, "shift y": 0.45, "brightness": 0.9,
            "contrast": 0.9}  # fmt: skip


def augmented(images: Images, *, copies: int, magnitude: float = 5.0, seed: int = 0) -> Images:
    """Return `copies` of every image, each distorted by two operations, `[copies * n]` with the images' labels.

    RandAugment (Cubuk et al., 2020) with two operations of `OPERATIONS` in torchvision's ranges, each with either sign;
    `magnitude` is of 30. Its operations on colours alone, and those that a magnitude does not scale, are left out.
    """
    rng, share = np.random.default_rng(seed), magnitude / 30
    rows = np.tile(np.arange(len(images)), copies)
    x = torch.from_numpy(images.pixels[rows].astype(np.float32))
    for _ in range(2):
        chosen = rng.integers(len(OPERATIONS), size=len(rows))
        strength = (
            share * rng.choice((-1.0, 1.0), size=len(rows)) * np.array([_LARGEST[OPERATIONS[op]] for op in chosen])
        )
        x = _distorted(x, chosen, strength)
    return Images(x.clamp(0, 255).round().to(torch.uint8).numpy(), images.labels[rows])


def _distorted(x: Tensor, chosen: NDArray[np.int64], strength: NDArray[np.float64]) -> Tensor:
    """Apply to every image `[n, channels, height, width]` its operation."""
    of = {name: torch.from_numpy(np.where(chosen == place, strength, 0.0)).float()
          for place, name in enumerate(OPERATIONS)}  # fmt: skip
    turn = of["rotate"]
    first = torch.stack([turn.cos(), of["shear x"] - turn.sin(), 2 * of["shift x"]], 1)
    second = torch.stack([of["shear y"] + turn.sin(), turn.cos(), 2 * of["shift y"]], 1)
    grid = F.affine_grid(torch.stack([first, second], 1), list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)
    mean = moved.mean((1, 2, 3), keepdim=True)
    bright, contrast = (1 + of[name][:, None, None, None] for name in ("brightness", "contrast"))
    return (mean + contrast * (moved - mean)) * bright


_ENDS = np.array(
    [
        *([[-1, -2], [1, -2]], [[1, -2], [1, 0]], [[1, 0], [1, 2]], [[-1, 2], [1, 2]]),
        *([[-1, 0], [-1, 2]], [[-1, -2], [-1, 0]], [[-1, 0], [1, 0]]),
    ],
    dtype=np.float64,
)
"""The two ends (x, y) of the segments a to g of a digital display."""
_LIT = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcfgd")


def builtin_images(
    *, train: int = 2000, validation: int = 500, test: int = 1000, side: int = 28, seed: int = 0
) -> ImageSplits:
    """Draw digits of a digital display: shifted, scaled, slanted, of varying weight, noisy; classes are balanced."""
    rng = np.random.default_rng(seed)
    names = tuple(str(digit) for digit in range(10))
    return ImageSplits(_drawn(train, side, rng), _drawn(validation, side, rng), _drawn(test, side, rng), names)


def _drawn(count: int, side: int, rng: np.random.Generator) -> Images:
    labels = rng.permutation(np.arange(count) % 10).astype(np.int64)
    lit = np.array([[segment in _LIT[label] for segment in "abcdefg"] for label in labels]).reshape(count, 7)
    size = rng.uniform(0.14, 0.2, (count, 1, 1, 1)) * side
    shift = rng.uniform(-0.1, 0.1, (count, 1, 1, 2)) * side + side / 2
    ends = size * _ENDS + shift
    slant = rng.uniform(-0.35, 0.35, (count, 1, 1))
    ends[..., 0] += slant * (side / 2 - ends[..., 1])
    reach = _distances(ends, side)
    reach[~lit] = np.inf
    weight = rng.uniform(0.7, 1.6, (count, 1, 1)) * side / 28
    ink = np.clip(weight + 1 - reach.min(axis=1), 0, 1) * 220 + rng.normal(0, 18, (count, side, side))
    return Images(np.clip(ink, 0, 255).astype(np.uint8)[:, None], labels)


def _distances(ends: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Return how far every pixel is from every segment, `[count, 7, side, side]`, for ends `[count, 7, 2, 2]`."""
    rows, columns = np.mgrid[:side, :side] + 0.5
    start, along = ends[:, :, 0], ends[:, :, 1] - ends[:, :, 0]
    x, y = columns - start[..., 0, None, None], rows - start[..., 1, None, None]
    dx, dy = along[..., 0, None, None], along[..., 1, None, None]
    share = np.clip((x * dx + y * dy) / (dx**2 + dy**2), 0, 1)
    distance: NDArray[np.float64] = np.hypot(x - share * dx, y - share * dy)
    return distance
