"""Recipes without random choices; `$name` stands for a model of `models.py`."""

from __future__ import annotations

import re
from typing import Any

import yaml

from tests.recipe.cards import CARDS

__all__ = ["ADVERTISED", "HALF_PRECISION", "METHODS", "STRUCTURES", "recipe"]


def recipe(
    method: str,
    models: dict[str, dict[str, Any]],
    *,
    base: str | None = "base",
    **parameters: Any,
) -> str:
    """A recipe's text: models with parameters of their own, a base, and parameters for all."""
    found: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": f"${name}", "parameters": own} for name, own in models.items()],
        "parameters": parameters,
    }
    if base is not None:
        found["base_model"] = f"${base}"
    return yaml.safe_dump(found, sort_keys=False)


def _weighted(*weights: float, names: str = "abc", **own: Any) -> dict[str, dict[str, Any]]:
    return {
        name: {"weight": weight, **{key: values[number] for key, values in own.items()}}
        for number, (name, weight) in enumerate(zip(names, weights, strict=False))
    }


def _plain(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {} for name in names}


_near = {"near_a": {"weight": 0.5}, "near_b": {"weight": 0.3}, "near_c": {"weight": 0.9}}
_three = _weighted(0.5, 0.3, 0.9)
_dense = _weighted(0.5, 0.3, 0.9, density=(0.5, 0.2, 0.9))
_opposed = _weighted(1.0, -0.7, 0.4, density=(0.5, 0.6, 1.0))
_outliers = _weighted(0.5, 0.3, 0.9, density=(0.5, 0.2, 0.9), gamma=(0.01, 0.1, 0.3))
_slerped = _plain("a", "base")

METHODS = {
    "linear": recipe("linear", _three, base=None),
    "linear_sum": recipe("linear", _weighted(0.5, -0.3, 2.0), base=None, normalize=False),
    "linear_of_one": recipe("linear", _weighted(0.5), base=None),
    "task_arithmetic": recipe("task_arithmetic", _three),
    "task_arithmetic_mean": recipe("task_arithmetic", _three, normalize=True),
    "task_arithmetic_lambda": recipe("task_arithmetic", _near, **{"lambda": -0.6}),
    "task_arithmetic_no_weight": recipe(
        "task_arithmetic", _weighted(1.0, -1.0), normalize=True, **{"lambda": 0.4}
    ),
    "ties": recipe("ties", _dense),
    "ties_near": recipe("ties", _near, density=0.3),
    "ties_sum": recipe("ties", _dense, normalize=False, rescale=True),
    "ties_opposed": recipe("ties", _opposed, **{"lambda": 1.5}),
    "ties_of_one": recipe("ties", _weighted(0.6), density=0.1),
    "ties_of_one_entry": recipe("ties", _three, density=1e-9),
    "ties_of_nothing": recipe("ties", _weighted(0.6, 0.5, density=(0.0, 0.5))),
    "ties_int8": recipe("ties", _dense, int8_mask=True),
    "breadcrumbs": recipe("breadcrumbs", _outliers),
    "breadcrumbs_mean": recipe("breadcrumbs", _outliers, normalize=True, rescale=True),
    "breadcrumbs_defaults": recipe("breadcrumbs", _three, density=0.9),
    "breadcrumbs_all_outliers": recipe("breadcrumbs", _three, density=0.5, gamma=0.9),
    "breadcrumbs_dense": recipe("breadcrumbs", _three, gamma=0.2),
    "breadcrumbs_ties": recipe("breadcrumbs_ties", _outliers),
    "breadcrumbs_ties_mean": recipe(
        "breadcrumbs_ties", _outliers, normalize=True, rescale=True, **{"lambda": 0.8}
    ),
    # Without random choices, since nothing or everything is dropped.
    "dare_linear_dense": recipe("dare_linear", _three, density=1.0),
    "dare_ties_dense": recipe("dare_ties", _weighted(1.0, -0.7, 0.4), density=1.0),
    "dare_ties_of_nothing": recipe("dare_ties", _three, density=0.0),
    "della_dense": recipe("della", _three, density=1.0),
    "della_linear_dense": recipe("della_linear", _three, density=1.0, epsilon=0.3),
    "slerp": recipe("slerp", _slerped, t=0.3),
    "slerp_beyond": recipe("slerp", _slerped, t=1.2),
    "slerp_near": recipe("slerp", _plain("near_a", "base"), t=0.7),
    "nuslerp": recipe("nuslerp", _weighted(0.5, 0.3), base=None),
    "nuslerp_near": recipe(
        "nuslerp", {"near_a": {"weight": 1}, "near_b": {"weight": 2}}, base=None
    ),
    "nuslerp_near_rows": recipe(
        "nuslerp",
        {"near_a": {"weight": 1}, "near_b": {"weight": 2}},
        base=None,
        nuslerp_flatten=False,
    ),
    "nuslerp_of_deltas": recipe("nuslerp", _weighted(0.5, 0.3)),
    "nuslerp_no_weight": recipe("nuslerp", _weighted(0.5, -0.5)),
    "nuslerp_rows": recipe("nuslerp", _weighted(2, 1), nuslerp_flatten=False, base=None),
    "nuslerp_columns": recipe(
        "nuslerp", _weighted(2, 1), nuslerp_flatten=False, nuslerp_row_wise=True
    ),
    "multislerp": recipe("multislerp", _three, base=None),
    "multislerp_near": recipe("multislerp", _near, base=None),
    "multislerp_of_deltas": recipe("multislerp", _three),
    "multislerp_sum": recipe("multislerp", _three, normalize_weights=False, eps=1e-3),
    "multislerp_of_one": recipe("multislerp", _weighted(0.3)),
    "karcher": recipe("karcher", _plain("a", "b", "c"), base=None),
    "karcher_near": recipe("karcher", _plain("near_a", "near_b", "near_c"), base=None),
    "karcher_exact": recipe("karcher", _plain("a", "b"), base=None, max_iter=50, tol=1e-7),
    "karcher_near_exact": recipe(
        "karcher", _plain("near_a", "near_b", "near_c"), base=None, max_iter=30, tol=1e-7
    ),
    "model_stock": recipe("model_stock", _plain("a", "b", "c")),
    "model_stock_near": recipe("model_stock", _plain("near_a", "near_b")),
    "model_stock_rows": recipe("model_stock", _plain("a", "b"), filter_wise=True),
    "model_stock_near_rows": recipe("model_stock", _plain("near_a", "near_b"), filter_wise=True),
    "nearswap": recipe("nearswap", _plain("a", "base"), t=0.01),
    "nearswap_near": recipe("nearswap", _plain("near_a"), t=0.0002),
    "arcee_fusion": recipe("arcee_fusion", _plain("a", "base")),
    "arcee_fusion_near": recipe("arcee_fusion", _plain("near_a")),
    "sce": recipe("sce", _plain("a", "b", "c")),
    "sce_some": recipe("sce", _plain("a", "b", "c"), select_topk=0.4),
    "sce_near": recipe("sce", _plain("near_a", "near_b"), select_topk=0.7),
    "sce_of_one": recipe("sce", _plain("a"), select_topk=0.5),
    "ram": recipe("ram", _plain("a", "b", "c"), epsilon=0.02),
    "ram_near": recipe("ram", _plain("near_a", "near_b")),
    "ramplus_tl": recipe("ramplus_tl", _plain("a", "b", "c"), epsilon=0.03, r=0.5, alpha=1.0),
    "passthrough": recipe("passthrough", _plain("a"), base=None),
    "passthrough_scaled": recipe("passthrough", {"a": {"scale": 0.7}}, base=None),
}
"""Every method that needs no random choice, under every parameter it has."""

STRUCTURES = {
    "gradients": """
merge_method: task_arithmetic
base_model: $base
models:
- model: $a
  parameters: {weight: [0, 0.3, 0.7, 1, 2]}
- model: $b
  parameters: {weight: [1, 0]}
- model: $c
  parameters: {weight: [0.4]}
parameters: {lambda: [1, 0.25]}
""",
    "gradients_of_densities": """
merge_method: ties
base_model: $base
models:
- model: $a
  parameters: {density: [1, 0.7, 0.1], weight: 1.0}
- model: $b
  parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
parameters: {normalize: [true, false]}
""",
    "filters": """
merge_method: slerp
base_model: $base
models: [{model: $base}, {model: $a}]
parameters:
  t:
  - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
  - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
  - {filter: "layers.2.", value: 0.9}
  - value: 0.5
""",
    "filters_that_fall_through": """
merge_method: task_arithmetic
base_model: $base
models:
- model: $a
  parameters:
    weight: [{filter: mlp, value: [0.1, 0.9]}, {filter: q_proj, value: 2}]
- model: $b
  parameters: {weight: {filter: "*", value: 0.3}}
- model: $c
parameters:
  weight: 0.7
  normalize: [{filter: self_attn, value: true}]
""",
    "the_base_anywhere": """
merge_method: ties
base_model: $base
models:
- model: $b
  parameters: {weight: 0.4}
- model: $base
- model: $a
  parameters: {weight: 1, density: 0.2}
parameters: {density: 0.6}
""",
    "modules": """
merge_method: ties
base_model: $base
modules:
  default:
    parameters: {density: 0.25, lambda: 0.7}
    models:
    - model: $a
      parameters: {weight: 1}
    - model: $b
      parameters: {weight: 1, density: 0.75}
parameters: {density: 0.1, normalize: false}
""",
    "stacked": """
merge_method: passthrough
slices:
- sources: [{model: $a, layer_range: [0, 3]}]
- sources: [{model: $deep_a, layer_range: [1, 6]}]
""",
    "stacked_twice": """
merge_method: passthrough
slices:
- sources: [{model: $a, layer_range: [0, 2]}]
- sources:
  - model: $a
    layer_range: [1, 3]
    parameters:
      scale:
      - {filter: o_proj, value: 0.0}
      - {filter: layers.2.mlp.down_proj, value: 0.25}
      - value: 1.0
- sources: [{model: $b, layer_range: [3, 4]}]
""",
    "merged_slices": """
merge_method: linear
slices:
- sources:
  - {model: $a, layer_range: [0, 2], parameters: {weight: [1, 0]}}
  - {model: $deep_a, layer_range: [2, 4], parameters: {weight: [0.5, 1]}}
- parameters: {normalize: false, weight: 0.5}
  sources:
  - {model: $deep_a, layer_range: [3, 6]}
  - {model: $b, layer_range: [1, 4], parameters: {weight: [{filter: self_attn, value: 0.75}]}}
parameters: {normalize: true}
""",
    "slices_of_one_layer": """
merge_method: linear
slices:
- sources:
  - {model: $a, layer_range: [0, 1], parameters: {weight: [0, 1]}}
  - {model: $b, layer_range: [3, 4], parameters: {weight: [1, 0.25]}}
- sources:
  - {model: $c, layer_range: [1, 4], parameters: {weight: [0.1, 0.2, 0.7]}}
  - {model: $b, layer_range: [0, 3], parameters: {weight: 3}}
""",
    "slices_with_bases_of_their_own": """
merge_method: ties
base_model: $base
slices:
- sources:
  - {model: $a, layer_range: [0, 2], parameters: {weight: 1}}
  - {model: $base, layer_range: [0, 2]}
- base_model: $deep_base
  sources:
  - {model: $deep_base, layer_range: [2, 6]}
  - {model: $deep_a, layer_range: [2, 6], parameters: {weight: [0.2, 0.9]}}
  parameters: {density: 0.3}
parameters: {density: 0.8}
""",
    "tied": """
merge_method: task_arithmetic
base_model: $tied_base
models:
- {model: $tied_a, parameters: {weight: 0.6}}
- {model: $tied_b, parameters: {weight: 0.2}}
""",
    "tied_and_not": """
merge_method: slerp
base_model: $tied_base
models: [{model: $a}, {model: $tied_base}]
parameters: {t: [0.2, 0.4, 0.9]}
""",
    "unlisted_base_without_a_role": """
merge_method: linear
base_model: $base
models: [{model: $a}, {model: $b, parameters: {weight: 0.25}}]
parameters: {weight: 0.5}
""",
    "unlisted_base_of_karcher": """
merge_method: karcher
base_model: $base
models: [{model: $a}, {model: $b}]
""",
    "wide_linear": recipe("linear", {"wide_a": {"weight": 1}, "wide_b": {"weight": 2}}, base=None),
    "wide_slerp": recipe("slerp", _plain("wide_a"), base="wide_base", t=0.4),
    "wide_task_arithmetic": recipe("task_arithmetic", _plain("wide_a"), base="wide_base", weight=2),
    "wide_ramplus_tl": recipe("ramplus_tl", _plain("wide_a", "wide_b"), base="wide_base"),
    "wide_nuslerp": recipe("nuslerp", _plain("wide_near_a", "wide_near_b"), base=None, weight=1),
    "wide_karcher": recipe(
        "karcher",
        _plain("wide_base", "wide_near_a", "wide_near_b"),
        base=None,
        max_iter=30,
        tol=1e-7,
    ),
    "wide_model_stock_rows": recipe(
        "model_stock", _plain("wide_near_a", "wide_near_b"), base="wide_base", filter_wise=True
    ),
    "wide_model_stock": recipe("model_stock", _plain("wide_a", "wide_b"), base="wide_base"),
    "wide_sce": recipe("sce", _plain("wide_a", "wide_b"), base="wide_base"),
    **{
        f"{kind}_{method}": recipe(
            method, _plain(f"{kind}_a", f"{kind}_b"), base=f"{kind}_base", **own
        )
        for kind in ("bert", "gpt2", "neo")
        for method, own in (
            ("task_arithmetic", {"weight": [0.2, 0.9]}),
            ("ties", {"weight": 1, "density": 0.4}),
            ("model_stock", {}),
            ("multislerp", {"weight": 1}),
        )
    },
    "gpt2_slerp": recipe(
        "slerp",
        _plain("gpt2_a"),
        base="gpt2_base",
        t=[{"filter": "attn", "value": [0, 1]}, {"value": 0.4}],
    ),
    "gpt2_stacked": """
merge_method: passthrough
slices:
- sources: [{model: $gpt2_a, layer_range: [0, 2]}]
- sources: [{model: $gpt2_b, layer_range: [0, 3]}]
""",
    "bert_stacked": """
merge_method: passthrough
slices:
- sources: [{model: $bert_a, layer_range: [0, 3]}]
- sources: [{model: $bert_b, layer_range: [1, 3]}]
""",
}
"""Gradients, filters, slices, modules, tied heads, and architectures."""


_DTYPE = re.compile(r"^(out_)?dtype: .*\n|^tokenizer.*\n", re.MULTILINE)

ADVERTISED = {
    card: _DTYPE.sub("", text)
    for card, text in CARDS.items()
    if not card.startswith(("dare", "della")) and card != "tokens"
}
"""What model cards show, without data types and vocabularies, and without random choices."""

HALF_PRECISION = {
    "passthrough": recipe("passthrough", _plain("half_a"), base=None),
    "stacked": """
merge_method: passthrough
slices:
- sources: [{model: $half_a, layer_range: [0, 3]}]
- sources: [{model: $half_b, layer_range: [1, 4]}]
""",
    # These two mergekit computes in float32 whatever the inputs are,
    "linear": recipe("linear", {"half_a": {"weight": 0.3}, "half_b": {"weight": 0.8}}, base=None),
    "slerp": recipe("slerp", _plain("half_a"), base="half_base", t=0.35),
    # and these if it is told to.
    **{
        method: recipe(method, _plain("half_a", "half_b"), base="half_base", **own)
        + "dtype: float32\nout_dtype: bfloat16\n"
        for method, own in (
            ("task_arithmetic", {"weight": 0.6}),
            ("nuslerp", {"weight": 1}),
            ("multislerp", {"weight": 1}),
            ("karcher", {}),
            ("model_stock", {}),
            ("sce", {}),
            ("ram", {"epsilon": 0.01}),
        )
    },
}
"""Of bfloat16 models."""
