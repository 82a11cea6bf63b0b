"""Timing for the kernel benchmark, and what the kernels are to show on a GPU."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from kernel_layers import Layers, random_packed, shared_out

from dare_adapters.kernels import sparse_delta_linear
from dare_adapters.mask import parameter_key

# Of a decoder layer of Llama-7B, as (out, in).
SEVEN = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
DEPTH = 32
DEVICE = "cuda"
# Seconds on a processor: longer than a way takes to find its data in the caches again.
RUN = 4e-4
Call = Callable[[], object]


class Clock:
    """Seconds of calls that take turns.

    On a GPU medians, of captured graphs and with a cold second-level cache. On a processor minima,
    of many short calls in runs of the same: what others do there only ever adds.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.bandwidth = 0.0
        self._flush = torch.empty(1 << 28, dtype=torch.uint8, device=device) if self._gpu else None

    @property
    def _gpu(self) -> bool:
        return self.device == "cuda"

    def copy_bandwidth(self) -> float:
        """Bytes read and written in a second by a copy of a gigabyte."""
        one = torch.empty(1 << 30, dtype=torch.uint8, device=self.device)
        other = torch.empty_like(one)
        times, _ = self.seconds({"copy": lambda: other.copy_(one)}, cold=False)
        self.bandwidth = 2 * one.nbytes / times["copy"]
        return self.bandwidth

    def seconds(
        self, calls: dict[str, Call], each: float = 0.25, cold: bool = True
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Seconds of each call, and what went wrong with those that are missing."""
        ready, problems = {}, dict[str, str]()
        for name, call in calls.items():
            try:
                call()
                ready[name] = self._captured(call) if self._gpu else call
            except Exception as error:
                problems[name] = f"{type(error).__name__}: {error}"[:300]
        times: dict[str, list[float]] = {name: [] for name in ready}
        end = time.perf_counter() + each * len(ready)
        rounds = 0
        while (time.perf_counter() < end or rounds < 5) and (rounds < 1000 or not self._gpu):
            for name, call in ready.items():
                times[name].append(self._once(call, cold) if self._gpu else self._best(call))
            rounds += 1
        typical = statistics.median if self._gpu else min
        return {name: typical(own) for name, own in times.items()}, problems

    def _best(self, call: Call) -> float:
        """The shortest of the calls, two at least, that begin within RUN."""
        best, calls, start = math.inf, 0, time.perf_counter()
        while calls < 2 or time.perf_counter() - start < RUN:
            before = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - before)
            calls += 1
        return best

    def _once(self, call: Call, cold: bool) -> float:
        if cold and self._flush is not None:
            self._flush.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1000

    def _captured(self, call: Call) -> Call:
        """A graph of the call; the call itself where it cannot be captured."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except Exception:
            torch.cuda.synchronize()
            return call
        return graph.replay


def llama_targets(clock: Clock, end: float, quick: bool) -> dict[str, Any]:
    """Each target's numbers, or why there are none; none is begun after `end`."""
    found: dict[str, Any] = {}
    for name, target in (
        ("decode_one_adapter", decode_one_adapter),
        ("decode_sixteen_adapters", decode_sixteen_adapters),
        ("prefill", prefill),
        ("switch_in_place", switch_in_place),
    ):
        if time.monotonic() > end:
            found[name] = "there was no time"
            continue
        try:
            found[name] = target(clock, 4 if quick else DEPTH)
        except Exception as error:  # the others are still worth having
            found[name] = f"failed: {type(error).__name__}: {error}"[:500]
        torch.cuda.empty_cache()
        print(name, found[name], flush=True)
    return found


def decode_one_adapter(clock: Clock, depth: int) -> dict[str, Any]:
    """Tokens through a 7B model's linear layers: the base alone, and with one adapter's delta."""
    shapes = SEVEN * depth
    weights = [torch.randn(s, device=DEVICE, dtype=torch.bfloat16) for s in shapes]
    deltas = [random_packed(*s, 10, 4, DEVICE, seed) for seed, s in enumerate(shapes)]
    found: dict[str, Any] = {"at_most": 1.25, "layers": len(shapes)}
    for tokens in (1, 8, 32):
        x = {k: torch.randn(tokens, k, device=DEVICE, dtype=torch.bfloat16) for _, k in SEVEN}
        slot = torch.zeros(tokens, dtype=torch.int64, device=DEVICE)

        def base(x: dict[int, torch.Tensor] = x) -> None:
            for weight in weights:
                torch.mm(x[weight.shape[1]], weight.T)

        def both(x: dict[int, torch.Tensor] = x, slot: torch.Tensor = slot) -> None:
            for weight, delta in zip(weights, deltas, strict=True):
                y = torch.mm(x[weight.shape[1]], weight.T)
                sparse_delta_linear(x[weight.shape[1]], [delta], slot, y)

        times, problems = clock.seconds({"base": base, "both": both}, cold=False)
        packed_bytes = sum(delta.nbytes for delta in deltas)
        added = times["both"] - times["base"]
        found[f"tokens_{tokens}"] = {
            "ratio": times["both"] / times["base"],
            "base_ms": times["base"] * 1e3,
            "added_ms": added * 1e3,
            "added_share_of_floor": packed_bytes / clock.bandwidth / max(added, 1e-9),
        } | problems
    return found


def decode_sixteen_adapters(clock: Clock, depth: int) -> dict[str, Any]:
    """A token for each of sixteen adapters, through a decoder layer's products, beside LoRAs'."""
    found: dict[str, Any] = {"at_most": 2.0}
    slot = shared_out(16, 16, "distinct")
    calls: dict[str, list[Call]] = {}
    for shape in SEVEN:
        layers = Layers(*shape, 10, 4, 16, torch.bfloat16, DEVICE)
        x = torch.randn(16, shape[1], device=DEVICE, dtype=torch.bfloat16)
        y = torch.zeros(16, shape[0], device=DEVICE, dtype=torch.bfloat16)
        ways = layers.ways(x, slot)
        for name in ("packed", "base", "lora_64", "vllm_lora_64"):
            try:
                way = ways[name]()
                way(y)
            except Exception as error:
                found[f"no_{name}"] = f"{type(error).__name__}: {error}"[:200]
                continue
            calls.setdefault(name, []).append(lambda way=way, y=y: way(y))
    complete = {name: own for name, own in calls.items() if len(own) == len(SEVEN)}
    times, problems = clock.seconds(
        {name: lambda own=own: [call() for call in own] for name, own in complete.items()}
    )
    for name in ("lora_64", "vllm_lora_64"):
        if name in times:
            found[f"ratio_to_{name}"] = times["packed"] / times[name]
            with_base = times["base"] + times["packed"], times["base"] + times[name]
            found[f"ratio_to_{name}_with_base"] = with_base[0] / with_base[1]
    return found | {f"{name}_us": own * 1e6 for name, own in times.items()} | problems


def prefill(clock: Clock, depth: int) -> dict[str, Any]:
    """2048 tokens of one adapter: the packed delta's product beside the dense delta's."""
    found: dict[str, Any] = {"at_most": 1.3}
    for tokens in (256, 2048):
        for shape in dict.fromkeys(SEVEN):
            layers = Layers(*shape, 10, 4, 1, torch.bfloat16, DEVICE)
            x = torch.randn(tokens, shape[1], device=DEVICE, dtype=torch.bfloat16)
            y = torch.zeros(tokens, shape[0], device=DEVICE, dtype=torch.bfloat16)
            ways = layers.ways(x, shared_out(tokens, 1, "all-one"))
            ready = {name: ways[name]() for name in ("packed", "base", "dense")}
            times, problems = clock.seconds(
                {name: lambda way=way: way(y) for name, way in ready.items()}  # noqa: B023
            )
            found[f"{tokens} tokens, {shape}"] = {
                name: times["packed"] / times[name] for name in ("base", "dense")
            } | problems
    return found


def switch_in_place(clock: Clock, depth: int) -> dict[str, Any]:
    """Attach and detach one adapter's changes of a 7B model's linear layers, where they are."""
    from dare_adapters.kernels.gpu.change import apply_on_device, restore_on_device

    block, bits = 10, 4
    layers = []
    for number, (rows, columns) in enumerate(SEVEN * depth):
        slots = -(-columns // block)
        weight = torch.randn(rows * columns, device=DEVICE).to(torch.bfloat16)
        codes = torch.randint(0, 256, (rows * -(-slots // 2),), dtype=torch.uint8, device=DEVICE)
        where = (1, parameter_key(f"layer {number}"), columns, block)
        layers.append((where, weight, codes, torch.rand(rows, device=DEVICE) * 1e-3, slots, rows))
    kept: list[torch.Tensor] = []

    def attach() -> None:
        for where, weight, codes, scales, slots, rows in layers:
            kept.append(
                apply_on_device(
                    where, bits, codes, scales, 1.0, weight, where[2], slots, 0, rows
                )
            )  # fmt: skip

    def detach() -> None:
        for (where, weight, _, _, slots, rows), one in zip(layers, kept, strict=True):
            restore_on_device(where, weight, where[2], one, slots, 0, rows)
        kept.clear()

    before = layers[0][1].clone()
    times: dict[str, list[float]] = {"attach": [], "detach": []}
    for turn in range(6):
        for name, call in (("attach", attach), ("detach", detach)):
            torch.accelerator.synchronize()
            start = time.perf_counter()
            call()
            torch.accelerator.synchronize()
            if turn:  # the first compiles
                times[name].append(time.perf_counter() - start)
    touched = sum(2 * 2 * one[1].nbytes for one in layers)  # read and written, twice
    attach_ms, detach_ms = (statistics.median(times[name]) * 1e3 for name in times)
    return {
        "under_ms": 50,
        "switch_ms": attach_ms + detach_ms,
        "attach_ms": attach_ms,
        "detach_ms": detach_ms,
        "floor_ms": touched / clock.bandwidth * 1e3,
        "restored_bit_for_bit": bool(torch.equal(before, layers[0][1])),
        "parameters": sum(one[1].numel() for one in layers),
    }
