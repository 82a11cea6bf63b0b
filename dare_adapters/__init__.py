"""Full fine-tunes as compact adapters over a shared base."""

from typing import TYPE_CHECKING, Any

import dare_adapters.torch_import  # noqa: F401  (before what imports PyTorch otherwise)
from dare_adapters import hf as _hf
from dare_adapters._version import __version__
from dare_adapters.adapter import Adapter
from dare_adapters.combine import delta_method, method_names, parameter_method
from dare_adapters.combine.api import combine
from dare_adapters.combine.mix import Mix
from dare_adapters.config import AdapterConfig
from dare_adapters.export import export
from dare_adapters.extract import extract
from dare_adapters.inspection import Inspection, inspect_adapter
from dare_adapters.merging.api import merge
from dare_adapters.on_import import after_import as _after_import
from dare_adapters.open_source import open_source
from dare_adapters.peft_method import register as _register

if TYPE_CHECKING:
    from dare_adapters.tuner.config import DareConfig

__all__ = [
    "Adapter",
    "AdapterConfig",
    "DareConfig",
    "Inspection",
    "Mix",
    "__version__",
    "combine",
    "delta_method",
    "export",
    "extract",
    "inspect_adapter",
    "merge",
    "method_names",
    "open_source",
    "parameter_method",
]

# transformers takes seconds to import; a command that does not need it need not wait.
_after_import("transformers.modeling_utils", _hf.install)
_after_import("peft", _register)


def __getattr__(name: str) -> Any:
    if name == "DareConfig":  # it is one of PEFT's, which takes seconds to import as well
        from dare_adapters.tuner import DareConfig

        return DareConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
