"""What is hooked where the model runs: loading an adapter, filling and emptying a slot."""

from __future__ import annotations

import functools
from typing import Any

from dare_adapters.errors import DareError
from dare_vllm.per_request.loading import Loader
from dare_vllm.per_request.model_sites import ModelSites
from dare_vllm.per_request.packed_adapter import Term, fill_slot
from dare_vllm.per_request.prompt_scoring import hook_prompt_scoring
from dare_vllm.per_request.slots import RowSlots

__all__ = ["Serving", "hook_worker", "serving_of"]


class UnsupportedEngineError(DareError, ValueError):
    """The engine's configuration cannot serve adapters per request."""


class Serving:
    """All that the plugin adds to one `LoRAModelManager`."""

    def __init__(self, manager: Any) -> None:
        wrapper = manager._get_punica_wrapper(_language_prefix(manager))
        self.rows = RowSlots(wrapper, manager.lora_slots)
        self.sites = ModelSites(manager.model, manager.packed_modules_mapping, self.rows)
        self.loader = Loader(self.sites)


def serving_of(manager: Any) -> Serving:
    """The state of a `LoRAModelManager`."""
    serving: Serving = manager._dare_serving
    return serving


def hook_worker() -> None:
    """Replace the functions that :data:`hooks.HOOKS` lists for workers."""
    from vllm.lora import model_manager, worker_manager
    from vllm.lora.lora_model import LoRAModel

    class DareModel(LoRAModel):  # type: ignore[misc]
        """What vLLM's caches hold of a DARE adapter: no LoRA of any layer, and its terms."""

        def __init__(self, lora_model_id: int, terms: list[Term]) -> None:
            super().__init__(lora_model_id, rank=1, loras={})
            self.terms = terms

    manager_class = model_manager.LoRAModelManager
    stock_create = manager_class._create_lora_modules
    stock_add = manager_class._add_adapter
    stock_activate = manager_class.activate_adapter
    stock_deactivate = manager_class._deactivate_adapter
    stock_remove_all = manager_class.remove_all_adapters
    stock_load = worker_manager.WorkerLoRAManager._load_adapter

    @functools.wraps(stock_create)
    def create_lora_modules(self: Any) -> None:
        stock_create(self)
        self._dare_serving = Serving(self)
        hook_prompt_scoring(self._dare_serving.rows)

    @functools.wraps(stock_load)
    def load_adapter(self: Any, lora_request: Any) -> Any:
        terms = serving_of(self._adapter_manager).loader.load(lora_request)
        if terms is None:
            return stock_load(self, lora_request)
        return DareModel(lora_request.lora_int_id, terms)

    @functools.wraps(stock_add)
    def add_adapter(self: Any, lora: Any) -> None:
        if isinstance(lora, DareModel):
            self._registered_adapters[lora.id] = lora
        else:
            stock_add(self, lora)

    @functools.wraps(stock_activate)
    def activate_adapter(self: Any, lora_id: int) -> bool:
        activated: bool = stock_activate(self, lora_id)
        if activated:
            serving, model = serving_of(self), self._registered_adapters[lora_id]
            slot = self.lora_index_to_id.index(lora_id)
            fill_slot(slot, model.terms if isinstance(model, DareModel) else (), serving.sites)
            serving.rows.holds_lora[slot] = not isinstance(model, DareModel)
        return activated

    @functools.wraps(stock_deactivate)
    def deactivate_adapter(self: Any, lora_id: int) -> None:
        slot = self.lora_index_to_id.index(lora_id) if lora_id in self.lora_index_to_id else None
        stock_deactivate(self, lora_id)
        if slot is not None:
            serving_of(self).sites.clear(slot)
            serving_of(self).rows.holds_lora[slot] = False

    @functools.wraps(stock_remove_all)
    def remove_all_adapters(self: Any) -> None:
        stock_remove_all(self)
        for slot in range(self.lora_slots):
            serving_of(self).sites.clear(slot)
            serving_of(self).rows.holds_lora[slot] = False

    manager_class._create_lora_modules = create_lora_modules
    manager_class._add_adapter = add_adapter
    manager_class.activate_adapter = activate_adapter
    manager_class._deactivate_adapter = deactivate_adapter
    manager_class.remove_all_adapters = remove_all_adapters
    worker_manager.WorkerLoRAManager._load_adapter = load_adapter


def _language_prefix(manager: Any) -> str:
    if manager.supports_mm:
        prefix: str = manager.mm_mapping.language_model[0]
        return prefix
    from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY

    return str(DEFAULT_LANGUAGE_WRAPPER_KEY)
