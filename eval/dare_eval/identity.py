"""What tells one model from another in a record: its content, and a name without a path."""

from __future__ import annotations

import re
from pathlib import Path

from dare_adapters.checkpoint import open_checkpoint
from dare_adapters.witness import content_seed

__all__ = ["model_identity"]


def model_identity(model: str | Path) -> dict[str, str]:
    """A model's name, the last part of its directory or hub id, and a number of sampled values.

    Raises:
        CheckpointError: it has no readable checkpoint.
    """
    checkpoint = open_checkpoint(model)
    content = content_seed((name, checkpoint.info[name], checkpoint[name]) for name in checkpoint)
    name = re.split(r"[/\\]", str(model).rstrip("/\\"))[-1]
    return {"name": name, "content": str(content)}
