"""Adapters that must be refused, and a word of the reason that must be given."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import dare_adapters
from dare_adapters.config import CONFIG_NAME, WEIGHTS_NAME
from tests.conftest import Pack

__all__ = ["BAD_ADAPTERS"]


def _of_another_base(pack: Pack, root: Path) -> Path:
    other = pack.live(torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.save_pretrained(root / "other-base")
    return _extract(root / "other-base", pack.finetuned["a"], root)


def _truncated_tensors(pack: Pack, root: Path) -> Path:
    copy = Path(shutil.copytree(pack.adapters["a"], root / "adapter"))
    data = (copy / WEIGHTS_NAME).read_bytes()
    (copy / WEIGHTS_NAME).write_bytes(data[: len(data) // 2])
    return copy


def _truncated_config(pack: Pack, root: Path) -> Path:
    copy = Path(shutil.copytree(pack.adapters["a"], root / "adapter"))
    text = (copy / CONFIG_NAME).read_text()
    (copy / CONFIG_NAME).write_text(text[: len(text) // 2])
    return copy


def _without_tensors(pack: Pack, root: Path) -> Path:
    copy = Path(shutil.copytree(pack.adapters["a"], root / "adapter"))
    (copy / WEIGHTS_NAME).unlink()
    return copy


def _with_a_new_head(pack: Pack, root: Path) -> Path:
    finetuned = Path(shutil.copytree(pack.finetuned["a"], root / "finetuned"))
    file = finetuned / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "score.weight": torch.ones(2, 128)}, file, metadata={"format": "pt"})
    return _extract(pack.base, finetuned, root)


def _with_added_rows(pack: Pack, root: Path) -> Path:
    model = pack.model_class.from_pretrained(pack.finetuned["a"])
    model.resize_token_embeddings(100)
    model.save_pretrained(root / "finetuned")
    return _extract(pack.base, root / "finetuned", root)


def _extract(base: Path, finetuned: Path, root: Path) -> Path:
    out = root / "adapter"
    dare_adapters.extract(
        base, finetuned, out, drop_rate=0.5, on_large_delta="ignore", progress=False
    )
    return out


BAD_ADAPTERS: dict[str, tuple[Callable[[Pack, Path], Path], str]] = {
    "another base": (_of_another_base, "is not the base of"),
    "truncated tensors": (_truncated_tensors, "SHA-256"),
    "truncated config": (_truncated_config, "not readable as JSON"),
    "no tensors": (_without_tensors, WEIGHTS_NAME),
    "a new head": (_with_a_new_head, "score.weight"),
    "added rows": (_with_added_rows, "model.embed_tokens.weight"),
}
