"""How many words a model has under adapters that add rows to its vocabulary, told while it runs.

A model's own loss folds its logits by `config.vocab_size`. While adapters are not merged for good
that number is the base's, by which PEFT tells that nobody has resized the embeddings; for the time
of a forward it is that of the adapters which act.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dare_adapters.tuner.state import DareState

__all__ = ["VocabularySize"]

_PLACE = "_dare_vocabulary_size"
_SIZES = ("num_embeddings", "out_features")


class VocabularySize:
    """Hooks on a model that tell its configs, and who else keeps a copy, for as long as it runs.

    Args:
        model: the base, with layers in it.
        layers: those of which an adapter has added rows, each with the parameter's name.
    """

    def __init__(self, model: nn.Module, layers: list[tuple[DareState, str]]) -> None:
        self._layers = layers
        config = getattr(model, "config", None)
        keepers: list[Any] = [config, getattr(config, "text_config", None), *model.modules()]
        self._keepers = [
            one
            for one in keepers
            if not isinstance(one, DareState) and isinstance(getattr(one, "vocab_size", None), int)
        ]
        self._told: list[list[tuple[Any, int]]] = []
        self._hooks = [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    @classmethod
    def follow(cls, model: nn.Module) -> None:
        """Begin, where any adapter of a model adds rows; again after more were loaded."""
        cls.stop(model)
        layers = [
            (layer, local)
            for layer in model.modules()
            if isinstance(layer, DareState)
            for local in layer.growing()
        ]
        if layers:
            setattr(model, _PLACE, cls(model, layers))

    @staticmethod
    def stop(model: nn.Module) -> None:
        """Leave the model without hooks."""
        found: VocabularySize | None = model.__dict__.pop(_PLACE, None)
        if found is not None:
            for hook in found._hooks:
                hook.remove()

    @classmethod
    def settle(cls, model: nn.Module) -> None:
        """End because the adapters are merged for good, or gone: tell what the weights are now."""
        found: VocabularySize | None = model.__dict__.get(_PLACE)
        cls.stop(model)
        if found is None:
            return
        for layer, local in found._layers:
            parameter, before = layer.owner._parameters[local], layer.rows_before(local)
            assert parameter is not None
            found._tell(before, len(parameter))
            for module in model.modules():  # those that share it
                if any(own is parameter for own in module._parameters.values()):
                    for size in _SIZES:
                        if getattr(module, size, None) == before:
                            setattr(module, size, len(parameter))

    def _enter(self, *_: Any) -> None:
        told: list[tuple[Any, int]] = []
        for layer, local in self._layers:
            told += self._tell(layer.rows_before(local), layer.rows_now(local))
        self._told.append(told)

    def _leave(self, *_: Any) -> None:
        for keeper, size in reversed(self._told.pop() if self._told else []):
            keeper.vocab_size = size

    def _tell(self, before: int, now: int) -> list[tuple[Any, int]]:
        """Put one number for another wherever it is kept; by whom it was."""
        told = [one for one in self._keepers if before != now and one.vocab_size == before]
        for keeper in told:
            keeper.vocab_size = now
        return [(keeper, before) for keeper in told]
