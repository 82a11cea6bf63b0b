"""How survivors are stored: 32 or 16 bits as they are, 8, 4, 2 or 1 bits with a scale for each row.

    8, 4, 2 bits   code = q + 2**(bits-1), q = round(value / scale) clipped to ±(2**(bits-1) - 1);
                   the scale minimises the row's squared error
    1 bit          1 for plus, 0 for minus; scale = Σv² / Σ|v|, which keeps the estimate unbiased
                   (the projection of the survivors on the row equals their own norm)

Codes are packed lowest bits first and each row starts at a byte. How scales are stored is in
:mod:`dare_adapters.scales`.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from dare_adapters import compiled_codec
from dare_adapters.mask import Slots
from dare_adapters.scales import round_scales

__all__ = [
    "BITS",
    "Quantised",
    "bytes_per_row",
    "pack",
    "quantise",
    "unpack",
]

BITS = (32, 16, 8, 4, 2, 1)
# Candidates for a row's scale, of which the best is refined. In units of largest / limit, for rows
# without a tail, and of the root mean square, for rows with one (normal to Laplace): together they
# come within a few percent of an exhaustive search on all of them.
_LANES = 16
_OF_LARGEST = {8: (1.0,), 4: (1.0,), 2: (1.0,)}
_OF_RMS = {8: (), 4: (0.36, 0.5), 2: (1.2, 1.6)}


class Quantised:
    """Codes of a range of rows, and what rounding cost.

    Attributes:
        codes: int8 (n, K) in ±limit, ±1 at one bit.
        scales: float32 (n,).
        signal: float32 (n,), Σv² of the row.
        rounding: float32 (n,), Σ(v - scale * code)² over the used slots of the row.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        signal: torch.Tensor,
        rounding: torch.Tensor,
    ) -> None:
        self.codes, self.scales = codes, scales
        self.signal, self.rounding = signal, rounding.clamp_(min=0)

    def values(self) -> torch.Tensor:
        """What a reader will see, float32 (n, K)."""
        return self.codes.to(torch.float32) * self.scales[:, None]


def quantise(values: torch.Tensor, slots: Slots, bits: int) -> Quantised:
    """Round survivors to `bits` bits.

    Args:
        values: float32 (n, K), zero where a slot is unused.
        slots: which slots are used.
        bits: 8, 4, 2 or 1.
    """
    if compiled_codec.available() and values.device.type == "cpu":
        used = None if slots.valid is None else slots.used_per_row()
        return Quantised(*compiled_codec.quantise(values.contiguous(), used, bits))
    signal = row_dot(values, values)
    if bits == 1:
        return _signs(values, slots, signal)
    limit = (1 << (bits - 1)) - 1
    codes = torch.empty_like(values)
    largest = _largest(values, codes) / limit
    rms = (signal / max(values.shape[1], 1)).sqrt_()
    tries = [largest * share for share in _OF_LARGEST[bits]]
    tries += [torch.minimum(rms * share, largest) for share in _OF_RMS[bits]]
    # Threads fight over short operations: those on one number a row are made for all tries at once.
    inverses = _inverse(torch.stack(tries))
    overlaps, energies = [], []
    for inverse in inverses:
        _round(values, inverse, limit, codes)
        overlaps.append(row_dot(values, codes))
        energies.append(row_dot(codes, codes))
    overlap, energy = torch.stack(overlaps), torch.stack(energies).clamp_(min=1)
    # The best scale for given codes is <v,q>/<q,q>, and leaves |v|² - <v,q>²/<q,q>.
    best = (overlap * overlap / energy).argmax(dim=0, keepdim=True)
    scales = round_scales((overlap / energy).gather(0, best)[0], bits)
    _round(values, _inverse(scales), limit, codes)
    error = values - scales[:, None] * codes
    return Quantised(codes.to(torch.int8), scales, signal, row_dot(error, error))


def row_dot(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The inner product of each row, float32 (n,), of two float32 (n, K)."""
    return row_sum(one * other)


def row_sum(matrix: torch.Tensor) -> torch.Tensor:
    """The sum of each row, float32 (n,), of a float32 (n, K).

    On the CPU in one order everywhere: sixteen lanes, entry j in lane j mod 16, which are then
    added in halves.
    """
    if matrix.device.type != "cpu":
        return matrix.sum(dim=1)
    lanes = matrix.new_zeros(len(matrix), _LANES)
    for start in range(0, matrix.shape[1], _LANES):
        part = matrix[:, start : start + _LANES]
        lanes[:, : part.shape[1]] += part
    while lanes.shape[1] > 1:
        low, high = lanes.chunk(2, dim=1)
        lanes = low + high
    return lanes[:, 0]


def _largest(values: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    if not values.shape[1]:
        return values.new_zeros(len(values))
    return torch.abs(values, out=buffer).amax(dim=1)


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    return inverse.clamp_(max=torch.finfo(torch.float32).max)


def _round(values: torch.Tensor, inverse: torch.Tensor, limit: int, out: torch.Tensor) -> None:
    torch.mul(values, inverse[:, None], out=out).round_().clamp_(-limit, limit)


def _signs(values: torch.Tensor, slots: Slots, signal: torch.Tensor) -> Quantised:
    magnitude = row_sum(values.abs())
    scales = torch.where(magnitude > 0, signal / magnitude.clamp(min=1e-38), magnitude)
    scales = round_scales(scales, 1)
    minus = values < 0
    # A zero has no sign: alternate, or rows of mostly zeros would drift in one direction.
    minus[:, 1::2] |= values[:, 1::2] == 0
    codes = 1 - 2 * minus.view(torch.int8)
    rounding = signal - scales * (2 * magnitude - scales * slots.used_per_row())
    return Quantised(codes, scales, signal, rounding)


def bytes_per_row(slots: int, bits: int) -> int:
    """Bytes that one row of `slots` codes takes."""
    return -(-slots * bits // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes int8 (n, K) to bytes, uint8 (n, ceil(K * bits / 8))."""
    if bits == 8:
        return codes.view(torch.uint8) ^ 0x80  # two's complement plus 128
    plain = (codes > 0).view(torch.int8) if bits == 1 else codes + (1 << (bits - 1))
    per_byte = 8 // bits
    if not plain.shape[1]:
        return plain.view(torch.uint8)  # rows without survivors; no word to view them as
    if plain.shape[1] % per_byte:
        plain = torch.nn.functional.pad(plain, (0, per_byte - plain.shape[1] % per_byte))
    # The codes of one byte as one word, folded in halves until all are in its lowest byte.
    word = plain.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[per_byte])
    shift = 8 - bits
    while per_byte > 1:
        word = word | (word >> shift)
        shift, per_byte = 2 * shift, per_byte // 2
    return word.to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes, uint8 (...), to float32 (..., 8 / bits) codes, before scaling."""
    if bits == 8:
        return (packed.to(torch.float32) - 128).unsqueeze(-1)
    table = _table(bits, packed.device)
    index = packed.reshape(-1).to(torch.int32)
    # One wide element moves faster than a row of two or four floats.
    wide = {2: torch.float64, 4: torch.complex128}.get(8 // bits)
    found = (table if wide is None else table.view(wide).view(-1)).index_select(0, index)
    return found.view(torch.float32).view(*packed.shape, 8 // bits)


@lru_cache(maxsize=16)
def _table(bits: int, device: torch.device) -> torch.Tensor:
    byte = torch.arange(256)
    shifts = torch.arange(0, 8, bits)
    codes = (byte[:, None] >> shifts) & ((1 << bits) - 1)
    plain = codes * 2 - 1 if bits == 1 else codes - (1 << (bits - 1))
    return plain.to(torch.float32).to(device)
