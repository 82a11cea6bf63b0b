"""What is hooked where the model runs: loading an adapter, filling and emptying a slot."""

from __future__ import annotations

import functools
import time
from typing import Any

from dare_vllm.merged_weights import MergedWeights
from dare_vllm.mixture import loaded_mixture
from dare_vllm.per_request.engine_check import engine_obstacles
from dare_vllm.per_request.loading import Loader
from dare_vllm.per_request.model_sites import ModelSites
from dare_vllm.per_request.packed_adapter import Term, bytes_of, fill_slot
from dare_vllm.per_request.prompt_scoring import hook_prompt_scoring
from dare_vllm.per_request.refusal import AdapterRefusedError
from dare_vllm.per_request.residency import Residency
from dare_vllm.per_request.slots import RowSlots

__all__ = ["Serving", "hook_worker", "serving_of"]


class Serving:
    """All that the plugin adds to one `LoRAModelManager`."""

    def __init__(self, manager: Any) -> None:
        from vllm.config import get_current_vllm_config

        wrapper = manager._get_punica_wrapper(_language_prefix(manager))
        self.rows = RowSlots(wrapper, manager.lora_slots)
        obstacles = engine_obstacles()

        def has_rows(name: str) -> bool:
            return not obstacles and manager._get_punica_wrapper(name) is wrapper

        packed = manager.packed_modules_mapping
        self.sites = ModelSites(manager.model, packed, self.rows, has_rows)
        config = get_current_vllm_config()
        self.loader = Loader(self.sites, obstacles, lambda: _open_mixture(config))
        self.residency = Residency(rank=_rank(), slots=manager.lora_slots)

    def empty(self, slot: int) -> None:
        """Make rows of a slot the base's."""
        self.sites.clear(slot)
        self.rows.holds_lora[slot] = False

    def publish(self, manager: Any) -> None:
        """Tell what is held now."""
        held = [m for m in manager._registered_adapters.cache.values() if hasattr(m, "dare_terms")]
        active = [manager._registered_adapters.cache.get(i) for i in manager.lora_index_to_id]
        packed = {model.dare_name: [t.adapter for t in model.dare_terms] for model in held}
        self.residency.adapters = {name: bytes_of(own) for name, own in packed.items()}
        self.residency.resident_bytes = bytes_of(one for own in packed.values() for one in own)
        self.residency.slots_used = sum(hasattr(model, "dare_terms") for model in active)
        self.residency.publish()


def serving_of(manager: Any) -> Serving:
    """The state of a `LoRAModelManager`."""
    serving: Serving = manager._dare_serving
    return serving


def hook_worker() -> None:
    """Replace the functions that :data:`hooks.HOOKS` lists for workers."""
    from vllm.lora.lora_model import LoRAModel

    class DareModel(LoRAModel):  # type: ignore[misc]
        """What vLLM's caches hold of a DARE adapter: no LoRA of any layer, and its terms."""

        def __init__(self, lora_model_id: int, name: str, terms: list[Term]) -> None:
            super().__init__(lora_model_id, rank=1, loras={})
            self.dare_name, self.dare_terms = name, terms

    _hook_loading(DareModel)
    _hook_slots(DareModel)


def _hook_loading(dare_model: Any) -> None:
    """Requests whose path is a DARE adapter are loaded here, all others as vLLM does."""
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.worker_manager import WorkerLoRAManager

    stock_create = LoRAModelManager._create_lora_modules
    stock_add = LoRAModelManager._add_adapter
    stock_load = WorkerLoRAManager._load_adapter
    stock_remove = WorkerLoRAManager.remove_adapter

    @functools.wraps(stock_create)
    def create_lora_modules(self: Any) -> None:
        stock_create(self)
        self._dare_serving = Serving(self)
        hook_prompt_scoring(self._dare_serving.rows)

    @functools.wraps(stock_load)
    def load_adapter(self: Any, lora_request: Any) -> Any:
        serving = serving_of(self._adapter_manager)
        start = time.perf_counter()
        terms = serving.loader.load(lora_request)
        if terms is None:
            lora = stock_load(self, lora_request)
            if serving.sites.replaces_experts and any(".experts" in name for name in lora.loras):
                raise AdapterRefusedError(
                    lora_request.lora_name, "a LoRA of experts does not run on a CPU in vLLM"
                )
            return lora
        serving.residency.count_load(time.perf_counter() - start)
        return dare_model(lora_request.lora_int_id, lora_request.lora_name, terms)

    @functools.wraps(stock_add)
    def add_adapter(self: Any, lora: Any) -> None:
        if isinstance(lora, dare_model):
            self._registered_adapters[lora.id] = lora
        else:
            stock_add(self, lora)

    @functools.wraps(stock_remove)
    def remove_for_good(self: Any, adapter_id: int) -> bool:
        removed: bool = stock_remove(self, adapter_id)
        serving_of(self._adapter_manager).loader.forget(adapter_id)
        return removed

    LoRAModelManager._create_lora_modules = create_lora_modules
    LoRAModelManager._add_adapter = add_adapter
    WorkerLoRAManager._load_adapter = load_adapter
    WorkerLoRAManager.remove_adapter = remove_for_good


def _hook_slots(dare_model: Any) -> None:
    """Sites are filled when vLLM gives an adapter a slot, and emptied when it takes it back."""
    from vllm.lora.model_manager import LoRAModelManager

    stock_activate = LoRAModelManager.activate_adapter
    stock_deactivate = LoRAModelManager._deactivate_adapter
    stock_remove = LoRAModelManager.remove_adapter
    stock_remove_all = LoRAModelManager.remove_all_adapters

    @functools.wraps(stock_activate)
    def activate_adapter(self: Any, lora_id: int) -> bool:
        activated: bool = stock_activate(self, lora_id)
        if activated:
            serving, model = serving_of(self), self._registered_adapters[lora_id]
            slot = self.lora_index_to_id.index(lora_id)
            serving.rows.holds_lora[slot] = not isinstance(model, dare_model)
            if isinstance(model, dare_model):
                start = time.perf_counter()
                fill_slot(slot, model.dare_terms, serving.sites)
                serving.residency.count_swap(time.perf_counter() - start)
                serving.publish(self)
        return activated

    @functools.wraps(stock_deactivate)
    def deactivate_adapter(self: Any, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            serving_of(self).empty(self.lora_index_to_id.index(lora_id))
        stock_deactivate(self, lora_id)

    @functools.wraps(stock_remove)
    def remove_adapter(self: Any, adapter_id: int) -> bool:
        removed: bool = stock_remove(self, adapter_id)
        serving_of(self).publish(self)
        return removed

    @functools.wraps(stock_remove_all)
    def remove_all_adapters(self: Any) -> None:
        stock_remove_all(self)
        for slot in range(self.lora_slots):
            serving_of(self).empty(slot)
        serving_of(self).publish(self)

    LoRAModelManager.activate_adapter = activate_adapter
    LoRAModelManager._deactivate_adapter = deactivate_adapter
    LoRAModelManager.remove_adapter = remove_adapter
    LoRAModelManager.remove_all_adapters = remove_all_adapters


def _open_mixture(config: Any) -> MergedWeights | None:
    """What was loaded with the base, or swapped in since, over the base's checkpoint."""
    if not loaded_mixture(config.load_config).parts:
        return None
    from dare_vllm.at_load.loader import DareModelLoader

    return DareModelLoader(config.load_config).open_mixture(config.model_config)


def _rank() -> int:
    from vllm.distributed import get_world_group

    return int(get_world_group().rank)


def _language_prefix(manager: Any) -> str:
    if manager.supports_mm:
        prefix: str = manager.mm_mapping.language_model[0]
        return prefix
    from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY

    return str(DEFAULT_LANGUAGE_WRAPPER_KEY)
