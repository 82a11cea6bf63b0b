"""One parameter of a difference to the tensors that an adapter stores for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from dare_adapters import codec, compiled_codec
from dare_adapters.config import ParameterEntry, tensor_key
from dare_adapters.delta import STEP_ENTRIES, Delta
from dare_adapters.difference import ParameterDifference
from dare_adapters.errors import CheckpointError
from dare_adapters.finite import first_non_finite
from dare_adapters.mask import MAX_DROP_RATE, BlockedKey, BlockedSupport, Slots, Support
from dare_adapters.prune import PruneRule
from dare_adapters.scales import store_scales
from dare_adapters.sparse_delta import SparseDelta
from dare_adapters.stored_support import StoredSupport, encode_support
from dare_adapters.tensor_file import DTYPE_NAMES

__all__ = [
    "EncodedParameter",
    "Energy",
    "encode_delta",
    "encode_dense",
    "encode_new",
    "encode_seeded",
    "encode_sparse",
    "encode_whole",
]

# Above it is infinity; with a largest value below, most others have fewer bits than in bfloat16.
_FLOAT16_RANGE = (2.0**-10, 65504.0)


@dataclass
class Energy:
    """Sums over the survivors of one parameter, in units of the rescaled values squared.

    `largest` is the largest magnitude, where survivors are stored as floats.
    """

    survivors: int = 0
    signal: float = 0.0
    rounding: float = 0.0
    largest: float = 0.0

    def add(self, other: Energy) -> None:
        """Take another part of the parameter in."""
        self.survivors += other.survivors
        self.signal += other.signal
        self.rounding += other.rounding
        self.largest = max(self.largest, other.largest)


@dataclass
class EncodedParameter:
    """What is written for a parameter: its entry in the config, tensors by key, measurements."""

    name: str
    entry: ParameterEntry
    tensors: dict[str, torch.Tensor]
    energy: Energy = field(default_factory=Energy)
    total_signal: float | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing that was kept has changed."""
        return self.energy.signal == 0 and not self.entry.added_rows


@dataclass
class _Part:
    values: torch.Tensor
    scales: torch.Tensor | None
    energy: Energy


def encode_sparse(
    pool: ThreadPoolExecutor,
    difference: ParameterDifference,
    rule: PruneRule,
    seed: int,
    bits: int,
) -> Callable[[], EncodedParameter]:
    """Begin to prune one parameter and round its survivors, its rows spread over the pool.

    Returns:
        A function that waits for the result. It raises CheckpointError where either checkpoint
        holds NaN or infinity.
    """
    support = rule.support(difference, seed)
    kept = max(1, round(difference.columns * (1 - rule.drop_rate)))
    step = max(1, STEP_ENTRIES // kept)
    ranges = [(s, min(s + step, difference.rows)) for s in range(0, difference.rows, step)]
    futures = [
        pool.submit(_encode_rows, difference, rule, support, bits, start, stop)
        for start, stop in ranges
    ]

    def result() -> EncodedParameter:
        parts = [future.result() for future in futures]
        encoded = _join(difference, rule, support, bits, parts)
        if rule.drop_error is None:
            encoded.total_signal = sum(
                float(difference.rows_between(s, e).square_().sum(dtype=torch.float64))
                for s, e in ranges
            )
        return _with_added_rows(encoded, difference)

    return result


def _join(
    difference: ParameterDifference,
    rule: PruneRule,
    support: Support,
    bits: int,
    parts: list[_Part],
) -> EncodedParameter:
    """The parts of a parameter as the tensors that are stored."""
    entry = ParameterEntry("sparse", difference.shape, drop_rate=rule.drop_rate, bits=bits)
    preferred = difference.finetuned.dtype
    return _assemble(difference.name, entry, support, parts, preferred)


def _assemble(
    name: str,
    entry: ParameterEntry,
    support: Support,
    parts: list[_Part],
    preferred: torch.dtype,
) -> EncodedParameter:
    """The parts of a parameter as the tensors that are stored, and its entry completed."""
    energy, bits = Energy(), entry.bits
    assert bits is not None
    for part in parts:
        energy.add(part.energy)
    values = torch.cat([part.values for part in parts])
    tensors: dict[str, torch.Tensor] = {}
    if bits < 16:
        scales = torch.cat([part.scales for part in parts if part.scales is not None])
        _check_range(name, scales)
        stored, entry.exponent = store_scales(scales, bits)
        tensors[tensor_key(name, "scales")] = stored
    elif bits == 16:
        rounded = values.to(_sixteen_bits(preferred, energy.largest))
        energy.rounding = _energy(rounded.to(torch.float32).sub_(values))
        values = rounded
    if bits >= 16:
        entry.dtype = DTYPE_NAMES[values.dtype]
    if isinstance(support, BlockedSupport):
        entry.mask, entry.block = "blocked", support.block
    else:
        entry.mask, entry.slots = "bernoulli", support.slot_count
        entry.value_units = len(values)
        if isinstance(support, StoredSupport):
            entry.mask, stream = encode_support(support)
            entry.support_bytes = len(stream) if entry.mask == "gaps" else None
            tensors[tensor_key(name, "support")] = torch.from_numpy(stream)
    tensors[tensor_key(name, "values")] = values
    return EncodedParameter(name, entry, tensors, energy)


def _encode_rows(
    difference: ParameterDifference,
    rule: PruneRule,
    support: Support,
    bits: int,
    start: int,
    stop: int,
) -> _Part:
    if isinstance(support, BlockedSupport) and bits < 16 and difference.compiled:
        row_bytes = codec.bytes_per_row(support.slots_per_row, bits)
        encoded = compiled_codec.encode(
            support.where, row_bytes, difference.base, difference.finetuned, rule.factor, bits,
            start, stop,
        )  # fmt: skip
        if encoded is not None:
            packed, scales, signal, rounding, used = encoded
            energy = Energy(used, _total(signal), _total(rounding.clamp_(min=0)))
            return _Part(packed, scales, energy)
    difference.check_finite(start, stop)
    slots, values = rule.survivors(difference, support, start, stop)
    return _encode_values(slots, values, support, bits)


def _encode_values(slots: Slots, values: torch.Tensor, support: Support, bits: int) -> _Part:
    if bits >= 16:
        # Which 16 bits is known, and rounding measured, when the largest of all is.
        used = int(slots.used_per_row().sum())
        energy = Energy(used, _energy(values), 0.0, _largest(values))
        whole = support.row_counts is None
        return _Part((values if whole else slots.compact(values)).cpu(), None, energy)
    quantised = codec.quantise(values, slots, bits)
    energy = Energy(
        int(slots.used_per_row().sum()), _total(quantised.signal), _total(quantised.rounding)
    )
    packed = codec.pack(quantised.codes, bits)
    if support.row_counts is not None:
        packed = _trim(packed, slots, bits)
    return _Part(packed.cpu(), quantised.scales.cpu(), energy)


def _trim(packed: torch.Tensor, slots: Slots, bits: int) -> torch.Tensor:
    """Of padded rows the bytes that their own survivors take, one row after the other."""
    assert slots.valid is not None
    used = -(-slots.valid.sum(dim=1) * bits // 8)
    return packed[torch.arange(packed.shape[1]) < used[:, None]]


def _total(rows: torch.Tensor) -> float:
    return float(rows.sum(dtype=torch.float64))


def _energy(values: torch.Tensor) -> float:
    flat = values.reshape(-1).cpu().numpy()
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64))


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().amax()) if values.numel() else 0.0


def _sixteen_bits(preferred: torch.dtype, largest: float) -> torch.dtype:
    """bfloat16 for a bfloat16 checkpoint; else float16, unless values are out of its best range."""
    low, high = _FLOAT16_RANGE
    if preferred == torch.bfloat16 or not low <= largest <= high:
        return torch.bfloat16
    return torch.float16


def encode_dense(difference: ParameterDifference) -> EncodedParameter:
    """A parameter whose delta is kept whole, so that base plus delta is the fine-tune.

    It takes the fine-tune's own 16 bits where they give the fine-tune back exactly, else float32.

    Raises:
        CheckpointError: NaN or infinity in either checkpoint.
    """
    difference.check_finite(0, difference.rows)
    delta = difference.rows_between(0, difference.rows)
    energy = Energy(
        delta.numel(),
        float(delta.square().sum()),
        0.0,
        _largest(delta),
    )
    short = delta.to(difference.finetuned.dtype)
    if short.element_size() == 2 and difference.base.dtype == short.dtype:
        again = (difference.base.to(torch.float32) + short.to(torch.float32)).to(short.dtype)
        delta = short if torch.equal(again, difference.finetuned) else delta
    entry = ParameterEntry("dense", difference.shape, dtype=DTYPE_NAMES[delta.dtype])
    tensors = {tensor_key(difference.name, "delta"): delta.view(difference.shape)}
    return _with_added_rows(EncodedParameter(difference.name, entry, tensors, energy), difference)


def encode_delta(
    pool: ThreadPoolExecutor,
    name: str,
    delta: Delta,
    bits: int,
    *,
    seed: int | None = None,
    preferred: torch.dtype = torch.float32,
) -> EncodedParameter:
    """Any delta as it is, its zeros left out where that is smaller.

    Args:
        pool: for ranges of rows.
        name: of the parameter.
        bits: of each entry that is not zero.
        seed: of the adapter; a blocked support that it gives is not stored again.
        preferred: dtype of the checkpoint, which decides between the kinds of 16 bits.

    Raises:
        CheckpointError: values beyond what can be stored.
    """
    support = _support_of(pool, name, delta, bits, seed)
    ranges = list(delta.row_ranges())

    def encode(rows: tuple[int, int]) -> _Part:
        slots = support.slots(*rows)
        index, values = delta.read(*rows)
        if delta.support_key is not None and delta.support_key == support.key:
            matrix = values.view(slots.index.shape)
        else:
            if index is not None:
                values = torch.zeros((rows[1] - rows[0]) * delta.columns).index_put_(
                    (index,), values
                )
            matrix = values[slots.index]
        return _encode_values(slots, slots.clear_unused(matrix), support, bits)

    parts = list(pool.map(encode, ranges))
    size = delta.rows * delta.columns
    share = min(1 - support.slot_count / max(size, 1), MAX_DROP_RATE)
    if isinstance(support, BlockedSupport):
        share = 1 - 1 / support.block
    entry = ParameterEntry("sparse", delta.shape, drop_rate=max(share, 0.0), bits=bits)
    encoded = _assemble(name, entry, support, parts, preferred)
    delta.release()
    return _with_rows(encoded, delta.added_rows)


def encode_seeded(
    name: str, delta: SparseDelta, bits: int, entry: ParameterEntry
) -> EncodedParameter:
    """A delta on a random support, its values rounded; the support stays with its seed.

    Args:
        name: of the parameter.
        delta: on the support that the adapter's seed gives.
        bits: of each survivor.
        entry: of the delta as it is, from which the drop rate is taken.

    Raises:
        CheckpointError: values beyond what can be stored.
    """
    parts = []
    for start, stop in delta.row_ranges():
        slots, values = delta.survivors(start, stop)
        parts.append(_encode_values(slots, values, delta.support, bits))
    made = ParameterEntry("sparse", delta.shape, drop_rate=entry.drop_rate, bits=bits)
    encoded = _assemble(name, made, delta.support, parts, torch.float32)
    return _with_rows(encoded, delta.added_rows)


def encode_whole(name: str, delta: Delta) -> EncodedParameter:
    """Any delta as float32, entry by entry."""
    values = delta.dense()
    delta.release()
    flat = values.reshape(-1)
    energy = Energy(flat.numel(), float(flat.square().sum()), 0.0, _largest(flat))
    entry = ParameterEntry("dense", delta.shape, dtype=DTYPE_NAMES[values.dtype])
    encoded = EncodedParameter(name, entry, {tensor_key(name, "delta"): values}, energy)
    return _with_rows(encoded, delta.added_rows)


def _with_rows(encoded: EncodedParameter, added: torch.Tensor | None) -> EncodedParameter:
    if added is not None:
        encoded.entry.added_rows = len(added)
        encoded.entry.added_dtype = DTYPE_NAMES[added.dtype]
        encoded.tensors[tensor_key(encoded.name, "rows")] = added
    for tensor in encoded.tensors.values():
        _check_range(encoded.name, tensor)
    return encoded


def _support_of(
    pool: ThreadPoolExecutor, name: str, delta: Delta, bits: int, seed: int | None
) -> BlockedSupport | StoredSupport:
    """Where a delta is not zero: by the seed, entry by entry, or as what is smaller."""
    key = delta.support_key
    if isinstance(key, BlockedKey) and (key.seed, key.name) == (seed, name):
        return key.support

    def where(rows: tuple[int, int]) -> np.ndarray:
        index, values = delta.read(*rows)
        mask = torch.zeros((rows[1] - rows[0]) * delta.columns, dtype=torch.bool)
        if index is None:
            torch.ne(values, 0, out=mask)
        else:
            mask[index] = values != 0
        return np.packbits(mask.view(-1, delta.columns).numpy(), axis=1, bitorder="little")

    bitmap = np.concatenate(list(pool.map(where, delta.row_ranges())))
    stored = StoredSupport(bitmap, delta.rows, delta.columns)
    whole = delta.rows * -(-delta.columns * bits // 8)
    sparse = int((-(-stored.row_counts * bits // 8)).sum()) + bitmap.size
    # One bit has no code for zero.
    full = stored.slot_count == delta.rows * delta.columns
    if full or (bits > 1 and whole <= sparse):
        return BlockedSupport(0, "", delta.rows, delta.columns, 1)  # every entry; draws nothing
    return stored


def encode_new(name: str, value: torch.Tensor, finetuned_name: str | None) -> EncodedParameter:
    """A parameter that only the fine-tune has: its value, whole."""
    dtype = DTYPE_NAMES[value.dtype]
    entry = ParameterEntry("new", tuple(value.shape), dtype=dtype, finetuned_name=finetuned_name)
    return EncodedParameter(name, entry, {tensor_key(name, "value"): value})


def _with_added_rows(
    encoded: EncodedParameter, difference: ParameterDifference
) -> EncodedParameter:
    if difference.added_rows is not None:
        _check_added(difference, difference.added_rows)
    return _with_rows(encoded, difference.added_rows)


def _check_range(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() and first_non_finite(tensor.reshape(-1)) is not None:
        raise CheckpointError(
            f"{name}: fine-tune minus base is beyond {tensor.dtype}; these are not weights of a "
            "working model, no adapter was written"
        )


def _check_added(difference: ParameterDifference, added: torch.Tensor) -> None:
    place = first_non_finite(added.reshape(-1))
    if place is not None:
        row = difference.shape[0] + place // math.prod(added.shape[1:])
        raise CheckpointError(
            f"{difference.name} of the fine-tune holds NaN or infinity in its added row {row}; no "
            "adapter was written"
        )
