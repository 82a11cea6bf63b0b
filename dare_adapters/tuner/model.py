"""`DareModel`: the tuner that PEFT puts around a model for adapters of method "DARE"."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
)
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn

from dare_adapters.errors import UnsupportedParameterError
from dare_adapters.tuner import loading, saving
from dare_adapters.tuner.base_witness import check_base_of
from dare_adapters.tuner.config import DareConfig, OwnTargets
from dare_adapters.tuner.layer import BYSTANDER, DareBystander, DareLayer
from dare_adapters.tuner.mixed_batch import mixed_batch
from dare_adapters.tuner.names import base_model
from dare_adapters.tuner.plan import Plan, plan_adapter
from dare_adapters.tuner.state import DareState
from dare_adapters.tuner.vocabulary_size import VocabularySize

__all__ = ["DareModel"]


class DareModel(BaseTuner):  # type: ignore[misc]
    """Adapters of method "DARE" on a model; PEFT makes it.

    Args:
        model: the base.
        config: of the first adapter, or of several by name.
        adapter_name: of the first.
        low_cpu_mem_usage, state_dict: as in PEFT.
    """

    prefix: str = "dare_"
    tuner_layer_cls = DareState
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    _plan: Plan

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Put an adapter's layers into the model, empty or as training begins."""
        config = self.peft_config[adapter_name]
        if not isinstance(config, DareConfig):
            raise TypeError(f"{adapter_name}: a DareModel takes a DareConfig, not {type(config)}")
        if config.seed is None:
            config.seed = _seed_of_torch()
        if config.described is not None and not config.inference_mode:
            config.bits = None  # those of the file: what is trained from now on is not rounded
        config.own_modules(config.modules_to_save)
        _maybe_include_all_linear_layers(config, model)
        self._plan = plan_adapter(model, config)
        if config.described is not None and config.check_base:
            check_base_of(model, config.described, f"adapter {adapter_name!r}")
        config.target_modules = _own_targets(config.target_modules, model)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        self._tie()
        VocabularySize.follow(base_model(model))
        loading.remember_conversions(base_model(model))
        config.note_injection(model)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:
        """By the plan, which knows what an adapter changes; PEFT goes through all modules."""
        if key in self._plan.paths:
            return True
        return _ExcludedModule() if key in self._plan.excluded else False

    def _create_and_replace(
        self,
        peft_config: DareConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if "" in self._plan.placements:
            self._inject_root(peft_config, adapter_name)
        layer = _layer_of(target)
        if layer is None:
            if _is_called_alone(target):
                layer = DareLayer(target)
                if adapter_name not in self.active_adapters:
                    layer.requires_grad_(False)
                self._replace_module(parent, target_name, layer, target)
            else:
                layer = DareBystander(target, parent)
                target.add_module(BYSTANDER, layer)
            layer.set_adapter(self.active_adapters, peft_config.inference_mode)
        layer.found_at(self.model, current_key)
        self._fill(layer, peft_config, adapter_name, current_key)

    def _fill(self, layer: DareState, config: DareConfig, adapter_name: str, key: str) -> None:
        placements = self._plan.placements.get(key)
        if placements:
            layer.add_adapter(adapter_name, placements, init_weights=config.init_weights)
            layer.set_adapter(self.active_adapters, config.inference_mode)

    def _inject_root(self, config: DareConfig, adapter_name: str) -> None:
        """The parameters that the model itself holds: PEFT does not visit it."""
        layer = self.model._modules.get(BYSTANDER)
        if not isinstance(layer, DareBystander):
            layer = DareBystander(self.model, None)
            self.model.add_module(BYSTANDER, layer)
        self._fill(layer, config, adapter_name, "")
        del self._plan.placements[""]

    def _tie(self) -> None:
        for path, shared in self._plan.tied.items():
            layer = _layer_of(self.model.get_submodule(path))
            for local, (other_path, there) in shared.items():
                other = _layer_of(self.model.get_submodule(other_path))
                if layer is None or other is None:
                    raise UnsupportedParameterError(
                        f"{path}.{local} is tied to {other_path}.{there}, which has no adapter "
                        "layer: load the base with tie_word_embeddings=False"
                    )
                layer.tie(local, other, there)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module | None, child: nn.Module
    ) -> None:
        if new_module is None:  # a bystander, which is gone
            return
        if isinstance(new_module, DareLayer):
            new_module.train(child.training)
        # One module may have several names (T5's embeddings), and all must lead to its layer.
        for module in list(self.model.modules()):
            if isinstance(new_module, DareState) and module is new_module:
                continue
            for name, own in module._modules.items():
                if own is child and not (isinstance(child, DareState) and module is child):
                    module._modules[name] = new_module

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        *,
        bits: int | None = 32,
        seed: int = 0,
        mask: str = "auto",
        prune: str | None = None,
        drop_rate: float | None = None,
        statistics: Sequence[Any] | None = None,
        **options: Any,
    ) -> None:
        """Make a new adapter of loaded ones; it is not activated, and can be saved as any other.

        Args:
            adapters: names of loaded adapters.
            weights: one for each.
            adapter_name: of the new one.
            combination_type: "linear", "ties", "dare_ties", …: `dare_adapters.method_names()`.
            bits: of each entry of the new adapter; 32 rounds nothing, None takes those of the
                finest of `adapters`.
            seed, mask: of what is dropped at random.
            prune, drop_rate: done to every delta before the method.
            statistics: a mapping for each adapter, for "fisher" and "regmean".
            **options: of the combination type: `density`, `majority_sign_method`, ….

        Raises:
            AdapterNotFoundError: a name is not loaded.
            AdapterExistsError: `adapter_name` is taken.
            CombinationError: an unknown method or option, or a value out of range; adapters are
                merged.
        """
        from dare_adapters.tuner.weighted import add_weighted

        add_weighted(
            self, adapters, weights, adapter_name, combination_type, bits=bits, seed=seed,
            mask=mask, prune=prune, drop_rate=drop_rate, statistics=statistics, options=options,
        )  # fmt: skip

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """As PEFT calls it around a forward or `generate`, with all that these are given."""
        names = kwargs.pop("adapter_names", None)
        with nullcontext() if names is None else mixed_batch(self, names, args, kwargs):
            yield

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        unloaded: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        VocabularySize.settle(base_model(unloaded))
        return unloaded

    def _check_merge_allowed(self) -> None:
        """Any: tied weights are changed once, where they are."""

    # --- a state dict -------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        return saving.adapter_state_dict(model, config, adapter_name, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if key.rpartition(".")[2].startswith(cls.prefix):
            return key  # a file's already
        removed: str = super()._remove_adapter_name_from_key(key, adapter_name)
        return removed

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        return loading.live_state_dict(model, config, adapter_name, state_dict)


def _layer_of(module: nn.Module) -> DareState | None:
    """The layer that a module is in, or has in it."""
    found: nn.Module | None = module
    while found is not None:
        if isinstance(found, DareState):
            return found
        bystander = found._modules.get(BYSTANDER)
        if isinstance(bystander, DareState):
            return bystander
        found = found._modules.get("base_layer")
    return None


def _is_called_alone(module: nn.Module) -> bool:
    """Whether it is a module without children, which others use by calling it."""
    inner: nn.Module = module
    while isinstance(below := inner._modules.get("base_layer"), nn.Module):
        inner = below
    return not inner._modules


def _own_targets(
    targets: list[str] | set[str] | str | None, model: nn.Module
) -> OwnTargets | str | None:
    """What PEFT shall not take for embeddings that are to be saved with the adapter."""
    if targets is None:
        return None
    if isinstance(targets, str):
        names = [
            name
            for name, _ in model.named_modules()
            if name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES and re.fullmatch(targets, name)
        ]
        if not names:
            return targets
        found = [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]
        return OwnTargets(found)
    return OwnTargets(targets)


def _seed_of_torch() -> int:
    """From the seed that the user's program has set; of a process group, that of the first."""
    digest = hashlib.sha256(f"dare-adapters:{torch.initial_seed()}".encode()).digest()
    seed = [int.from_bytes(digest[:8], "little") >> 11]  # a JSON number that every reader keeps
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(seed)  # one mask, however they are seeded
    return seed[0]
