"""Threads over ranges of rows, with PyTorch's own threads switched off meanwhile."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["default_workers", "ordered_map", "worker_pool"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_guard = threading.Lock()
_open_pools = 0
_threads_before = 1


def default_workers() -> int:
    """Cores that this process may use, at most eight: beyond that memory is the limit."""
    try:
        available = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        available = os.cpu_count() or 1
    return min(available, 8)


@contextmanager
def worker_pool(workers: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """A thread pool whose tasks run PyTorch operations on one thread each.

    Sums then never depend on the number of threads, and pools do not fight for cores. PyTorch
    keeps that setting for the whole process; it is restored when the last pool closes.
    """
    global _open_pools, _threads_before  # noqa: PLW0603 (the setting is the process's own)
    with _guard:
        if _open_pools == 0:
            _threads_before = torch.get_num_threads()
            torch.set_num_threads(1)
        _open_pools += 1
    try:
        with ThreadPoolExecutor(
            max_workers=workers or default_workers(),
            thread_name_prefix="dare",
            initializer=torch.set_num_threads,
            initargs=(1,),
        ) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    finally:
        with _guard:
            _open_pools -= 1
            if _open_pools == 0:
                torch.set_num_threads(_threads_before)


def ordered_map(
    pool: ThreadPoolExecutor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    ahead: int,
) -> Iterator[Result]:
    """Results in order, with at most `ahead` items begun and not yet taken."""
    pending: list[Future[Result]] = []
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.pop(0).result()
        while pending:
            yield pending.pop(0).result()
    finally:
        for future in pending:
            future.cancel()
