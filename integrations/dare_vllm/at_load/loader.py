"""vLLM's own loader, over weights that have a mixture added."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, get_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

from dare_adapters.checkpoint import Checkpoint
from dare_adapters.errors import ArchitectureMismatchError, UnsupportedParameterError
from dare_vllm.at_load.logit_mask import LogitMask
from dare_vllm.at_load.spare_rows import SPARE_ROWS, keep_rows_free, parse_spare_rows
from dare_vllm.merged_weights import MergedWeights
from dare_vllm.mixture import Mixture

__all__ = ["PLAIN_WEIGHTS", "DareModelLoader"]

PLAIN_WEIGHTS = "plain_weights"
"""A switch in `model_loader_extra_config`: keep CPU weights where a sparse swap finds them."""


class DareModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """Streams the base and adds the adapters of `model_loader_extra_config`.

    The fields are those of :class:`dare_vllm.mixture.Mixture`, `plain_weights`, `spare_rows`, and
    vLLM's own for this loader. Fusing, slicing for tensor parallel ranks, casting to the engine's
    dtype and quantising come after, as for any checkpoint; each rank computes whole parameters.

    Attributes:
        mixture: what is added.
        spare_rows: vocabulary rows of the model that neither base nor mixture fills.

    Raises:
        CombinationError: a field is out of range.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        extra = dict(load_config.model_loader_extra_config or {})
        self.plain_weights = bool(extra.pop(PLAIN_WEIGHTS, False))
        self.spare_rows = parse_spare_rows(extra)
        extra.pop(SPARE_ROWS, None)
        self.mixture, rest = Mixture.split(extra)
        plain = dataclasses.replace(load_config, load_format="hf", model_loader_extra_config=rest)
        super().__init__(plain)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Load base and mixture, and keep apart what a later mixture may change apart."""
        if self.plain_weights:
            for module in model.modules():
                # CPU linears are packed after loading unless they say this.
                module._cpu_skip_gemm_dispatch = True  # type: ignore[assignment]
        if self.spare_rows and model_config.runner_type != "draft":
            self._keep_rows_free(model, model_config)
        super().load_weights(model, model_config)
        # vLLM would now tie a head that equals the embedding; the next mixture may move them apart.
        model_config.word_embeddings_untied_by_checkpoint = False

    def _keep_rows_free(self, model: nn.Module, model_config: ModelConfig) -> None:
        total = model_config.get_vocab_size()
        if get_current_vllm_config().parallel_config.enable_batch_sharded_sampling:
            raise UnsupportedParameterError(
                f"{SPARE_ROWS} and sampling of parts of a batch on each rank do not go together: "
                "drop --enable-batch-sharded-sampling"
            )
        keep_rows_free(model, total, self.spare_rows)
        LogitMask(total - self.spare_rows, total).wrap(model)

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Checkpoint names and tensors, whole and unfused, the mixture added."""
        weights = self.base_weights(model_config, model)
        if not self.mixture.parts or model_config.runner_type == "draft":
            yield from weights  # a draft model only proposes tokens
            return
        yield from self.add_mixture(self.open_mixture(model_config), weights, model)

    def base_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """What vLLM's own loader reads."""
        weights: Iterator[tuple[str, torch.Tensor]] = super().get_all_weights(model_config, model)
        return weights

    def add_mixture(
        self,
        merged: MergedWeights,
        weights: Iterator[tuple[str, torch.Tensor]],
        model: nn.Module,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The base's tensors with those of a mixture added.

        Raises:
            CheckpointMismatchError: parameters that the adapters change never came.
        """
        unused = getattr(model, "is_unused_checkpoint_weight", None)

        def may_lack(name: str) -> bool:
            other_rank = should_skip_weight(name, self.local_expert_ids)
            return other_rank or (unused is not None and unused(name))

        return merged.stream(weights, may_lack)

    def open_base(self, model_config: ModelConfig) -> Checkpoint:
        """The base's checkpoint, downloaded where it is on the hub."""
        folder = self._prepare_weights(model_config.model, None, model_config.revision, True, None)[
            0
        ]
        return Checkpoint(Path(folder))

    def open_mixture(
        self, model_config: ModelConfig, base: Checkpoint | None = None
    ) -> MergedWeights:
        """The mixture over its base, every check made.

        Raises:
            DareError: as `Mixture.open` and `MergedWeights` say.
            ArchitectureMismatchError: the model is built for another vocabulary.
            UnsupportedParameterError: the model ties what an adapter sets apart.
        """
        base = base or self.open_base(model_config)
        config: Any = model_config.hf_config
        tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
        merged = MergedWeights(
            base, self.mixture.open(), check_base=self.mixture.check_base, untied=not tied
        )
        _check_vocabulary(merged, model_config.get_vocab_size() - self.spare_rows)
        if tied:
            _check_no_head(merged)
        return merged


def _check_vocabulary(merged: MergedWeights, built: int) -> None:
    for name, added in merged.added_rows().items():
        rows = merged.base.info[name].shape[0] + added
        if rows != built:
            raise ArchitectureMismatchError(
                f"{name} has {rows} rows with the {added} that the adapters add, the model is "
                f"built for {built}: pass --hf-overrides '{json.dumps({'vocab_size': rows})}' and "
                "the fine-tune's --tokenizer"
            )


def _check_no_head(merged: MergedWeights) -> None:
    """Refuse a head that the model would leave out, because it has none of its own."""
    for name in [*merged.new.values(), *(merged.renamed(name) for name in merged.changed)]:
        if name.split(".")[-2:] == ["lm_head", "weight"]:
            raise UnsupportedParameterError(
                f"{name} is changed by {merged.source and merged.source.label}, but the model ties "
                "it to the embedding and has none of its own: pass --hf-overrides "
                "'{\"tie_word_embeddings\": false}'"
            )
