"""A mix: an adapter directory that is only a recipe over others, computed when it is loaded.

Its `adapter_config.json` has no tensors file beside it:

    {"peft_type": "DARE", "format_version": 1, "mix": {
        "combination_type": "ties", "options": {"density": 0.2}, "seed": 0, "mask": "auto",
        "prune": null, "drop_rate": null,
        "adapters": [{"source": "../math", "revision": null, "weight": 1.0, "sha256": "…"}]}}

A source is a hub id, or a relative path that stays inside the directory the mix lies in. No mix
is made of mixes. Each adapter is known by the SHA-256 of its tensors.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dare_adapters.adapter import download_adapter
from dare_adapters.checkpoint import read_json
from dare_adapters.combine.align import align_names
from dare_adapters.combine.combination import Combination
from dare_adapters.config import CONFIG_NAME, FORMAT_VERSION
from dare_adapters.errors import AdapterFormatError, AdapterNotFoundError, CombinationError
from dare_adapters.output import complete_directory
from dare_adapters.source import DeltaSource

__all__ = ["Mix", "is_mix", "open_mix", "write_mix"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FIELDS = {"combination_type", "options", "seed", "mask", "prune", "drop_rate", "adapters"}
_ENTRY_FIELDS = {"source", "revision", "weight", "sha256"}
MAX_ADAPTERS = 1024


class Mix(Combination):
    """A combination that was read from a mix directory, or written to one.

    Attributes:
        path: the directory.
    """

    path: Path


def is_mix(config: dict[str, Any]) -> bool:
    """Whether an adapter_config.json is that of a mix."""
    return config.get("peft_type") == "DARE" and "mix" in config


def write_mix(
    combination: Combination,
    sources: Sequence[DeltaSource],
    out: str | Path,
    *,
    overwrite: bool = False,
) -> Mix:
    """Write the recipe of a combination of adapters.

    Args:
        combination: of them.
        sources: adapters of directories, inside the directory that `out` lies in.
        out: directory to create.
        overwrite: replace it if it exists.

    Raises:
        CombinationError: a source has no directory, lies elsewhere, or needs statistics.
    """
    out = Path(out)
    if combination.statistics is not None:
        raise CombinationError(
            f"a mix cannot carry the statistics that {combination.method.name} needs; "
            "write an adapter (as_mix=False)"
        )
    entries = []
    for source, weight in zip(sources, combination.weights, strict=True):
        path = getattr(source, "path", None)
        if not isinstance(path, Path) or isinstance(source, Combination):
            raise CombinationError(f"{source.label} is no adapter directory; a mix names only such")
        relative = os.path.relpath(os.path.realpath(path), os.path.realpath(out))
        if _outside(relative) or not relative.startswith(os.pardir):  # in `out`: it is replaced
            raise CombinationError(
                f"{path} lies outside {out.parent}, or in {out}; a mix may only name adapters "
                "beside it: copy them there, or write an adapter (as_mix=False)"
            )
        entries.append({"source": relative, "weight": weight, "sha256": source.identity})
    description = {**combination.describe(), "adapters": entries}
    config = {
        "peft_type": "DARE",
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": combination.base_model_name_or_path,
        "revision": combination.revision,
        "mix": description,
    }
    with complete_directory(out, overwrite) as directory:
        text = json.dumps(config, indent=1, sort_keys=True)
        (directory / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
    return open_mix(out)


def open_mix(path: Path, *, token: str | bool | None = None, verify: bool = True) -> Mix:
    """Open a mix and the adapters that it names.

    Raises:
        AdapterFormatError: it is damaged, names a path that it must not, or another mix; an
            adapter is not the one it was made of.
        AdapterNotFoundError: an adapter is not there.
        CombinationError: an unknown method or option.
    """
    file = path / CONFIG_NAME
    config = read_json(file, AdapterFormatError)
    version = config.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise AdapterFormatError(
            f"{file}: format version {version!r:.40}, this library reads up to {FORMAT_VERSION}; "
            "upgrade dare-adapters"
        )
    recipe = config.get("mix")
    if not isinstance(recipe, dict) or set(recipe) - _FIELDS:
        raise AdapterFormatError(f"{file}: mix must be an object of {', '.join(sorted(_FIELDS))}")
    entries = recipe.get("adapters")
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_ADAPTERS:
        raise AdapterFormatError(f"{file}: mix.adapters must list 1 to {MAX_ADAPTERS} adapters")
    sources, weights = [], []
    for number, entry in enumerate(entries):
        source, weight = _open_entry(file, number, entry, token, verify)
        sources.append(source)
        weights.append(weight)
    options = recipe.get("options", {})
    if not isinstance(options, dict) or not isinstance(recipe.get("combination_type"), str):
        raise AdapterFormatError(f"{file}: mix needs a combination_type, and options as an object")
    seed = recipe.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise AdapterFormatError(f"{file}: mix.seed is {seed!r:.40}, expected a whole number")
    mix = Mix(
        align_names(sources),
        weights,
        recipe["combination_type"],
        options,
        seed=seed,
        mask=str(recipe.get("mask", "auto")),
        prune=recipe.get("prune"),
        drop_rate=recipe.get("drop_rate"),
    )
    mix.path, mix.label = path, str(path)
    return mix


def _open_entry(
    file: Path, number: int, entry: Any, token: str | bool | None, verify: bool
) -> tuple[DeltaSource, float]:
    from dare_adapters.open_source import open_source

    where = f"{file}: mix.adapters[{number}]"
    if not isinstance(entry, dict) or set(entry) - _ENTRY_FIELDS:
        raise AdapterFormatError(f"{where} must be an object of {', '.join(sorted(_ENTRY_FIELDS))}")
    if not isinstance(entry.get("source"), str):
        raise AdapterFormatError(f"{where} names no source")
    weight = entry.get("weight", 1.0)
    known = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not known or not abs(weight) <= sys.float_info.max:  # JSON's whole numbers have no end
        raise AdapterFormatError(f"{where}: weight is {weight!r:.40}, expected a finite number")
    name = entry["source"]
    path = file.parent / name
    if not _outside(name) and os.path.isdir(path):  # Path.is_dir raises for a name too long
        if _outside(os.path.relpath(os.path.realpath(path), os.path.realpath(file.parent))):
            raise AdapterFormatError(f"{where}: {name!r} is a link to another place")
    elif _HUB_ID.fullmatch(name) and not name.startswith("."):
        path = download_adapter(name, entry.get("revision"), token)
    elif _outside(name):
        raise AdapterFormatError(
            f"{where}: {name!r} is neither a hub id nor a path beside the mix; it is not followed"
        )
    else:
        raise AdapterNotFoundError(f"{where}: there is no adapter at {path}")
    config = path / CONFIG_NAME
    if config.is_file() and is_mix(read_json(config, AdapterFormatError)):
        raise AdapterFormatError(f"{where}: {name!r} is itself a mix; a mix names adapters only")
    source = open_source(path, verify=verify)
    digest = entry.get("sha256")
    if digest is not None and digest != source.identity:
        raise AdapterFormatError(
            f"{where}: {name!r} is not the adapter that the mix was made of (its tensors have the "
            f"SHA-256 {source.identity}, the mix names {digest!r:.80}); make the mix again"
        )
    return source, float(weight)


def _outside(relative: str) -> bool:
    """Whether a path, relative to a mix, leaves the directory that the mix lies in."""
    if os.path.isabs(relative) or "\\" in relative or ":" in relative:
        return True
    parts = os.path.normpath(relative).split(os.sep)
    return parts.count("..") > 1 or parts in (["."], [".."])
