"""mergekit's merge methods, and the options with which ours give its numbers.

Where a method's name is the same here and there its defaults are not, so that every option is
stated. What is noted as mergekit's was read and measured in version 0.1.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dare_adapters.errors import RecipeError
from dare_adapters.recipe.document import nearest
from dare_adapters.recipe.parameters import Parameter

__all__ = ["MERGE_METHODS", "PARAMETER_NAMES", "MergeMethod", "Values", "get_merge_method"]

Values = Mapping[str, Any]
"""Resolved parameters of one tensor: a list, one for each input, unless shared."""

NO_DIVISOR = 1e-8  # what mergekit takes for a sum of weights of zero: it does not divide then


@dataclass(frozen=True)
class MergeMethod:
    """How a method of mergekit is run here.

    Attributes:
        name: in recipes.
        combination_type: our method; "passthrough" is none, but a copy.
        base: "required", "optional", or "ignored" (then `base_model` is an input like others).
        parameters: what it reads.
        options: our options from resolved parameters and whether there is a base.
        least, most: inputs besides the base.
        base_is_first: our method takes the base as its first input.
        copies_singles: whether a tensor that only one model has is copied; where that is the base
            it always is.
    """

    name: str
    combination_type: str
    base: str
    parameters: tuple[Parameter, ...]
    options: Callable[[Values, bool], dict[str, Any]]
    least: int = 1
    most: int | None = None
    base_is_first: bool = False
    copies_singles: bool = False

    def parameter(self, name: str) -> Parameter | None:
        """Its parameter of that name."""
        return next((own for own in self.parameters if own.name == name), None)


def get_merge_method(name: str) -> MergeMethod:
    """The method of a name in recipes.

    Raises:
        RecipeError: there is none; the message lists those there are.
    """
    if name not in MERGE_METHODS:
        raise RecipeError(
            f"merge_method is {name!r}{nearest(name, MERGE_METHODS)}; there are "
            f"{', '.join(MERGE_METHODS)}"
        )
    return MERGE_METHODS[name]


def _normalize(values: Values) -> bool:
    return bool(values["normalize"]) and abs(sum(values["weight"])) >= NO_DIVISOR


def _rescale(values: Values) -> str:
    """To the L1 norm that the delta had, and not by 1/density as DARE's paper has it."""
    return "l1" if values["rescale"] else "none"


def _election(values: Values) -> dict[str, Any]:
    """mergekit's sign election: weighted deltas vote, those that agree are summed."""
    return {
        "majority_sign_method": "total",
        "vote": "weighted",
        "divisor": "weights" if values["normalize"] else "none",
    }


def _linear(values: Values, base: bool) -> dict[str, Any]:
    # Without a base the deltas are the parameters themselves.
    if values["normalize"] and sum(values["weight"]) == 0:
        raise RecipeError(f"linear divides by the sum of the weights {values['weight']}, zero")
    return {"normalize": values["normalize"], "lambda_": 1.0}


def _task_arithmetic(values: Values, base: bool) -> dict[str, Any]:
    return {"normalize": _normalize(values), "lambda_": values["lambda"]}


def _ties(values: Values, base: bool) -> dict[str, Any]:
    return {
        "density": values["density"],
        # However low the density, mergekit keeps one entry; of a density of zero it keeps none.
        "least": int(all(density > 0 for density in values["density"])),
        "rescale": _rescale(values),
        "trim_scope": "parameter",
        **_election(values),
        "lambda_": values["lambda"],
    }


def _sum_of(*names: str) -> Callable[[Values, bool], dict[str, Any]]:
    """Options of sparsifying by the parameters `names`, then a weighted sum."""

    def options(values: Values, base: bool) -> dict[str, Any]:
        return {
            **{name: values[name] for name in names},
            "rescale": _rescale(values),
            "normalize": _normalize(values),
            "lambda_": values["lambda"],
        }

    return options


def _election_of(*names: str) -> Callable[[Values, bool], dict[str, Any]]:
    """Options of sparsifying by the parameters `names`, then a sign election."""

    def options(values: Values, base: bool) -> dict[str, Any]:
        return {
            **{name: values[name] for name in names},
            "rescale": _rescale(values),
            **_election(values),
            "lambda_": values["lambda"],
        }

    return options


def _della(
    options: Callable[[Values, bool], dict[str, Any]],
) -> Callable[[Values, bool], dict[str, Any]]:
    """The options, once every probability density - epsilon … density + epsilon is one."""

    def checked(values: Values, base: bool) -> dict[str, Any]:
        for density, epsilon in zip(values["density"], values["epsilon"], strict=True):
            if 0 < density < 1 and (density - epsilon <= 0 or density + epsilon >= 1):
                raise RecipeError(
                    f"della keeps entries with probabilities density - epsilon … density + "
                    f"epsilon, which must lie in 0 … 1; density is {density:g}, epsilon "
                    f"{epsilon:g}"
                )
        return options(values, base)

    return checked


def _as_they_are(*names: str) -> Callable[[Values, bool], dict[str, Any]]:
    """Options that have the parameters' names."""

    def options(values: Values, base: bool) -> dict[str, Any]:
        return {name: values[name] for name in names}

    return options


def _nuslerp(values: Values, base: bool) -> dict[str, Any]:
    return {
        "flatten": values["nuslerp_flatten"],
        "row_wise": values["nuslerp_row_wise"],
        "on_deltas": base,
    }


def _multislerp(values: Values, base: bool) -> dict[str, Any]:
    weights = values["weight"]
    if values["normalize_weights"] and len(weights) > 1 and sum(weights) == 0:
        raise RecipeError(f"multislerp divides by the sum of the weights {weights}, zero")
    return {
        "normalize_weights": values["normalize_weights"],
        "eps": values["eps"],
        "on_deltas": base,
    }


def _sce(values: Values, base: bool) -> dict[str, Any]:
    return {
        "select_topk": values["select_topk"],
        "merged": "selected",
        "floor": 1e-6,
        "lambda_": 1.0,
    }


def _model_stock(values: Values, base: bool) -> dict[str, Any]:
    return {"filter_wise": values["filter_wise"], "eps": 1e-6}


def _passthrough(values: Values, base: bool) -> dict[str, Any]:
    scale = values["scale"][0]
    return {} if scale is None or scale == 1 else {"scale": scale}


_WEIGHT = Parameter("weight", scope="non_base")
_INT8_MASK = Parameter("int8_mask", bool, False, used=False)
_T = Parameter("t")
_GAMMA = Parameter("gamma", default=0.01, scope="non_base", low=0, high=1)
_EPSILON = Parameter("epsilon", default=0.15, scope="non_base", low=0, high=1)
_RAM_EPSILON = Parameter("epsilon", default=1e-5, low=0)


def _task_vectors(
    name: str,
    combination_type: str,
    options: Callable[[Values, bool], dict[str, Any]],
    *more: Parameter,
    normalize: bool = False,
    rescale: bool = False,
    sparse: bool = True,
) -> MergeMethod:
    """A method of deltas that may be made sparse, weighted and summed."""
    parameters = (
        _WEIGHT,
        Parameter("density", default=1.0, scope="non_base", low=0, high=1, used=sparse),
        *more,
        Parameter("lambda", default=1.0),
        Parameter("normalize", bool, normalize),
        Parameter("rescale", bool, rescale, used=sparse),
        _INT8_MASK,
    )
    return MergeMethod(name, combination_type, "required", parameters, options)


_ALL = (
    MergeMethod(
        "linear",
        "linear",
        "ignored",
        (Parameter("weight", scope="input"), Parameter("normalize", bool, True)),
        _linear,
    ),
    _task_vectors("task_arithmetic", "linear", _task_arithmetic, sparse=False),
    _task_vectors("ties", "ties", _ties, normalize=True),
    _task_vectors("dare_linear", "dare_linear", _sum_of("density"), rescale=True),
    _task_vectors("dare_ties", "dare_ties", _election_of("density"), rescale=True),
    _task_vectors("breadcrumbs", "breadcrumbs", _sum_of("density", "gamma"), _GAMMA),
    _task_vectors("breadcrumbs_ties", "breadcrumbs_ties", _election_of("density", "gamma"), _GAMMA),
    _task_vectors(
        "della",
        "della",
        _della(_election_of("density", "epsilon")),
        _EPSILON,
        normalize=True,
        rescale=True,
    ),
    _task_vectors(
        "della_linear",
        "della_linear",
        _della(_sum_of("density", "epsilon")),
        _EPSILON,
        rescale=True,
    ),
    MergeMethod(
        "slerp",
        "slerp",
        "required",
        (_T,),
        _as_they_are("t"),
        most=1,
        base_is_first=True,
        copies_singles=True,
    ),
    MergeMethod(
        "nuslerp",
        "nuslerp",
        "optional",
        (
            _WEIGHT,
            Parameter("nuslerp_row_wise", bool, False),
            Parameter("nuslerp_flatten", bool, True),
        ),
        _nuslerp,
        least=2,
        most=2,
        copies_singles=True,
    ),
    MergeMethod(
        "multislerp",
        "multislerp",
        "optional",
        (
            _WEIGHT,
            Parameter("normalize_weights", bool, True),
            Parameter("eps", default=1e-8, low=0),
        ),
        _multislerp,
    ),
    MergeMethod(
        "karcher",
        "karcher",
        "ignored",
        (Parameter("max_iter", int, 10, low=0), Parameter("tol", default=1e-5, low=0)),
        _as_they_are("max_iter", "tol"),
    ),
    MergeMethod(
        "model_stock",
        "model_stock",
        "required",
        (Parameter("filter_wise", bool, False),),
        _model_stock,
        least=2,
    ),
    MergeMethod(
        "nearswap",
        "nearswap",
        "required",
        (Parameter("t", low=0),),
        _as_they_are("t"),
        most=1,
    ),
    MergeMethod(
        "arcee_fusion", "arcee_fusion", "required", (), _as_they_are(), most=1, copies_singles=True
    ),
    MergeMethod(
        "sce",
        "sce",
        "required",
        (Parameter("select_topk", default=1.0, low=0, high=1), _INT8_MASK),
        _sce,
    ),
    MergeMethod("ram", "ram", "required", (_RAM_EPSILON,), _as_they_are("epsilon")),
    MergeMethod(
        "ramplus_tl",
        "ramplus_tl",
        "required",
        (
            Parameter("r", default=0.1),
            Parameter("alpha", default=0.2, low=0),
            _RAM_EPSILON,
        ),
        _as_they_are("r", "alpha", "epsilon"),
    ),
    MergeMethod(
        "passthrough",
        "passthrough",
        "ignored",
        (Parameter("scale", default=None, scope="input"),),
        _passthrough,
        most=1,
    ),
)

MERGE_METHODS = {method.name: method for method in _ALL}

PARAMETER_NAMES = frozenset(own.name for method in _ALL for own in method.parameters)
