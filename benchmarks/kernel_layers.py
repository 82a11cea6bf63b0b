"""One layer's change in every form that the kernel benchmark compares, for one or more adapters.

Each way adds to the same y the products of tokens that are shared out among adapters. Their
popularity says how: all-one, uniform, Zipf (s = 1), or distinct (in turn).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch

from dare_adapters.kernels import PackedDelta, sparse_delta_linear
from dare_adapters.kernels.blocked import BlockedLayout

RANKS = (16, 64, 256)
POPULARITIES = ("all-one", "uniform", "zipf", "distinct")
Way = Callable[[torch.Tensor], object]


def random_packed(
    rows: int, columns: int, block: int, bits: int, device: str, seed: int = 0
) -> PackedDelta:
    """A packed delta of random contents, made where it is to be."""
    generator = torch.Generator(device).manual_seed(seed)
    slots = math.ceil(math.ceil(columns / block) / 8) * 8
    dtype = {32: torch.float32, 16: torch.bfloat16}.get(bits, torch.uint8)
    layout = BlockedLayout((rows, columns), bits, dtype, block, slots)
    tensors = {}
    for name, (shape, of) in layout.declare().items():
        if name == "offsets":
            high = min(block, 1 << 15)
            made = torch.randint(0, high, (rows, slots), generator=generator, device=device)
            if layout.offset_bits == 4:
                made = made[:, ::2] | made[:, 1::2] << 4
            tensors[name] = made.to(of)
        elif of == torch.uint8:
            tensors[name] = torch.randint(
                0, 256, shape, dtype=of, generator=generator, device=device
            )
        else:
            tensors[name] = torch.rand(shape, generator=generator, device=device).to(of)
    return PackedDelta.from_tensors(layout, tensors)


def shared_out(tokens: int, adapters: int, popularity: str) -> torch.Tensor:
    """The adapter of each token, int64 (tokens,)."""
    if popularity == "all-one":
        return torch.zeros(tokens, dtype=torch.int64)
    if popularity == "distinct":
        return torch.arange(tokens) % adapters
    generator = torch.Generator().manual_seed(tokens)
    weights = torch.ones(adapters)
    if popularity == "zipf":
        weights /= torch.arange(1, adapters + 1)
    return torch.multinomial(weights, tokens, replacement=True, generator=generator)


class Layers:
    """So many adapters' changes of a layer of (rows, columns).

    Args:
        dtype: of tokens, the base, LoRAs, and dense deltas.
    """

    def __init__(
        self, rows: int, columns: int, block: int, bits: int, adapters: int, dtype: torch.dtype,
        device: str,
    ) -> None:  # fmt: skip
        self.shape, self.adapters, self.dtype, self.device = (
            (rows, columns),
            adapters,
            dtype,
            device,
        )
        self.packed = [
            random_packed(rows, columns, block, bits, device, seed) for seed in range(adapters)
        ]

    @cached_property
    def base(self) -> torch.Tensor:
        """The layer's own weight."""
        return torch.randn(self.shape, device=self.device, dtype=self.dtype)

    @cached_property
    def dense(self) -> list[torch.Tensor]:
        """The deltas made dense."""
        return [one.dense(self.dtype) for one in self.packed]

    @cached_property
    def csr(self) -> list[torch.Tensor]:
        """The deltas in PyTorch's compressed rows."""
        return [one.to_sparse_csr() for one in self.dense]

    def lora(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Down (adapters, rank, columns) and up (adapters, rows, rank)."""
        rows, columns = self.shape
        down = torch.randn(self.adapters, rank, columns, device=self.device, dtype=self.dtype)
        up = torch.randn(self.adapters, rows, rank, device=self.device, dtype=self.dtype)
        return down / math.sqrt(columns), up / math.sqrt(rank)

    def bytes_moved(self, slot: torch.Tensor) -> int:
        """What a product must read and write: the adapters that have tokens, x, y twice."""
        present = len(slot.unique())
        rows, columns = self.shape
        own = self.packed[0].nbytes * present
        return own + len(slot) * (columns + 2 * rows) * self.dtype.itemsize

    def ways(self, x: torch.Tensor, slot: torch.Tensor) -> dict[str, Callable[[], Way]]:
        """By name, what prepares each way; a way that is not asked for takes no memory."""
        on_device = slot.to(self.device)
        places = [
            (slot == one).nonzero().squeeze(1).to(self.device) for one in range(self.adapters)
        ]
        used = [one for one, place in enumerate(places) if len(place)]

        def grouped(product: Callable[[int, torch.Tensor], torch.Tensor]) -> Way:
            def run(y: torch.Tensor) -> None:
                for one in used:
                    if len(places[one]) == len(x):
                        y += product(one, x)
                    else:
                        y.index_add_(0, places[one], product(one, x[places[one]]).to(y.dtype))

            return run

        def packed() -> Way:
            return lambda y: sparse_delta_linear(x, self.packed, on_device, y)

        def base() -> Way:
            weight = self.base
            return lambda y: torch.mm(x, weight.T)

        def dense() -> Way:
            deltas = self.dense
            return grouped(lambda one, part: part @ deltas[one].T)

        def csr() -> Way:
            deltas = self.csr
            return grouped(lambda one, part: (deltas[one] @ part.T).T)

        def bag() -> Way:
            made = [
                (one.col_indices(), one.crow_indices()[:-1].contiguous(), one.values())
                for one in self.csr
            ]
            return grouped(
                lambda one, part: torch.nn.functional.embedding_bag(
                    made[one][0], part.T.contiguous(), made[one][1],
                    per_sample_weights=made[one][2], mode="sum",
                ).T
            )  # fmt: skip

        found = {"packed": packed, "base": base, "dense": dense, "csr": csr}
        if self.device == "cpu":
            found["embedding_bag"] = bag
        for rank in RANKS:
            found[f"lora_{rank}"] = lambda rank=rank: self._lora(rank, x, places, used)
            found[f"vllm_lora_{rank}"] = lambda rank=rank: self._vllm_lora(rank, x, on_device)
        return found

    def _lora(self, rank: int, x: torch.Tensor, places: list[torch.Tensor], used: list[int]) -> Way:
        """Grouped products: one batch of all adapters' tokens, filled up to the most of any."""
        down, up = self.lora(rank)
        most = max(len(places[one]) for one in used)
        if len(used) == 1 or most * len(used) > 4 * len(x):

            def one_by_one(y: torch.Tensor) -> None:
                for one in used:
                    part = x if len(places[one]) == len(x) else x[places[one]]
                    product = (part @ down[one].T) @ up[one].T
                    if part is x:
                        y += product
                    else:
                        y.index_add_(0, places[one], product)

            return one_by_one
        index = torch.zeros(len(used), most, dtype=torch.int64, device=self.device)
        kept = torch.zeros(len(used), most, 1, dtype=self.dtype, device=self.device)
        for row, one in enumerate(used):
            index[row, : len(places[one])] = places[one]
            kept[row, : len(places[one])] = 1
        down, up = down[used].transpose(1, 2).contiguous(), up[used].transpose(1, 2).contiguous()
        flat = index.view(-1)

        def together(y: torch.Tensor) -> None:
            made = torch.bmm(torch.bmm(x[flat].view(*index.shape, -1), down) * kept, up)
            y.index_add_(0, flat, made.view(len(flat), -1))

        return together

    def _vllm_lora(self, rank: int, x: torch.Tensor, slot: torch.Tensor) -> Way:
        """The kernels of vLLM."""
        from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

        down, up = self.lora(rank)
        meta = LoRAKernelMeta.make(self.adapters, len(x), device=self.device)
        meta.prepare_tensors(slot)
        arguments = meta.meta_args(len(x), True)

        def run(y: torch.Tensor) -> None:
            between = torch.zeros(1, len(x), rank, dtype=torch.float32, device=self.device)
            lora_shrink(x, [down], between, *arguments, 1.0)
            lora_expand(between, [up], y, *arguments, add_inputs=True)

        return run
