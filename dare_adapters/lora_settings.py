"""The settings of a LoRA adapter that its deltas depend on, and kinds of LoRA that have none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from dare_adapters.config import MAX_NUMEL
from dare_adapters.errors import AdapterFormatError, UnsupportedParameterError
from dare_adapters.module_pattern import name_matcher

__all__ = ["LoraSettings", "needs_base"]

# What a config's setting means, where it is set, for a change of weights.
_NEEDS_BASE = {
    "use_dora": "DoRA, whose change depends on the norms of the base's weights",
    "use_qalora": "QA-LoRA, whose factors act on averages of its inputs",
    "use_bdlora": "BD-LoRA, whose factors are block-diagonal",
    "velora_config": "VeLoRA, which this library does not know",
    "kasa_config": "KaSA, which takes singular values out of the base's weights",
    "monteclora_config": "MonteCLoRA, which draws its change at random",
    "arrow_config": "Arrow, which chooses between adapters for every token",
    "alora_invocation_tokens": "aLoRA, which changes the weights for some tokens only",
    "layer_replication": "a LoRA that repeats layers of the base",
    "target_parameters": "a LoRA of target_parameters, which PEFT stores in an order of dimensions "
    "that only the base's modules tell",
    "trainable_token_indices": "a LoRA with trainable_token_indices, which are whole rows and not "
    "changes of the base's",
}
# They put the largest part of W into B A, or round W, and take that from the base.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class LoraSettings:
    """The fields of adapter_config.json that a delta depends on, with PEFT's defaults.

    Raises:
        AdapterFormatError: a field that is not what PEFT writes.
        UnsupportedParameterError: a kind of LoRA that is no change of the base's weights.
    """

    def __init__(self, file: Path, raw: dict[str, Any], fan_in_fan_out: bool | None) -> None:
        self.file, self.raw = file, raw
        if raw.get("peft_type") != "LORA":
            self._fail("peft_type", "'LORA'")
        for key in _NEEDS_BASE:
            if raw.get(key):
                raise UnsupportedParameterError(needs_base(file, key))
        self._check_initialisation()
        for key in ("base_model_name_or_path", "revision"):
            if not isinstance(raw.get(key), str | None):
                self._fail(key, "text or null")
        self.lora_bias, self.rslora = self._flag("lora_bias"), self._flag("use_rslora")
        self.fan_in_fan_out_is_certain = fan_in_fan_out is not None
        self.fan_in_fan_out = self._flag("fan_in_fan_out")
        if fan_in_fan_out is not None:
            self.fan_in_fan_out = fan_in_fan_out
        self._whole = raw.get("modules_to_save") or []
        if not isinstance(self._whole, list):
            self._fail("modules_to_save", "a list of names")
        self._ranks, self._alphas = self._patterns("rank_pattern"), self._patterns("alpha_pattern")

    def rank(self, module: str) -> int:
        """r of a module."""
        rank = self._of_module("rank_pattern", self._ranks, module, self.raw.get("r", 8))
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= MAX_NUMEL:
            self._fail("r", "a whole number of at least 1 (rank_pattern likewise)", rank)
        return int(rank)

    def scaling(self, module: str, rank: int) -> float:
        """s of a module."""
        alpha = self._of_module(
            "alpha_pattern", self._alphas, module, self.raw.get("lora_alpha", 8)
        )
        plain = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not plain or not abs(alpha) < torch.finfo(torch.float32).max:
            self._fail("lora_alpha", "a finite number (alpha_pattern likewise)", alpha)
        return float(alpha / math.sqrt(rank) if self.rslora else alpha / rank)

    def is_saved_whole(self, module: str) -> bool:
        """Whether `modules_to_save` has it."""
        return any(module == name or module.endswith(f".{name}") for name in self._whole)

    def _of_module(
        self, field: str, patterns: Mapping[str, Callable[[str], bool]], module: str, default: Any
    ) -> Any:
        """PEFT's `get_pattern_key`: the first pattern that matches the end of the name."""
        key = next((key for key, matches in patterns.items() if matches(module)), module)
        return (self.raw.get(field) or {}).get(key, default)

    def _patterns(self, field: str) -> dict[str, Callable[[str], bool]]:
        found = self.raw.get(field) or {}
        if not isinstance(found, dict):
            self._fail(field, "an object of patterns")
        try:
            return {key: name_matcher(key) for key in found}
        except ValueError as error:
            raise AdapterFormatError(f"{self.file}: {field}: {error}") from error

    def _check_initialisation(self) -> None:
        how = self.raw.get("init_lora_weights", True)
        how = how.lower() if isinstance(how, str) else how
        if isinstance(how, str) and how.startswith(_CHANGES_BASE):
            raise UnsupportedParameterError(
                f"{self.file}: init_lora_weights is {how!r:.80}, which changed the base's weights: "
                "the factors are not the change of the base that the config names. Save it once "
                "more with PEFT's path_initial_model_for_weight_conversion, or, where the base at "
                "hand is the changed one, set init_lora_weights to true in the config"
            )
        if not isinstance(how, str | bool | None):
            self._fail("init_lora_weights", "true, false or a name")
        if how not in _KEEPS_BASE:
            known = ", ".join(str(name) for name in _KEEPS_BASE if name is not None)
            raise UnsupportedParameterError(
                f"{self.file}: init_lora_weights is {how!r:.80}, and this library does not know "
                f"whether that changes the base's weights; it knows {known}"
            )

    def _flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if not isinstance(value, bool | None):
            self._fail(key, "true or false")
        return bool(value)

    def _fail(self, key: str, expected: str, *of_pattern: Any) -> NoReturn:
        value = of_pattern[0] if of_pattern else self.raw.get(key)
        raise AdapterFormatError(f"{self.file}: {key} is {value!r:.80}, expected {expected}")


def needs_base(file: Path, key: str) -> str:
    return (
        f"{file}: this is {_NEEDS_BASE[key]}; such an adapter cannot be read as a change of "
        "weights. Where PEFT can merge it (merge_and_unload), save the merged model and extract "
        "an adapter from that"
    )
