"""Images: what a file may hold, what is refused, and a built-in task that can be learned."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from lora.errors import DataError
from tasks.images import Images, augmented, builtin_images, load_images


def arrays(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (20, 6, 5), dtype=np.uint8),
        "y_train": np.array([7, 3] * 10),
        "x_test": rng.integers(0, 256, (4, 6, 5), dtype=np.uint8),
        "y_test": np.array([3, 7, 7, 3]),
    } | changes


def written(path: Path, given: dict[str, Any]) -> Path:
    np.savez(path / "images.npz", **given)
    return path / "images.npz"


def test_every_training_image_is_in_one_split_and_labels_are_numbered(tmp_path: Path) -> None:
    given = arrays()
    splits = load_images(written(tmp_path, given), holdout=0.2, seed=1)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (16, 4, 4)
    assert splits.label_names == ("3", "7")
    whole = np.concatenate([splits.train.pixels, splits.validation.pixels])[:, 0]
    assert sorted(map(bytes, whole)) == sorted(map(bytes, given["x_train"]))
    assert splits.test.labels.tolist() == [0, 1, 1, 0]
    np.testing.assert_array_equal(splits.test.pixels[:, 0], given["x_test"])
    again = load_images(written(tmp_path, given), holdout=0.2, seed=1)
    np.testing.assert_array_equal(again.validation.pixels, splits.validation.pixels)


def test_channels_come_first(tmp_path: Path) -> None:
    coloured = np.arange(20 * 6 * 5 * 3, dtype=np.int64).astype(np.uint8).reshape(20, 6, 5, 3)
    splits = load_images(written(tmp_path, arrays(x_train=coloured)), holdout=0.1)
    assert splits.train.pixels.shape == (18, 3, 6, 5)
    assert any((splits.train.pixels[0] == np.moveaxis(image, 2, 0)).all() for image in coloured)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"x_train": np.zeros((20, 6, 5))}, "float64"),
        ({"y_train": np.zeros(19, dtype=int)}, "y_train [19]"),
        ({"y_test": np.array([3, 9, 7, 3])}, "label 9"),
        ({"x_test": np.zeros((4, 6), dtype=np.uint8)}, "x_test"),
    ],
)
def test_what_is_not_images_is_refused(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    with pytest.raises(DataError, match=r".") as caught:
        load_images(written(tmp_path, arrays(**changes)))
    assert part in str(caught.value)


def test_a_missing_array_is_named_with_the_nearest(tmp_path: Path) -> None:
    given = arrays()
    given["xtrain"] = given.pop("x_train")
    with pytest.raises(DataError, match=r"no array 'x_train'; did you mean 'xtrain'"):
        load_images(written(tmp_path, given))


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.npz"):
        load_images(path)


def test_a_holdout_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holdout"):
        load_images(written(tmp_path, arrays()), holdout=0.01)


def test_built_in_digits_repeat_and_differ_by_seed() -> None:
    one, two, other = (builtin_images(train=30, validation=10, test=10, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.train.pixels, two.train.pixels)
    assert (one.train.pixels != other.train.pixels).any()
    assert np.bincount(one.train.labels).tolist() == [3] * 10


def test_built_in_digits_can_be_told_apart_but_not_at_a_glance() -> None:
    splits = builtin_images(train=400, validation=10, test=200, side=12)
    flat = [(part.pixels.reshape(len(part), -1) / 255, part.labels) for part in (splits.train, splits.test)]
    score = KNeighborsClassifier(3).fit(*flat[0]).score(*flat[1])
    assert 0.5 < score < 0.99


def test_rows_are_taken_in_order() -> None:
    images = Images(np.arange(12, dtype=np.uint8).reshape(3, 1, 2, 2), np.array([5, 6, 7]))
    taken = images.take([2, 0])
    assert taken.labels.tolist() == [7, 5] and taken.pixels[0, 0, 0, 0] == 8


def test_copies_are_distorted_a_little_and_keep_their_labels() -> None:
    images = builtin_images(train=40, validation=20, test=20).train
    copies = augmented(images, copies=3, seed=1)
    assert copies.pixels.shape == (120, *images.pixels.shape[1:]) and copies.pixels.dtype == np.uint8
    assert np.array_equal(copies.labels, np.tile(images.labels, 3))
    assert np.array_equal(copies.pixels, augmented(images, copies=3, seed=1).pixels)
    assert not np.array_equal(copies.pixels, augmented(images, copies=3, seed=2).pixels)
    own = np.tile(images.pixels, (3, 1, 1, 1)).astype(float)
    other = np.roll(own, 1, axis=0)
    far, apart = (np.abs(copies.pixels - each).mean(axis=(1, 2, 3)) for each in (own, other))
    # Distorted, but nearer to what it is a copy of than to another image.
    assert (far > 0).mean() > 0.95 and (far < apart).mean() > 0.95


def test_no_magnitude_is_no_distortion() -> None:
    images = builtin_images(train=20, validation=20, test=20).train
    assert np.array_equal(augmented(images, copies=1, magnitude=0.0).pixels, images.pixels)
