"""The layers of a live vLLM model as sites, and where each checkpoint parameter is among them.

Names follow vLLM's own rules for LoRA: `hf_to_vllm_mapper` renames, `packed_modules_mapping` says
what is fused. Whatever has no site is refused by name, so that no part of a fine-tune is lost.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dare_vllm.at_load.logit_mask import LogitMask, mask_of
from dare_vllm.per_request.added_rows import AddedRows
from dare_vllm.per_request.experts_site import ExpertsSite, expert_shard, is_plain_experts
from dare_vllm.per_request.shards import Shard, embedding_shards, held_spare_rows, linear_shards
from dare_vllm.per_request.sites import EmbeddingSite, LinearSite, NormSite, Site
from dare_vllm.per_request.slots import RowSlots

__all__ = ["ModelSites", "NoPlaceError", "Place"]


class NoPlaceError(Exception):
    """A parameter has no site; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where a part of a checkpoint's parameter is.

    Attributes:
        site: what adds changes there.
        layer: vLLM's layer.
        part: "weight" or "bias"; of experts, "3.w1".
        shard: which rows and columns, and where in the layer.
    """

    site: Site
    layer: Any
    part: str
    shard: Shard


class ModelSites:
    """Every layer of a model that can add changes.

    Args:
        model: a model of vLLM's, its layers wrapped for LoRA.
        packed: fused layer -> the checkpoint's names of what it holds.
        rows: where slots are told.
        has_rows: whether the rows of a layer, by its name, are tokens of the step; those of an
            image's tower are not.

    Attributes:
        mask: of the logits, where the engine spares rows for tokens of adapters.
    """

    def __init__(
        self,
        model: Any,
        packed: dict[str, list[str]],
        rows: RowSlots,
        has_rows: Callable[[str], bool],
    ) -> None:
        self.model, self.rows = model, rows
        self._packed = packed
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        self._mapper = None if mapper is None else mapper.get_rename_mapper()
        self._layers: dict[str, Any] = {}
        self._elsewhere: list[str] = []  # layers of other pipeline stages
        self._sites: dict[tuple[int, type[Site]], Site] = {}
        self._kinds: dict[int, str] = {}
        # transformers' own models, which vLLM runs with a batch of one around each step's rows.
        self._batched = any(own.__module__.startswith(_TRANSFORMERS) for own in type(model).__mro__)
        for name, module in list(model.named_modules(remove_duplicate=False)):
            self._take(name, module, has_rows)
        self.mask: LogitMask | None = mask_of(model)
        if self.mask is not None:
            self.mask.attach(rows)
        config = model.config.get_text_config()
        self._tied = bool(getattr(config, "tie_word_embeddings", False))
        pools = bool(getattr(model, "is_pooling_model", False))
        self._has_logits = hasattr(model, "compute_logits") and not pools
        self._take_embedding_as_head()

    def sites(self) -> Iterable[Site]:
        """All of them."""
        return self._sites.values()

    def clear(self, slot: int) -> None:
        """Make rows of a slot the base's again."""
        for site in self._sites.values():
            site.clear(slot)
        if self.mask is not None:
            self.mask.clear(slot)

    @property
    def spare_rows(self) -> int:
        """How many tokens the base does not have, and adapters may."""
        return 0 if self.mask is None else self.mask.total - self.mask.own

    def vocabularies(self) -> list[Site]:
        """The embedding and the head: what an adapter that adds tokens must give rows to."""
        found = (
            site for site in self._sites.values() if isinstance(site, (EmbeddingSite, LinearSite))
        )
        return [site for site in found if site.added is not None]

    @property
    def replaces_experts(self) -> bool:
        """Whether experts are computed without vLLM's kernel, which alone knows LoRAs of them."""
        on_cpu = self.rows.device.type == "cpu"
        return on_cpu and any(isinstance(one, ExpertsSite) for one in self._sites.values())

    def tied_to_other(self, name: str, names: Iterable[str]) -> bool:
        """Whether a parameter is the head of a model that ties it to an embedding in `names`."""
        if not self._tied or self._kind_named(name) != "head":
            return False
        return any(self._kind_named(other) == "embedding" for other in names)

    def places(self, name: str) -> list[Place]:
        """Where a checkpoint's parameter is; nowhere if other ranks hold all of it.

        Raises:
            NoPlaceError: a change of it could not be added.
        """
        part = name.rpartition(".")[2]
        layer, number = self._find(name)
        if layer is None:
            return []
        if isinstance(number, str):
            return [self._expert_place(layer, part, number)]
        if part not in ("weight", "bias"):
            raise NoPlaceError(f"{type(layer).__name__} has nothing of that name that can change")
        found = list(self._places_in(layer, part, number))
        for other in self._tied_to(layer) if part == "weight" else ():
            found += self._places_in(other, part, None)
        if self._tied and self._has_logits and self._kind(layer) == "embedding":
            heads = any(isinstance(place.site, LinearSite) for place in found)
            if not heads and not self._elsewhere:
                raise NoPlaceError("a head is tied to it, and vLLM's model has none of its layers")
        return found

    def _tied_to(self, layer: Any) -> list[Any]:
        """The head of an embedding that is also the head's weight, or the other way round."""
        if not self._tied or self._kind(layer) not in _VOCABULARY:
            return []
        other = _VOCABULARY[1 - _VOCABULARY.index(self._kind(layer) or "")]
        found = {id(one): one for one in self._layers.values() if self._kind(one) == other}
        return list(found.values())

    def _expert_place(self, layer: Any, part: str, matrix: str) -> Place:
        site = self._sites.get((id(layer), ExpertsSite))
        if site is None or part != "weight":
            raise NoPlaceError("experts of this kind, or in this engine, cannot differ by request")
        return Place(site, layer, matrix, expert_shard(layer, matrix.partition(".")[2]))

    def _places_in(self, layer: Any, part: str, number: int | None) -> Iterator[Place]:
        kind = self._kind(layer)
        if kind is None:
            raise NoPlaceError(f"no change can be added to a {type(layer).__name__}")
        if part == "bias" and getattr(layer, "bias", None) is None:
            raise NoPlaceError("vLLM's layer has no bias")
        if part == "bias" and getattr(layer, "skip_bias_add", False):
            raise NoPlaceError("vLLM adds that bias outside of the layer")
        if kind in ("rms_norm", "gemma_rms_norm", "layer_norm"):
            width = int(layer.weight.numel())
            shard = Shard((width,), (0, width), (0, 1), 0)
            yield Place(self._sites[id(layer), NormSite], layer, part, shard)
        elif kind == "positions":
            rows, columns = (int(size) for size in layer.weight.shape)
            shard = Shard((rows, columns), (0, rows), (0, columns), 0)
            yield Place(self._sites[id(layer), EmbeddingSite], layer, part, shard)
        elif kind in _VOCABULARY:
            for site_type in (EmbeddingSite, LinearSite):
                site = self._sites.get((id(layer), site_type))
                if site is not None:
                    for shard in embedding_shards(layer, part):
                        yield Place(site, layer, part, shard)
        else:
            site = self._sites[id(layer), LinearSite]
            for shard in linear_shards(layer, kind.removesuffix("+"), number, part):
                yield Place(site, layer, part, shard)

    def _find(self, name: str) -> tuple[Any | None, int | str | None]:
        """The layer of a parameter, and its number among those fused; None: on another stage.

        Of experts, the matrix instead of the number: "3.w1".

        Raises:
            NoPlaceError: the model has none.
        """
        mapped = name if self._mapper is None else self._mapper.map_name(name)
        if mapped is None:
            raise NoPlaceError("vLLM does not load it")
        path = mapped.rpartition(".")[0]
        for variant in (path, f"model.{path}", path.removeprefix("model.")):
            if variant in self._layers:
                return self._layers[variant], None
            parent, _, last = variant.rpartition(".")
            for fused, names in self._packed.items():
                whole = f"{parent}.{fused}" if parent else fused
                if last in names and whole in self._layers:
                    return self._layers[whole], names.index(last)
            owner, _, expert = parent.rpartition(".")
            experts = self._layers.get(f"{owner}.routed_experts")
            if experts is not None and expert.isdecimal():
                return experts, f"{int(expert)}.{_matrix_of(experts, last)}"
            if any(f"{variant}.".startswith(f"{other}.") for other in self._elsewhere):
                return None, None
        raise NoPlaceError("vLLM's model has no such layer")

    def _kind_named(self, name: str) -> str | None:
        try:
            return self._kind(self._find(name)[0])
        except NoPlaceError:
            return None

    def _kind(self, layer: Any) -> str | None:
        return self._kinds.get(id(layer))

    def _take(self, name: str, module: Any, has_rows: Callable[[str], bool]) -> None:
        """Make a site of a module, if it is a layer of a kind that is known."""
        from vllm.model_executor.models.utils import PPMissingLayer

        if isinstance(module, PPMissingLayer):
            self._elsewhere.append(name)
            return
        # Inside of vLLM's wrapper for LoRA, which has the layer's own name and comes first.
        name = name.replace(".base_layer", "")
        self._layers[name] = module
        if id(module) in self._kinds:
            return
        kind = _kind_of(module) if has_rows(name) else None
        if kind is None:
            return
        self._kinds[id(module)] = kind
        if kind == "positions":
            positions = EmbeddingSite(name, self.rows)
            positions.wrap_positions(module)
            self._sites[id(module), EmbeddingSite] = positions
        elif kind == "embedding":
            embedding = EmbeddingSite(name, self.rows, self._added_rows(module))
            embedding.wrap(module)
            self._sites[id(module), EmbeddingSite] = embedding
            if module is getattr(self.model, "lm_head", None):
                self._take_linear(name, module, of_samples=True)
        elif kind == "head":
            self._take_linear(name, module, of_samples=True)
        elif kind == "experts":
            experts = ExpertsSite(name, self.rows)
            experts.wrap(module)
            self._sites[id(module), ExpertsSite] = experts
        elif kind in ("rms_norm", "gemma_rms_norm", "layer_norm"):
            self._take_norm(name, module, kind)
        else:
            self._take_linear(name, module, of_samples=False)

    def _take_linear(self, name: str, layer: Any, *, of_samples: bool) -> None:
        bias = getattr(layer, "bias", None)
        width = 0 if bias is None else int(bias.numel())
        added = self._added_rows(layer) if of_samples else None
        site = LinearSite(name, self.rows, bias_width=width, of_samples=of_samples, added=added)
        if self._kinds[id(layer)].endswith("+"):
            site.wrap_forward(layer)
        else:
            site.wrap(layer)
        self._sites[id(layer), LinearSite] = site

    def _take_embedding_as_head(self) -> None:
        """Some models ask their embedding for logits, and have no head that is tied to it."""
        heads = any(kind == "head" for kind in self._kinds.values())
        vocabularies = {
            id(layer): (name, layer)
            for name, layer in self._layers.items()
            if self._kind(layer) == "embedding"
        }
        if self._tied and self._has_logits and not heads and len(vocabularies) == 1:
            name, layer = next(iter(vocabularies.values()))
            if (id(layer), LinearSite) not in self._sites:
                self._take_linear(name, layer, of_samples=True)

    def _added_rows(self, layer: Any) -> AddedRows:
        return AddedRows(self.rows, held_spare_rows(layer)[2])

    def _take_norm(self, name: str, layer: Any, kind: str) -> None:
        bias = getattr(layer, "bias", None)
        widths = int(layer.weight.numel()), 0 if bias is None else int(bias.numel())
        one, centred = float(kind == "gemma_rms_norm"), kind == "layer_norm"
        site = NormSite(name, self.rows, widths, one=one, centred=centred, batched=self._batched)
        site.wrap(layer)
        self._sites[id(layer), NormSite] = site


_VOCABULARY = ("embedding", "head")
_TRANSFORMERS = "vllm.model_executor.models.transformers"


def _kind_of(module: Any) -> str | None:
    """What kind of layer a module is: only those of which the slicing is known; None: another."""
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if isinstance(module, linear.LinearBase):
        return _linear_kind(module)
    if isinstance(module, VocabParallelEmbedding):
        return _vocabulary_kind(module)
    if isinstance(module, RoutedExperts):
        return "experts" if is_plain_experts(module) else None
    opt = sys.modules.get("vllm.model_executor.models.opt")
    if opt is not None and isinstance(module, opt.OPTLearnedPositionalEmbedding):
        return "positions"
    weight = getattr(module, "weight", None)
    return _norm_kind(module) if weight is not None and weight.dim() == 1 else None


def _matrix_of(experts: Any, name: str) -> str:
    """w1, w2 or w3, of the checkpoint's name for one of an expert's matrices."""
    names = {
        experts.ckpt_gate_proj_name: "w1",
        experts.ckpt_down_proj_name: "w2",
        experts.ckpt_up_proj_name: "w3",
    }
    if name not in names:
        raise NoPlaceError("vLLM's experts have no such matrix")
    return names[name]


def _linear_kind(module: Any) -> str | None:
    from vllm.model_executor.layers import linear

    for kind, base in (
        ("qkv", linear.QKVParallelLinear),
        ("merged", linear.MergedColumnParallelLinear),
        ("column", linear.ColumnParallelLinear),
        ("row", linear.RowParallelLinear),
        ("replicated", linear.ReplicatedLinear),
    ):
        if isinstance(module, base):
            if not _inherits(module, base, *_SLICING):
                return None
            if _inherits(module, base, "forward"):
                return kind
            return "replicated+" if kind == "replicated" else None
    return None


def _vocabulary_kind(module: Any) -> str | None:
    from vllm.model_executor.layers import vocab_parallel_embedding as vocabulary

    own = _inherits(module, vocabulary.VocabParallelEmbedding, "_get_indices", "weight_loader")
    if module.num_added_embeddings or not own:
        return None
    return "head" if isinstance(module, vocabulary.ParallelLMHead) else "embedding"


def _norm_kind(module: Any) -> str | None:
    from vllm.model_executor.layers import layernorm

    for kind, base, forward in (
        ("gemma_rms_norm", layernorm.GemmaRMSNorm, "forward_native"),
        ("rms_norm", layernorm.RMSNorm, "forward_native"),
        ("layer_norm", layernorm.LayerNorm, "forward_native"),
        ("layer_norm", torch.nn.LayerNorm, "forward"),
    ):
        if isinstance(module, base) and getattr(module, "has_weight", True):
            # One that overrides what calls that function may gather ranks' parts first.
            whole = _inherits(module, base, "forward") or getattr(module, "tp_size", 0) == 1
            return kind if whole and _inherits(module, base, forward) else None
    return None


_SLICING = ("weight_loader", "weight_loader_v2", "_get_shard_offset_mapping")


def _inherits(module: Any, base: type, *names: str) -> bool:
    """Whether a module's functions of these names are those of a base class."""
    return all(_function(type(module), name) is _function(base, name) for name in names)


def _function(owner: type, name: str) -> Any:
    found = getattr(owner, name, None)
    return getattr(found, "__func__", found)  # of a class method
