"""Compiles the Triton kernels for sm_90 without a GPU and reports what they take.

    python benchmarks/kernels_sm90.py [--json benchmarks/results/kernels_sm90.json]

The kernels and their constants are those that the back end launches for layers of Llama-7B:
launches are recorded, not run. Registers, spills and shared memory are ptxas's, instructions are
counted in the machine code (a static count: loops count once). Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dare_adapters.kernels import PackedDelta
from dare_adapters.kernels.blocked import BlockedLayout
from dare_adapters.kernels.compressed_rows import CompressedRowsLayout
from dare_adapters.kernels.gpu.change import apply_on_device, offsets_on_device, restore_on_device
from dare_adapters.kernels.layout import Layout
from dare_adapters.kernels.triton_product import add_product

TARGET = GPUTarget("cuda", 90, 32)
NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the report")
    arguments = parser.parse_args()
    report = []
    seen = set()
    for what, call in cases():
        for launch in recorded(call):
            name = launch[0].__name__
            found = compiled(launch)
            key = (name, json.dumps(found))
            if key in seen:
                continue
            seen.add(key)
            report.append({"kernel": name, "for": what} | found)
            numbers = " ".join(f"{key} {value}" for key, value in found.items())
            print(f"{name:20} {what:44} {numbers}", flush=True)
    if arguments.json:
        about = {"triton": triton.__version__, "target": "sm_90", "timed": False}
        arguments.json.write_text(json.dumps(about | {"kernels": report}, indent=1) + "\n")


def cases() -> list[tuple[str, Callable[[], None]]]:
    """What is launched, described."""
    found: list[tuple[str, Callable[[], None]]] = []
    for block, bits in ((10, 4), (10, 16), (10, 8), (10, 1), (20, 4), (100, 2)):
        for tokens, slots in ((1, 1), (16, 16), (16, 1), (64, 1), (256, 16), (2048, 1)):
            what = f"p={1 - 1 / block:g} {bits} bits, {tokens} tokens, {slots} adapters"
            found.append((what, lambda a=(block, bits, tokens, slots): product(*a)))
    found.append(("p=0.9 4 bits, transposed, 64 tokens", lambda: product(10, 4, 64, 1, True)))
    for tokens in (1, 64):
        what = f"compressed rows, 4 bits, {tokens} tokens"
        found.append((what, lambda t=tokens: product(None, 4, t, 1)))
    found.append(("p=0.9 4 bits, bfloat16", change))
    return found


def product(
    block: int | None, bits: int, tokens: int, slots: int, transposed: bool = False
) -> None:
    """One call of the back end with tensors that hold nothing."""
    size = 4096
    dtype = torch.bfloat16 if bits == 16 else torch.uint8
    layout: Layout = CompressedRowsLayout((size, size), bits, dtype, 1_000_000, 300)
    if block is not None:
        layout = BlockedLayout((size, size), bits, dtype, block, _eights(size // block + 1))
    declared = layout.declare().items()
    tensors = {name: torch.zeros(shape, dtype=of) for name, (shape, of) in declared}
    deltas = [PackedDelta(layout, tensors)] * slots
    x = torch.empty(tokens, size, dtype=torch.bfloat16)
    slot = torch.zeros(tokens, dtype=torch.int64)
    add_product(x, deltas, slot, torch.empty_like(x), transposed=transposed, weights=None)


def change() -> None:
    """A layer patched in place and restored, and its offsets drawn."""
    size, block = 4096, 10
    slots = -(-size // block)
    where = (7, 11, size, block)
    target = torch.zeros(size * size, dtype=torch.bfloat16)
    codes = torch.zeros(size * -(-slots // 2), dtype=torch.uint8)
    kept = apply_on_device(
        where, 4, codes, torch.zeros(size), 1.0, target, size, slots, 0, size
    )  # fmt: skip
    restore_on_device(where, target, size, kept, slots, 0, size)
    padded = _eights(slots)
    offsets_on_device(where, size, torch.zeros(size, padded // 2, dtype=torch.uint8), padded)


def _eights(slots: int) -> int:
    return -(-slots // 8) * 8


def recorded(call: Callable[[], None]) -> list[Launch]:
    """The launches that a call makes."""
    launches: list[Launch] = []

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launches.append((self, arguments, named))

    original = triton.JITFunction.run
    triton.JITFunction.run = record
    try:
        call()
    finally:
        triton.JITFunction.run = original
    return launches


def compiled(launch: Launch) -> dict[str, Any]:
    """What the machine code of a launch takes."""
    kernel, arguments, named = launch
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | named
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = given[name]
        if kernel.params[place].is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + NAMES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif value == 1 and isinstance(value, int):  # as Triton specialises a launch
            signature[name], constants[name] = "constexpr", 1
        else:
            small = isinstance(value, float) or -(1 << 31) <= value < 1 << 31
            signature[name] = ("fp32" if isinstance(value, float) else "i32") if small else "i64"
            if not isinstance(value, float) and value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    options = {
        name: named[name]
        for name in ("num_warps", "num_stages", "enable_fp_fusion")
        if name in named
    }
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=TARGET, options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        usage = _run(tools / "cuobjdump", "-res-usage", cubin)
        code = _run(tools / "nvdisasm", "-c", cubin)
    numbers = {
        part.split(":")[0]: part.split(":")[1] for part in usage.split() if part.count(":") == 1
    }
    lines = [line for line in code.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line)]
    return {
        "registers": int(numbers["REG"]),
        "spilled_bytes": int(numbers["LOCAL"]) + int(numbers["STACK"]),
        "shared_bytes": made.metadata.shared,
        "warps": made.metadata.num_warps,
        "instructions": len(lines),
        "tensor_core_instructions": sum("GMMA" in line or "HMMA" in line for line in lines),
    }


def _run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    main()
