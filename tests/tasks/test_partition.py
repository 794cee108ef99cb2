import itertools
import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.errors import DataError
from tasks.config import DataConfig
from tasks.examples import Examples
from tasks.partition import partition

ALL_ROWS = ("iid", "dirichlet")


def labelled(labels: Sequence[int]) -> Examples:
    return Examples(texts=tuple(map(str, range(len(labels)))), labels=tuple(labels))


def owned(owners: Sequence[str]) -> Examples:
    return Examples(texts=tuple(owners), owners=tuple(owners))


def config(kind: str, **settings: object) -> DataConfig:
    return DataConfig.model_validate({"partition": kind, **settings})


@settings(max_examples=25, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=24, max_size=80),
    kind=st.sampled_from(["iid", "dirichlet", "shards", "natural"]),
    clients=st.integers(1, 8),
    seed=st.integers(0, 2**40),
    alpha=st.floats(1e-6, 1e6),
)
def test_no_row_goes_to_two_clients_and_equal_seeds_agree(
    labels: list[int], kind: str, clients: int, seed: int, alpha: float
) -> None:
    owners = tuple(f"owner {i % 8}" for i in range(len(labels)))
    examples = Examples(texts=owners, labels=tuple(labels), owners=owners)
    setting = config(kind, dirichlet_alpha=alpha)
    parts = partition(examples, setting, clients=clients, seed=seed)
    rows = [row for part in parts for row in part]
    assert len(parts) == clients and len(set(rows)) == len(rows) and set(rows) <= set(range(len(labels)))
    assert parts == partition(examples, setting, clients=clients, seed=seed)
    if kind in ALL_ROWS or (kind == "natural" and clients == 8):
        assert len(rows) == len(labels)
    if kind == "shards":
        assert len(labels) - len(rows) == len(labels) % (2 * clients)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "shards"])
def test_another_seed_gives_another_partition(kind: str) -> None:
    examples = labelled([i % 5 for i in range(200)])
    one, two = (partition(examples, config(kind), clients=4, seed=seed) for seed in (1, 2))
    assert [set(part) for part in one] != [set(part) for part in two]


def test_iid_sizes_differ_by_at_most_one_and_rows_are_shuffled() -> None:
    parts = partition(labelled([0] * 50 + [1] * 53), config("iid"), clients=10, seed=0)
    assert {len(part) for part in parts} == {10, 11}
    assert sum(0 < sum(row < 50 for row in part) < len(part) for part in parts) == 10


def test_dirichlet_is_skewed_by_alpha_and_may_leave_a_client_empty() -> None:
    examples = labelled([i % 4 for i in range(400)])

    def mixes(alpha: float) -> np.ndarray:
        parts = partition(examples, config("dirichlet", dirichlet_alpha=alpha), clients=10, seed=0)
        return np.array([[sum(row % 4 == label for row in part) for label in range(4)] for part in parts])

    assert np.ptp(mixes(1e6), axis=0).max() <= 2
    assert mixes(0.01).max() > 90
    assert (mixes(0.01).sum(axis=1) == 0).any()


def test_shards_hold_few_labels_each() -> None:
    examples = labelled([i % 10 for i in range(1000)])
    parts = partition(examples, config("shards", shards_per_client=2), clients=10, seed=0)
    assert all(len(part) == 100 and len({row % 10 for row in part}) <= 2 for part in parts)


def test_natural_gives_every_client_one_owner_the_largest_first() -> None:
    owners = ["ann"] * 3 + ["bob"] * 5 + ["cyd"] + ["dan"] * 3
    parts = partition(owned(owners), config("natural"), clients=3, seed=0)
    assert [{owners[row] for row in part} for part in parts] == [{"bob"}, {"ann"}, {"dan"}]
    assert [len(part) for part in parts] == [5, 3, 3]
    assert sorted(map(len, partition(owned(owners), config("natural"), clients=4, seed=0))) == [1, 3, 3, 5]


def test_natural_prints_no_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    partition(owned(["a", "b"]), config("natural"), clients=2, seed=0)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("shares", "counts"),
    [
        ([[0.1, 0.9], [0.9, 0.1], [0.5, 0.5]], (450, 450)),
        ([[0.1, 0.9], [0.9, 0.1], [0.5, 0.5]], (700, 450)),
        ([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]], (200, 200, 200)),
        ([[1.0, 0.0], [0.0, 1.0]], (30, 50)),
    ],
)
def test_shares_are_each_clients_own_label_mix_at_equal_sizes(
    shares: list[list[float]], counts: tuple[int, ...]
) -> None:
    labels = list(itertools.chain.from_iterable([label] * count for label, count in enumerate(counts)))
    parts = partition(labelled(labels), config("shares", shares=shares), clients=len(shares), seed=0)
    rows = [row for part in parts for row in part]
    assert len(set(rows)) == len(rows)
    size = len(parts[0])
    for part, mix in zip(parts, shares, strict=True):
        assert len(part) == size
        assert [Counter(labels[row] for row in part)[label] for label in range(len(mix))] == pytest.approx(
            [size * share for share in mix], abs=1
        )
    taken = Counter(labels[row] for row in rows)
    assert any(taken[label] == count for label, count in enumerate(counts))  # as many as the labels allow


@pytest.mark.parametrize(
    ("shares", "clients", "message"),
    [
        ([[0.5, 0.5]], 2, "data.shares: 1 rows for 2 clients"),
        ([[1.0]] * 2, 2, "row 1 has 1 shares for 2 labels"),
        ([[0.5, 0.5], [0.5, 0.2]], 2, "row 2 sums to 0.7"),
        ([[0.5, 0.5], [1.5, -0.5]], 2, "row 2 sums to 1; shares are at least 0"),
        ([[0.3, 0.3, 0.4], [0.5, 0.5, 0.0]], 2, "row 1 has 3 shares and wants label 2"),
        ([[0.999, 0.001]] * 30, 30, "40 training rows are too few"),
    ],
)
def test_shares_that_do_not_fit_are_refused(shares: list[list[float]], clients: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        partition(labelled([0, 1] * 20), config("shares", shares=shares), clients=clients, seed=0)


@pytest.mark.parametrize("kind", ["dirichlet", "shards", "shares"])
def test_dividing_by_label_needs_labels(kind: str) -> None:
    shares = {"shares": [[1.0]]} if kind == "shares" else {}
    with pytest.raises(DataError, match=f"data.partition: {kind} divides by label, and these examples have none"):
        partition(Examples(texts=("a",)), config(kind, **shares), clients=1, seed=0)


def test_what_cannot_be_divided_is_refused_with_both_counts() -> None:
    with pytest.raises(DataError, match=r"natural needs an owner of every row; name its column with data\.owner="):
        partition(labelled([0, 1]), config("natural"), clients=1, seed=0)
    with pytest.raises(DataError, match="natural has 2 owners for 3 clients"):
        partition(owned(["a", "b", "b"]), config("natural"), clients=3, seed=0)
    with pytest.raises(DataError, match="4 clients for 3 training rows"):
        partition(labelled([0, 1, 0]), config("iid"), clients=4, seed=0)
    with pytest.raises(
        DataError, match=r"data\.shards_per_client: 3 clients x 2 shards need 6 training rows, there are 5"
    ):
        partition(labelled([0, 1, 0, 1, 0]), config("shards"), clients=3, seed=0)


def test_telemetry_is_off_before_flower_datasets_is_imported() -> None:
    partition(labelled([0, 1]), config("iid"), clients=2, seed=0)
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
