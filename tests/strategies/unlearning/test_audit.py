"""The audit sees what a request reads, and a planted read fails."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from lora.errors import DataError
from strategies.unlearning.audit import Audit, drawn
from strategies.unlearning.audited_request import AuditedRequest
from tasks.examples import Examples
from tasks.learner import Learner


def test_an_undeclared_tensor_is_foreign_even_in_the_backward_pass() -> None:
    audit, own, other = Audit(), torch.randn(3, requires_grad=True), torch.randn(3)

    class Sneaky(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x * 2

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            return grad * other

    audit.declare("model", [own])
    with audit.watching():
        torch.autograd.backward(torch.sum(own * own))
    audit.check()
    assert audit.tensors["model"] >= 2 and not audit.foreign
    with audit.watching():
        torch.autograd.backward(Sneaky.apply(own).sum())
    with pytest.raises(DataError, match=r"shape \(3,\) in aten\.mul.*only its rows"):
        audit.check()


def test_views_of_what_is_declared_and_numbers_are_no_reads_of_others() -> None:
    audit, own = Audit(), torch.randn(4, 4)
    audit.declare("model", [own])
    with audit.watching():
        ((own[1:, 2].T + torch.tensor(3.0)) * 2).sum()
        torch.zeros(5).add_(1)
    audit.check()
    assert audit.scalars >= 1
    with audit.watching():
        torch.from_numpy(np.ones(4)) + 1
    assert audit.foreign == ["a tensor of shape (4,) in aten.lift_fresh.default"]


def test_what_an_operation_made_is_given_back_when_nobody_holds_it() -> None:
    audit, start = Audit(), torch.ones(1024, 1024)
    audit.declare("model", [start])
    before = psutil.Process().memory_info().rss
    with audit.watching():
        for _ in range(200):
            start + 1
    grown = psutil.Process().memory_info().rss - before
    # 200 tensors of 4 MiB were made, one after the other.
    assert grown < 200 * 2**20
    audit.check()
    assert audit.report()["tensors_model"] == 200


def test_files_are_counted_and_foreign_ones_found(tmp_path: Path) -> None:
    own, other = tmp_path / "own.txt", tmp_path / "retained.npy"
    own.write_text("x")
    np.save(other, np.ones(3))
    audit = Audit()
    audit.allow_files([own])
    other.read_bytes()
    with audit.watching():
        own.read_text()
        own.read_text()
        (tmp_path / "written.txt").write_text("y")
    audit.check()
    assert audit.report()["files"] == 2
    with audit.watching():
        np.load(other)
    with pytest.raises(DataError, match=r"read what is not its own: file retained\.npy"):
        audit.check()


def test_after_the_watch_nothing_is_counted(tmp_path: Path) -> None:
    audit = Audit()
    with audit.watching():
        pass
    (tmp_path / "x").write_text("")
    (tmp_path / "x").read_text()
    torch.randn(3) + torch.randn(3)
    assert audit.report()["files"] == audit.report()["foreign"] == 0


def test_rows_are_counted(learner: Learner, request_of: Callable[..., AuditedRequest]) -> None:
    request = request_of(0, 1)
    tokens = request.tokens(learner.task)
    with request.audit.watching():
        batch = request.batch(tokens, [3, 5, 3], pad=learner.pad)
        batch.input_ids + 1
    assert request.audit.rows == {3: 2, 5: 1} and not request.audit.foreign
    assert request.audit.report()["row_reads"] == 3 and request.audit.report()["rows"] == 2


def test_a_request_is_divided_once_and_for_all(request_of: Callable[..., AuditedRequest]) -> None:
    request = request_of(0, 1)
    assert sorted([*request.used, *request.held_back]) == list(range(48))
    assert len(request.held_back) == round(0.2 * 48)
    assert (request.used == request_of(0, 1).used).all()
    with pytest.raises(DataError, match=r"of 1 examples cannot be divided .* at least 2"):
        _ = AuditedRequest(Examples(("one",), (0,)))


def test_what_another_thread_opens_and_computes_is_not_the_requests(tmp_path: Path) -> None:
    file, audit, other = tmp_path / "x.txt", Audit(), torch.randn(3)
    file.write_text("x")

    def work() -> None:
        file.read_text()
        other.mul(2)

    with audit.watching():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    audit.check()
    with audit.watching():
        work()
    with pytest.raises(DataError, match=r"file x\.txt; a tensor of shape \(3,\)"):
        audit.check()


def test_noise_is_not_data_but_what_is_added_to_it_counts() -> None:
    audit, other = Audit(), torch.randn(3)
    with audit.watching():
        noise = drawn(lambda: torch.from_numpy(np.ones(3, dtype=np.float32)))
        noise.mul(2)
    audit.check()
    with audit.watching():
        noise.add(other)
    with pytest.raises(DataError, match=r"shape \(3,\)"):
        audit.check()
