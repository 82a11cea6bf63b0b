"""Sizes and speeds on a Llama-shaped bfloat16 model of half a billion parameters.

    python benchmarks/llama_half_billion.py [--work DIR] [--repeats 7] [--json FILE]

Base and fine-tune (base + N(0, 0.002)) are made here; they need 2 GB of disk. Every time is a
ratio to a floor or a peer that is measured in the same run, round by round:

    extract    against reading the bytes of both checkpoints from the page cache
    load       load_dare_adapter onto a live base against from_pretrained of the full fine-tune,
               which maps the file: once copying every weight into fresh memory of its own, as the
               live base's are, once only reading every weight of the mapping. Beside it the floor:
               adding to every cache line of the base, which is what survivors at p = 0.9 touch
    switch     between two loaded adapters, nanoseconds for each base parameter
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import dare_adapters

CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=1536,
    intermediate_size=4096,
    num_hidden_layers=14,
    num_attention_heads=12,
    num_key_value_heads=12,
    tie_word_embeddings=False,
    architectures=["LlamaForCausalLM"],
    dtype="bfloat16",
)
SPREAD = 0.002


def make_family(work: Path) -> tuple[Path, Path, Path]:
    """A base and two fine-tunes of it, made once."""
    places = work / "base", work / "finetuned-1", work / "finetuned-2"
    if all((place / "config.json").is_file() for place in places):
        return places
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(CONFIG).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    base = {}
    for name, shape in shapes.items():
        value = torch.ones(shape) if len(shape) == 1 else torch.empty(shape)
        if len(shape) > 1:
            value.normal_(0, 0.02, generator=generator)
        base[name] = value.bfloat16()
    for number, place in enumerate(places):
        place.mkdir(parents=True, exist_ok=True)
        tensors = base
        if number:
            tensors = {
                name: (
                    value.float() + SPREAD * torch.randn(value.shape, generator=generator)
                ).bfloat16()
                for name, value in base.items()
            }
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        CONFIG.save_pretrained(place)
    return places


def read_bytes(paths: list[Path]) -> float:
    """Seconds to read files into memory once."""
    buffer = bytearray(8 << 20)
    start = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


@contextmanager
def peak_anonymous_memory() -> Iterator[Callable[[], float]]:
    """The largest anonymous resident memory inside the block, in GB (Linux)."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            status = Path("/proc/self/status").read_text()
            peak = max(peak, int(status.split("RssAnon:")[1].split()[0]))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: peak * 1024 / 1e9
    finally:
        done.set()
        watcher.join()


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(work: Path, repeats: int) -> dict[str, object]:
    """All measurements; medians over `repeats` rounds."""
    # In a process of its own: what it leaves in the heap would change both memory and load times.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as maker:
        base, first, second = maker.submit(make_family, work).result()
    weights = [place / "model.safetensors" for place in (base, first)]
    read_bytes(weights)
    checkpoint_bytes = weights[0].stat().st_size
    results: dict[str, object] = {
        "parameters": checkpoint_bytes // 2,
        "checkpoint_bytes": checkpoint_bytes,
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "repeats": repeats,
    }

    def extract(finetuned: Path, out: str, bits: int) -> dare_adapters.Adapter:
        return dare_adapters.extract(
            base, finetuned, work / out, bits=bits, overwrite=True, progress=False
        )

    for bits in (4, 1):
        out = f"adapter-1-{bits}bit"
        with peak_anonymous_memory() as peak:
            adapter = extract(first, out, bits)
            memory = peak()
        ratios = [
            timed(lambda o=out, b=bits: extract(first, o, b)) / read_bytes(weights)
            for _ in range(repeats)
        ]
        results[f"extract_{bits}bit"] = {
            "times_reading_both": _spread(ratios),
            "peak_anonymous_gb": memory,
            "adapter_bytes": adapter.nbytes,
            "times_smaller": checkpoint_bytes / adapter.nbytes,
        }
    extract(second, "adapter-2-4bit", 4)

    def load_and_read() -> None:
        model = AutoModelForCausalLM.from_pretrained(first, dtype=torch.bfloat16)
        for parameter in model.parameters():
            parameter.detach().view(torch.int16).amax()

    def load_and_own() -> None:
        model = AutoModelForCausalLM.from_pretrained(first, dtype=torch.bfloat16)
        # One block for all: the allocator has none of that size to give again, as in a process
        # that loads its first model.
        room = torch.empty(checkpoint_bytes // 2, dtype=torch.bfloat16)
        for parameter in model.parameters():
            own, room = room[: parameter.numel()], room[parameter.numel() :]
            parameter.data = own.view(parameter.shape).copy_(parameter.data)

    live = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for parameter in live.parameters():  # the base is in memory of its own, as after any use
        parameter.data = parameter.data.clone()
    floor = torch.zeros(checkpoint_bytes // 2, dtype=torch.bfloat16)
    one_in_ten = floor[: floor.numel() // 10 * 10].view(torch.int16)[::10]
    against_own, against_read, against_floor = [], [], []
    for _ in range(repeats):
        own, read = timed(load_and_own), timed(load_and_read)
        adapter_time = timed(lambda: live.load_dare_adapter(work / "adapter-1-4bit", "first"))
        against_own.append(adapter_time / own)
        against_read.append(adapter_time / read)
        against_floor.append(adapter_time / timed(partial(one_in_ten.add_, 1)))
        live.delete_dare_adapter("first")
    results["load_against_full_load_into_memory"] = _spread(against_own)
    results["load_against_full_load_mapped_and_read"] = _spread(against_read)
    results["load_against_touching_every_tenth_weight"] = _spread(against_floor)

    live.load_dare_adapter(work / "adapter-2-4bit", "second")
    live.load_dare_adapter(work / "adapter-1-4bit", "first")
    switches = []
    for number in range(2 * repeats):
        name = "second" if number % 2 == 0 else "first"
        switches.append(timed(lambda n=name: live.set_dare_adapter(n)) * 1e9)
    count = sum(parameter.numel() for parameter in live.parameters())
    results["switch_ns_per_parameter"] = _spread([value / count for value in switches])
    state = live.__dict__["_dare_live_adapters"]
    results["restore_bytes_of_checkpoint"] = state.patch.nbytes / checkpoint_bytes
    return results


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(results: dict[str, object]) -> None:
    """The results as a table, each beside what was asked of it."""
    table = Table("what", "median", "min … max", "asked")

    def row(what: str, spread: dict[str, float], asked: str) -> None:
        table.add_row(
            what, f"{spread['median']:.2f}", f"{spread['min']:.2f} … {spread['max']:.2f}", asked
        )

    for bits, smaller in ((4, 38), (1, 130)):
        part = results[f"extract_{bits}bit"]
        assert isinstance(part, dict)
        row(
            f"extract, {bits} bit / reading both checkpoints",
            part["times_reading_both"],
            "≤ 4, aim 2" if bits == 4 else "",
        )
        table.add_row("… anonymous memory, GB", f"{part['peak_anonymous_gb']:.2f}", "", "< 1")
        table.add_row("… times smaller", f"{part['times_smaller']:.1f}", "", f"≥ {smaller}")
    row(
        "load / loading the full fine-tune into memory",
        results["load_against_full_load_into_memory"],
        "≤ 1, aim 0.33",
    )
    row(
        "load / mapping the full fine-tune and reading it",
        results["load_against_full_load_mapped_and_read"],
        "",
    )
    row(
        "load / adding in place to every tenth weight",
        results["load_against_touching_every_tenth_weight"],
        "floor 1",
    )
    row("switch, ns a parameter", results["switch_ns_per_parameter"], "< 1.5")
    held = results["restore_bytes_of_checkpoint"]
    table.add_row("held to restore the base / checkpoint", f"{held:.3f}", "", "")
    Console().print(table)


def main() -> None:
    """Measure, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--work", type=Path, help="keep the models here (default: a temporary)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results = measure(options.work or Path(temporary), options.repeats)
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
