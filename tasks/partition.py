"""How training rows are divided among clients, by the partitioners of flwr-datasets."""

import contextlib
import io
import os
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, cast

from lora.errors import DataError
from tasks.config import DataConfig
from tasks.examples import Examples

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

Partition = list[tuple[int, ...]]


def partition(examples: Examples, config: DataConfig, *, clients: int, seed: int) -> Partition:
    """Divide rows among clients as `data.partition` says; entry k holds the row indices of client k.

    **Guarantee**: no row goes to two clients, and equal arguments give equal partitions.

    | partition | who gets what | rows left out |
    |---|---|---|
    | iid | shuffled rows, sizes differ by at most 1 | none |
    | dirichlet | per label, proportions from Dirichlet(alpha) (Yurochkin et al. 2019); some may get no row | none |
    | shards | `shards_per_client` label-sorted blocks (McMahan et al. 2017) | rows mod (clients * shards) |
    | natural | the owners with most rows, one per client, most rows first | rows of any further owners |
    | shares | rows in the client's own label mix, equal sizes, as many as the labels allow | the rest |

    Raises DataError for fewer rows or owners than clients, and for labels, owners or shares that do not fit.
    """
    if len(examples) < clients:
        raise DataError(f"{clients} clients for {len(examples)} training rows; use at most {len(examples)} clients")
    divide = {"iid": _iid, "dirichlet": _dirichlet, "shards": _shards, "natural": _natural, "shares": _shares}
    return divide[config.partition](examples, config, clients, random.Random(f"{seed}:partition").getrandbits(32))


def _iid(examples: Examples, config: DataConfig, clients: int, seed: int) -> Partition:
    order = _shuffled(len(examples), seed)  # IidPartitioner cuts consecutive blocks
    partitioner = _flwr_partitioners().IidPartitioner(num_partitions=clients)
    return _loaded(partitioner, order, [0] * len(order), clients)


def _dirichlet(examples: Examples, config: DataConfig, clients: int, seed: int) -> Partition:
    labels = _labels(examples, config)
    partitioner = _flwr_partitioners().DirichletPartitioner(
        num_partitions=clients,
        partition_by="key",
        alpha=config.dirichlet_alpha,
        min_partition_size=0,  # the default draws again until every client has 10 rows, and fails after 10 draws
        self_balancing=False,
        seed=seed,
    )
    order = _shuffled(len(labels), seed)
    return _loaded(partitioner, order, [labels[row] for row in order], clients)


def _shards(examples: Examples, config: DataConfig, clients: int, seed: int) -> Partition:
    labels = _labels(examples, config)
    shards = clients * config.shards_per_client
    if shards > len(labels):
        raise DataError(
            f"data.shards_per_client: {clients} clients x {config.shards_per_client} shards need {shards} training "
            f"rows, there are {len(labels)}; use fewer clients or shards"
        )
    partitioner = _flwr_partitioners().ShardPartitioner(
        num_partitions=clients, partition_by="key", num_shards_per_partition=config.shards_per_client, seed=seed
    )
    order = _shuffled(len(labels), seed)
    return _loaded(partitioner, order, [labels[row] for row in order], clients)


def _natural(examples: Examples, config: DataConfig, clients: int, seed: int) -> Partition:
    if examples.owners is None:
        raise DataError("data.partition: natural needs an owner of every row; name its column with data.owner=...")
    counts = Counter(examples.owners)
    if len(counts) < clients:
        raise DataError(
            f"data.partition: natural has {len(counts)} owners for {clients} clients; use at most {len(counts)} clients"
        )
    most = sorted(counts, key=lambda owner: (-counts[owner], owner))[:clients]
    client = {owner: k for k, owner in enumerate(most)}
    rows = [row for row, owner in enumerate(examples.owners) if owner in client]
    keys = [client[examples.owners[row]] for row in rows]
    return _loaded(_flwr_partitioners().NaturalIdPartitioner(partition_by="key"), rows, keys, clients)


def _shares(examples: Examples, config: DataConfig, clients: int, seed: int) -> Partition:
    """Give client k rows in proportion to `shares[k]`; flwr-datasets has no partitioner for a given mix per client."""
    labels = _labels(examples, config)
    mixes = _mixes(config, clients, labels)
    pools: list[list[int]] = [[] for _ in mixes[0]]
    for row in _shuffled(len(labels), seed):
        pools[labels[row]].append(row)
    demand = [sum(column) for column in zip(*mixes, strict=True)]
    size = min(len(pool) / need for pool, need in zip(pools, demand, strict=True) if need > 0)
    if size < 1:
        raise DataError(
            f"data.shares: {len(labels)} training rows are too few for these mixes; add rows or even them out"
        )
    parts: Partition = []
    for mix in mixes:
        takes = [int(size * share + 1e-9) for share in mix]
        parts.append(tuple(pool.pop() for pool, take in zip(pools, takes, strict=True) for _ in range(take)))
    return parts


def _mixes(config: DataConfig, clients: int, labels: Sequence[int]) -> list[list[float]]:
    """Return the shares as rows that sum to 1 exactly, after checking them against the clients and the labels."""
    shares = config.shares or ()
    if len(shares) != clients:
        raise DataError(f"data.shares: {len(shares)} rows for {clients} clients; give one row per client")
    present = set(labels)
    width = max(present) + 1
    for k, row in enumerate(shares):
        if len(row) < width:
            raise DataError(f"data.shares: row {k + 1} has {len(row)} shares for {width} labels; give one per label")
        if min(row) < 0 or abs(sum(row) - 1) > 0.01:
            raise DataError(f"data.shares: row {k + 1} sums to {sum(row):g}; shares are at least 0 and sum to 1")
        hollow = next((i for i, share in enumerate(row) if share > 0 and i not in present), None)
        if hollow is not None:
            raise DataError(
                f"data.shares: row {k + 1} has {len(row)} shares and wants label {hollow}, which no training row has; "
                f"give one share for each of the {width} labels"
            )
    longest = max(len(row) for row in shares)
    return [[share / sum(row) for share in row] + [0.0] * (longest - len(row)) for row in shares]


def _labels(examples: Examples, config: DataConfig) -> tuple[int, ...]:
    if examples.labels is None:
        raise DataError(
            f"data.partition: {config.partition} divides by label, and these examples have none; use iid or natural"
        )
    return examples.labels


def _shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def _flwr_partitioners() -> ModuleType:
    """Import the partitioners, which takes seconds and would otherwise switch telemetry on."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    from flwr_datasets import partitioner

    return cast(ModuleType, partitioner)


def _loaded(partitioner: "Partitioner", rows: Sequence[int], keys: Sequence[int], clients: int) -> Partition:
    """Run a partitioner over (row, key) pairs; its progress bar and pyarrow's deprecation notices are not shown."""
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict({"row": list(rows), "key": list(keys)})
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return [tuple(partitioner.load_partition(k)["row"][:]) for k in range(clients)]
