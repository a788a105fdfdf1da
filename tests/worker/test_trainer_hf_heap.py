"""Memory that a pass has done with is there for the next."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from app.worker.trainers import heap

PIECES, NUMBERS = 32, 1 << 20


def passes() -> list[int]:
    """Pages that the system cleared for each of three passes of 128 MiB, in 4 MiB pieces."""
    found = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        pieces = [torch.ones(NUMBERS) for _ in range(PIECES)]
        del pieces
        found.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)
    return found


def on_another_thread(work: Callable[[], list[int]]) -> list[int]:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


@pytest.mark.parametrize("ran", [lambda work: work(), on_another_thread])
def test_a_pass_finds_the_memory_of_the_last(
    ran: Callable[[Callable[[], list[int]]], list[int]],
) -> None:
    if not heap.keep():
        pytest.skip("this C library keeps what it likes")
    pages = PIECES * NUMBERS * 4 // resource.getpagesize()
    assert ran(passes)[-1] < pages // 20


def test_where_there_is_no_such_library_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setattr(ctypes, "CDLL", lambda name: object())
        assert not heap.keep()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not heap.keep()
