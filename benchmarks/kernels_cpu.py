"""What a packed delta costs a processor beside other ways to the same sum, as ratios within a run.

    python benchmarks/kernels_cpu.py [--json FILE] [--size 2048] [--threads 2]

For a layer of size x size in float32 and tokens that are shared out among adapters: the layer's own
product; the delta made dense; PyTorch's CSR product; embedding_bag over the transposed tokens;
LoRA of rank 64, each adapter's tokens together. All but the first add to the same y. A ratio under
1 says that the packed delta is faster. What is timed is interleaved, and medians are compared.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from dare_adapters.kernels import PackedDelta, sparse_delta_linear
from dare_adapters.mask import BlockedSupport
from dare_adapters.scales import store_scales
from dare_adapters.sparse_delta import SparseDelta

TOKENS = (1, 8, 32, 64, 256)
ADAPTERS = (1, 4, 16)
SETTINGS = ((10, 4), (20, 4), (10, 1), (10, 16))  # block (1 / density), bits
PEERS = ("base", "dense", "csr", "embedding_bag", "lora_64")
RANK = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the layer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.3, help="for each line of the table")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    print(f"{arguments.size} x {arguments.size}, {arguments.threads} threads; time / peer's time")
    print(
        f"{'p':>6} {'bits':>4} {'tokens':>6} {'adapters':>8} " + " ".join(f"{p:>13}" for p in PEERS)
    )
    lines = []
    for block, bits in SETTINGS:
        layers = [Layer(arguments.size, block, bits, seed) for seed in range(max(ADAPTERS))]
        for adapters in ADAPTERS:
            for tokens in TOKENS:
                if tokens < adapters or (bits != 4 and adapters > 1):
                    continue
                medians = measure(layers[:adapters], tokens, arguments.seconds)
                ratios = {peer: medians["packed"] / medians[peer] for peer in PEERS}
                line = {"p": 1 - 1 / block, "bits": bits, "tokens": tokens, "adapters": adapters}
                lines.append(line | {"ratios": ratios})
                print(
                    f"{1 - 1 / block:6} {bits:4} {tokens:6} {adapters:8} "
                    + " ".join(f"{ratios[peer]:13.2f}" for peer in PEERS),
                    flush=True,
                )
        sizes = layers[0].sizes()
        print(f"{'bytes':>27} " + " ".join(f"{sizes['packed'] / sizes[p]:13.3f}" for p in PEERS))
    if arguments.json:
        machine = {"processor": platform.processor() or platform.machine()}
        about = machine | {"torch": torch.__version__, "threads": arguments.threads}
        result = about | {"date": time.strftime("%Y-%m-%d"), "size": arguments.size}
        arguments.json.write_text(json.dumps(result | {"lines": lines}, indent=1) + "\n")


class Layer:
    """One adapter's change of a layer in every form."""

    def __init__(self, size: int, block: int, bits: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        support = BlockedSupport(seed, "layer.weight", size, size, block)
        count = support.slot_count
        shape = (size, size)
        if bits >= 16:
            values = torch.randn(count, generator=generator).to(torch.bfloat16)
            delta = SparseDelta(shape, support, bits, values)
        else:
            width = -(-support.slots_per_row * bits // 8)
            codes = torch.randint(0, 256, (size * width,), dtype=torch.uint8, generator=generator)
            scales, exponent = store_scales(torch.rand(size, generator=generator), bits)
            delta = SparseDelta(shape, support, bits, codes, scales, exponent)
        self.packed = PackedDelta.from_delta(delta)
        self.base = torch.randn(size, size, generator=generator)
        self.dense = self.packed.dense()
        self.csr = self.dense.to_sparse_csr()
        starts = self.csr.crow_indices()[:-1].contiguous()
        self.bag = self.csr.col_indices(), starts, self.csr.values()
        self.down = torch.randn(RANK, size, generator=generator)
        self.up = torch.randn(size, RANK, generator=generator)

    def sizes(self) -> dict[str, int]:
        """Bytes that each form takes."""
        count = self.csr.values().numel()
        index = self.csr.crow_indices().nbytes
        return {
            "packed": self.packed.nbytes,
            "base": self.base.nbytes,
            "dense": self.dense.nbytes,
            "csr": index + count * (8 + 4),
            "embedding_bag": index + count * (8 + 4),
            "lora_64": self.down.nbytes + self.up.nbytes,
        }


def measure(layers: list[Layer], tokens: int, seconds: float) -> dict[str, float]:
    """Median seconds of each way, by name; all ways first shown to give the same sum."""
    size = len(layers[0].base)
    x = torch.randn(tokens, size)
    token_slot = torch.arange(tokens) % len(layers)
    places = [(token_slot == slot).nonzero().squeeze(1) for slot in range(len(layers))]
    packed = [layer.packed for layer in layers]
    base = layers[0].base

    def grouped(product: Callable[[Layer, torch.Tensor], torch.Tensor]) -> Callable[..., object]:
        def run(y: torch.Tensor) -> None:
            for layer, place in zip(layers, places, strict=True):
                if len(layers) == 1:
                    y += product(layer, x)
                else:
                    y.index_add_(0, place, product(layer, x.index_select(0, place)))

        return run

    def bag(layer: Layer, part: torch.Tensor) -> torch.Tensor:
        columns, starts, values = layer.bag
        return torch.nn.functional.embedding_bag(
            columns, part.T.contiguous(), starts, per_sample_weights=values, mode="sum"
        ).T

    ways: dict[str, Callable[..., object]] = {
        "packed": lambda y: sparse_delta_linear(x, packed, token_slot, y),
        "base": lambda y: torch.mm(x, base.T),
        "dense": grouped(lambda layer, part: part @ layer.dense.T),
        "csr": grouped(lambda layer, part: (layer.csr @ part.T).T),
        "embedding_bag": grouped(bag),
        "lora_64": grouped(lambda layer, part: (part @ layer.down.T) @ layer.up.T),
    }
    made = {}
    for name in ("packed", "dense", "csr", "embedding_bag"):
        made[name] = torch.zeros(tokens, size)
        ways[name](made[name])
        torch.testing.assert_close(made[name], made["packed"], rtol=1e-3, atol=1e-2)
    y, times = torch.zeros(tokens, size), {name: list[float]() for name in ways}
    end = time.perf_counter() + seconds * len(ways)
    while time.perf_counter() < end or len(times["packed"]) < 5:
        for name, way in ways.items():
            start = time.perf_counter()
            way(y)
            times[name].append(time.perf_counter() - start)
        y.zero_()
    return {name: statistics.median(own) for name, own in times.items()}


if __name__ == "__main__":
    main()
