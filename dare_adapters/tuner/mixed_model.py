"""Adapters of this method in PEFT's `PeftMixedModel`, for who asks for it.

That class has a closed list of methods. Without it a DARE and a LoRA adapter go together as well:
on one transformers model with `load_adapter`, or a `PeftModel` in a `PeftModel`.
"""

from __future__ import annotations

import functools
from functools import reduce
from operator import or_
from typing import Any

from peft.tuners import mixed
from peft.tuners.mixed import model as mixed_model
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import PeftType
from torch import nn

from dare_adapters.tuner.config import DareConfig
from dare_adapters.tuner.layer import DareBystander
from dare_adapters.tuner.model import DareModel
from dare_adapters.tuner.names import base_model
from dare_adapters.tuner.state import DareState
from dare_adapters.tuner.vocabulary_size import VocabularySize

__all__ = ["allow_in_mixed_models"]


def allow_in_mixed_models() -> None:
    """Let `get_peft_model(model, config, mixed=True)` take a `DareConfig`; for the whole process.

    It changes PEFT's own lists. Doing it again does nothing.
    """
    kind = PeftType("DARE")
    if kind in mixed_model.COMPATIBLE_TUNER_TYPES:
        return
    types = (*mixed_model.COMPATIBLE_TUNER_TYPES, kind)
    mixed_model.COMPATIBLE_TUNER_TYPES = mixed.COMPATIBLE_TUNER_TYPES = types
    mixed_model.PREFIXES.append(DareModel.prefix)
    mixed_model.Configs = reduce(or_, (*mixed_model.Configs.__args__, DareConfig))
    mixed_model.Layers = (*mixed_model.Layers, DareState)
    tuner = mixed_model.MixedModel
    tuner.inject_adapter = _injecting(tuner.inject_adapter)
    tuner._unload_and_optionally_merge = _unloading(tuner._unload_and_optionally_merge)


def _injecting(plain: Any) -> Any:
    @functools.wraps(plain)
    def inject_adapter(
        self: BaseTuner, model: nn.Module, adapter_name: str, *a: Any, **k: Any
    ) -> None:
        if not isinstance(self.peft_config[adapter_name], DareConfig):
            plain(self, model, adapter_name, *a, **k)
            return
        self._check_new_adapter_config(self.peft_config[adapter_name])
        # A tuner of this method for the time of the injection, on the same model.
        tuner = DareModel.__new__(DareModel)
        nn.Module.__init__(tuner)
        tuner.model, tuner.peft_config = self.model, self.peft_config
        tuner.active_adapter = self.active_adapter
        tuner.targeted_module_names, tuner.targeted_parameter_names = [], []
        tuner.inject_adapter(self.model, adapter_name, *a, **k)

    return inject_adapter


def _unloading(plain: Any) -> Any:
    @functools.wraps(plain)
    def unload(
        self: BaseTuner,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        for module in [one for one in self.model.modules() if isinstance(one, DareBystander)]:
            module.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        unloaded = plain(self, merge, progressbar, safe_merge, adapter_names)
        VocabularySize.settle(base_model(unloaded))
        return unloaded

    return unload
