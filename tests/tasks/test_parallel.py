"""Batches side by side: every job is done once, the division repeats, and workers end together."""

import threading

import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks.parallel import cores, even_budget, shares, spread, workers

COSTS = st.lists(st.floats(min_value=0.1, max_value=1e6), max_size=40)


@given(costs=COSTS, count=st.integers(1, 8))
def test_shares_give_every_job_to_one_worker(costs: list[float], count: int) -> None:
    divided = shares(costs, count=count)
    assert sorted(job for share in divided for job in share) == list(range(len(costs)))
    assert len(divided) <= count
    assert all(divided)


@given(costs=st.lists(st.floats(min_value=0.1, max_value=1e6), min_size=1, max_size=40), count=st.integers(1, 8))
def test_shares_keep_graham_s_bound(costs: list[float], count: int) -> None:
    """Whoever ends last had least when it took its last job: makespan <= mean + (1 - 1/m) largest."""
    loads = [sum(costs[job] for job in share) for share in shares(costs, count=count)]
    assert max(loads) <= (sum(costs) / count + (1 - 1 / count) * max(costs)) * (1 + 1e-9)


@given(total=st.integers(0, 10**6), most=st.integers(1, 4096), least=st.integers(0, 4096), count=st.integers(1, 16))
def test_even_budget_fills_whole_turns(total: int, most: int, least: int, count: int) -> None:
    with cores(count):
        budget = even_budget(total, most=most, least=least)
    assert 0 < budget <= most
    if least < budget < most:
        assert -(-total // budget) <= count * max(1, -(-total // (most * count)))


def test_a_small_batch_is_left_whole_and_a_middling_one_is_halved() -> None:
    with cores(2):
        assert even_budget(32, most=2048, least=100) >= 32
        assert even_budget(1024, most=2048, least=100) == 512
        assert even_budget(6000, most=2048, least=100) == 1500


def test_spread_returns_in_the_workers_order_and_uses_their_threads() -> None:
    barrier = threading.Barrier(2, timeout=10)

    def work(share: list[int]) -> tuple[list[int], int]:
        barrier.wait()  # Both must be running at once.
        return share, torch.get_num_threads()

    with cores(2):
        assert workers() == 2
        done = spread(work, [3.0, 2.0, 1.0])
    assert done == [([0], 1), ([1, 2], 1)]
    assert workers() == 1
