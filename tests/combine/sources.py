"""Deltas and sources in memory, and the plain arithmetic that methods are compared with."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from hypothesis import strategies as st

from dare_adapters import codec
from dare_adapters.delta import Delta, DenseDelta, NewParameter, NoChange
from dare_adapters.mask import BernoulliSupport, BlockedSupport, Support, matrix_shape
from dare_adapters.scales import store_scales
from dare_adapters.source import DeltaSource
from dare_adapters.sparse_delta import SparseDelta
from dare_adapters.stored_support import StoredSupport
from tests import reference

# Scalars, vectors, a single row and column, rows that no block divides, a matrix folded of three.
SHAPES = [(), (1,), (7,), (131,), (1, 9), (9, 1), (5, 16), (7, 53), (3, 5, 4), (2, 3, 130)]
KINDS = ("float32", "bfloat16", "float16", "blocked", "bernoulli", "stored", "one bit", "nothing")
# Of sums of their multiples by small whole numbers none is rounded, so that none depends on order.
UNIT = 2.0**-10
WEIGHTS = st.integers(-16, 16).map(lambda eighths: eighths / 8)
DENSITIES = st.sampled_from([0.0, 0.03, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.99, 1.0])


class MemorySource(DeltaSource):
    """Deltas by name; its content is what `identity` says."""

    def __init__(
        self,
        deltas: Mapping[str, Delta | NewParameter],
        label: str = "memory",
        identity: str | None = None,
        witness: Mapping[str, str] | None = None,
        base_parameter_count: int = 0,
    ) -> None:
        self._deltas, self.label, self._identity = dict(deltas), label, identity or label
        self.base_model_name_or_path = f"base of {label}"
        self.base_architectures = ["ToyModel"]
        self.base_parameter_count = base_parameter_count
        self.witness = dict(witness or {})

    def __getitem__(self, name: str) -> Delta | NewParameter:
        return self._deltas[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)

    @property
    def identity(self) -> str:
        return self._identity


def mask_seed(seed: int, identity: str) -> int:
    """What `DeltaSource.mask_seed` promises."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{identity}".encode()).digest()[:8], "little")


# --- values


def levels(shape: Sequence[int], seed: int, largest: int = 3) -> torch.Tensor:
    """Few levels, so that many magnitudes are equal and some entries zero, float32."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-largest, largest + 1, tuple(shape), generator=generator)
    return drawn.to(torch.float32) * UNIT


def distinct(shape: Sequence[int], seed: int) -> torch.Tensor:
    """Both signs, no two magnitudes equal, none zero, float32."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape)
    magnitudes = torch.randperm(size, generator=generator) + 1
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return (magnitudes * signs * UNIT).to(torch.float32).view(tuple(shape))


def normal(shape: Sequence[int], seed: int) -> torch.Tensor:
    """As real deltas are, float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator) * 0.002


# --- deltas


def supports(rows: int, columns: int, seed: int) -> dict[str, Support]:
    """One of each kind."""
    chosen = np.random.default_rng(seed).random(rows * columns) < 0.4
    return {
        "blocked": BlockedSupport(seed, "w", rows, columns, 2 + seed % 5),
        "bernoulli": BernoulliSupport(seed, "w", rows, columns, 0.6),
        "stored": StoredSupport.from_positions(np.flatnonzero(chosen), rows, columns),
    }


def encoded(values: torch.Tensor, support: Support, bits: int) -> SparseDelta:
    """The entries of a support, stored as an adapter stores them."""
    slots = support.slots(0, support.rows)
    matrix = slots.clear_unused(values.reshape(-1)[slots.index])
    shape, padded = tuple(values.shape), support.row_counts is not None
    if bits >= 16:
        stored = slots.compact(matrix) if padded else matrix.reshape(-1)
        return SparseDelta(shape, support, bits, stored.bfloat16() if bits == 16 else stored)
    quantised = codec.quantise(matrix, slots, bits)
    packed = codec.pack(quantised.codes, bits)
    if padded:
        used = -(-slots.used_per_row() * bits // 8)
        packed = packed[torch.arange(packed.shape[1]) < used[:, None]]
    scales, exponent = store_scales(quantised.scales, bits)
    return SparseDelta(shape, support, bits, packed.reshape(-1), scales, exponent)


def delta_of(kind: str, values: torch.Tensor, seed: int, bits: int = 32) -> Delta:
    """`values` as a delta of a kind; a sparse one keeps some of them."""
    if kind == "nothing":
        return NoChange(tuple(values.shape))
    if kind in ("float32", "bfloat16", "float16"):
        return DenseDelta(values.to(getattr(torch, kind)))
    rows, columns = matrix_shape(tuple(values.shape))
    if kind == "one bit":  # all magnitudes of a row are equal
        return encoded(values, supports(rows, columns, seed)["blocked"], 1)
    return encoded(values, supports(rows, columns, seed)[kind], bits)


@st.composite
def aligned_deltas(
    draw: st.DrawFn,
    least: int = 1,
    most: int = 5,
    kinds: Sequence[str] = KINDS,
    values: Sequence[str] = ("levels", "distinct", "normal"),
    bits: Sequence[int] = (32, 16, 8, 4, 1),
) -> list[Delta]:
    """Some deltas of one shape."""
    shape = draw(st.sampled_from(SHAPES))
    make = {"levels": levels, "distinct": distinct, "normal": normal}[draw(st.sampled_from(values))]
    seed = draw(st.integers(0, 99))
    found = []
    for number in range(draw(st.integers(least, most))):
        own = seed + 100 * number
        kind = draw(st.sampled_from(kinds))
        found.append(delta_of(kind, make(shape, own), own, draw(st.sampled_from(bits))))
    return found


def weights_for(deltas: Sequence[object]) -> st.SearchStrategy[list[float]]:
    """A weight for each, of either sign."""
    return st.lists(WEIGHTS, min_size=len(deltas), max_size=len(deltas))


def densities_for(deltas: Sequence[object]) -> st.SearchStrategy[float | list[float]]:
    """One density for all, or one for each."""
    return st.one_of(DENSITIES, st.lists(DENSITIES, min_size=len(deltas), max_size=len(deltas)))


def listed(density: float | Sequence[float], count: int) -> list[float]:
    """One density for each."""
    return [density] * count if isinstance(density, (int, float)) else list(density)


def range_starts(rows: int) -> st.SearchStrategy[list[int]]:
    """Where ranges of rows begin, and the end."""
    return st.sets(st.integers(0, rows), max_size=6).map(lambda inner: sorted({0, rows} | inner))


# --- plain arithmetic, float64 (k, n) -> (k, n) or (n,)


def stack(deltas: Sequence[Delta]) -> np.ndarray:
    """All of them, dense, a row each."""
    return np.stack([delta.dense().reshape(-1).double().numpy() for delta in deltas])


def in_pieces(delta: Delta, starts: Sequence[int]) -> torch.Tensor:
    """The whole delta from reads of these ranges, float32 (n,)."""
    flat = torch.zeros(delta.rows * delta.columns)
    for start, stop in itertools.pairwise(starts):
        index, values = delta.read(start, stop)
        part = flat[start * delta.columns : stop * delta.columns]
        if index is None:
            part.copy_(values)
        else:
            part[index] = values
    return flat


def keep_top(row: np.ndarray, keep: int) -> np.ndarray:
    """The `keep` largest of a vector by a stable sort, the rest zero."""
    kept = np.zeros_like(row)
    chosen = np.argsort(-np.abs(row), kind="stable")[:keep]
    kept[chosen] = row[chosen]
    return kept


def merge_loop(
    values: np.ndarray,
    weights: Sequence[float],
    majority_sign_method: str = "total",
    vote: str = "unweighted",
    divisor: str = "count",
) -> np.ndarray:
    """Sign election and disjoint merge, an entry at a time, as TIES describes them."""
    merged = np.zeros(values.shape[1])
    for place, entry in enumerate(values.T):
        voting = [v * w if vote == "weighted" else v for v, w in zip(entry, weights, strict=True)]
        ballots = voting if majority_sign_method == "total" else [np.sign(v) for v in voting]
        elected = 1 if sum(ballots) >= 0 else -1
        agree = [number for number, v in enumerate(voting) if np.sign(v) == elected]
        total = sum(entry[number] * weights[number] for number in agree)
        if divisor == "count":
            total /= max(len(agree), 1)
        elif divisor == "weights":
            total /= sum(weights[number] for number in agree) or 1.0
        merged[place] = total
    return merged


def kept_at_random(
    seed: int, name: str, rows: int, columns: int, density: float, kind: str = "auto"
) -> np.ndarray:
    """Which entries survive, bool (n,), by the published rule for masks."""
    kept = np.zeros((rows, columns), dtype=bool)
    block = round(1 / density) if density > 0 else 0
    blocked = kind != "bernoulli" and density > 0 and abs(1 / block - density) < 1e-9
    for row in range(rows if density > 0 else 0):
        if blocked:
            found = reference.blocked_row(seed, name, row, columns, block)
            kept[row, [column for column in found if column is not None]] = True
        else:
            kept[row, reference.bernoulli_row(seed, name, row, columns, 1 - density)] = True
    return kept.reshape(-1)


def close(found: torch.Tensor | Delta, expected: np.ndarray | torch.Tensor) -> bool:
    """Equal to six digits of the largest entry."""
    dense = found.dense() if isinstance(found, Delta) else found
    flat, other = dense.reshape(-1).double(), torch.as_tensor(expected).reshape(-1).double()
    room = 1e-6 * float(other.abs().max()) if other.numel() else 0.0
    return bool(torch.allclose(flat, other, rtol=1e-6, atol=room + 1e-30))
