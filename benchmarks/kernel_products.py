"""What a packed delta costs beside other ways to the same sum, as ratios within one run.

    python benchmarks/kernel_products.py [--device cuda|cpu] [--quick] [--minutes 9] [--json FILE]

On a GPU: layers of Llama-7B and 13B in bfloat16; tokens 1 to 2048; 1 to 64 adapters, however
popular; drop rates and bits. Beside each: the base's own product; the delta made dense; LoRA of
rank 16, 64 and 256 by grouped products, and by vLLM's kernels where it is installed; PyTorch's
(cuSPARSE's) CSR product; and the floor: the bytes that must move, at the bandwidth of a copy
measured here. Products are replayed from CUDA graphs with a cold second-level cache. On a
processor: float32, and `embedding_bag` too. Ways take turns; medians are compared, on a processor
the shortest times. A ratio under 1 says that the packed delta is faster. What fails is recorded,
and the rest goes on; what the time does not suffice for is counted. On a GPU it begins with what is
to be shown (docs/kernels.md).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from kernel_layers import POPULARITIES, Layers, Way, shared_out
from kernel_targets import Clock, llama_targets

import dare_adapters

SHAPES = {
    "7B attention": (4096, 4096),
    "7B gate": (11008, 4096),
    "7B down": (4096, 11008),
    "13B attention": (5120, 5120),
    "13B gate": (13824, 5120),
    "13B down": (5120, 13824),
}
DROP_RATES = (0.875, 0.9, 0.9375, 0.95, 0.99)
BITS = (16, 8, 4, 2, 1)
TOKENS = {"cuda": (1, 8, 32, 256, 2048), "cpu": (1, 2, 4, 8, 16, 32, 48, 64, 256)}
Case = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="one shape, few cases")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no case is begun")
    parser.add_argument("--size", type=int, nargs="+", default=[2048], help="on a processor")
    parser.add_argument("--threads", type=int, default=1, help="on a processor")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--plots", type=Path, help="a folder for plots (needs matplotlib)")
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    torch.set_num_threads(arguments.threads)
    end = time.monotonic() + 60 * arguments.minutes
    clock = Clock(device)
    result: dict[str, Any] = about(device) | {
        "targets": {},
        "lines": [],
        "failed": [],
        "not_run": 0,
    }
    if device == "cuda":
        result["copy_bandwidth_gb_s"] = clock.copy_bandwidth() / 1e9
        print(f"a copy moves {result['copy_bandwidth_gb_s']:.0f} GB/s", flush=True)
        result["targets"] = llama_targets(clock, end, arguments.quick)
        write(arguments.json, result)
    for case in cases(device, arguments.quick, arguments.size):
        if time.monotonic() > end:
            result["not_run"] += 1
            continue
        try:
            line = measured(case, device, clock, result["failed"], 0.1 if arguments.quick else 0.25)
        except Exception as error:  # a case that does not fit must not end the others
            result["failed"].append(case | {"error": f"{type(error).__name__}: {error}"[:300]})
            print("failed", case, type(error).__name__, flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()
            continue
        result["lines"].append(line)
        print(text(line), flush=True)
        write(arguments.json, result)
    if device == "cpu":
        result["targets"] = processor_targets(result["lines"])
    print(f"\n{len(result['lines'])} cases, {len(result['failed'])} failures, "
          f"{result['not_run']} for which there was no time")  # fmt: skip
    print(json.dumps(result["targets"], indent=1))
    write(arguments.json, result)
    if arguments.plots:
        plot(result, arguments.plots)


def about(device: str) -> dict[str, Any]:
    """The machine and the versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": name,
        "torch": torch.__version__,
        "triton": version,
        "threads": torch.get_num_threads(),
        "dare_adapters": dare_adapters.__version__,
    }


def cases(device: str, quick: bool, sizes: list[int]) -> Iterator[Case]:
    """What is measured, the most telling first."""
    if device == "cpu":
        yield from processor_cases(quick, sizes)
    else:
        yield from gpu_cases(quick)


def processor_cases(quick: bool, sizes: list[int]) -> Iterator[Case]:
    """Square layers."""
    tokens = TOKENS["cpu"]
    for size in sizes:
        for drop_rate, bits in ((0.9, 4), (0.95, 4), (0.9, 1), (0.9, 16)):
            for count in (1, 8, 32, 64) if quick else tokens:
                yield case(f"{size}", (size, size), count, 1, "all-one", drop_rate, bits)
        for adapters in (4, 16):
            for count in (16, 64):
                yield case(f"{size}", (size, size), count, adapters, "distinct", 0.9, 4)


def gpu_cases(quick: bool) -> Iterator[Case]:
    """Llama's layers: all of them for one adapter; one of them for adapters, drop rates, bits."""
    tokens = TOKENS["cuda"]
    shapes = dict(list(SHAPES.items())[:1]) if quick else SHAPES
    for name, shape in shapes.items():
        for count in tokens:
            yield case(name, shape, count, 1, "all-one", 0.9, 4)
    first = "7B attention"
    for adapters in (4, 16, 64):
        for popularity in ("distinct",) if quick else POPULARITIES:
            for count in tokens:
                if count > 1 and (popularity != "distinct" or count >= adapters):
                    yield case(first, SHAPES[first], count, adapters, popularity, 0.9, 4)
    for drop_rate in DROP_RATES:
        for bits in (4,) if quick else BITS:
            for count in (1, 32, 2048):
                if (drop_rate, bits) != (0.9, 4):
                    yield case(first, SHAPES[first], count, 1, "all-one", drop_rate, bits)
    for name, shape in list(shapes.items())[1:]:
        for adapters in (16, 64):
            for count in (64, 256):
                yield case(name, shape, count, adapters, "zipf", 0.9, 4)


def case(
    layer: str, shape: tuple[int, int], tokens: int, adapters: int, popularity: str,
    drop_rate: float, bits: int,
) -> Case:  # fmt: skip
    """One line of the table."""
    return {
        "layer": layer, "shape": shape, "tokens": tokens, "adapters": adapters,
        "popularity": popularity, "p": drop_rate, "bits": bits,
    }  # fmt: skip


def measured(case: Case, device: str, clock: Clock, failed: list[Case], seconds: float) -> Case:
    """The case with ratios of the packed delta's time to each way's, and its share of the floor."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    block = round(1 / (1 - case["p"]))
    layers = Layers(*case["shape"], block, case["bits"], case["adapters"], dtype, device)
    slot = shared_out(case["tokens"], case["adapters"], case["popularity"])
    x = torch.randn(case["tokens"], case["shape"][1], device=device, dtype=dtype)
    y = torch.zeros(case["tokens"], case["shape"][0], device=device, dtype=dtype)
    ways: dict[str, Way] = {}
    for name, prepare in layers.ways(x, slot).items():
        try:
            ways[name] = prepare()
            ways[name](y)
        except ImportError:
            ways.pop(name, None)
        except Exception as error:
            ways.pop(name, None)
            failed.append(case | {"way": name, "error": f"{type(error).__name__}: {error}"[:300]})
    check(ways, y)
    times, problems = clock.seconds(
        {name: lambda w=way: w(y) for name, way in ways.items()}, seconds
    )
    failed += [case | {"way": name, "error": error} for name, error in problems.items()]
    ratios = {name: times["packed"] / own for name, own in times.items() if name != "packed"}
    line = case | {"seconds": times["packed"], "ratios": ratios}
    line["bytes_to_dense"] = layers.packed[0].nbytes / layers.base.nbytes
    if clock.bandwidth:
        line["share_of_floor"] = layers.bytes_moved(slot) / clock.bandwidth / times["packed"]
    return line


def check(ways: dict[str, Way], y: torch.Tensor) -> None:
    """Refuse to time what is not the same sum."""
    sums = {}
    for name in ("packed", "dense"):
        sums[name] = torch.zeros_like(y)
        ways[name](sums[name])
    scale = sums["dense"].float().abs().max()
    off = (sums["packed"].float() - sums["dense"].float()).abs().max() / scale
    if not off < (1e-4 if y.dtype == torch.float32 else 2e-2):
        raise ValueError(f"the packed product is off by {off:.2g} of the largest entry")


def text(line: Case) -> str:
    """A line of the table."""
    floor = f" floor {line['share_of_floor']:4.0%}" if "share_of_floor" in line else ""
    ratios = " ".join(f"{name} {ratio:.2f}" for name, ratio in line["ratios"].items())
    return (
        f"{line['layer']:14} p {line['p']:<6} bits {line['bits']:2} tokens {line['tokens']:4} "
        f"adapters {line['adapters']:2} {line['popularity']:8} {line['seconds'] * 1e6:9.1f} us"
        f"{floor} | {ratios}"
    )


def processor_targets(lines: list[Case]) -> dict[str, Any]:
    """Whether the packed delta is at least as fast as the better of the two peers everywhere."""
    found: dict[str, Any] = {}
    for line in lines:
        if line["tokens"] <= 64:
            better = max(line["ratios"]["csr"], line["ratios"]["embedding_bag"])
            what = f"bits {line['bits']} adapters {line['adapters']} tokens {line['tokens']}"
            found[f"{line['layer']} p {line['p']} {what}"] = round(better, 2)
    missed = [name for name, ratio in found.items() if ratio > 1]
    return {"ratio_to_the_better_of_csr_and_embedding_bag": found, "slower_at": missed}


def write(file: Path | None, result: dict[str, Any]) -> None:
    """All numbers, after every case: a run that is cut short leaves what it has."""
    if file is not None:
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(file)


def plot(result: dict[str, Any], folder: Path) -> None:
    """Ratios over tokens, one picture a layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    alone = [one for one in result["lines"] if one["adapters"] == 1 and one["bits"] == 4]
    for layer in dict.fromkeys(one["layer"] for one in alone):
        lines = [one for one in alone if one["layer"] == layer and one["p"] == 0.9]
        if len(lines) < 2:
            continue
        figure, axes = pyplot.subplots(figsize=(6, 4))
        for name in lines[0]["ratios"]:
            points = [(one["tokens"], one["ratios"].get(name)) for one in lines]
            axes.plot(*zip(*[p for p in points if p[1]], strict=True), marker="o", label=name)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="packed delta / other way")
        axes.set_title(f"{layer}, p = 0.9, 4 bits, {result['device']}", fontsize=9)
        axes.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(folder / f"kernels_{layer.replace(' ', '_')}.png", dpi=150)
        pyplot.close(figure)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        traceback.print_exc()
