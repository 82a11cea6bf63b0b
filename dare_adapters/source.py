"""What has a delta: an adapter, a difference of checkpoints, a LoRA, a combination of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from dare_adapters.delta import Delta, NewParameter

__all__ = ["DeltaSource"]


class DeltaSource(Mapping[str, "Delta | NewParameter"]):
    """A mapping from checkpoint name to delta, read one parameter at a time.

    Attributes:
        label: what messages call it: a path or a name.
        base_model_name_or_path, revision, base_architectures: what it is a delta of, as far as it
            knows.
        base_parameter_count: entries of that base, 0 where it is not known.
        witness: sampled values of that base by parameter; see :mod:`dare_adapters.witness`.
    """

    label: str = ""
    base_model_name_or_path: str | None = None
    revision: str | None = None
    base_architectures: list[str]
    base_parameter_count: int = 0
    witness: Mapping[str, str]

    def is_new(self, name: str) -> bool:
        """Whether a parameter is one that the base does not have."""
        return isinstance(self[name], NewParameter)

    @property
    def identity(self) -> str:
        """Depends on its content alone: what random choices about it are made from."""
        raise NotImplementedError

    def mask_seed(self, seed: int) -> int:
        """A 64-bit seed of its own, from a user's seed."""
        digest = hashlib.sha256(f"{seed}:{self.identity}".encode()).digest()
        return int.from_bytes(digest[:8], "little")
