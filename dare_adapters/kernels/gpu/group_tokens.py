"""Tokens sorted by slot, on the device: what products of many tokens need to know first.

The same as vLLM's LoRA metadata holds: the tokens of slot 0, then those of slot 1, and so on; those
of no slot are left out.
"""

import triton
import triton.language as tl

__all__ = ["group_tokens", "tokens_of_tile"]


@triton.jit
def group_tokens(token_slot, order, starts, tokens, CHUNK: tl.constexpr):
    """starts[s] … starts[s + 1] are where `order` (int32) has the tokens of s. Grid: slots + 1."""
    slot = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    before = 0
    for first in range(0, tokens, CHUNK):
        own = tl.load(token_slot + first + lane, mask=first + lane < tokens, other=-1)
        before += tl.sum(((own >= 0) & (own < slot)).to(tl.int32), axis=0)
    tl.store(starts + slot, before)
    if slot == tl.num_programs(0) - 1:
        return
    for first in range(0, tokens, CHUNK):
        own = tl.load(token_slot + first + lane, mask=first + lane < tokens, other=-1)
        mine = own == slot
        rank = tl.cumsum(mine.to(tl.int32), axis=0) - 1
        tl.store(order + before + rank, first + lane, mask=mine)
        before += tl.sum(mine.to(tl.int32), axis=0)


@triton.jit
def tokens_of_tile(starts, tile, slots, TOKENS: tl.constexpr, SLOTS: tl.constexpr):
    """Of the tiles of TOKENS tokens that slots are cut into, one after the other, the slot of one;
    where its tokens begin in `order`, and where the slot's end. A slot >= slots: no such tile."""
    slot = tl.arange(0, SLOTS)
    begin = tl.load(starts + slot, mask=slot < slots, other=0)
    end = tl.load(starts + slot + 1, mask=slot < slots, other=0)
    tiles = tl.where(slot < slots, (end - begin + TOKENS - 1) // TOKENS, 0)
    upto = tl.cumsum(tiles, axis=0)
    own = tl.sum((upto <= tile).to(tl.int32), axis=0)
    is_it = slot == own
    first = tl.sum(tl.where(is_it, begin + (tile - upto + tiles) * TOKENS, 0), axis=0)
    return own, first, tl.sum(tl.where(is_it, end, 0), axis=0)
