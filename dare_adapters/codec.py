"""How survivors are stored: 32 or 16 bits as they are, 8, 4, 2 or 1 bits with a scale for each row.

    8, 4, 2 bits   code = q + 2**(bits-1), q = round(value / scale) clipped to ±(2**(bits-1) - 1);
                   the scale minimises the row's squared error
    1 bit          1 for plus, 0 for minus; scale = Σv² / Σ|v|, which keeps the estimate unbiased
                   (the projection of the survivors on the row equals their own norm)

Codes are packed lowest bits first and each row starts at a byte. A scale is stored as float16
times 2**exponent, one exponent for each parameter, so that no delta is too small for it.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from dare_adapters.mask import Slots

__all__ = ["BITS", "Quantised", "bytes_per_row", "pack", "quantise", "store_scales", "unpack"]

BITS = (32, 16, 8, 4, 2, 1)
# Share of the row's largest value that the outermost level may stand for, tried in turn; the
# last is replaced by twice the Gaussian optimum where that is lower still.
_CLIPS = {8: (1.0, 0.8), 4: (1.0, 0.84, 0.7, 0.58), 2: (1.0, 0.75, 0.6, 0.47, 0.36)}
_SCALE_MANTISSA = 1 << 11  # float16 keeps 11 significant bits


class Quantised:
    """Codes of a range of rows: `codes` int8 (n, K) in ±limit (±1 at one bit), `scales` (n,)."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        self.codes, self.scales = codes, scales

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
    if bits == 1:
        return _signs(values)
    limit = (1 << (bits - 1)) - 1
    largest = values.abs().amax(dim=1) if values.shape[1] else values.new_zeros(len(values))
    best_scale, best_score = largest / limit, torch.full_like(largest, -1.0)
    for clip in _CLIPS[bits]:
        codes = _round(values, largest * (clip / limit), limit)
        # The best scale for given codes is <v,q>/<q,q>, and leaves |v|² - <v,q>²/<q,q>.
        overlap = (values * codes).sum(dim=1)
        energy = codes.square_().sum(dim=1).clamp_(min=1)
        score = overlap * overlap / energy
        better = score > best_score
        best_score = torch.where(better, score, best_score)
        best_scale = torch.where(better, overlap / energy, best_scale)
    scales = _round_scale(best_scale)
    return Quantised(_round(values, scales, limit).to(torch.int8), scales)


def _round(values: torch.Tensor, scales: torch.Tensor, limit: int) -> torch.Tensor:
    inverse = torch.where(scales > 0, 1 / scales, torch.zeros_like(scales))
    inverse.clamp_(max=torch.finfo(torch.float32).max)
    return (values * inverse[:, None]).round_().clamp_(-limit, limit)


def _signs(values: torch.Tensor) -> Quantised:
    magnitude = values.abs().sum(dim=1)
    scales = torch.where(
        magnitude > 0, values.square().sum(dim=1) / magnitude.clamp(min=1e-38), magnitude
    )
    codes = torch.where(values < 0, -1, 1).to(torch.int8)
    # A zero has no sign: alternate, or rows of mostly zeros would drift in one direction.
    odd = codes[:, 1::2]
    odd.masked_fill_(values[:, 1::2] == 0, -1)
    return Quantised(codes, _round_scale(scales))


def _round_scale(scales: torch.Tensor) -> torch.Tensor:
    mantissa, exponent = torch.frexp(scales)
    return torch.ldexp((mantissa * _SCALE_MANTISSA).round_() / _SCALE_MANTISSA, exponent)


def store_scales(scales: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Float16 scales (rows,) and the exponent e: scale = float16 * 2**e, the largest in [1, 2]."""
    largest = float(scales.max()) if scales.numel() else 0.0
    exponent = math.frexp(largest)[1] - 1 if largest > 0 else 0
    return torch.ldexp(scales, torch.tensor(-exponent)).to(torch.float16), exponent


def bytes_per_row(slots: int, bits: int) -> int:
    """Bytes that one row of `slots` codes takes."""
    return -(-slots * bits // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes int8 (n, K) to bytes, uint8 (n, ceil(K * bits / 8))."""
    if bits == 8:
        return codes.view(torch.uint8) ^ 0x80  # two's complement plus 128
    plain = (
        (codes > 0).to(torch.uint8) if bits == 1 else (codes + (1 << (bits - 1))).to(torch.uint8)
    )
    per_byte = 8 // bits
    slots = plain.shape[1]
    if slots % per_byte:
        plain = torch.nn.functional.pad(plain, (0, per_byte - slots % per_byte))
    packed = plain[:, 0::per_byte].clone()
    for place in range(1, per_byte):
        packed |= plain[:, place::per_byte] << (bits * place)
    return packed


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes, uint8 (...), to float32 (..., 8 / bits) codes, before scaling."""
    if bits == 8:
        return (packed.to(torch.float32) - 128).unsqueeze(-1)
    table = _table(bits, packed.device)
    index = packed.reshape(-1).to(torch.int32)
    wide = {2: torch.float64, 4: torch.complex128}.get(8 // bits)
    # One wide element moves faster than a row of two or four floats.
    found = table.index_select(0, index) if wide is None else table.view(wide)[index]
    return found.view(torch.float32).view(*packed.shape, 8 // bits)


@lru_cache(maxsize=16)
def _table(bits: int, device: torch.device) -> torch.Tensor:
    byte = torch.arange(256)
    shifts = torch.arange(0, 8, bits)
    codes = (byte[:, None] >> shifts) & ((1 << bits) - 1)
    plain = codes * 2 - 1 if bits == 1 else codes - (1 << (bits - 1))
    return plain.to(torch.float32).to(device)
