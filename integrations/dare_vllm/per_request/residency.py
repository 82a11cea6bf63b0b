"""What a worker holds, as numbers that the process with /metrics can read.

Adapters are held in the engine's processes, vLLM's Prometheus output is made in the server's. A
worker keeps a small file, replaced whole, in a directory whose path its environment has from the
server; a collector reads the files when it is asked.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Residency", "export_metrics", "read_residencies"]

DIRECTORY = "DARE_VLLM_RESIDENCY"


@dataclass
class Residency:
    """Of one worker.

    Attributes:
        rank: the worker's.
        adapters: bytes of each adapter in memory, by the name that requests have for it; what
            adapters share is counted in each.
        resident_bytes: of all adapters together.
        slots_used, slots: how many of the slots hold a DARE adapter.
        loads, load_seconds: adapters read, checked and packed so far, and the time it took.
        swaps, swap_seconds: slots filled so far, and the time it took.
    """

    rank: int = 0
    adapters: dict[str, int] = field(default_factory=dict)
    resident_bytes: int = 0
    slots_used: int = 0
    slots: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    swaps: int = 0
    swap_seconds: float = 0.0

    def count_load(self, seconds: float) -> None:
        """An adapter was loaded."""
        self.loads += 1
        self.load_seconds += seconds

    def count_swap(self, seconds: float) -> None:
        """A slot was filled."""
        self.swaps += 1
        self.swap_seconds += seconds

    def publish(self) -> None:
        """Write the numbers where a collector looks for them; no directory, no numbers."""
        directory = os.environ.get(DIRECTORY)
        if not directory:
            return
        target = Path(directory, f"{os.getpid()}.json")
        partial = target.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
            partial.replace(target)
        except OSError:
            pass  # the server is gone, or its disk is full: serving goes on


def export_metrics() -> None:
    """Have this process's /metrics tell what its workers hold.

    Processes of one server share the directory that its first process made. A server that was
    started by another one's process, or by a program with an engine in it, inherits that one's
    environment but not its numbers: only multiprocessing's children belong together.
    """
    from prometheus_client import REGISTRY

    if DIRECTORY not in os.environ or multiprocessing.parent_process() is None:
        directory = tempfile.mkdtemp(prefix="dare-vllm-")
        os.environ[DIRECTORY] = directory
        owner = os.getpid()

        def remove() -> None:
            if os.getpid() == owner:
                shutil.rmtree(directory, ignore_errors=True)

        atexit.register(remove)
    REGISTRY.register(_Collector())


def read_residencies(directory: str | Path) -> list[Residency]:
    """What the live workers published."""
    found = []
    for file in sorted(Path(directory).glob("*.json")):
        try:
            os.kill(int(file.stem), 0)
            found.append(Residency(**json.loads(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue  # a worker that ended
    return sorted(found, key=lambda one: one.rank)


class _Collector:
    """A collector of `prometheus_client`."""

    def describe(self) -> list[Any]:
        return []  # nothing is known ahead of the first worker

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily, SummaryMetricFamily

        found = read_residencies(os.environ.get(DIRECTORY, "."))
        gauges: Mapping[str, tuple[str, Any]] = {
            "adapters_resident": ("DARE adapters in memory.", lambda one: len(one.adapters)),
            "resident_bytes": ("Bytes of DARE adapters in memory.", lambda o: o.resident_bytes),
            "slots_used": ("Slots that hold a DARE adapter.", lambda one: one.slots_used),
            "slots": ("Slots for adapters of any kind.", lambda one: one.slots),
        }
        for name, (help_text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"vllm:dare_{name}", help_text, labels=["rank"])
            for one in found:
                gauge.add_metric([str(one.rank)], value(one))
            yield gauge
        sizes = GaugeMetricFamily(
            "vllm:dare_adapter_bytes",
            "Bytes of a DARE adapter in memory.",
            labels=["rank", "adapter"],
        )
        loads = SummaryMetricFamily(
            "vllm:dare_adapter_load_seconds", "Reading, checking, packing.", labels=["rank"]
        )
        swaps = SummaryMetricFamily(
            "vllm:dare_slot_swap_seconds", "Putting an adapter into a slot.", labels=["rank"]
        )
        for one in found:
            for adapter, nbytes in one.adapters.items():
                sizes.add_metric([str(one.rank), adapter], nbytes)
            loads.add_metric([str(one.rank)], one.loads, one.load_seconds)
            swaps.add_metric([str(one.rank)], one.swaps, one.swap_seconds)
        yield from (sizes, loads, swaps)
