"""Each of Flower's aggregators, reached by its name, against its formula; and the error that averaging makes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import trim_mean
from torch import Tensor

from lora.codec import Entry, Layout
from lora.errors import ConfigError
from lora.frame import Frame, Site
from strategies.federated.aggregation import AGGREGATORS, aggregate, aggregation_error, build_aggregator
from strategies.federated.config import FederationConfig
from strategies.federated.wire import TRAIN, Update
from strategies.flower import take_identity

take_identity()
Vectors = NDArray[np.float64]


def build(name: str, **options: float) -> Any:
    return build_aggregator(FederationConfig.model_validate({"aggregator": name, "aggregator_options": options}))


def replies(vectors: Any, examples: Sequence[int] | None = None) -> list[tuple[Message, Update]]:
    found = []
    for place, vector in enumerate(vectors):
        count = 1 if examples is None else examples[place]
        update = Update(torch.tensor(vector, dtype=torch.float32), str(place), "frame", count)
        found.append((Message(update.content(), dst_node_id=place + 1, message_type=TRAIN), update))
    return found


def combine(
    aggregator: Any, vectors: Any, *, start: Any = None, number: int = 1, examples: Sequence[int] | None = None
) -> Vectors:
    first = torch.zeros(len(vectors[0])) if start is None else torch.tensor(start, dtype=torch.float32)
    uniform = examples is None
    given_replies = replies(vectors, examples or range(1, len(vectors) + 1))
    result = aggregate(aggregator, given_replies, start=first, number=number, uniform=uniform)
    assert result.dtype == torch.float32
    assert result.shape == first.shape
    return result.double().numpy()


def drawn(clients: int, size: int, seed: int) -> Vectors:
    return np.random.default_rng(seed).standard_normal((clients, size)).astype(np.float32).astype(np.float64)


CLOSE: Any = {"rtol": 1e-5, "atol": 1e-6}
cohorts = st.builds(drawn, st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**32))


# -- by name -----------------------------------------------------------------------------------------------------------


@given(cohorts)
@settings(max_examples=30)
def test_fedavg_is_the_mean_whatever_the_example_counts(vectors: Vectors) -> None:
    np.testing.assert_allclose(combine(build("fedavg"), vectors), vectors.mean(0), **CLOSE)


@given(cohorts, st.data())
@settings(max_examples=30)
def test_fedavg_by_examples_is_the_weighted_mean(vectors: Vectors, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 1000), min_size=len(vectors), max_size=len(vectors)))
    wanted = np.average(vectors, axis=0, weights=counts)
    np.testing.assert_allclose(combine(build("fedavg"), vectors, examples=counts), wanted, **CLOSE)


@given(cohorts)
@settings(max_examples=30)
def test_median(vectors: Vectors) -> None:
    np.testing.assert_allclose(combine(build("median"), vectors), np.median(vectors, axis=0), **CLOSE)


@given(cohorts, st.sampled_from([0.0, 0.1, 0.2, 0.34, 0.49]))
@settings(max_examples=30)
def test_trimmed_mean_is_scipys(vectors: Vectors, beta: float) -> None:
    wanted = trim_mean(vectors, beta, axis=0)
    np.testing.assert_allclose(combine(build("trimmed-mean", beta=beta), vectors), wanted, **CLOSE)


def krum_order(vectors: Vectors, malicious: int) -> list[int]:
    """Clients by the sum of squared distances to their n - f - 2 nearest others (Blanchard et al., 2017)."""
    scores = []
    for place, own in enumerate(vectors):
        distances = sorted(float(((own - other) ** 2).sum()) for i, other in enumerate(vectors) if i != place)
        scores.append(sum(distances[: max(1, len(vectors) - malicious - 2)]))
    return list(np.argsort(scores, kind="stable"))


@pytest.mark.parametrize("malicious", [0, 1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_krum_takes_the_client_in_the_thick_of_it(malicious: int, seed: int) -> None:
    vectors = drawn(8, 5, seed)
    vectors[:malicious] += 50
    best = krum_order(vectors, malicious)
    found = combine(build("krum", num_malicious_nodes=malicious), vectors)
    np.testing.assert_allclose(found, vectors[best[0]], **CLOSE)
    multi = combine(build("multi-krum", num_malicious_nodes=malicious, num_nodes_to_select=3), vectors)
    np.testing.assert_allclose(multi, vectors[best[:3]].mean(0), **CLOSE)


@pytest.mark.parametrize("seed", range(5))
def test_krum_still_tells_small_updates_apart_far_from_zero(seed: int) -> None:
    """In float32, ||x||^2 + ||y||^2 - 2xy of vectors of norm 300 knows nothing of distances of 0.1."""
    start = 30 * drawn(1, 100, 99)[0]
    updates = 0.01 * drawn(8, 100, seed)
    updates[2] += 0.05
    vectors = (start + updates).astype(np.float32).astype(np.float64)
    best = krum_order(vectors, 1)[0]
    found = combine(build("krum", num_malicious_nodes=1), vectors, start=start)
    np.testing.assert_allclose(found, vectors[best], rtol=1e-6, atol=1e-5)


# -- server-side optimisation ------------------------------------------------------------------------------------------


def run_rounds(aggregator: Any, rounds: int = 4) -> tuple[list[Vectors], list[Vectors]]:
    """Play rounds of random client steps; returns the means of the replies and the results."""
    x, means, results = drawn(1, 6, 77)[0], [], []
    for number in range(1, rounds + 1):
        vectors = (x + drawn(3, 6, number)).astype(np.float32).astype(np.float64)
        means.append(vectors.mean(0))
        x = combine(aggregator, vectors, start=x, number=number)
        results.append(x)
    return means, results


def test_fedavgm_is_torchs_sgd_on_the_pseudo_gradient() -> None:
    means, results = run_rounds(build("fedavgm", server_learning_rate=0.7, server_momentum=0.9))
    x = torch.nn.Parameter(torch.tensor(drawn(1, 6, 77)[0]))
    optimizer = torch.optim.SGD([x], lr=0.7, momentum=0.9)
    for mean, found in zip(means, results, strict=True):
        x.grad = x.detach() - torch.tensor(mean)
        optimizer.step()
        np.testing.assert_allclose(found, x.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_fedadam_is_its_formula() -> None:
    """Reddi et al., 2021, algorithm 2, with the bias correction of Kingma & Ba as Flower applies it."""
    eta, first, second, tau = 0.3, 0.8, 0.95, 1e-2
    means, results = run_rounds(build("fedadam", eta=eta, beta_1=first, beta_2=second, tau=tau))
    x, m, v = drawn(1, 6, 77)[0], np.zeros(6), np.zeros(6)
    for number, (mean, found) in enumerate(zip(means, results, strict=True), start=1):
        m = first * m + (1 - first) * (mean - x)
        v = second * v + (1 - second) * (mean - x) ** 2
        rate = eta * np.sqrt(1 - second ** (number + 1)) / (1 - first ** (number + 1))
        x = x + rate * m / (np.sqrt(v) + tau)
        np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)
        x = found


@pytest.mark.parametrize("name", ["fedadagrad", "fedyogi"])
def test_fedadagrad_and_fedyogi_are_their_formulas(name: str) -> None:
    eta, tau, options = 0.3, 1e-2, {"beta_1": 0.8, "beta_2": 0.95} if name == "fedyogi" else {}
    means, results = run_rounds(build(name, eta=eta, tau=tau, **options))
    first = options.get("beta_1", 0.0)
    x, m, v = drawn(1, 6, 77)[0], np.zeros(6), np.zeros(6)
    for mean, found in zip(means, results, strict=True):
        step = mean - x
        m = first * m + (1 - first) * step
        v = v + step**2 if name == "fedadagrad" else v - 0.05 * step**2 * np.sign(v - step**2)
        np.testing.assert_allclose(found, x + eta * m / (np.sqrt(v) + tau), rtol=1e-4, atol=1e-5)
        x = found


@pytest.mark.parametrize("name", AGGREGATORS)
def test_identical_updates_are_not_scattered(name: str) -> None:
    """All clients of one mind: the averages and the selections return it exactly, the optimisers step towards it."""
    vector, start = drawn(1, 6, 1)[0], np.zeros(6)
    found = combine(build(name), np.stack([vector] * 4), start=start)
    if name in ("fedadam", "fedadagrad", "fedyogi"):
        assert (np.sign(found) == np.sign(vector)).all()
    else:
        np.testing.assert_allclose(found, vector, rtol=1e-6, atol=1e-6)


def test_odd_metrics_of_one_client_do_not_end_the_run() -> None:
    pairs = replies(drawn(3, 4, 0))
    pairs[1][0].content.metric_records["metrics"]["surprise"] = [1.0, 2.0]
    del pairs[2][0].content["report"]
    result = aggregate(build("fedavg"), pairs, start=torch.zeros(4), number=1, uniform=True)
    np.testing.assert_allclose(result, drawn(3, 4, 0).mean(0), **CLOSE)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fedavgm", {"server_momentom": 0.9}, r"server_momentom: 'fedavgm' has no such .* mean 'server_momentum'\?"),
        ("fedavg", {"eta": 0.1}, "eta: 'fedavg' has no such option; it takes none"),
        ("fedadam", {"min_train_nodes": 1}, "min_train_nodes: 'fedadam' has no such option"),
        ("fedadam", {"beta_1": 1.0}, "beta_1=1: must be a number, 0 or above and below 1"),
        ("fedadam", {"tau": 0.0}, "tau=0: must be a number, 1e-12 or above"),
        ("fedadam", {"eta": float("nan")}, "eta=nan: must be a number"),
        ("trimmed-mean", {"beta": 0.5}, r"beta=0\.5: must be a number, 0 or above and below 0\.5"),
        ("krum", {"num_malicious_nodes": 1.5}, r"num_malicious_nodes=1\.5: must be a whole number, 0 or above"),
        ("krum", {"num_malicious_nodes": -1}, "num_malicious_nodes=-1: must be a whole number, 0 or above"),
        ("multi-krum", {"num_nodes_to_select": 0}, "num_nodes_to_select=0: must be a whole number, 1 or above"),
        ("krum", {"num_nodes_to_select": 2}, "num_nodes_to_select: 'krum' has no such option; .*num_malicious_nodes"),
    ],
)
def test_what_an_aggregator_does_not_take_is_refused(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"federation\.aggregator_options\.{message}"):
        build(name, **options)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_alternating_factors_refuse_what_remembers_the_other_one(name: Any) -> None:
    config = FederationConfig(strategy="rolora", aggregator=name)
    if name in ("fedavgm", "fedadam", "fedadagrad", "fedyogi"):
        with pytest.raises(ConfigError, match=f"federation.aggregator={name}: its momentum would mix the factors"):
            build_aggregator(config)
    else:
        build_aggregator(config)


# -- aggregation error -------------------------------------------------------------------------------------------------

SITES = (Site("q", 7, 5), Site("v", 4, 6))


def layout(*, moves_frame: bool, rank: int) -> Layout:
    a = [Entry("A", site.name, (rank, site.d_in)) for site in SITES] if moves_frame else []
    return Layout((*a, *(Entry("B", site.name, (site.d_out, rank)) for site in SITES)))


def dense(where: Layout, vector: Tensor, frame: Frame) -> Vectors:
    """All of B A, site by site, as one vector of float64."""
    views: Any = where.views(vector.double())
    products = [views["B", s.name] @ views.get(("A", s.name), frame.matrices[s.name].double()) for s in SITES]
    return torch.cat([product.flatten() for product in products]).numpy()


@given(st.tuples(st.integers(1, 5), st.integers(1, 6)), st.booleans(), st.booleans(), st.integers(0, 2**32), st.data())
@settings(max_examples=60)
def test_the_error_is_that_of_dense_products(
    sizes: tuple[int, int], moves: bool, off: bool, seed: int, data: st.DataObject
) -> None:
    clients, rank = sizes
    where, frame = layout(moves_frame=moves, rank=rank), Frame.draw(SITES, rank=rank, seed=seed)
    source = torch.Generator().manual_seed(seed)
    vectors = list(torch.randn(clients, where.size, generator=source))
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=clients, max_size=clients))
    shares = np.array(weights) / sum(weights)
    mean = sum(share * vector.double() for share, vector in zip(shares, vectors, strict=True))
    result = (torch.as_tensor(mean) + (0.5 if off else 0.0)).float()
    exact = sum(share * dense(where, vector, frame) for share, vector in zip(shares, vectors, strict=True))
    wanted = np.linalg.norm(exact - dense(where, result, frame)) / np.linalg.norm(exact)
    found = aggregation_error(vectors, result, weights=weights, layout=where, frame=frame)
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    if not moves and not off:
        assert found < 1e-6
    if moves and clients > 1 and not off:
        assert found > 1e-3


def test_one_moving_factor_averages_exactly() -> None:
    """RoLoRA's rounds: B equal for all while A moves."""
    where, frame = layout(moves_frame=True, rank=2), Frame.draw(SITES, rank=2, seed=0)
    vectors = list(torch.randn(3, where.size, generator=torch.Generator().manual_seed(0)))
    for vector in vectors:
        where.insert(vector, ["B"], where.select(vectors[0], ["B"]))
    mean = torch.stack(vectors).mean(0)
    assert aggregation_error(vectors, mean, weights=[1, 1, 1], layout=where, frame=frame) < 1e-6


def test_updates_that_cancel_or_did_not_move_make_no_error() -> None:
    where, frame = layout(moves_frame=False, rank=2), Frame.draw(SITES, rank=2, seed=0)
    zero = torch.zeros(where.size)
    assert aggregation_error([zero, zero], zero, weights=[1, 1], layout=where, frame=frame) == 0.0
