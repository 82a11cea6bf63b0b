"""Numbers of a packed delta as kernels read them: offsets within blocks, and values.

Addresses come from tables as 64-bit integers, since each slot's tensors lie elsewhere. What is
read is int32 or float32; a code becomes a float without the conversion that GPUs are slow at.
"""

import triton
import triton.language as tl

__all__ = ["block_offsets", "block_values", "code_value"]


@triton.jit
def code_value(number, BITS: tl.constexpr):
    """The value of a code (int32), before its row's scale: `codec` says which, exactly."""
    # A float of exponent 2**23 has whole numbers for its last bits.
    plain = (number | 0x4B000000).to(tl.float32, bitcast=True)
    if BITS == 1:
        value = (plain - 8388608.0) * 2.0 - 1.0
    else:
        value = plain - (8388608.0 + (1 << (BITS - 1)))
    return value


@triton.jit
def block_offsets(address, row, slot, slots, mask, OFFSET_BITS: tl.constexpr):
    """Offsets of slots, of a blocked delta; `row` int64, `slot`, `mask` broadcast together."""
    at = row * slots + slot
    if OFFSET_BITS == 0:
        found = (at * 0).to(tl.int32)
    elif OFFSET_BITS == 4:
        byte = tl.load(address.to(tl.pointer_type(tl.uint8)) + (at >> 1), mask=mask, other=0)
        found = (byte.to(tl.int32) >> ((slot & 1) * 4)) & 15
    elif OFFSET_BITS == 8:
        byte = tl.load(address.to(tl.pointer_type(tl.uint8)) + at, mask=mask, other=0)
        found = byte.to(tl.int32)
    else:
        pair = tl.load(address.to(tl.pointer_type(tl.uint16)) + at, mask=mask, other=0)
        found = pair.to(tl.int32)
    return found


@triton.jit
def block_values(address, place, mask, BITS: tl.constexpr, FLOAT: tl.constexpr):
    """Values at places (int64) of packed values, before their row's scale."""
    if BITS >= 16:
        value = tl.load(address.to(tl.pointer_type(FLOAT)) + place, mask=mask, other=0)
        value = value.to(tl.float32)
    else:
        bit = place * BITS
        byte = tl.load(address.to(tl.pointer_type(tl.uint8)) + (bit >> 3), mask=mask, other=0)
        number = (byte.to(tl.int32) >> (bit & 7).to(tl.int32)) & ((1 << BITS) - 1)
        value = code_value(number, BITS)
    return value
