"""The library in a process that is killed in the midst of writing tensors."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

__all__ = ["kill_while_writing"]

SLOWLY = """
import sys, time
import dare_adapters
from dare_adapters.tensor_file import TensorFileWriter

add = TensorFileWriter.add
def slowly(self, key, tensor):
    add(self, key, tensor)
    time.sleep(0.2)
TensorFileWriter.add = slowly
"""
START_SECONDS = 60


def kill_while_writing(call: str, arguments: list[str], out: Path) -> Path:
    """Kill a call once something of its adapter is there.

    Args:
        call: a statement that takes its arguments from sys.argv.
        arguments: those.
        out: the adapter that it is to write.

    Returns:
        The directory that it left.
    """
    process = subprocess.Popen([sys.executable, "-c", SLOWLY + call, *arguments])
    try:
        deadline = time.monotonic() + START_SECONDS
        partial: list[Path] = []
        while not any(any(path.iterdir()) for path in partial):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
            partial = list(out.parent.glob(f".{out.name}.partial-*"))
    finally:
        process.kill()
        process.wait()
    assert len(partial) == 1
    assert partial[0].exists()
    assert not out.exists()
    return partial[0]
