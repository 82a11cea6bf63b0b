"""What a fine-tune brings besides weights: config, tokenizer, chat template and the like."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path

__all__ = ["FINETUNED_CONFIG", "copy_companions", "copy_present_companions", "is_companion"]

# Not "config.json": with that file transformers would take an adapter for a whole model.
FINETUNED_CONFIG = "finetuned_config.json"

_NAMES = {
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
}


def is_companion(name: str) -> bool:
    """Whether a file of a model directory is one of these."""
    return name in _NAMES


def copy_companions(base: Path, finetuned: Path, out: Path) -> list[str]:
    """Copy the fine-tune's companions that are not the base's own.

    A tokenizer is copied whole as soon as one of its files differs: half of it would not load.

    Returns:
        The names that were copied.
    """
    present = sorted(file.name for file in finetuned.iterdir() if is_companion(file.name))
    changed = {name for name in present if _differs(base / name, finetuned / name)}
    if any("generation" not in name for name in changed):
        changed |= {name for name in present if "generation" not in name}
    for name in sorted(changed):
        shutil.copyfile(finetuned / name, out / name)
    if (finetuned / "config.json").is_file():
        shutil.copyfile(finetuned / "config.json", out / FINETUNED_CONFIG)
    return sorted(changed)


def copy_present_companions(directory: Path, out: Path) -> None:
    """Copy an adapter directory's companions to another, over those of the same names."""
    for file in directory.iterdir():
        if file.is_file() and (is_companion(file.name) or file.name == FINETUNED_CONFIG):
            shutil.copyfile(file, out / file.name)


def _differs(base: Path, finetuned: Path) -> bool:
    return not base.is_file() or not filecmp.cmp(base, finetuned, shallow=False)
