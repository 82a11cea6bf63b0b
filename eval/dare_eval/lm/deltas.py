"""Adapters that an experiment makes for itself, and removes when it is done."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dare_adapters
from dare_adapters.merging.models import is_adapter_directory
from dare_eval.lm.masked_weights import masked_weights

__all__ = ["Deltas", "is_adapter"]


class Deltas:
    """Fine-tunes of one base as adapters on disk, where both backends can read them.

    A fine-tune's whole delta stays; of what is left of it under a drop rate the last two.

    Args:
        base: directory or hub id.
        work: where they go; default: the system's directory for temporary files.
    """

    def __init__(self, base: str, work: Path | None) -> None:
        self.base, self._work = base, work
        self._made: tempfile.TemporaryDirectory[str] | None = None
        self._whole: dict[str, str] = {}
        self._count = 0

    def whole(self, model: str) -> str:
        """A fine-tune's delta, exact."""
        if model not in self._whole:
            self._whole[model] = self._extract(model, self._next(), drop_rate=0.0, bits=32)
        return self._whole[model]

    def pruned(self, model: str, point: Mapping[str, Any]) -> str:
        """What is left of it, rounded to a few bits."""
        rate = point["drop_rate"]
        return self._extract(
            model,
            self._only(),
            drop_rate=rate,
            # A rate by pattern is for every parameter, also those that are else kept whole.
            drop_rates={"*": rate},
            bits=point["bits"],
            method=point["method"],
            mask=point["mask"] or "auto",
            seed=point["seed"],
        )

    def masked(self, model: str, drop_rate: float, seed: int, mask: str) -> str:
        """The base's way to a fine-tune whose weights were masked; see :mod:`.masked_weights`."""
        folder = self._only()
        checkpoint = masked_weights(model, folder / "masked", drop_rate, seed, mask)
        adapter = self._extract(str(checkpoint), folder / "adapter", drop_rate=0.0, bits=32)
        shutil.rmtree(checkpoint)
        return adapter

    def remove(self) -> None:
        """Take everything off the disk."""
        self._whole.clear()
        if self._made is not None:
            self._made.cleanup()
            self._made = None

    def _extract(self, model: str, out: Path, **how: Any) -> str:
        dare_adapters.extract(self.base, model, out, on_large_delta="ignore", **how)
        return str(out)

    def _only(self) -> Path:
        """A new directory in place of the last but one: an engine may still read the last."""
        folder = self._folder() / "pruned"
        folder.mkdir(exist_ok=True)
        for old in sorted(folder.iterdir(), key=lambda path: int(path.name))[:-1]:
            shutil.rmtree(old)
        return self._next(folder)

    def _next(self, parent: Path | None = None) -> Path:
        self._count += 1  # a path is never used for two adapters
        return (parent or self._folder()) / str(self._count)

    def _folder(self) -> Path:
        if self._made is None:
            if self._work is not None:
                self._work.mkdir(parents=True, exist_ok=True)
            self._made = tempfile.TemporaryDirectory(prefix="dare-eval-", dir=self._work)
        return Path(self._made.name)


def is_adapter(model: str) -> bool:
    """Whether a directory or hub id holds an adapter and no checkpoint."""
    if Path(model).is_dir():
        return is_adapter_directory(model)
    from huggingface_hub import file_exists

    return bool(file_exists(model, "adapter_config.json"))
