"""Full fine-tunes as compact adapters over a shared base."""

from dare_adapters import hf as _hf
from dare_adapters._version import __version__
from dare_adapters.adapter import Adapter
from dare_adapters.config import DareConfig
from dare_adapters.export import export
from dare_adapters.extract import extract
from dare_adapters.inspection import Inspection, inspect_adapter

__all__ = [
    "Adapter",
    "DareConfig",
    "Inspection",
    "__version__",
    "export",
    "extract",
    "inspect_adapter",
]

_hf.install()
