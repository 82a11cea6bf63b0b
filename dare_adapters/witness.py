"""A handful of values of every base parameter: enough to tell a wrong base from a cast one."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch

from dare_adapters.checkpoint import ParameterInfo
from dare_adapters.errors import AdapterFormatError
from dare_adapters.mask import parameter_key, philox_words

__all__ = [
    "content_seed",
    "decode_witness",
    "encode_sampled",
    "encode_witness",
    "matches",
    "sample_positions",
]

WITNESS_VALUES = 8
_SEED_VALUES = 64
# A JSON number that every reader keeps exact.
_SEED_BITS = 53
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_NAMES = {name: dtype for dtype, name in _DTYPES.items()}


@lru_cache(maxsize=1 << 14)
def sample_positions(name: str, numel: int, count: int = WITNESS_VALUES) -> torch.Tensor:
    """Flat positions, int64 (count,), drawn from the parameter's name alone; none of nothing.

    They are not to be changed: later calls give the same tensor.
    """
    words = philox_words(0, parameter_key(name), 0, -(-count // 4))[: count if numel else 0]
    return torch.from_numpy((words % np.uint64(max(numel, 1))).astype(np.int64))


def encode_witness(name: str, base: torch.Tensor) -> str:
    """The base's values at the witness positions: dtype, size of the parameter, base64 of bytes."""
    return encode_sampled(base.numel(), base.reshape(-1)[sample_positions(name, base.numel())])


def encode_sampled(numel: int, values: torch.Tensor) -> str:
    """The witness of a parameter of `numel` entries, from its values at :func:`sample_positions`.

    Args:
        values: CPU, (8,), float of 16 to 64 bits.
    """
    raw = values.contiguous().view(torch.uint8).numpy().tobytes()
    return f"{_DTYPES[values.dtype]}:{numel}:{base64.b64encode(raw).decode()}"


def decode_witness(name: str, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat positions, int64 (8,), and the values there, (8,) in the dtype of the base's checkpoint.

    Raises:
        AdapterFormatError: it is not a witness.
    """
    try:
        kind, size, encoded = text.split(":")
        raw = base64.b64decode(encoded, validate=True)
        values = torch.frombuffer(bytearray(raw), dtype=_NAMES[kind])
        positions = sample_positions(name, int(size))
    except (AttributeError, KeyError, ValueError, OverflowError) as error:
        raise AdapterFormatError(f"the witness of {name} is {text!r:.60}, not values") from error
    if len(values) != len(positions):
        raise AdapterFormatError(f"the witness of {name} has {len(values)} values")
    return positions, values


def matches(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Which found values are the expected ones, perhaps rounded to bfloat16 or float16 on the way.

    Args:
        expected: (n,), the checkpoint's dtype.
        found: (n,), the live dtype.
    """
    if found.dtype == expected.dtype and torch.equal(found, expected):  # mostly: not cast at all
        return torch.ones(len(found), dtype=torch.bool)
    wide = found.to(torch.float64)
    same = torch.zeros(len(found), dtype=torch.bool)
    for chain in (
        (),
        (torch.bfloat16,),
        (torch.float16,),
        (torch.float32,),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
    ):
        value = expected
        for dtype in chain:
            value = value.to(dtype)
        same |= value.to(found.dtype).to(torch.float64) == wide
        if bool(same.all()):
            break
    return same


def content_seed(parameters: Iterable[tuple[str, ParameterInfo, torch.Tensor]]) -> int:
    """A seed from the values of a fine-tune: the same fine-tune, the same seed.

    Args:
        parameters: name, shape and dtype, tensor; in the order of their names.
    """
    digest = hashlib.sha256()
    for name, info, tensor in parameters:
        values = tensor.reshape(-1)[sample_positions(name, info.numel, _SEED_VALUES)]
        digest.update(f"{name}{info.shape}".encode())
        digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "little") >> (64 - _SEED_BITS)
