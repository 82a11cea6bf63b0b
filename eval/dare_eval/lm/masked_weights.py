"""The paper's counter-example: entries dropped from a fine-tune's weights, not from its delta."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm.auto import tqdm

from dare_adapters.checkpoint import Checkpoint, open_checkpoint
from dare_adapters.checkpoint_writer import (
    OutputTensor,
    shards_of_size,
    whole_parts,
    write_checkpoint,
)
from dare_adapters.combine.sparsify import RandomMasks, drop_at_random
from dare_adapters.companions import copy_present_companions
from dare_adapters.delta import DenseDelta

__all__ = ["masked_weights"]

_SHARD_BYTES = 5 << 30


def masked_weights(
    model: str | Path, out: Path, drop_rate: float, seed: int, mask: str = "auto"
) -> Path:
    """Write m ⊙ W / (1-p) as a checkpoint: every weight dropped with probability p, or rescaled.

    Args:
        model: directory or hub id of W.
        out: directory to make.
        drop_rate: p.
        seed: of the masks m.
        mask: "auto", "blocked" or "bernoulli".

    Returns:
        `out`.
    """
    checkpoint = open_checkpoint(model)
    out.mkdir(parents=True)
    outputs = [_output(checkpoint, name, drop_rate, seed, mask) for name in checkpoint]
    shards = shards_of_size(outputs, _SHARD_BYTES)
    total = sum(output.nbytes for output in outputs)
    with (
        ThreadPoolExecutor(1) as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc="masking weights") as bar,
    ):
        write_checkpoint(out, shards, pool, bar)
    copy_present_companions(checkpoint.path, out)
    shutil.copyfile(checkpoint.path / "config.json", out / "config.json")
    return out


def _output(
    checkpoint: Checkpoint, name: str, drop_rate: float, seed: int, mask: str
) -> OutputTensor:
    info = checkpoint.info[name]
    density = round(1 - drop_rate, 12)  # 1 - 0.9 is below 0.1

    def parts(pool: ThreadPoolExecutor) -> Iterable[torch.Tensor]:
        weight = checkpoint[name]
        if weight.is_floating_point() and weight.numel():
            whole = DenseDelta(weight.to(torch.float32))
            kept = drop_at_random(whole, density, RandomMasks(name, [seed], mask), 0)
            weight = kept.dense().view(weight.shape).to(weight.dtype)
        yield from whole_parts(weight)(pool)
        checkpoint.release(name)

    return OutputTensor(name, info.dtype, tuple(info.shape), parts)
