"""Work in a process of its own that ends by a signal, as if the power went."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from dare_adapters.tensor_file import TensorFileWriter

__all__ = ["forked", "kill_while_writing"]

WAIT_SECONDS = 60


@contextmanager
def forked(work: Callable[[], object]) -> Iterator[BaseProcess]:
    """A copy of this process that only does the work, quietly; killed when the block ends.

    It has imported already what this one has, which would take it ten seconds.
    """

    def alone() -> None:
        torch.set_num_threads(1)  # others do not survive a fork
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        work()

    process = multiprocessing.get_context("fork").Process(target=alone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the work needs not
        process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def kill_while_writing(work: Callable[[], object], out: Path) -> Path:
    """Kill work that writes an adapter once something of it is there.

    Args:
        work: what writes it.
        out: where to.

    Returns:
        The directory that it left.
    """

    def slowly() -> None:
        add = TensorFileWriter.add

        def add_slowly(self: TensorFileWriter, key: str, tensor: torch.Tensor) -> None:
            add(self, key, tensor)
            time.sleep(0.2)

        TensorFileWriter.add = add_slowly  # type: ignore[method-assign]
        work()

    deadline = time.monotonic() + WAIT_SECONDS
    partial: list[Path] = []
    with forked(slowly) as process:
        while not any(any(path.iterdir()) for path in partial):
            assert process.is_alive(), "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
            partial = list(out.parent.glob(f".{out.name}.partial-*"))
    assert len(partial) == 1
    assert partial[0].exists()
    assert not out.exists()
    return partial[0]
