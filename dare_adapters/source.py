"""What has a delta: an adapter, a difference of checkpoints, a LoRA, a combination of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping

import torch

from dare_adapters.delta import Delta, NewParameter

__all__ = ["WHOLE", "BaseReader", "DeltaSource", "Renamed"]

WHOLE = 64
"""`stored_bits` of what nobody pruned or rounded: more than any number of bits."""


BaseReader = Callable[[str], torch.Tensor]
"""The base's parameter of a checkpoint name, any float dtype."""


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

    def parameter(self, name: str, base: BaseReader | None) -> Delta | NewParameter:
        """The same as `self[name]`, over a base that is given now, for whom it matters."""
        return self[name]

    def stored_bits(self, name: str) -> int:
        """Bits of each entry of a parameter that survives, `WHOLE` where it was kept whole."""
        return 16

    def added_row_count(self, name: str) -> int:
        """How many vocabulary rows a parameter has more than the base's."""
        added = getattr(self[name], "added_rows", None)
        return 0 if added is None else len(added)

    @property
    def identity(self) -> str:
        """Depends on its content alone: what random choices about it are made from."""
        raise NotImplementedError

    def mask_seed(self, seed: int) -> int:
        """A 64-bit seed of its own, from a user's seed."""
        digest = hashlib.sha256(f"{seed}:{self.identity}".encode()).digest()
        return int.from_bytes(digest[:8], "little")


class Renamed(DeltaSource):
    """A source under other names, so that it can be combined with one that uses those.

    Args:
        source: whose deltas they are.
        names: new name -> the source's own.
    """

    def __init__(self, source: DeltaSource, names: Mapping[str, str]) -> None:
        self.source, self.names = source, dict(names)
        self.label = source.label
        self.base_model_name_or_path, self.revision = (
            source.base_model_name_or_path,
            source.revision,
        )
        self.base_architectures = source.base_architectures
        self.base_parameter_count = source.base_parameter_count
        # A witness is of entries that its parameter's name chooses: none under another name.
        self.witness = {n: text for n, text in source.witness.items() if names.get(n) == n}

    def __getitem__(self, name: str) -> Delta | NewParameter:
        return self.source[self.names[name]]

    def parameter(self, name: str, base: BaseReader | None) -> Delta | NewParameter:
        if base is None:
            return self[name]
        renewed = {own: new for new, own in self.names.items()}
        given = base

        def read(own: str) -> torch.Tensor:
            return given(renewed[own])

        return self.source.parameter(self.names[name], read)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def is_new(self, name: str) -> bool:
        return self.source.is_new(self.names[name])

    def stored_bits(self, name: str) -> int:
        return self.source.stored_bits(self.names[name])

    def added_row_count(self, name: str) -> int:
        return self.source.added_row_count(self.names[name])

    @property
    def identity(self) -> str:
        return self.source.identity
