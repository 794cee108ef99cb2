"""Who trains: the same everywhere, as often as asked for, in an order of its own."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare

from strategies.federated.config import FederationConfig
from strategies.federated.selection import natural, select

names = st.lists(st.integers(0, 99).map(str) | st.text("ab1", min_size=1, max_size=4), unique=True, max_size=20)


def config(sampling: Any, fraction: float) -> FederationConfig:
    return FederationConfig(sampling=sampling, fraction=fraction)


settings_of = st.sampled_from([("all", 1.0), ("fixed", 0.3), ("fixed", 1.0), ("poisson", 0.5)]).map(
    lambda each: config(*each)
)


@given(names.filter(bool), settings_of, st.integers(0, 9), st.integers(1, 9), st.randoms())
def test_the_draw_depends_on_seed_and_round_alone(
    clients: list[str], settings: FederationConfig, seed: int, number: int, shuffler: Any
) -> None:
    chosen = select(clients, settings, seed=seed, number=number)
    shuffled = list(clients)
    shuffler.shuffle(shuffled)
    assert select(shuffled, settings, seed=seed, number=number) == chosen
    assert chosen == sorted(chosen, key=natural)
    assert set(chosen) <= set(clients) and len(set(chosen)) == len(chosen)
    if settings.sampling == "all":
        assert set(chosen) == set(clients)


@given(st.integers(2, 60), st.floats(0.01, 1), st.integers(0, 99))
def test_a_fixed_draw_has_its_size_and_is_never_empty(count: int, fraction: float, number: int) -> None:
    chosen = select([str(i) for i in range(count)], config("fixed", fraction), seed=0, number=number)
    assert len(chosen) == max(1, round(fraction * count))


def drawn(settings: FederationConfig, *, rounds: int = 400, clients: int = 20) -> list[list[str]]:
    known = [str(i) for i in range(clients)]
    return [select(known, settings, seed=1, number=number) for number in range(1, rounds + 1)]


def test_poisson_takes_every_client_with_its_probability_and_sizes_vary() -> None:
    rounds = drawn(config("poisson", 0.3))
    assert binomtest(sum(map(len, rounds)), 400 * 20, 0.3).pvalue > 0.01
    for client in range(20):
        assert binomtest(sum(str(client) in each for each in rounds), 400, 0.3).pvalue > 1e-4
    assert len({len(each) for each in rounds}) > 5
    assert [] in drawn(config("poisson", 0.05))


def test_fixed_draws_favour_nobody() -> None:
    rounds = drawn(config("fixed", 0.25))
    counts = [sum(str(client) in each for each in rounds) for client in range(20)]
    assert chisquare(counts).pvalue > 0.01


def test_seeds_and_rounds_each_give_another_draw() -> None:
    known, half = [str(i) for i in range(40)], config("fixed", 0.5)
    draws = [tuple(select(known, half, seed=seed, number=number)) for seed in range(3) for number in range(1, 4)]
    assert len(set(draws)) == 9


def test_natural_order_counts_numbers_before_names() -> None:
    assert sorted(["10", "b", "9", "a10", "2"], key=natural) == ["2", "9", "10", "a10", "b"]


@given(st.text(max_size=4), st.text(max_size=4))
def test_no_two_names_are_equal_in_the_order(one: str, other: str) -> None:
    assert (natural(one) == natural(other)) == (one == other)


def test_a_name_of_thousands_of_digits_is_a_name() -> None:
    assert sorted(["9" * 5000, "7"], key=natural) == ["7", "9" * 5000]


def test_numbers_written_differently_keep_one_order() -> None:
    assert sorted(["1", "01"], key=natural) == sorted(["01", "1"], key=natural)
