"""`DareConfig`: PEFT's view of an adapter, and the recipe for training one."""

from __future__ import annotations

import importlib
import json
import os
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils.peft_types import PeftType
from torch import nn

from dare_adapters import codec
from dare_adapters.checkpoint import MAX_JSON_DEPTH, nested_deeper
from dare_adapters.config import CONFIG_NAME, FORMAT_VERSION, AdapterConfig, ParameterEntry
from dare_adapters.errors import AdapterFormatError
from dare_adapters.prune import PruneRule
from dare_adapters.tuner.saving import take_description

__all__ = ["DareConfig", "OwnModules", "OwnTargets"]

# Of a file, what says how it was trained: PEFT's own fields have other meanings for others.
_RECIPE = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "train_vectors",
)
# What PEFT adds to a file; absent where `extract` wrote it.
_OF_PEFT = ("auto_mapping", "peft_version")
# Not part of what a config says.
_NOT_COPIED = ("_model", "_taken")
# What the user of an adapter decides, never its file.
_NOT_OF_FILES = ("check_base",)
_OF_FORMAT = frozenset(f.name for f in fields(AdapterConfig)) | {"digest", "mix"}


class OwnModules(list[str]):
    """`modules_to_save` that this method trains itself: false, so that PEFT does not wrap them too.

    They become values of kind "new" in the file, which is what every other loader knows.
    """

    def __bool__(self) -> bool:
        return False


class OwnTargets(set[str]):
    """`target_modules` after injection: false, so that PEFT looks for no embeddings among them.

    It would save these whole with the adapter.
    """

    def __bool__(self) -> bool:
        return False


@dataclass
class DareConfig(PeftConfig):  # type: ignore[misc]
    """An adapter of PEFT's method "DARE": one that exists, or how to train one.

    Read from a directory it describes that adapter, tensor by tensor. Made by hand it is a recipe:
    `get_peft_model(model, DareConfig(drop_rate=0.99))` trains the survivors of a random mask of
    every parameter, and `save_pretrained` writes an adapter that `load_dare_adapter` reads as well.

    Args:
        target_modules: names or endings of names of modules, or a regular expression of names;
            "all-linear"; None: every module that has floating-point parameters.
        exclude_modules: of these, which not.
        modules_to_save: modules whose parameters are trained and stored whole (task heads).
        layers_to_transform, layers_pattern: of numbered layers, which; as in PEFT.
        drop_rate: p, the share of each parameter's entries that is never trained.
        mask: "blocked", "bernoulli", or "auto": blocked wherever 1/(1-p) is a whole number.
        seed: of the mask; None: from PyTorch's seed (`torch.initial_seed()`), so that processes
            which are seeded alike train the same entries.
        bits: 8, 4, 2 or 1 quantises trained values when they are saved, as `extract` does; None
            saves them as they are. Training can only resume from what was saved as it is.
        train_vectors: train parameters of one dimension (biases, norms) of the target modules too,
            whole.
        init_weights: begin with no change; False: a random one, for tests.
        check_base: refuse a model that is not the base which the adapter was made over; not of the
            file: `PeftModel.from_pretrained(model, adapter, check_base=False)`.

    The other fields are those of the adapter format, and belong to the file.

    Raises:
        ValueError: an option is out of range.
        AdapterFormatError: the fields of a file contradict each other, or its digest.
    """

    target_modules: list[str] | set[str] | str | None = field(default=None)
    exclude_modules: list[str] | set[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    target_parameters: None = field(default=None)  # PEFT's matching looks for it
    drop_rate: float = field(default=0.9)
    mask: str = field(default="auto")
    seed: int | None = field(default=None)
    bits: int | None = field(default=None)
    train_vectors: bool = field(default=True)
    init_weights: bool = field(default=True)
    check_base: bool = field(default=True)
    training: dict[str, Any] = field(default_factory=dict)
    method: str = field(default="dare")
    rescale: bool = field(default=False)
    base_architectures: list[str] = field(default_factory=list)
    finetuned_model: dict[str, Any] = field(default_factory=dict)
    finetuned_prefix: str = field(default="")
    ignored_base_parameters: list[str] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    witness: dict[str, str] = field(default_factory=dict)
    fidelity: dict[str, dict[str, float]] = field(default_factory=dict)
    base_parameter_count: int = field(default=0)
    library_versions: dict[str, str] = field(default_factory=dict)
    sha256: str = field(default="")
    format_version: int = field(default=FORMAT_VERSION)
    digest: str | None = field(default=None)
    mix: dict[str, Any] | None = field(default=None)

    def __post_init__(self) -> None:
        of_peft = {key: value for key in _OF_PEFT if (value := getattr(self, key)) is not None}
        raw = {key: getattr(self, key) for key in _OF_FORMAT if hasattr(self, key)}
        super().__post_init__()
        self.peft_type = PeftType("DARE")
        if self.mix is not None:
            raise AdapterFormatError(
                "this adapter_config.json is that of a mix, which has no tensors of its own: load "
                "it with model.load_dare_adapter, or write it out with dare_adapters.combine"
            )
        self._of_peft = of_peft
        self._described = self._describe(raw) if self.digest is not None else None
        if self._described is None:
            self._check_recipe()
        elif not of_peft.get("auto_mapping") and self.base_architectures:
            self.auto_mapping = {
                "base_model_class": self.base_architectures[0],
                "parent_library": _library_of(self.base_architectures[0]),
            }
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self.own_modules(self.modules_to_save)

    def __getstate__(self) -> dict[str, Any]:
        return {key: one for key, one in self.__dict__.items() if key not in _NOT_COPIED}

    @property
    def injected_into(self) -> nn.Module | None:
        """The model that this adapter was put into last."""
        found = self.__dict__.get("_model")
        return None if found is None else found()

    def note_injection(self, model: nn.Module) -> None:
        """Remember a model, for the loaders that are not told of it."""
        self._model = weakref.ref(model)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The fields of a file, but for those that only a user may set."""
        found: dict[str, Any] = super().from_json_file(path_json_file, **kwargs)
        return {key: one for key, one in found.items() if key not in _NOT_OF_FILES}

    def keep_unplaced(self, tensors: dict[str, torch.Tensor]) -> None:
        """Remember tensors of the file for which the model has no place, to be saved again."""
        self._unplaced = tensors

    @property
    def unplaced(self) -> dict[str, torch.Tensor]:
        """Those tensors, by their keys in the file."""
        found: dict[str, torch.Tensor] = self.__dict__.get("_unplaced", {})
        return found

    @property
    def described(self) -> AdapterConfig | None:
        """The adapter that this was read from; None: a recipe."""
        return self._described

    @property
    def entries(self) -> dict[str, ParameterEntry]:
        """How each parameter of a described adapter is stored."""
        return {} if self._described is None else self._described.parameters

    @property
    def rule(self) -> PruneRule:
        """How a parameter's mask is drawn."""
        return PruneRule("drop_only", self.drop_rate, self.mask)

    def own_modules(self, names: Iterable[str] | None) -> None:
        """Take over the training of modules that PEFT would wrap in modules of its own."""
        self.modules_to_save = None if names is None else OwnModules(names)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write adapter_config.json: of the adapter whose tensors were taken last, or the recipe.

        Args:
            save_directory: where, beside the tensors file if that is there already.
            **kwargs: `auto_mapping_dict`, of PEFT.
        """
        directory = Path(save_directory)
        if directory.is_file():
            raise ValueError(f"{save_directory} is a file; an adapter is a directory")
        directory.mkdir(parents=True, exist_ok=True)
        auto_mapping = kwargs.pop("auto_mapping_dict", None)
        description = take_description(self, directory)
        if description is None:
            self._save_recipe(directory, auto_mapping)
            return
        extra: dict[str, Any] = dict(self._of_peft)
        if description is not self._described:
            extra["peft_version"] = self.peft_version
            if auto_mapping or self.auto_mapping:
                extra["auto_mapping"] = auto_mapping or self.auto_mapping
            extra["training"] = self.recipe() or self.training
        elif self.training:
            extra["training"] = self.training
        description.save(directory, extra)

    def recipe(self) -> dict[str, Any]:
        """The options of training that are not their defaults, as JSON."""
        found = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in _RECIPE and value is not None and value != one.default:
                found[one.name] = _plain(value)
        return found

    def _save_recipe(self, directory: Path, auto_mapping: dict[str, Any] | None) -> None:
        written: dict[str, Any] = {}
        for one in fields(self):
            if one.name in _NOT_OF_FILES:
                continue
            value = getattr(self, one.name)
            default = one.default_factory() if callable(one.default_factory) else one.default
            if one.name not in _OF_FORMAT or default is MISSING or value != default:
                written[one.name] = _plain(value)
        written["peft_type"] = self.peft_type.value
        if auto_mapping is not None:
            written["auto_mapping"] = auto_mapping
        text = json.dumps(written, indent=2, sort_keys=True)
        (directory / CONFIG_NAME).write_text(text, encoding="utf-8")

    def _describe(self, raw: dict[str, Any]) -> AdapterConfig:
        if nested_deeper(raw, MAX_JSON_DEPTH):
            raise AdapterFormatError(f"{CONFIG_NAME}: nested deeper than {MAX_JSON_DEPTH} levels")
        raw["peft_type"] = "DARE"
        return AdapterConfig.from_json(raw, CONFIG_NAME)

    def _check_recipe(self) -> None:
        if self.parameters or self.sha256:
            raise AdapterFormatError(
                f"{CONFIG_NAME}: it lists the tensors of an adapter, and has no digest of what it "
                "lists; the file was edited or damaged"
            )
        self.rule  # noqa: B018 (checks its options)
        if self.bits is not None and (type(self.bits) is not int or self.bits not in codec.BITS):
            listed = ", ".join(map(str, codec.BITS))
            raise ValueError(f"bits is {self.bits!r}; there are {listed}, or None for no rounding")
        if self.seed is not None and not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed is {self.seed!r}; it must be a whole number of 64 bits")


def _library_of(architecture: str) -> str:
    """Where PEFT's automatic classes shall look for the base's class."""
    if not _has("transformers", architecture):
        with suppress(ImportError):
            if _has("diffusers", architecture):
                return "diffusers"
    return "transformers"


def _has(library: str, name: str) -> bool:
    """Whether a library has a name; nothing is imported for it, and `dir` takes half a second."""
    module = importlib.import_module(library)
    return name in vars(module) or name in getattr(module, "__all__", ())


def _plain(value: Any) -> Any:
    """As JSON has it, which would write a list that is false as an empty one."""
    if isinstance(value, set):
        return sorted(value)
    return list(value) if isinstance(value, list) else value
