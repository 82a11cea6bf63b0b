"""What a parameter is worth where: gradients, filters, levels, defaults."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters.combine import get_method
from dare_adapters.errors import CombinationError, RecipeError
from dare_adapters.recipe import MERGE_METHODS, get_merge_method
from dare_adapters.recipe.document import read_document
from dare_adapters.recipe.parameters import REQUIRED, Parameter, evaluate, read_parameters, resolve

WEIGHT = Parameter("x")
FLAG = Parameter("x", bool, False)
COUNT = Parameter("x", int, 1)
FINITE = st.floats(-1e6, 1e6)


def written(value: object) -> dict:
    return dict(read_parameters(read_document({"x": value})[0]))


def at(value: object, tensor: str = "model.norm.weight", t: float = 0.0, parameter=WEIGHT):
    return evaluate(parameter, written(value)["x"], tensor, t)


@given(st.lists(FINITE, min_size=1, max_size=7), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_a_gradient_is_linear_interpolation_over_depth(values, t):
    expected = np.interp(t * (len(values) - 1), range(len(values)), values)
    assert at(values, t=t) == pytest.approx(expected, rel=1e-9, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "t", "expected"),
    [
        ([0, 1], 0.0, 0.0),
        ([0, 1], 1.0, 1.0),
        ([0, 0.5, 0.3, 0.7, 1], 15 / 31, 0.5 * (1 - 60 / 31 + 1) + 0.3 * (60 / 31 - 1)),
        ([1, 0.7, 0.1], 0.25, 0.85),
        ([4], 0.3, 4.0),
        (0.3, 0.9, 0.3),
        (["0", "1e-1"], 0.5, 0.05),
    ],
)
def test_gradients_by_hand(values, t, expected):
    assert at(values, t=t) == pytest.approx(expected, rel=1e-12)


def test_a_gradient_of_flags_takes_steps():
    values = [True, False, "yes"]
    found = [at(values, t=t, parameter=FLAG) for t in (0, 0.49, 0.5, 0.99, 1)]
    assert found == [True, True, False, False, True]


def test_a_whole_number_between_two_must_be_one():
    assert at([1, 3], t=0.5, parameter=COUNT) == 2
    with pytest.raises(RecipeError, match=r"x is 1\.5.*whole number"):
        at([1, 2], t=0.5, parameter=COUNT)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (1, float, 1.0),
        ("1e-5", float, 1e-5),
        ("-0.5", float, -0.5),
        (3.0, int, 3),
        ("12", int, 12),
        ("Off", bool, False),
        ("y", bool, True),
        (1, bool, True),
        (0.0, bool, False),
        (True, float, None),
        ("much", float, None),
        (float("inf"), float, None),
        ("nan", float, None),
        (2.5, int, None),
        (2, bool, None),
        ("maybe", bool, None),
    ],
)
def test_values_are_read_as_their_parameters_kind(value, kind, expected):
    parameter = Parameter("x", kind, None)
    if expected is None:
        with pytest.raises(RecipeError, match="x is"):
            at(value, parameter=parameter)
    else:
        found = at(value, parameter=parameter)
        assert (found, type(found)) == (expected, kind)


SLERP = [
    {"filter": "self_attn", "value": [0, 1]},
    {"filter": "mlp", "value": [1, 0]},
    {"value": 0.5},
]


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", 0.25),
        ("model.layers.3.mlp.up_proj.weight", 0.75),
        ("model.layers.3.input_layernorm.weight", 0.5),
        ("model.layers.3.SELF_ATTN.q_proj.weight", 0.5),  # the case counts
        ("model.layers.3.mlp.self_attn.weight", 0.25),  # the first that fits
    ],
)
def test_the_first_filter_in_the_name_decides(tensor, expected):
    assert at(SLERP, tensor, 0.25) == expected


def test_a_filter_is_a_piece_of_the_name_and_no_pattern():
    assert at([{"filter": "self_attn|mlp", "value": 1}], "x.mlp.y") is None
    assert at([{"filter": ".*", "value": 1}], "x.mlp.y") is None
    assert at([{"filter": "*", "value": 1}], "x.mlp.y") == 1
    assert at({"filter": ".mlp.", "value": 2}, "x.mlp.y") == 2


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([1, 2, 3], 1),
        ([None, 2, 3], 2),
        ([[{"filter": "attn", "value": 1}], 2, 3], 2),  # no filter fits: the next level
        ([[], 2, 3], 2),  # an empty gradient says nothing
        ([[{"filter": "mlp", "value": []}, {"value": 1}], None, 3], 3),  # nor for what it fits
        ([{"value": 1, "filter": "mlp"}, 2, 3], 1),
        ([None, None, None], 7.0),
    ],
)
def test_the_first_level_that_says_something_decides(levels, expected):
    settings = [{} if level is None else written(level) for level in levels]
    assert resolve(Parameter("x", default=7.0), settings, NAME, 0.0) == expected


def test_a_required_parameter_that_no_filter_gives_is_named():
    level = written([{"filter": "attn", "value": 1}])
    with pytest.raises(RecipeError, match=f"{NAME} of org/m has no x, which is required"):
        resolve(WEIGHT, [level], NAME, 0.0, "org/m")


# --- the table of methods

FROM_NOTES = {  # mergekit 0.1.5: base, parameters with defaults, and which are each model's own
    "linear": ("ignored", {"weight": REQUIRED, "normalize": True}, {"weight"}),
    "slerp": ("required", {"t": REQUIRED}, set()),
    "nuslerp": (
        "optional",
        {"weight": REQUIRED, "nuslerp_row_wise": False, "nuslerp_flatten": True},
        {"weight"},
    ),
    "multislerp": (
        "optional",
        {"weight": REQUIRED, "normalize_weights": True, "eps": 1e-8},
        {"weight"},
    ),
    "karcher": ("ignored", {"max_iter": 10, "tol": 1e-5}, set()),
    "model_stock": ("required", {"filter_wise": False}, set()),
    "nearswap": ("required", {"t": REQUIRED}, set()),
    "arcee_fusion": ("required", {}, set()),
    "sce": ("required", {"int8_mask": False, "select_topk": 1.0}, set()),
    "ram": ("required", {"epsilon": 1e-5}, set()),
    "ramplus_tl": ("required", {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}, set()),
    "passthrough": ("ignored", {"scale": None}, {"scale"}),
}
for name, normalize, rescale, more in [
    ("task_arithmetic", False, False, {}),
    ("ties", True, False, {}),
    ("dare_linear", False, True, {}),
    ("dare_ties", False, True, {}),
    ("breadcrumbs", False, False, {"gamma": 0.01}),
    ("breadcrumbs_ties", False, False, {"gamma": 0.01}),
    ("della", True, True, {"epsilon": 0.15}),
    ("della_linear", False, True, {"epsilon": 0.15}),
]:
    shared = {"lambda": 1.0, "normalize": normalize, "rescale": rescale, "int8_mask": False}
    own = {"weight": REQUIRED, "density": 1.0, **more}
    FROM_NOTES[name] = ("required", {**own, **shared}, set(own))


def test_every_method_of_mergekit_is_there_with_its_parameters():
    assert {
        method.name: (
            method.base,
            {own.name: own.default for own in method.parameters},
            {own.name for own in method.parameters if own.scope != "shared"},
        )
        for method in MERGE_METHODS.values()
    } == FROM_NOTES


def values_for(method, count: int) -> dict:
    """Any values, one for each input where the method has it so."""
    found = {}
    for own in method.parameters:
        value = own.default if own.default is not REQUIRED else 0.5
        if own.name == "density":
            value = 0.5
        found[own.name] = value if own.scope == "shared" else [value] * count
    return found


@pytest.mark.parametrize("name", [name for name in MERGE_METHODS if name != "passthrough"])
def test_every_option_is_one_of_our_method(name):
    method = get_merge_method(name)
    ours = get_method(method.combination_type)
    count = 2 if method.most is None else method.most
    options = method.options(values_for(method, count), method.base == "required")
    try:
        ours.check(options, count + method.base_is_first)
    except CombinationError as error:
        pytest.fail(str(error))
    # Nothing is left to a default, which is PEFT's or the paper's.
    assert set(ours.options) == set(options)


def options_of(name: str, base: bool = True, **values: object) -> dict:
    method = get_merge_method(name)
    return method.options({**values_for(method, 2), **values}, base)


@pytest.mark.parametrize("name", ["ties", "dare_ties", "breadcrumbs_ties", "della"])
@pytest.mark.parametrize(("normalize", "divisor"), [(True, "weights"), (False, "none")])
def test_mergekit_elects_signs_by_weighted_deltas_and_divides_by_the_weights(
    name, normalize, divisor
):
    options = options_of(name, normalize=normalize, **{"lambda": 0.5})
    assert options["majority_sign_method"] == "total"
    assert (options["vote"], options["divisor"]) == ("weighted", divisor)
    assert options["lambda_"] == 0.5


@pytest.mark.parametrize(
    "name",
    [
        "ties",
        "dare_linear",
        "dare_ties",
        "breadcrumbs",
        "breadcrumbs_ties",
        "della",
        "della_linear",
    ],
)
def test_mergekit_rescales_to_the_l1_norm_or_not_at_all(name):
    assert options_of(name, rescale=True)["rescale"] == "l1"
    assert options_of(name, rescale=False)["rescale"] == "none"
    assert options_of(name, density=[0.3, 0.6])["density"] == [0.3, 0.6]


@pytest.mark.parametrize("name", ["task_arithmetic", "dare_linear", "breadcrumbs", "della_linear"])
def test_weights_that_sum_to_zero_divide_nothing(name):
    assert options_of(name, normalize=True, weight=[1.0, -0.5])["normalize"] is True
    assert options_of(name, normalize=True, weight=[1.0, -1.0])["normalize"] is False
    assert options_of(name, normalize=False)["normalize"] is False


def test_mergekits_ties_keeps_an_entry_unless_the_density_is_zero():
    assert options_of("ties", density=[0.001, 1.0])["least"] == 1
    assert options_of("ties", density=[0.5, 0.0])["least"] == 0


def test_methods_on_deltas_or_not_by_whether_there_is_a_base():
    assert options_of("nuslerp", base=True)["on_deltas"] is True
    assert options_of("multislerp", base=False)["on_deltas"] is False
    assert options_of("model_stock") == {"filter_wise": False, "eps": 1e-6}
    assert options_of("sce", select_topk=0.8)["floor"] == 1e-6
    assert options_of("linear", base=False) == {"normalize": True, "lambda_": 1.0}


@pytest.mark.parametrize(
    ("density", "epsilon", "fits"),
    [
        (0.5, 0.15, True),
        (0.85, 0.15, False),
        (0.15, 0.15, False),
        (1.0, 0.15, True),
        (0.0, 1, True),
    ],
)
def test_della_needs_probabilities(density, epsilon, fits):
    values = {"density": [density, 0.5], "epsilon": [epsilon, 0.1]}
    if fits:
        assert options_of("della", **values)["epsilon"] == [epsilon, 0.1]
    else:
        with pytest.raises(RecipeError, match=f"density is {density:g}, epsilon {epsilon:g}"):
            options_of("della_linear", **values)
