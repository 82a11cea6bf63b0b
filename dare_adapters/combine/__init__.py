"""Making one delta of several: PEFT's, mergekit's and MergeLM's methods, and those users add."""

from importlib import import_module

from dare_adapters.combine.combination import Combination, Statistics
from dare_adapters.combine.registry import (
    Method,
    delta_method,
    get_method,
    method_names,
    parameter_method,
)

__all__ = [
    "Combination",
    "Method",
    "Statistics",
    "delta_method",
    "get_method",
    "method_names",
    "parameter_method",
]

_FAMILIES = (
    "linear",
    "ties",
    "dare",
    "breadcrumbs",
    "della",
    "sce",
    "spherical",
    "model_stock",
    "nearswap",
    "fusion",
    "ram",
    "fisher",
    "regmean",
    "widen",
)


def load_methods() -> None:
    """Import every family of methods, which registers them."""
    for family in _FAMILIES:
        import_module(f"dare_adapters.combine.{family}")
