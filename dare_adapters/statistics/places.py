"""Which parameters statistics are made of: every float one, by checkpoint name, tied ones once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from dare_adapters.errors import PatchedStateWarning, UnsupportedParameterError
from dare_adapters.live import LiveParameter, locate, locate_all

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["find_places"]


def find_places(
    model: PreTrainedModel,
    names: Iterable[str] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> dict[str, LiveParameter]:
    """Where the float parameters of a live model are, by checkpoint name.

    Of several names of one tied weight the first counts.

    Args:
        names: checkpoint names to look for; by default those that saving the model would write.
        include, exclude: glob patterns of names.

    Raises:
        UnsupportedParameterError: a parameter is on the meta device.
        ValueError: the patterns leave nothing.
    """
    with warnings.catch_warnings():
        # It is read on purpose with its adapters in it, and only to learn where things are.
        warnings.simplefilter("ignore", PatchedStateWarning)
        table = locate_all(model) if names is None else locate(model, names)
    parameters = {id(parameter) for parameter in model.parameters()}
    found: dict[str, LiveParameter] = {}
    seen = set()
    for name, place in table.items():
        if place is None:
            continue
        owner = place.tensor(model)
        if id(owner) not in parameters or not owner.is_floating_point():
            continue
        wanted = _matches(name, include) and not _matches(name, exclude)
        if owner.is_meta:
            if wanted:
                raise UnsupportedParameterError(
                    f"{name} is on the meta device (offloaded or not loaded); load the model whole"
                )
            continue
        region = place.region(model)
        if region not in seen and wanted:
            found[name] = place
        seen.add(region)
    if not found:
        raise ValueError(
            f"include={list(include)} and exclude={list(exclude)} leave no parameter of "
            f"{type(model).__name__}; its names are like {', '.join(list(table)[:3])}"
        )
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
