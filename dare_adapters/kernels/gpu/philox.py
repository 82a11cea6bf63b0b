"""The random stream of mask.py: Philox4x64-10 (Salmon et al., SC 2011), one counter a thread.

A row takes `stride` counters and counter r * stride + t is its t-th, so the number of a thread is
its counter, and each has sixteen lanes of 16 bit, lowest bits first.
"""

import triton
import triton.language as tl

__all__ = ["lane_offset", "philox", "word_of"]


@triton.jit
def word_of(low, high):
    """A 64-bit word of two halves that came as signed 32-bit numbers."""
    bottom = low.to(tl.uint32, bitcast=True).to(tl.uint64)
    return (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | bottom


@triton.jit
def philox(counter, seed, key):
    """The four words (uint64) of counters (c, 0, 0, 0)."""
    a = counter.to(tl.uint64)
    b = a ^ a
    c = a ^ a
    d = a ^ a
    for _ in tl.static_range(10):
        one = a * 0xD2E7470EE14C6C93
        one_high = tl.umulhi(a, tl.full(a.shape, 0xD2E7470EE14C6C93, tl.uint64))
        two = c * 0xCA5A826395121157
        two_high = tl.umulhi(c, tl.full(a.shape, 0xCA5A826395121157, tl.uint64))
        a = two_high ^ b ^ seed
        c = one_high ^ d ^ key
        b = two
        d = one
        seed = seed + 0x9E3779B97F4A7C15
        key = key + 0xBB67AE8584CAA73B
    return a, b, c, d


@triton.jit
def lane_offset(a, b, c, d, LANE: tl.constexpr, BLOCK: tl.constexpr):
    """Where in its block of columns a lane's survivor is, int32."""
    if LANE < 4:
        word = a
    elif LANE < 8:
        word = b
    elif LANE < 12:
        word = c
    else:
        word = d
    lane = ((word >> (16 * (LANE % 4))) & 0xFFFF).to(tl.uint32)
    return ((lane * BLOCK) >> 16).to(tl.int32)
